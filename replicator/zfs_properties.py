"""Which properties of a ZFS dataset a replica takes over from its source, and which it never has from anybody.

A stream of ours carries no properties. What a source has set of :data:`TAKEN_OVER` travels beside it, and the node that
receives decides (``override`` and ``exclude`` of its storage). All others are the receiver's own affair: they decide
about its space, its devices, its mounts and what is shared from it.

=====================  =============================================================================================
taken over             why
=====================  =============================================================================================
compression            blocks arrive as the source compressed them; after a failover, new ones should be the same
recordsize             the application's block size; a database on the copy would suffer from another
atime, relatime        what programs see of access times
xattr                  where extended attributes are kept; ACLs of a restored system depend on it
acltype, aclinherit,   who may read and write the files once the copy is used
aclmode
dnodesize              goes with xattr=sa
=====================  =============================================================================================

=====================  =============================================================================================
not taken over         why
=====================  =============================================================================================
volsize, volblocksize  are in every stream, changes included; so are case sensitivity, normalization and utf8only
mountpoint, canmount,  a source could mount its data over the receiver's own, or have it shared from there
sharenfs, sharesmb
exec, setuid, devices  a source could bring programs that run with the receiver's rights
readonly               a replica is always on
quota, refquota,       the receiver keeps more snapshots than the source: a quota would stop replication, a reservation
(ref)reservation       takes its space
copies, dedup          multiply the receiver's space or memory
checksum, sync,        how safely and how fast the receiver's disks work is for who owns them
redundant_metadata,
logbias, caches,
special_small_blocks
volmode, snapdev       which devices appear on the receiver (LVM and multipath look into them)
encryption, key*       raw streams bring their own; what arrives plain is encrypted as the receiver's parent dataset is
user properties        programs act on them (auto-snapshot), on the wrong node
=====================  =============================================================================================
"""

from __future__ import annotations

TAKEN_OVER = (
    "compression",
    "recordsize",
    "atime",
    "relatime",
    "xattr",
    "acltype",
    "aclinherit",
    "aclmode",
    "dnodesize",
)
"""In the order in which they are set."""
FOR_ZVOLS = frozenset({"compression"})
"""Those of them that a zvol has."""
FILESYSTEMS_ONLY = frozenset(
    {
        "aclinherit", "aclmode", "acltype", "atime", "devices", "dnodesize", "exec", "filesystem_limit", "mountpoint",
        "nbmand", "overlay", "quota", "recordsize", "refquota", "relatime", "setuid", "sharenfs", "sharesmb", "snapdir",
        "special_small_blocks", "vscan", "xattr", "zoned",
    }
)  # fmt: skip
"""Properties that a zvol does not have (zfsprops(7))."""
ZVOLS_ONLY = frozenset({"snapdev", "volmode", "volthreading"})
"""Properties that only a zvol makes use of."""
RESERVED = {
    "readonly": "a replica is always readonly=on",
    "canmount": "a replica is always canmount=noauto",
    "origin": "what a replica is a clone of follows its source",
    "encryption": "what arrives plain is encrypted as the storage's root is, raw streams as they are",
    "keyformat": "raw streams bring their own",
    "keylocation": "raw streams bring their own",
    "pbkdf2iters": "raw streams bring their own",
    "volsize": "it is the source's",
    "volblocksize": "it is the source's",
    "casesensitivity": "it is the source's",
    "normalization": "it is the source's",
    "utf8only": "it is the source's",
}
"""What a receiver cannot override, and why."""
