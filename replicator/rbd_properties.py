"""What a replica of an RBD image takes over from its source beside the data, and what it never has from anybody.

All of it travels beside the stream, and the node that receives decides. Data is right whatever comes of it: what a
cluster cannot do is left out, and told.

======================  ============================================================================================
taken over              why
======================  ============================================================================================
order                   the size of objects, as a power of two
stripe_unit,            how data is spread over objects
stripe_count
deep_flatten            whether flattening also parts an image's snapshots from what it is a clone of
data_pool               where objects are, by the pool's name, if this cluster has a pool of that name that the user may
                        write to; unless the receiving storage says which (``data_pool``)
meta:KEY                of the image's metadata: what people note (:data:`NOTES`), and nothing that a program acts on
======================  ============================================================================================

The first four are fixed when an image is made, so a replica keeps what it was made with.

======================  ============================================================================================
not taken over          why
======================  ============================================================================================
layering, object-map,   a replica always has them: changes are found by them, writers are kept out, what is held is
fast-diff,              protected
exclusive-lock
journaling, mirroring   the receiver's own affair: they multiply writes, or have another program write to the image
conf_*                  settings of every client that opens the image, the receive itself included: its limits
                        (``conf_rbd_qos_…``) would hold replication back, its caches decide what is durable
keys of encryption      (``rbd.csi.ceph.com/…``) the receiver gets ciphertext, and not what opens it
other metadata          programs act on it, on the wrong cluster; a family's own ``replicator.…`` is made anew
======================  ============================================================================================
"""

from __future__ import annotations

ORDER = "order"
STRIPE_UNIT = "stripe_unit"
STRIPE_COUNT = "stripe_count"
DEEP_FLATTEN = "deep_flatten"
DATA_POOL = "data_pool"
META = "meta:"
"""Before the key of an entry of the image's metadata."""
NOTES = frozenset({"comment", "contact", "description", "label", "owner", "title"})
NOTE_PREFIXES = ("label.", "user.")
"""Which entries those are: by name, or by how it begins."""
MAX_NOTES = 32
MAX_NOTE = 4096
"""Entries of one image, and characters in one value; what is more stays where it is."""
