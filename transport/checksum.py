"""Checksums of the data path: CRC32C, keyed BLAKE3 of blocks, and zero detection.

CRC32C finds accidental damage in flight and nothing else. Whether two blocks are equal is decided by keyed BLAKE3,
because guests choose what is on their disks and could make a CRC, or a fast hash whose seed they can guess, collide.
A key is 32 random bytes, fresh for each session and known to its two ends only.

Everything here takes any contiguous buffer (bytes, bytearray, memoryview, mmap, array), lets other threads run while
it works on large ones, and picks the fastest implementation that the processor has. ``implementation`` names another
one of :func:`implementations`; all give the same results.

CRC32C is that of RFC 3720 (iSCSI), appendix B.4; BLAKE3 is that of https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from transport import _checksum
from transport._checksum import cpu_features, crc32c, implementations, is_zero

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCK_SIZE",
    "BLOCK_SIZE_MAX",
    "DIGEST_SIZE",
    "KEYED_DIGEST_SIZE",
    "KEY_SIZE",
    "block_count",
    "cpu_features",
    "crc32c",
    "differing_blocks",
    "digest_blocks",
    "digest_blocks_into",
    "implementations",
    "is_zero",
    "keyed_digest",
    "new_key",
    "zero_map",
]

BLOCK_SIZE = 64 * 1024
"""Bytes of a block where nothing else is said."""

BLOCK_SIZE_MAX = 16 * 1024 * 1024
"""Bytes of the largest block that can be digested."""

DIGEST_SIZE = 16
"""Bytes kept of a block's digest: 128 bits, far more than chance needs, and its key stops intent."""

KEYED_DIGEST_SIZE = 32
"""Bytes of :func:`keyed_digest`: BLAKE3's full digest."""

KEY_SIZE = 32
"""Bytes of a BLAKE3 key."""


def new_key() -> bytes:
    """Return a random key of :data:`KEY_SIZE` bytes. It must reach the other end inside TLS only."""
    return secrets.token_bytes(KEY_SIZE)


def block_count(length: int, block_size: int = BLOCK_SIZE) -> int:
    """Return the number of blocks in ``length`` bytes, a short last one included."""
    return -(-length // block_size)


def digest_blocks(
    data: Buffer,
    key: Buffer,
    *,
    block_size: int = BLOCK_SIZE,
    digest_size: int = DIGEST_SIZE,
    implementation: str | None = None,
) -> bytes:
    """Return the keyed BLAKE3 digests of the blocks of ``data``, one after the other.

    Block i is ``data[i * block_size : (i + 1) * block_size]``; the last may be shorter; no data has no blocks. The
    first ``digest_size`` (16 to 32) bytes of each digest are kept.

    Raises ValueError if the key has not 32 bytes, or a size is out of range.
    """
    view = memoryview(data)
    # Sizes out of range are refused below, in the same words as everywhere.
    digests = bytearray(block_count(view.nbytes, max(block_size, 1)) * max(digest_size, 0))
    _checksum.digest_blocks_into(view, key, digests, None, block_size, digest_size, implementation)
    return bytes(digests)


def digest_blocks_into(
    data: Buffer,
    key: Buffer,
    digests: Buffer,
    zeros: Buffer | None,
    *,
    block_size: int = BLOCK_SIZE,
    digest_size: int = DIGEST_SIZE,
    implementation: str | None = None,
) -> int:
    """Write the digests of the blocks of ``data`` into ``digests``, and return the number of blocks.

    As :func:`digest_blocks`, but into a writable buffer of at least ``digest_size`` bytes a block. If ``zeros`` is
    given, a writable buffer of at least one byte a block, it gets 1 for each block of nothing but zeros and 0 for each
    other; what lies behind the last block is left alone in both.

    Raises ValueError if the key has not 32 bytes, a size is out of range, an output is too small or shares memory with
    ``data``; BufferError if an output is read-only or a buffer is not contiguous.
    """
    return _checksum.digest_blocks_into(data, key, digests, zeros, block_size, digest_size, implementation)


def keyed_digest(key: Buffer, *parts: Buffer, implementation: str | None = None) -> bytes:
    """Return the keyed BLAKE3 digest, 32 bytes, of ``parts`` one after the other.

    Several parts are copied together first, so give large data as one. Where parts ends is not part of the
    digest: give them fixed lengths, or put their lengths in.

    Raises ValueError if the key has not 32 bytes.
    """
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return _checksum.keyed_digest(key, data, implementation)


def zero_map(data: Buffer, zeros: Buffer, *, block_size: int = BLOCK_SIZE, implementation: str | None = None) -> int:
    """Write 1 for each block of nothing but zeros and 0 for each other into ``zeros``; return the number of blocks.

    Raises ValueError if ``block_size`` is out of range, or ``zeros`` has fewer bytes than ``data`` has blocks or shares
    memory with it; BufferError if ``zeros`` is read-only or a buffer is not contiguous.
    """
    return _checksum.zero_map(data, block_size, zeros, implementation)


def differing_blocks(ours: Buffer, theirs: Buffer, *, digest_size: int = DIGEST_SIZE) -> list[int]:
    """Return the indexes, ascending, at which two arrays of digests differ.

    Blocks that only the longer of the two has are among them.

    Raises ValueError if either is not a whole number of digests.
    """
    return _checksum.differing_blocks(ours, theirs, digest_size)
