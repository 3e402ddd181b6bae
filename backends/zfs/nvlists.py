"""Reads packed nvlists: in native encoding, as resume tokens have them, and in XDR, as the heads of send streams do.

Format: ``module/nvpair/nvpair.c`` (nvs_native_*, nvs_xdr_*) and ``include/sys/nvpair.h`` of OpenZFS. What is read may
come from a peer, so every length is checked, and depth and size are bounded.
"""

from __future__ import annotations

import struct

from replicator.errors import ProtocolError

MAX_DEPTH = 8
_NATIVE = 0
_XDR = 1
_PAIR = struct.Struct("<ihhii")
"""Of the native encoding: size of the pair, size of its name with the final zero, reserved, elements, type."""

_BOOLEAN = 1
_UINT64 = 8
_STRING = 9
_UINT64_ARRAY = 16
_NVLIST = 19
_BOOLEAN_VALUE = 21

Value = bool | int | str | tuple[int, ...] | dict[str, "Value"] | None
"""None for what has a type that is not read here."""


def unpack(data: bytes) -> dict[str, Value]:
    """The pairs of a packed nvlist. :raises ProtocolError: it is not one"""
    try:
        if data[0] == _NATIVE:
            return _native(data)
        if data[0] == _XDR:
            return _list(data, 4, 0)[0]
    except (struct.error, UnicodeDecodeError, IndexError):
        raise _bad("is cut short") from None
    raise _bad("is in an unknown encoding")


def _native(data: bytes) -> dict[str, Value]:
    """A flat one, as written by a little-endian machine: the only kind that runs Debian's OpenZFS packages on a server.
    What is nested in it has the value None."""
    if data[1] != 1:
        raise _bad("was written by a big-endian machine")
    at = 12  # encoding and byte order, version, flags
    pairs: dict[str, Value] = {}
    while True:
        (size,) = struct.unpack_from("<i", data, at)
        if size == 0:
            return pairs
        _, name_size, _, _, kind = _PAIR.unpack_from(data, at)
        value = at + (_PAIR.size + name_size + 7) // 8 * 8
        end = at + size
        if name_size < 1 or not value <= end <= len(data):
            raise _bad("has a pair of impossible length")
        name = data[at + _PAIR.size : at + _PAIR.size + name_size - 1].decode("utf-8")
        _check_new(name, pairs)
        if kind == _UINT64:
            pairs[name] = int(struct.unpack_from("<Q", data[:end], value)[0])
        elif kind == _STRING:
            pairs[name] = data[value:end].partition(b"\0")[0].decode("utf-8")
        elif kind == _BOOLEAN_VALUE:
            pairs[name] = bool(struct.unpack_from("<I", data[:end], value)[0])
        else:
            pairs[name] = True if kind == _BOOLEAN else None
        at = end


def _list(data: bytes, at: int, depth: int) -> tuple[dict[str, Value], int]:
    if depth > MAX_DEPTH:
        raise _bad("is nested too deep")
    at += 8  # version and flags
    pairs: dict[str, Value] = {}
    while True:
        size, decoded = struct.unpack_from(">II", data, at)
        if size == 0 and decoded == 0:
            return pairs, at + 8
        end = at + size
        if size < 20 or end > len(data):
            raise _bad("has a pair of impossible length")
        name, place = _string(data, at + 8, end)
        _check_new(name, pairs)
        kind, count = struct.unpack_from(">II", data, place)
        pairs[name] = _value(data[:end], place + 8, kind, count, depth)
        at = end


def _check_new(name: str, pairs: dict[str, Value]) -> None:
    """Which of two of a name counts, we and ZFS might see differently."""
    if name in pairs:
        raise _bad(f"has two values called {name[:40]!r}")


def _string(data: bytes, at: int, end: int) -> tuple[str, int]:
    (length,) = struct.unpack_from(">I", data, at)
    if at + 4 + length > end:
        raise _bad("has a text of impossible length")
    return data[at + 4 : at + 4 + length].decode("utf-8"), at + 4 + (length + 3) // 4 * 4


def _value(data: bytes, at: int, kind: int, count: int, depth: int) -> Value:
    if kind == _BOOLEAN:
        return True
    if kind == _BOOLEAN_VALUE:
        return bool(struct.unpack_from(">I", data, at)[0])
    if kind == _UINT64:
        return int(struct.unpack_from(">Q", data, at)[0])
    if kind == _STRING:
        return _string(data, at, len(data))[0]
    if kind == _UINT64_ARRAY:
        if count > (len(data) - at) // 8:
            raise _bad("has an array of impossible length")
        return tuple(struct.unpack_from(f">{count}Q", data, at))
    if kind == _NVLIST:
        return _list(data, at, depth + 1)[0]
    return None


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"a packed nvlist {why}", hint="both nodes must run OpenZFS 2.1 or newer")
