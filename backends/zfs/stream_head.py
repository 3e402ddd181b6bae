"""Reads the first record of a send stream, so that nothing is received that was not asked for.

Layout: ``dmu_replay_record_t`` and ``struct drr_begin`` in ``include/sys/zfs_ioctl.h`` of OpenZFS. A stream is
written in the byte order of the machine that made it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from replicator.errors import ProtocolError

RECORD_SIZE = 312
"""Bytes of a record without its payload."""
_HEAD = "IIQQQIIQQ256s"
_MAGIC = 0x2F5BACBAC
_ONE_STREAM = 1
_RAW = 1 << 24
_RESUMING = 1 << 20
_REDACTED = 1 << 21
_HOLDS = 1 << 26
_ZVOL = 3


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a stream says of itself.

    :ivar redacted: whether it leaves out data (zfs send --redact)
    :ivar holds: whether it brings holds (zfs send -h)
    :ivar to_guid: the snapshot that it brings
    :ivar base_guid: what it applies to, None for a full one
    :ivar to_name: what the source calls the snapshot: whatever a peer says, and not checked; "" where it says nothing
    """

    raw: bool
    resuming: bool
    is_zvol: bool
    to_guid: str
    base_guid: str | None
    to_name: str = ""
    redacted: bool = False
    holds: bool = False


def read_head(data: bytes | bytearray | memoryview) -> StreamHead:
    """The head of a stream that begins with ``data``.

    :raises ProtocolError: it is not the stream of one snapshot. Packages (zfs send -I, -p, -R) are none; and for libzfs
        all is a package that does not say that it is one stream
    """
    view = memoryview(data)
    if len(view) < RECORD_SIZE:
        raise _bad(f"it has only {len(view)} bytes")
    for order in "<>":
        kind, _, magic, version, _, object_type, _, to_guid, from_guid, name = struct.unpack_from(order + _HEAD, view)
        if magic == _MAGIC and kind == 0:
            break
    else:
        raise _bad("it does not begin as one")
    if version & 3 != _ONE_STREAM:
        raise _bad("it is a package, and not just one snapshot")
    features = (version >> 2) & 0x3FFF_FFFF
    return StreamHead(
        bool(features & _RAW),
        bool(features & _RESUMING),
        object_type == _ZVOL,
        str(to_guid),
        str(from_guid) if from_guid else None,
        name.partition(b"\0")[0].decode("utf-8", "replace").partition("@")[2],
        redacted=bool(features & _REDACTED),
        holds=bool(features & _HOLDS),
    )


def _bad(why: str) -> ProtocolError:
    return ProtocolError(
        f"what arrived is no ZFS send stream of one snapshot: {why}", hint="both nodes must run the same version"
    )
