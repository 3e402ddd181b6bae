"""Writes a block stream into an image file, several chunks at a time, and records how far it is durable."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from pathlib import Path

from backends.chunks import runs
from backends.image.durable import Files
from backends.image.kept_digests import block_count
from backends.image.records import encode_progress
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.errors import ChecksumMismatch, ProtocolError
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, DIGEST_SIZE, MAX_EXTENTS, BlockChunk, Chunk

CHECKPOINT_BYTES = 64 << 20
CHECKPOINT_SECONDS = 2.0
_WINDOW = 8
"""Chunks being verified and written at a time, at most."""
_POLL = 0.5
"""Seconds between two looks at whether to stop, while writes are under way."""


@dataclass(frozen=True, slots=True)
class Target:
    """The file that is written.

    :ivar size: of the version being received
    :ivar empty: it is one hole, so zeros need not be made
    :ivar progress: path of the record of what is durable
    """

    fd: int
    size: int
    empty: bool
    progress: Path
    label: str


class TouchedBlocks:
    """Which digest blocks of an image were written to: one byte for each 64 KiB, 16 MiB for 1 TiB."""

    def __init__(self, size: int) -> None:
        self._touched = bytearray(block_count(size))

    def add(self, offset: int, length: int) -> None:
        """The blocks that the range is in. Threads may add at the same time."""
        first, end = offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)
        end = min(end, len(self._touched))
        self._touched[first:end] = b"\1" * max(0, end - first)

    def __call__(self, block: int) -> bool:
        return bool(self._touched[block])


class ChunkWriter:
    """Applies the chunks of one stream.

    A chunk is verified and written by a worker, so several are under way. ``prefix`` is the offset below which every
    chunk was written; a checkpoint syncs the file in a worker and only then records the prefix as it was before the
    sync. So the record never says more than the disk has, and the stream does not wait for it.
    """

    def __init__(
        self,
        target: Target,
        files: Files,
        checksums: Checksums,
        key: bytes,
        *,
        start: int,
        workers: int,
        touched: TouchedBlocks | None,
    ) -> None:
        self._target = target
        self._files = files
        self._checksums = checksums
        self._key = key
        self._touched = touched
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="image-write")
        self._window: deque[tuple[Future[None], int, int]] = deque()
        self._last_end = start
        self._prefix = start
        self._durable = start
        self._unsaved = 0
        self._saved_at = time.monotonic()
        self._saving: Future[None] | None = None

    def run(self, stream: Iterable[Chunk], cancel: Cancellation) -> None:
        """Apply the whole stream. On any error what was written in order is made durable and recorded first.

        :raises ChecksumMismatch: a block is not what its digest says; it was not written
        :raises ProtocolError: a chunk breaks the rules of :class:`~replicator.streams.BlockChunk`
        """
        try:
            for chunk in stream:
                cancel.check()
                self._submit(self._checked(chunk))
                self._collect(_WINDOW - 1, cancel)
                self._checkpoint_if_due()
            self._collect(0, cancel)
            self._finish_saving()
        except BaseException:
            self._save_what_is_there()
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- one chunk

    def _checked(self, chunk: Chunk) -> BlockChunk:
        """The chunk, if every number in it is within bounds."""
        if not isinstance(chunk, BlockChunk):
            raise self._broken("a native chunk in a block stream")
        if not 1 <= len(chunk.extents) <= MAX_EXTENTS:
            raise self._broken(f"a chunk of {len(chunk.extents)} extents")
        size = pieces = 0
        end = self._last_end
        for extent in chunk.extents:
            if extent.length <= 0 or extent.offset < end or extent.end > self._target.size:
                raise self._broken(
                    f"an extent of {extent.length} bytes at {extent.offset}, after {end}, "
                    f"in an image of {self._target.size} bytes"
                )
            end = extent.end
            if not extent.zero:
                size += extent.length
                pieces += -(-extent.length // BLOCK_SIZE)
        if size != len(chunk.data) or size > CHUNK_SIZE or len(chunk.digests) != pieces * DIGEST_SIZE:
            raise self._broken(f"{len(chunk.data)} bytes and {len(chunk.digests)} of digests for extents of {size}")
        self._last_end = end
        return chunk

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"the stream for {self._target.label} has {what}", hint="both nodes must run the same version"
        )

    def _submit(self, chunk: BlockChunk) -> None:
        self._window.append((self._pool.submit(self._apply, chunk), chunk.end, chunk.length))

    def _apply(self, chunk: BlockChunk) -> None:
        try:
            view = memoryview(chunk.data)
            self._verify(chunk, view)
            for offset, length, start in runs(chunk.extents):
                if start is not None:
                    self._files.write_at(self._target.fd, view[start : start + length], offset)
                elif not self._target.empty:
                    self._files.zero(self._target.fd, offset, length)
                if self._touched is not None:
                    self._touched.add(offset, length)
        finally:
            chunk.release()

    def _verify(self, chunk: BlockChunk, view: memoryview) -> None:
        position = digest = 0
        for extent in chunk.extents:
            if extent.zero:
                continue
            found = self._checksums.digest_blocks(
                view[position : position + extent.length], self._key, block_size=BLOCK_SIZE
            )
            if found != chunk.digests[digest : digest + len(found)]:
                raise ChecksumMismatch(
                    f"bytes {extent.offset} to {extent.end - 1} of {self._target.label} were damaged on their way",
                    hint="they were not written; the next run continues here. If it happens again, check memory and "
                    "network cards of both nodes",
                )
            position += extent.length
            digest += len(found)

    # -- how far it is

    def _collect(self, keep: int, cancel: Cancellation) -> None:
        """Wait until at most ``keep`` chunks are under way. :raises: the first error of a chunk"""
        while self._window and (len(self._window) > keep or self._window[0][0].done()):
            done, end, length = self._window[0]
            try:
                done.result(_POLL)
            except WaitTimeout:
                if not done.done():
                    cancel.check()
                    continue
                raise
            self._window.popleft()
            self._prefix = end
            self._unsaved += length

    def _checkpoint_if_due(self) -> None:
        if self._saving is not None:
            if not self._saving.done():
                return
            self._finish_saving()
        now = time.monotonic()
        if self._unsaved >= CHECKPOINT_BYTES or (self._unsaved and now - self._saved_at >= CHECKPOINT_SECONDS):
            self._saved_at, self._unsaved = now, 0
            self._saving = self._pool.submit(self._save, self._prefix)

    def _save(self, prefix: int) -> None:
        """Every write below ``prefix`` returned before this was called, so the sync covers them all."""
        self._files.sync_data(self._target.fd)
        self._files.replace(self._target.progress, encode_progress(prefix))
        self._durable = prefix

    def _finish_saving(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def _save_what_is_there(self) -> None:
        """Best effort: the older record stays true whatever happens here.

        Not after a sync that failed: the kernel reports lost writes once, so a later sync that succeeds proves
        nothing (https://wiki.postgresql.org/wiki/Fsync_Errors).
        """
        for done, _, _ in self._window:
            with contextlib.suppress(Exception):
                done.result()
        while self._window and self._window[0][0].exception() is None:
            self._prefix = self._window.popleft()[1]
        try:
            self._finish_saving()
        except Exception:  # noqa: BLE001 - the error that is being raised already is the one to report
            return
        if self._prefix > self._durable:
            with contextlib.suppress(OSError):
                self._save(self._prefix)


def close_quietly(fd: int) -> None:
    """Close a descriptor whose contents were synced, or do not matter."""
    with contextlib.suppress(OSError):
        os.close(fd)
