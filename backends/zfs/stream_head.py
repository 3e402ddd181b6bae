"""Reads the first record of a send stream, so that nothing is received that was not asked for.

Layout: ``dmu_replay_record_t`` and ``struct drr_begin`` in ``include/sys/zfs_ioctl.h`` of OpenZFS. A stream is
written in the byte order of the machine that made it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from backends.zfs.nvlists import Value, unpack
from replicator.errors import ProtocolError

RECORD_SIZE = 312
"""Bytes of a record without its payload."""
MAX_HEAD = 64 << 20
"""Bytes of a head with its payload: a package of datasets (zfs send -R, -p) names each of its snapshots there."""
_MAGIC = 0x2F5BACBAC
_COMPOUND = 2
_RAW = 1 << 24
_RESUMING = 1 << 20
_REDACTED = 1 << 21
_HOLDS = 1 << 26
_ZVOL = 3
_BESIDES = ("props", "snapprops", "snapholds")
"""What the list of a package may have of each dataset beside its snapshots."""


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a stream says of itself.

    :ivar compound: a package of several streams (zfs send -I); the rest is what its first one says
    :ivar contents: what a package says that it has in it; "" for the plain sequence of snapshots that zfs send -I makes
    :ivar redacted: whether it leaves out data (zfs send --redact)
    :ivar holds: whether it brings holds (zfs send -h)
    :ivar to_guid: the snapshot that it brings
    :ivar base_guid: what it applies to, None for a full one
    """

    compound: bool
    raw: bool
    resuming: bool
    is_zvol: bool
    to_guid: str
    base_guid: str | None
    contents: str = ""
    redacted: bool = False
    holds: bool = False


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
    features = (version >> 2) & 0x3FFF_FFFF
    if version & 3 == _COMPOUND:
        end = RECORD_SIZE + payload
        contents = _package(bytes(view[RECORD_SIZE:end]))
        first = read_head(view[end + RECORD_SIZE :])
        if first.compound:
            raise _bad("it is a package in a package")
        holds = first.holds or bool(features & _HOLDS)
        return replace(first, compound=True, contents=contents, holds=holds)
    return StreamHead(
        False,
        bool(features & _RAW),
        bool(features & _RESUMING),
        object_type == _ZVOL,
        str(to_guid),
        str(from_guid) if from_guid else None,
        redacted=bool(features & _REDACTED),
        holds=bool(features & _HOLDS),
    )


def _package(payload: bytes) -> str:
    """What the head of a package says that it has beside the snapshots of one dataset, for people
    (``send_iterate_fs`` in ``lib/libzfs/libzfs_sendrecv.c``). That of ``zfs send -I`` alone says nothing or, of a raw
    one, what the dataset is: it is just one stream after the other."""
    if not payload:
        return ""
    found = unpack(payload).get("fss")
    if not isinstance(found, dict):
        return "contents that it does not list"
    datasets = [value for value in found.values() if isinstance(value, dict)]
    brought = [key for key in _BESIDES if any(_says_something(value.get(key)) for value in datasets)]
    if len(datasets) == 1 and not brought:
        return ""
    return " and ".join((f"{len(datasets)} dataset{'' if len(datasets) == 1 else 's'}", *brought))


def _says_something(value: Value) -> bool:
    """Whether there is anything in lists of lists."""
    if isinstance(value, dict):
        return any(_says_something(inner) for inner in value.values())
    return value is not None


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"what arrived is no ZFS send stream: {why}", hint="both nodes must run the same version")
