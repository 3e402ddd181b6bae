"""Reading and writing images with many operations under way: their order, their bounds, and what fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.blocks import ChunkChecker
from backends.rbd.catalog import RawSnapshot
from backends.rbd.changes import Diff, selected
from backends.rbd.objects import Objects
from backends.rbd.reading import DEPTH, Reader
from backends.rbd.records import Taken
from backends.rbd.source import make_chunk
from backends.rbd.writing import Writer
from replicator.cancellation import Cancellation
from replicator.endpoint import Range
from replicator.errors import Cancelled, DamagedData, NoSpace, StorageUnavailable
from replicator.streams import Extent
from tests.support.blocks import pattern
from tests.support.versions import at
from transport import checksum

DATA = pattern(1 << 20)


class Done:
    """A completion."""

    def __init__(self, status: int) -> None:
        self.status = status

    def get_return_value(self) -> int:
        return self.status


class FakeImage:
    """An image whose operations come back in any order, in another thread.

    :ivar fail: what becomes of an operation at an offset
    """

    def __init__(self, data: bytes, order: Callable[[int], int] = lambda number: -number) -> None:
        self.data = bytearray(data)
        self.fail: dict[int, int] = {}
        self.most = 0
        self._order = order
        self._pending: list[tuple[int, Callable[[], None]]] = []
        self._number = 0
        self._lock = threading.Lock()

    def _later(self, answer: Callable[[], None]) -> Done:
        with self._lock:
            self._number += 1
            self._pending.append((self._order(self._number), answer))
            self.most = max(self.most, len(self._pending))
        threading.Timer(0.001, self._run).start()
        return Done(0)

    def _run(self) -> None:
        with self._lock:
            if not self._pending:
                return
            item = min(self._pending, key=lambda item: item[0])
            self._pending.remove(item)
        item[1]()

    def aio_read(self, offset: int, length: int, done: Callable[[Done, bytes | None], None], _advice: int) -> Done:
        status = -self.fail.get(offset, 0)
        data = None if status else bytes(self.data[offset : offset + length])
        return self._later(lambda: done(Done(status), data))

    def aio_write(self, data: bytes, offset: int, done: Callable[[Done], None]) -> Done:
        def act() -> None:
            status = -self.fail.get(offset, 0)
            if not status:
                self.data[offset : offset + len(data)] = data
            done(Done(status))

        return self._later(act)

    def aio_write_zeroes(self, offset: int, length: int, done: Callable[[Done], None]) -> Done:
        return self.aio_write(bytes(length), offset, done)

    def aio_flush(self, done: Callable[[Done], None]) -> Done:
        return self._later(lambda: done(Done(-self.fail.get(-1, 0))))


def reader(image: Any, cancel: Cancellation | None = None) -> Reader:
    return Reader(image, len(DATA), "store:vm@one", cancel or Cancellation())


def batches_of(count: int, size: int = 4096) -> list[list[Extent]]:
    return [[Extent(n * size, size), Extent(n * size + size // 2, 0 + 1, zero=True)] for n in range(count)]


def test_reads_come_in_order_and_not_too_many_at_a_time() -> None:
    image = FakeImage(DATA)
    found = list(reader(image).read(batches_of(100)))
    assert [extents[0].offset for extents, _ in found] == [n * 4096 for n in range(100)]
    assert all(parts == [DATA[e[0].offset : e[0].end]] for e, parts in found)
    assert 1 < image.most <= DEPTH


def test_a_batch_of_zeros_is_not_read() -> None:
    found = list(reader(FakeImage(DATA)).read([[Extent(0, 99, zero=True)], [Extent(5, 6)]]))
    assert [parts for _, parts in found] == [[], [DATA[5:11]]]
    assert list(reader(FakeImage(DATA)).read([])) == []


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.EIO, DamagedData), (errno.ETIMEDOUT, StorageUnavailable), (errno.ESHUTDOWN, StorageUnavailable)],
)
def test_reads_that_fail(code: int, error: type[Exception]) -> None:
    image = FakeImage(DATA)
    image.fail[7 * 4096] = code
    with pytest.raises(error, match="store:vm@one"):
        list(reader(image).read(batches_of(50)))


def test_a_read_that_is_too_short_is_damage() -> None:
    with pytest.raises(DamagedData):
        list(reader(FakeImage(DATA)).read([[Extent(len(DATA) - 5, 10)]]))


def test_reading_is_cancelled() -> None:
    cancel = Cancellation()
    found = reader(FakeImage(DATA), cancel).read(batches_of(50))
    next(found)
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(found)


def writer(image: Any, start: int = 0) -> Writer:
    return Writer(image, "store:vm", start, Cancellation())


def test_writes_arrive_and_are_durable_at_the_end() -> None:
    image = FakeImage(bytes(len(DATA)))
    writing = writer(image)
    for offset in range(0, len(DATA), 8192):
        writing.write(offset, memoryview(DATA)[offset : offset + 8192])
    assert writing.durable == 0
    writing.finish()
    assert bytes(image.data) == DATA
    assert writing.durable == len(DATA)
    assert image.most <= DEPTH


def test_what_a_flush_says_is_durable_was_written_before_it() -> None:
    image = FakeImage(bytes(len(DATA)), order=lambda number: number)
    writing = writer(image)
    for offset in range(0, len(DATA), 8192):
        writing.write(offset, DATA[offset : offset + 8192])
        if offset % 65536 == 0:
            writing.flush()
        assert bytes(image.data[: writing.durable]) == DATA[: writing.durable]
    writing.finish()


def test_zeros_are_made_in_pieces() -> None:
    image = FakeImage(DATA)
    writing = writer(image)
    writing.zero(100, 5000)
    writing.finish()
    assert bytes(image.data) == DATA[:100] + bytes(5000) + DATA[5100:]


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, NoSpace), (errno.ESHUTDOWN, StorageUnavailable)])
def test_a_write_that_fails_is_not_durable(code: int, error: type[Exception]) -> None:
    image = FakeImage(bytes(len(DATA)))
    image.fail[20 * 8192] = code
    writing = writer(image)
    with pytest.raises(error), writing.draining():
        for offset in range(0, len(DATA), 8192):
            writing.write(offset, DATA[offset : offset + 8192])
        writing.finish()
    writing.salvage()
    assert writing.durable <= 20 * 8192


def test_a_flush_that_fails_says_nothing() -> None:
    image = FakeImage(bytes(len(DATA)))
    image.fail[-1] = errno.EIO
    writing = writer(image)
    writing.write(0, b"x")
    with pytest.raises(Exception, match="failed"), writing.draining():
        writing.finish()
    assert writing.durable == 0


def test_what_was_written_in_order_is_saved_after_an_error_elsewhere() -> None:
    image = FakeImage(bytes(len(DATA)))
    writing = writer(image)
    with writing.draining():
        writing.write(0, b"abc")
        writing.write(5, b"defg")
        writing.salvage()
    assert writing.durable == 9


# -- pieces of one object


class FakeObjects:
    """The objects of an image, of 64 KiB: one may be written to only once that image has written to it.

    :ivar together: pieces in each operation
    """

    size = 65536

    def __init__(self, image: FakeImage) -> None:
        self.together: list[int] = []
        self.fail = 0
        self._image = image

    number = Objects.number
    crosses = Objects.crosses

    def write(self, number: int, pieces: list[tuple[int, bytes]], done: Callable[[Done], None]) -> Done:
        assert any(self._image.data[number * self.size : (number + 1) * self.size]), "not begun by librbd"
        assert all(offset // self.size == (offset + len(data) - 1) // self.size == number for offset, data in pieces)
        self.together.append(len(pieces))

        def act() -> None:
            if not self.fail:
                for offset, data in pieces:
                    self._image.data[offset : offset + len(data)] = data
            done(Done(-self.fail))

        return self._image._later(act)


def writer_of_objects(image: Any, objects: Any) -> Writer:
    return Writer(image, "store:vm", 0, Cancellation(), objects)


def test_small_pieces_of_an_object_are_written_together() -> None:
    image = FakeImage(bytes(len(DATA)))
    objects = FakeObjects(image)
    writing = writer_of_objects(image, objects)
    expected = bytearray(len(DATA))
    # Ten in each of four objects; two in the next, which is too few; three, and one across two objects; a large one.
    pieces = [(number * 65536 + place * 5000, 4096) for number in range(4) for place in range(10)]
    pieces += [(4 * 65536, 512), (4 * 65536 + 9000, 512)]
    pieces += [(5 * 65536, 9), (5 * 65536 + 9000, 9), (5 * 65536 + 9999, 9), (6 * 65536 - 100, 200)]
    pieces += [(7 * 65536, 2 * 65536)]
    pieces += [(10 * 65536 + place, 1) for place in range(0, 65536, 512)]
    with writing.draining():
        for offset, length in pieces:
            writing.write(offset, DATA[offset : offset + length])
            expected[offset : offset + length] = DATA[offset : offset + length]
        writing.zero(15 * 65536, 10)
        writing.finish()
    assert image.data == expected
    assert sorted(objects.together) == [2, 9, 9, 9, 9, 63, 63]
    assert writing.durable == 15 * 65536 + 10


def test_pieces_that_wait_for_others_are_not_durable_before_they_are_written() -> None:
    image = FakeImage(bytes(len(DATA)))
    writing = writer_of_objects(image, FakeObjects(image))
    with writing.draining():
        for offset in range(0, len(DATA), 8192):
            writing.write(offset, DATA[offset : offset + 8192])
            if offset % 40960 == 0:
                writing.flush()
            assert image.data[: writing.durable] == DATA[: writing.durable]
        writing.salvage()
    assert bytes(image.data) == DATA
    assert writing.durable == len(DATA)


def test_pieces_that_fail_together_are_not_durable() -> None:
    image = FakeImage(bytes(len(DATA)))
    objects = FakeObjects(image)
    objects.fail = errno.ENOSPC
    writing = writer_of_objects(image, objects)
    with pytest.raises(NoSpace), writing.draining():
        for offset in range(65536 - 4096, len(DATA), 4096):
            writing.write(offset, DATA[offset : offset + 4096])
        writing.finish()
    writing.salvage()
    assert writing.durable <= 65536


# -- chunks


def test_long_runs_of_zeros_are_not_sent() -> None:
    """What librbd tells of an object that is new: all that lies before its last byte."""
    piece, page = DATA[:4096], 4096
    part = bytes(20 * page) + piece + bytes(15 * page) + piece + bytes(16 * page) + piece + bytes(100)
    batch = [Extent(page, len(part)), Extent(1 << 20, 3 * page), Extent((1 << 20) + 3 * page, page, zero=True)]
    chunk = make_chunk(batch, [part, bytes(3 * page)], checksum, bytes(32))
    place = [Extent(page, 20 * page, zero=True), Extent(21 * page, 17 * page), Extent(38 * page, 16 * page, zero=True)]
    place += [Extent(54 * page, page + 100), Extent(1 << 20, 4 * page, zero=True)]
    assert list(chunk.extents) == place
    assert chunk.data == piece + bytes(15 * page) + piece + piece + bytes(100)
    checker = ChunkChecker("x", size=2 << 20, start=0, key=bytes(32), checksums=checksum)
    assert len(list(checker.check(chunk))) == 5


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6), st.integers(0, 4095))
def test_chunks_have_what_was_read(runs: list[tuple[int, bool]], short: int) -> None:
    data = b"".join((b"x" if full else b"\0") * 4096 * pages for pages, full in runs)[: -short or None]
    chunk = make_chunk([Extent(8192, len(data))], [data], checksum, bytes(32))
    checker = ChunkChecker("x", size=8192 + len(data), start=0, key=bytes(32), checksums=checksum)
    found = [(extent, bytes(piece) or bytes(extent.length)) for extent, piece in checker.check(chunk)]
    assert b"".join(piece for _, piece in found) == data
    assert found[0][0].offset == 8192


# -- changes


class FakeDiff:
    """An image of objects of 100 bytes, by what was written to it."""

    def __init__(self, size: int, written: list[Extent]) -> None:
        self.size = size
        self.written = written
        self.asked: list[tuple[int, int, bool]] = []

    def diff_iterate(
        self, offset: int, length: int, _base: str | None, add: Any, _parents: bool = True, whole: bool = False
    ) -> None:
        assert offset % 100 == 0
        assert length > 0
        self.asked.append((offset, length, whole))
        if whole:
            for number in range(offset // 100, -(-(offset + length) // 100)):
                if any(e.offset < (number + 1) * 100 and e.end > number * 100 for e in self.written):
                    add(number * 100, 100, True)
            return
        for extent in self.written:
            begin, end = max(extent.offset, offset), min(extent.end, offset + length)
            if begin < end:
                add(begin, end - begin, not extent.zero)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    size = draw(st.integers(1, 3000))
    position, found = 0, []
    for _ in range(draw(st.integers(0, 10))):
        position += draw(st.integers(1, 300))
        length = draw(st.integers(1, 250))
        if position + length > size:
            break
        found.append(Extent(position, length, draw(st.booleans())))
        position += length + 1
    return size, found


BASE = RawSnapshot(Taken("i", 1, at(0)), "base", 5, True)


@given(histories(), st.integers(0, 30), st.integers(0, 3000), st.integers(1, 7), st.integers(1, 7))
def test_two_passes_find_all_that_changed(
    history: tuple[int, list[Extent]], objects: int, start: int, whole: int, exact: int
) -> None:
    size, written = history
    image: Any = FakeDiff(size, written)
    trusted = size if objects * 100 >= size else objects * 100
    diff = Diff(image, size, BASE, trusted, 100, whole * 100, exact * 100)
    expected = [Extent(max(e.offset, start), e.end - max(e.offset, start), e.zero) for e in written if e.end > start]
    assert list(diff.extents(start)) == expected
    dirty = list(diff.dirty())
    edges = [offset for e in written for offset in (e.offset, e.end - 1)]
    assert all(any(d.offset <= offset < d.end for d in dirty) for offset in edges)
    estimate = diff.estimate()
    if estimate is not None:
        assert sum(e.length for e in written) <= estimate <= size


@given(histories(), st.integers(0, 3000), st.integers(1, 7))
def test_what_no_object_has_is_looked_for_everywhere(
    history: tuple[int, list[Extent]], start: int, window: int
) -> None:
    size, written = history
    image: Any = FakeDiff(size, written)
    diff = Diff(image, size, BASE, size, 100, exact_window=window * 100, has_parent=True, hidden=True)
    found = list(diff.extents(start))
    assert not any(extent.zero for extent in found)
    assert [offset for e in found for offset in range(e.offset, e.end)] == list(range(start, size))


def test_ranges_are_cut_to_the_image() -> None:
    ranges = [Range(0, 10), Range(20, 100), Range(200, 5)]
    assert list(selected(ranges, 50, 5)) == [Extent(5, 5), Extent(20, 30)]
