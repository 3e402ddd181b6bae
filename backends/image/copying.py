"""Making one image file out of another: by sharing blocks where the file system can, else by copying all but holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backends.image.durable import Files
from backends.image.extents import data_segments
from backends.image.kept_digests import DigestWriter, KeptDigests, block_count
from backends.image.linux import cannot_clone, copy_nocow
from backends.image.reading import PIECE, WINDOW, Image
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.prefetch import ahead
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE

_KERNEL_COPY = 64 << 20
"""Bytes copied by the kernel between two looks at whether to stop."""
_WINDOW_BLOCKS = WINDOW // BLOCK_SIZE


def try_clone(files: Files, target: int, source: int) -> bool:
    """Make the empty file ``target`` share the blocks of ``source``; False where these two cannot."""
    copy_nocow(target, source)
    try:
        files.clone(target, source)
    except OSError as error:
        if not cannot_clone(error):
            raise
        return False
    return True


def clone_or_copy(files: Files, target: int, source: int, size: int, cancel: Cancellation) -> bool:
    """Fill the empty file ``target`` with the first ``size`` bytes of the unchanging file ``source``; whether by
    sharing. Holes stay holes."""
    shared = try_clone(files, target, source)
    if not shared:
        for offset, length in data_segments(source, 0, size):
            _copy_range(files, target, source, offset, length, cancel)
    files.truncate(target, size)
    return shared


def _copy_range(files: Files, target: int, source: int, offset: int, length: int, cancel: Cancellation) -> None:
    while length:
        cancel.check()
        try:
            done = files.copy_range(source, target, offset, min(length, _KERNEL_COPY))
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            data = os.pread(source, min(length, WINDOW), offset)
            files.write_at(target, memoryview(data), offset)
            done = len(data)
        if not done:
            return  # the end of the source: the caller's size check says what that means
        offset, length = offset + done, length - done


@dataclass(frozen=True, slots=True)
class Window:
    """Some blocks of an image: ``data`` is empty where there is only a hole."""

    offset: int
    length: int
    data: bytearray
    digests: bytes
    zeros: bytes


class Digester:
    """Digests whole images with a volume's own key."""

    def __init__(self, checksums: Checksums, key: bytes) -> None:
        self._checksums = checksums
        self._key = key
        self._zero_block = checksums.digest_blocks(bytes(BLOCK_SIZE), key, block_size=BLOCK_SIZE)

    def zero(self, length: int) -> bytes:
        """The digests of ``length`` bytes of zeros."""
        whole, rest = divmod(length, BLOCK_SIZE)
        short = self._checksums.digest_blocks(bytes(rest), self._key, block_size=BLOCK_SIZE) if rest else b""
        return self._zero_block * whole + short

    def digest(self, data: bytearray | bytes) -> tuple[bytes, bytes]:
        """The digests of the blocks of ``data``, and a byte for each: 1 if it is all zeros."""
        count = block_count(len(data))
        digests, zeros = bytearray(count * DIGEST_SIZE), bytearray(count)
        self._checksums.digest_blocks_into(data, self._key, digests, zeros, block_size=BLOCK_SIZE)
        return bytes(digests), bytes(zeros)

    def windows(self, image: Image) -> Iterator[Window]:
        """All of an image in order, read and digested but for its holes."""
        for offset, length, data in windows_of(image):
            if not data:
                yield Window(offset, length, bytearray(), self.zero(length), b"")
                continue
            buffer = bytearray(length)
            image.read_into(memoryview(buffer), offset)
            digests, zeros = self.digest(buffer)
            yield Window(offset, length, buffer, digests, zeros)


def windows_of(image: Image) -> Iterator[tuple[int, int, bool]]:
    """``(offset, length, has data)`` of aligned windows that cover an image in order."""
    segments = data_segments(image.fd, 0, image.size)
    begin, end = next(((o, o + n) for o, n in segments), (image.size, image.size))
    for offset in range(0, image.size, WINDOW):
        stop = min(offset + WINDOW, image.size)
        while end <= offset and begin < image.size:
            begin, end = next(((o, o + n) for o, n in segments), (image.size, image.size))
        yield offset, stop - offset, begin < stop and end > offset


