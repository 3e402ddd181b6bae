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
_MAGIC = 0x2F5BACBAC
_COMPOUND = 2
_RAW = 1 << 24
_RESUMING = 1 << 20
_ZVOL = 3


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a stream says of itself.

    :ivar compound: a package of several streams (zfs send -I); the guids are in the inner ones then
    :ivar to_guid: the snapshot that it brings
    :ivar base_guid: what it applies to, None for a full one
    """

    compound: bool
    raw: bool
    resuming: bool
    is_zvol: bool
    to_guid: str
    base_guid: str | None


def read_head(data: bytes | bytearray | memoryview) -> StreamHead:
    """The head of a stream that begins with ``data``. :raises ProtocolError: it is no send stream"""
    view = memoryview(data)
    if len(view) < RECORD_SIZE:
        raise _bad(f"it has only {len(view)} bytes")
    for order in "<>":
        kind, _, magic, version, _, object_type, _, to_guid, from_guid = struct.unpack_from(f"{order}IIQQQIIQQ", view)
        if magic == _MAGIC and kind == 0:
            features = (version >> 2) & 0x3FFF_FFFF
            return StreamHead(
                version & 3 == _COMPOUND,
                bool(features & _RAW),
                bool(features & _RESUMING),
                object_type == _ZVOL,
                str(to_guid),
                str(from_guid) if from_guid else None,
            )
    raise _bad("it does not begin as one")


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"what arrived is no ZFS send stream: {why}", hint="both nodes must run the same version")
