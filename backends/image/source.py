"""The source side: sending, estimating, digesting."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

from backends.fields import BadRecord
from backends.image import changes
from backends.image.catalog import Catalog, Snapshot
from backends.image.context import Context
from backends.image.copying import write_digests
from backends.image.extents import data_segments
from backends.image.kept_digests import DigestWriter, KeptDigests, open_digests
from backends.image.linux import fiemap
from backends.image.reading import WINDOW, Image
from backends.image.sending import ChunkReader
from backends.requests import check_digests, check_offset, opened_stream, resume_offset
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestBatch, DigestRequest, SendRequest
from replicator.errors import Unsupported
from replicator.model import VersionKind, VersionRef
from replicator.streams import BLOCK_SIZE, BlockChunk, Extent, Stream

_log = logging.getLogger(__name__)

_BATCH_WINDOWS = 16
_DIGEST_THREADS = 2


def kept_digests(
    context: Context, catalog: Catalog, snapshot: Snapshot, cancel: Cancellation
) -> AbstractContextManager[KeptDigests]:
    """The kept digests of a snapshot that was copied. Damaged ones are made anew from its bytes, which takes a read
    of all of it, and said in the log."""
    try:
        with open_digests(snapshot.digests, context.checksums, catalog.known_key(), snapshot.meta):
            pass
    except BadRecord as error:
        _log.warning(
            "digests of %s@%s are made anew: %s", catalog.label, snapshot.version.name, error, extra={"healed": True}
        )
        _heal_digests(context, catalog, snapshot, cancel)
    return open_digests(snapshot.digests, context.checksums, catalog.known_key(), snapshot.meta)


def _heal_digests(context: Context, catalog: Catalog, snapshot: Snapshot, cancel: Cancellation) -> None:
    with catalog.changing("making its key"):
        key = catalog.key()
    temporary = snapshot.folder / f".tmp-{uuid.uuid4().hex}"
    try:
        with (
            context.open_image(_volume_of(context, catalog), snapshot) as image,
            DigestWriter.new(context.files, temporary, context.checksums, key, snapshot.meta) as kept,
        ):
            write_digests(image, context.digester(key), kept, cancel)
        context.files.rename(temporary, snapshot.digests)
    except BaseException:
        with contextlib.suppress(OSError):
            context.files.unlink(temporary)
        raise
    context.files.sync_directory(snapshot.folder)


def _volume_of(context: Context, catalog: Catalog) -> str:
    return catalog.label.removeprefix(f"{context.storage}:")


class ChangeFinder:
    """Finds what a stream from ``base`` to ``to`` carries. Open images and digests live as long as the object.

    The extents of one finder are iterated in one thread.
    """

    def __init__(
        self, context: Context, volume: str, base: VersionRef | None, to: VersionRef, cancel: Cancellation
    ) -> None:
        self._context = context
        self._cancel = cancel
        self._catalog = context.catalog(volume)
        self.to = self._catalog.require(to)
        if base is not None and base.kind is not VersionKind.SNAPSHOT:
            raise Unsupported(f"{context.label(volume)} has no bookmarks", hint="")
        self.base = self._catalog.require(base) if base is not None else None
        self._open = ExitStack()
        try:
            self.image = self._open.enter_context(context.open_image(volume, self.to))
            self._base_image = (
                self._open.enter_context(context.open_image(volume, self.base)) if self.base is not None else None
            )
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Close the images."""
        self._open.close()

    def _guard(self, snapshot: Snapshot | None, image: Image | None) -> changes.Guard | None:
        if snapshot is None or image is None or not snapshot.meta.digests:
            return None
        kept = self._open.enter_context(kept_digests(self._context, self._catalog, snapshot, self._cancel))
        return changes.Guard(image, kept, self._context.checksums, self._catalog.known_key() or b"")

    def extents(self, request: SendRequest, start: int) -> Iterator[Extent]:
        """What the stream carries, verified against the kept digests where there are any."""
        guard = self._guard(self.to, self.image)
        if request.ranges is not None:
            found = changes.selected(self.image, request.ranges, start)
        elif self.base is None or self._base_image is None:
            found = changes.full(self.image, start)
        else:
            return self._incremental(guard, self._guard(self.base, self._base_image), self._base_image, start)
        return changes.verified_windows(guard, found) if guard is not None else found

    def _incremental(
        self, guard: changes.Guard | None, base_guard: changes.Guard | None, base: Image, start: int
    ) -> Iterator[Extent]:
        if guard is not None and base_guard is not None:
            found = self._by_digests(guard, base_guard, start)
        elif _has_maps(self.image.fd):
            found = changes.mapped(self.image, base, start)
            if guard is None and base_guard is None:
                return changes.merged(found)
        else:
            found = changes.compared(self.image, base, start, self.image.size - start)
        if guard is not None:
            found = changes.verified_windows(guard, changes.merged(found))
        return changes.merged(changes.narrowed(found, self.image, base_guard or base))

    def _by_digests(self, guard: changes.Guard, base_guard: changes.Guard, start: int) -> Iterator[Extent]:
        differing = changes.digested(guard.kept, base_guard.kept, self._context.checksums)
        grown = min(guard.kept.blocks, base_guard.kept.blocks) * BLOCK_SIZE
        return itertools.chain(
            changes.block_extents(self.image, differing, start), changes.full(self.image, max(start, grown))
        )

    def estimate(self, start: int = 0) -> int | None:
        """Bytes of changes from offset ``start`` on, by mappings and kept digests alone; None where only reading could
        tell."""
        if self.base is None or self._base_image is None:
            return changes.total(changes.full(self.image, start))
        if self.to.meta.digests and self.base.meta.digests:
            key = self._catalog.known_key()
            try:
                with (
                    open_digests(self.to.digests, self._context.checksums, key, self.to.meta) as mine,
                    open_digests(self.base.digests, self._context.checksums, key, self.base.meta) as theirs,
                ):
                    differing = changes.digested(mine, theirs, self._context.checksums)
                    blocks = (Extent(block * BLOCK_SIZE, BLOCK_SIZE) for block in differing)
                    grown = changes.full(self.image, min(mine.blocks, theirs.blocks) * BLOCK_SIZE)
                    return changes.total(blocks, start) + changes.total(grown, start)
            except BadRecord:
                return None
        if self.to.meta.digests or self.base.meta.digests or not _has_maps(self.image.fd):
            return None
        return changes.total(changes.mapped_estimate(self.image, self._base_image), start)