def copy_digesting(
    files: Files, target: int, source: Image, digester: Digester, kept: DigestWriter, cancel: Cancellation
) -> None:
    """Copy an image that may be in use, digesting in the same pass; holes and blocks of zeros become holes.

    Reads and hashes in one thread while it writes in another.

    :raises StorageError: what ``source.shrunk`` makes, if the source got shorter
    """
    files.truncate(target, source.size)
    with ahead(lambda: digester.windows(source), cancel) as windows:
        for window in windows:
            kept.add(window.digests)
            view = memoryview(window.data)
            for start, stop in _nonzero_runs(window.zeros):
                begin = window.offset + start * BLOCK_SIZE
                end = min(window.offset + stop * BLOCK_SIZE, window.offset + window.length)
                for first, last in _data_runs(source, window, begin, end):
                    files.write_at(target, view[first - window.offset : last - window.offset], first)


def _nonzero_runs(zeros: bytes) -> Iterator[tuple[int, int]]:
    start = zeros.find(0)
    while start >= 0:
        stop = zeros.find(1, start)
        yield start, stop if stop >= 0 else len(zeros)
        start = zeros.find(0, stop) if stop >= 0 else -1


def _data_runs(source: Image, window: Window, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of a window to write: all of it, or all but pieces of zeros where the source has holes, so
    that holes smaller than a block stay holes. Decided by the bytes that were read and digested: an image in use may
    have other holes by now."""
    whole = next(data_segments(source.fd, begin, end), None)
    if whole == (begin, end - begin):
        yield begin, end
        return
    base = window.offset
    for first, last in _differing_runs(window.data[begin - base : end - base], bytes(end - begin)):
        yield begin + first, begin + last


def write_digests(
    image: Image,
    digester: Digester,
    kept: DigestWriter,
    cancel: Cancellation,
    carried: tuple[KeptDigests, Callable[[int], bool]] | None = None,
) -> None:
    """Digest an image that was written.

    :param carried: the digests of the base that it was copied from, and which blocks are not the base's: only those
        are read. The others keep their digests, so damage of the base stays visible as such in its copy.
    """
    if carried is None:
        with ahead(lambda: digester.windows(image), cancel) as windows:
            for window in windows:
                kept.add(window.digests)
        return
    base, touched = carried
    for offset in range(0, image.size, WINDOW):
        cancel.check()
        first = offset // BLOCK_SIZE
        count = min(_WINDOW_BLOCKS, block_count(image.size) - first)
        digests = bytearray(base.read(first, count) if first < base.blocks else b"")
        digests += bytes(count * DIGEST_SIZE - len(digests))
        for block in range(count):
            if touched(first + block):
                start = (first + block) * BLOCK_SIZE
                data = image.read(start, min(BLOCK_SIZE, image.size - start))
                digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE] = digester.digest(data)[0]
        kept.add(bytes(digests))


def copy_changes(files: Files, target: int, source: Image, base: Image, cancel: Cancellation) -> None:
    """Make ``target``, which shares all blocks of ``base``, equal to ``source`` by writing only the pieces that differ.

    :raises StorageError: what ``source.shrunk`` makes, if the source got shorter
    """
    files.truncate(target, source.size)
    for offset in range(0, source.size, WINDOW):
        cancel.check()
        length = min(WINDOW, source.size - offset)
        data, old = source.read(offset, length), base.read(offset, length)
        if data == old:
            continue
        for start, stop in _differing_runs(data, old):
            if data.count(0, start, stop) == stop - start:
                files.zero(target, offset + start, stop - start)
            else:
                files.write_at(target, memoryview(data)[start:stop], offset + start)


def _differing_runs(data: bytes | bytearray, old: bytes) -> Iterator[tuple[int, int]]:
    begin: int | None = None
    for start in range(0, len(data), PIECE):
        differs = data[start : start + PIECE] != old[start : start + PIECE]
        if differs and begin is None:
            begin = start
        elif not differs and begin is not None:
            yield begin, start
            begin = None
    if begin is not None:
        yield begin, len(data)
