"""Reads packed nvlists in native encoding, as resume tokens have them.

Format: ``module/nvpair/nvpair.c`` (nvs_native_*) and ``include/sys/nvpair.h`` of OpenZFS. What is read may come from a
peer, so every length is checked.
"""

from __future__ import annotations

import struct

from replicator.errors import ProtocolError

_NATIVE = 0
_PAIR = struct.Struct("<ihhii")
"""Of the native encoding: size of the pair, size of its name with the final zero, reserved, elements, type."""

_BOOLEAN = 1
_UINT64 = 8
_STRING = 9
_BOOLEAN_VALUE = 21

Value = bool | int | str | None
"""None for what has a type that is not read here."""


def unpack(data: bytes) -> dict[str, Value]:
    """The pairs of a packed nvlist. :raises ProtocolError: it is not one"""
    try:
        if data[0] == _NATIVE:
            return _native(data)
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


def _check_new(name: str, pairs: dict[str, Value]) -> None:
    """Which of two of a name counts, we and ZFS might see differently."""
    if name in pairs:
        raise _bad(f"has two values called {name[:40]!r}")


def _bad(why: str) -> ProtocolError:
    return ProtocolError(f"a packed nvlist {why}", hint="both nodes must run OpenZFS 2.1 or newer")