def _has_maps(fd: int) -> bool:
    try:
        fiemap(fd, 0, 1, 1)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
        return False
    return True


def estimate(context: Context, volume: str, base: VersionRef | None, to: VersionRef) -> int | None:
    """See :meth:`backends.base.Backend.estimate`."""
    finder = ChangeFinder(context, volume, base, to, Cancellation())
    try:
        return finder.estimate()
    finally:
        finder.close()


def open_stream(context: Context, request: SendRequest, cancel: Cancellation) -> Stream:
    """See :meth:`replicator.endpoint.Endpoint.send`."""
    start = resume_offset(request)
    finder = ChangeFinder(context, request.volume.name, request.base, request.to, cancel)
    try:
        check_offset(request, start, finder.image.size)
        reader = ChunkReader(finder.image, context.checksums, bytes.fromhex(request.key))
        if request.ranges is not None:
            size: int | None = sum(part.length for part in request.ranges)
        else:
            size = finder.estimate(start)
    except BaseException:
        finder.close()
        raise

    def read() -> Iterator[BlockChunk]:
        with context.errors(f"reading {finder.image.label}"):
            yield from reader.chunks(finder.extents(request, start))

    return opened_stream(read, cancel, estimate=size, on_close=finder.close)


def digest_blocks(context: Context, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
    """See :meth:`replicator.endpoint.Endpoint.digests`."""
    check_digests(request)
    snapshot = context.catalog(request.volume.name).require(request.version)
    return _digest_batches(context, request, snapshot, cancel)


def _digest_batches(
    context: Context, request: DigestRequest, snapshot: Snapshot, cancel: Cancellation
) -> Iterator[DigestBatch]:
    name = request.volume.name
    with context.errors(f"reading {context.label(name)}"), context.open_image(name, snapshot) as image:
        end = image.size if request.length is None else min(image.size, request.offset + request.length)
        worker = _BlockDigester(context, image, request)
        pending: deque[Future[DigestBatch]] = deque()
        offsets = iter(range(request.offset, end, worker.batch))
        with ThreadPoolExecutor(_DIGEST_THREADS, thread_name_prefix="image-digest") as pool:
            try:
                for offset in itertools.islice(offsets, _DIGEST_THREADS + 1):
                    pending.append(pool.submit(worker.digest, offset, min(offset + worker.batch, end)))
                while pending:
                    cancel.check()
                    batch = pending.popleft().result()
                    for offset in itertools.islice(offsets, 1):
                        pending.append(pool.submit(worker.digest, offset, min(offset + worker.batch, end)))
                    yield batch
            finally:
                for future in pending:
                    future.cancel()


class _BlockDigester:
    """Digests parts of an image; holes without reading them."""

    def __init__(self, context: Context, image: Image, request: DigestRequest) -> None:
        self._checksums = context.checksums
        self._image = image
        self._size = request.block_size
        self._key = bytes.fromhex(request.key)
        self._unit = max(1, WINDOW // self._size) * self._size
        self._zero = self._checksums.digest_blocks(bytes(self._size), self._key, block_size=self._size)
        self.batch = self._unit * max(1, _BATCH_WINDOWS * WINDOW // self._unit)

    def digest(self, start: int, end: int) -> DigestBatch:
        """The digests of the blocks between ``start`` and ``end``; the last may be short."""
        found = bytearray()
        buffer = memoryview(bytearray(self._unit))
        for offset in range(start, end, self._unit):
            length = min(self._unit, end - offset)
            if next(data_segments(self._image.fd, offset, offset + length), None) is None:
                found += self._zeros(length)
                continue
            part = buffer[:length]
            self._image.read_into(part, offset)
            found += self._checksums.digest_blocks(part, self._key, block_size=self._size)
        return DigestBatch(start, self._size, bytes(found))

    def _zeros(self, length: int) -> bytes:
        whole, rest = divmod(length, self._size)
        short = self._checksums.digest_blocks(bytes(rest), self._key, block_size=self._size) if rest else b""
        return self._zero * whole + short
