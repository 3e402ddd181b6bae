"""What the storages need of the checksum path, so that they need not know who provides it.

``transport.checksum`` (the module itself) has these functions; the daemon and the tests hand it to the backends.
"""

from __future__ import annotations

from typing import Protocol

from replicator.streams import Buffer


class Checksums(Protocol):
    """Keyed BLAKE3 of blocks; see :mod:`transport.checksum` for each function's contract."""

    def digest_blocks(self, data: Buffer, key: Buffer, *, block_size: int = ...) -> bytes:
        """The digests, ``DIGEST_SIZE`` bytes each, of the blocks of ``data``; the last block may be short."""

    def digest_blocks_into(
        self, data: Buffer, key: Buffer, digests: Buffer, zeros: Buffer | None, *, block_size: int = ...
    ) -> int:
        """The same into ``digests``; ``zeros`` gets 1 for each block of zeros and 0 for others. Returns the blocks."""

    def zero_map(self, data: Buffer, zeros: Buffer, *, block_size: int = ...) -> int:
        """Write 1 into ``zeros`` for each block of zeros and 0 for others. Returns the blocks."""

    def keyed_digest(self, key: Buffer, *parts: Buffer) -> bytes:
        """The keyed digest, 32 bytes, of ``parts`` one after the other."""

    def differing_blocks(self, ours: Buffer, theirs: Buffer) -> list[int]:
        """The indexes, ascending, at which two arrays of digests differ."""
