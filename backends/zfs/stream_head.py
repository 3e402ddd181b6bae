"""Reads the first record of a send stream, so that nothing is received that was not asked for.

Layout: ``dmu_replay_record_t`` and ``struct drr_begin`` in ``include/sys/zfs_ioctl.h`` of OpenZFS. A stream is
written in the byte order of the machine that made it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from backends.zfs.nvlists import unpack
from replicator.errors import ProtocolError

RECORD_SIZE = 312
"""Bytes of a record without its payload."""
MAX_HEAD = 64 << 20
"""Bytes of a head with its payload: a package of datasets (zfs send -R, -p) names each of its snapshots there."""
_MAGIC = 0x2F5BACBAC
_COMPOUND = 2
_RAW = 1 << 24
_RESUMING = 1 << 20
_ZVOL = 3


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a stream says of itself.

    :ivar compound: a package of several streams (zfs send -I); the rest is what its first one says
    :ivar datasets: how many datasets a package brings; 1 for a stream that is none
    :ivar with_properties: whether a package brings properties
    :ivar to_guid: the snapshot that it brings
    :ivar base_guid: what it applies to, None for a full one
    """

    compound: bool
    raw: bool
    resuming: bool
    is_zvol: bool
    to_guid: str
    base_guid: str | None
    datasets: int = 1
    with_properties: bool = False


def head_size(data: bytes | bytearray | memoryview) -> int:
    """Bytes that :func:`read_head` needs of a stream that begins with ``data``. :raises ProtocolError: too many"""
    view = memoryview(data)
    if len(view) < RECORD_SIZE:
        return RECORD_SIZE
    order = "<" if struct.unpack_from("<Q", view, 8)[0] == _MAGIC else ">"
    size = RECORD_SIZE + int(struct.unpack_from(f"{order}I", view, 4)[0])
    if size > MAX_HEAD:
        raise _bad(f"its head has {size} bytes")
    if struct.unpack_from(f"{order}Q", view, 16)[0] & 3 == _COMPOUND:
        return size + 2 * RECORD_SIZE  # the end of the package's head, and the head of its first stream
    return size


def read_head(data: bytes | bytearray | memoryview) -> StreamHead:
    """The head of a stream that begins with ``data``. :raises ProtocolError: it is no send stream"""
    view = memoryview(data)
    if len(view) < RECORD_SIZE:
        raise _bad(f"it has only {len(view)} bytes")
    for order in "<>":
        kind, payload, magic, version, _, object_type, _, to_guid, from_guid = struct.unpack_from(
            f"{order}IIQQQIIQQ", view
        )
        if magic == _MAGIC and kind == 0:
            break
    else:
        raise _bad("it does not begin as one")
    if version & 3 == _COMPOUND:
        end = RECORD_SIZE + payload
        datasets, with_properties = _package(bytes(view[RECORD_SIZE:end]))
        first = read_head(view[end + RECORD_SIZE :])
        if first.compound:
            raise _bad("it is a package in a package")
        return replace(first, compound=True, datasets=datasets, with_properties=with_properties)
    features = (version >> 2) & 0x3FFF_FFFF
    return StreamHead(
        False,
        bool(features & _RAW),
        bool(features & _RESUMING),
        object_type == _ZVOL,
        str(to_guid),
        str(from_guid) if from_guid else None,
    )


def _package(payload: bytes) -> tuple[int, bool]:
    """What the head of a package says of its contents: datasets in it, and whether any has properties
    (``send_iterate_fs`` in ``lib/libzfs/libzfs_sendrecv.c``). That of ``zfs send -I`` alone says nothing: it is just
    one stream after the other, all of one dataset."""
    if not payload:
        return 1, False
    found = unpack(payload).get("fss")
    if not isinstance(found, dict):
        raise _bad("its package does not say what is in it")
    datasets = [value for value in found.values() if isinstance(value, dict)]
    return len(datasets), any(value.get("props") for value in datasets)


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"what arrived is no ZFS send stream: {why}", hint="both nodes must run the same version")
