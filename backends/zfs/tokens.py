"""Reads resume tokens: what was being received when a receive was interrupted.

A token is ``1-CHECKSUM-LENGTH-DATA`` in hex: a packed nvlist, compressed by zlib, with the first word of its fletcher-4
checksum (``zfs_send_resume_token_to_nvlist`` in ``lib/libzfs/libzfs_sendrecv.c``, ``get_receive_resume_token_impl``
in ``module/zfs/dsl_dataset.c`` of OpenZFS).
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from backends.zfs.nvlists import unpack
from replicator.errors import ProtocolError, StaleResume
from replicator.model import ResumeState, StreamKind

MAX_TOKEN = 32 * 1024
"""Characters."""
_MAX_PACKED = 64 * 1024
RAW = "rawok"
COMPRESSED = "compressok"
FLAGS = frozenset({RAW, COMPRESSED, "largeblockok", "embedok"})
"""What a token of a stream of ours can have beside the six values that all have. The receiving kernel notes what the
stream's head says (``dmu_recv_begin_sync`` in ``module/zfs/dmu_recv.c``), and that names large and embedded blocks only
where there may be some, but always compression (``setup_featureflags`` in ``module/zfs/dmu_send.c``)."""
_VALUES = frozenset({"fromguid", "object", "offset", "bytes", "toguid", "toname"})
_TOKEN = re.compile(r"1-([0-9a-f]{1,16})-([0-9a-f]{1,8})-((?:[0-9a-f]{2})+)")


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """What a token says.

    :ivar text: the token itself
    :ivar to_guid: snapshot that was being received
    :ivar dataset: the source
    :ivar to_name: the snapshot's name there
    :ivar base_guid: what the stream began from, None for a full one
    :ivar received: bytes of the stream that arrived
    :ivar flags: what zfs send -t takes from it as options, by mere presence: see :data:`FLAGS`
    """

    text: str
    to_guid: str
    dataset: str
    to_name: str
    base_guid: str | None
    received: int
    flags: frozenset[str]

    @property
    def resume(self) -> ResumeState:
        """As planning needs it."""
        return ResumeState(StreamKind.NATIVE, self.to_guid, self.to_name, self.base_guid, self.received, self.text)


def read_token(text: str) -> ResumeToken:
    """Decode and check a token, which may come from a peer. :raises StaleResume: it is none"""
    match = _TOKEN.fullmatch(text) if len(text) <= MAX_TOKEN else None
    if match is None:
        raise _bad("has not the form of one")
    packed = bytes.fromhex(match[3])
    if _fletcher4(packed) != int(match[1], 16):
        raise _bad("has a wrong checksum")
    length = int(match[2], 16)
    if not 0 < length <= _MAX_PACKED:
        raise _bad(f"has {length} bytes")
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(packed, length)
    except zlib.error:
        raise _bad("cannot be decompressed") from None
    if len(data) != length:
        raise _bad("has another length than it tells")
    try:
        values = unpack(data)
    except ProtocolError as error:
        raise _bad(str(error)) from None
    to_guid, to_name = values.get("toguid"), values.get("toname")
    from_guid, received = values.get("fromguid"), values.get("bytes", 0)
    if not isinstance(to_guid, int) or not isinstance(to_name, str) or not isinstance(received, int):
        raise _bad("does not say what was being received")
    base = str(from_guid) if isinstance(from_guid, int) and from_guid else None
    dataset, _, name = to_name.partition("@")
    flags = frozenset(values) - _VALUES
    return ResumeToken(text, str(to_guid), dataset, name or to_name, base, received, flags)


def _fletcher4(data: bytes) -> int:
    """The first word of the checksum: the sum of the little-endian 32-bit words; a shorter rest is left out."""
    words: tuple[int, ...] = struct.unpack_from(f"<{len(data) // 4}I", data)
    return sum(words) & 0xFFFF_FFFF_FFFF_FFFF


def _bad(why: str) -> StaleResume:
    return StaleResume(
        f"the resume token {why}", hint="the next run discards what was received and sends the snapshot from the start"
    )
