"""The format of ``rbd export-diff``: what is written, and what is refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.diff_format import BANNER, MAX_NAME, DiffHeader, DiffReader, Piece, encode
from replicator.errors import BadDiff
from replicator.streams import CHUNK_SIZE, MAX_VOLUME_SIZE, Extent
from tests.support.blocks import pattern

HEADER = DiffHeader("one", "two", 1 << 20)


def written(header: DiffHeader, pieces: Iterable[Piece]) -> bytes:
    return b"".join(bytes(part) for part in encode(header, pieces))


def read(data: bytes) -> tuple[DiffHeader, list[Piece]]:
    reader = DiffReader(io.BytesIO(data).read)
    return reader.header, list(reader)


def data_at(offset: int, *parts: bytes) -> list[Piece]:
    record = Extent(offset, sum(map(len, parts)))
    return [Piece(record, part) for part in parts]


def name(tag: bytes, text: bytes) -> bytes:
    return tag + struct.pack("<I", len(text)) + text


def record(tag: bytes, offset: int, length: int, data: bytes = b"") -> bytes:
    return tag + struct.pack("<QQ", offset, length) + data


def size(number: int) -> bytes:
    return b"s" + struct.pack("<Q", number)


WHOLE = (
    b"rbd diff v1\n"
    b"f\x03\x00\x00\x00one"
    b"t\x03\x00\x00\x00two"
    b"s\x00\x00\x10\x00\x00\x00\x00\x00"
    b"w\x00\x10\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00abc"
    b"z\x00\x20\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00"
    b"e"
)


def test_every_byte_is_as_the_format_says() -> None:
    pieces = [*data_at(0x1000, b"\0abc"), Piece(Extent(0x2000, 512, zero=True))]
    assert written(HEADER, pieces) == WHOLE
    assert read(WHOLE) == (HEADER, pieces)
    assert written(DiffHeader(None, "s", 0), ()) == b"rbd diff v1\nt\x01\x00\x00\x00ss" + bytes(8) + b"e"


def test_a_record_of_nothing_but_zeros_is_one_of_zeros() -> None:
    zeros = data_at(8, bytes(5), bytes(CHUNK_SIZE), bytes(1))
    after = data_at(2 << 20, b"x")
    found = written(DiffHeader(None, "t", 4 << 20), [*zeros, *after])
    assert found.endswith(record(b"z", 8, CHUNK_SIZE + 6) + record(b"w", 2 << 20, 1, b"x") + b"e")


def test_zeros_before_data_are_in_its_record() -> None:
    data = bytes(CHUNK_SIZE), bytes(CHUNK_SIZE - 3) + b"abc", bytes(7)
    found = written(DiffHeader(None, "t", 4 << 20), data_at(4, *data))
    assert found.endswith(record(b"w", 4, 2 * CHUNK_SIZE + 7, b"".join(data)) + b"e")


@st.composite
def diffs(draw: st.DrawFn) -> tuple[DiffHeader, list[Piece]]:
    """Any diff, with its records in pieces of any size."""
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    bounds = sorted(draw(st.sets(st.integers(0, 5000), max_size=12)))
    header = DiffHeader(draw(st.none() | names), draw(names), draw(st.integers(5000, MAX_VOLUME_SIZE)))
    pieces: list[Piece] = []
    for start, end in pairwise(bounds):
        kind = draw(st.sampled_from(["nothing", "zero", "data", "zeros", "mixed"]))
        extent = Extent(start, end - start, zero=kind == "zero")
        if kind == "zero":
            pieces.append(Piece(extent))
        elif kind != "nothing":
            fill = {"data": b"x" * extent.length, "zeros": bytes(extent.length)}
            data = fill.get(kind) or draw(st.binary(min_size=extent.length, max_size=extent.length))
            cuts = sorted({0, extent.length, *draw(st.sets(st.integers(0, extent.length), max_size=3))})
            pieces += [Piece(extent, data[a:b]) for a, b in pairwise(cuts)]
    return header, pieces


@given(diffs())
def test_what_is_written_is_read(made: tuple[DiffHeader, list[Piece]]) -> None:
    header, pieces = made
    whole = written(header, pieces)
    found, again = read(whole)
    assert found == header
    assert written(found, again) == whole
    image, other = bytearray(5000), bytearray(5000)
    for content, parts in ((image, pieces), (other, again)):
        at = 0
        for piece in parts:
            at = max(at, piece.record.offset)
            content[at : at + len(piece.data)] = piece.data
            at += len(piece.data)
    assert image == other


@given(diffs(), st.data())
def test_whatever_is_damaged_is_refused_or_within_bounds(
    made: tuple[DiffHeader, list[Piece]], data: st.DataObject
) -> None:
    whole = bytearray(written(*made))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        header, pieces = read(bytes(whole))
    except BadDiff:
        return
    assert header.size <= MAX_VOLUME_SIZE
    end = 0
    for extent in dict.fromkeys(piece.record for piece in pieces):
        assert end <= extent.offset < extent.end <= header.size
        end = extent.end
    assert all(len(piece.data) <= CHUNK_SIZE for piece in pieces)


@given(st.binary(max_size=300))
def test_any_bytes_behind_the_banner_are_refused_or_read(rest: bytes) -> None:
    try:
        read(BANNER + rest)
    except BadDiff:
        return


def test_one_that_is_cut_anywhere_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(BadDiff, match=f"cut short: it ends at byte {end}"):
            read(WHOLE[:end])


START = BANNER + name(b"t", b"two") + size(4096)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"rbd diff v2\n" + START[12:] + b"e", "version 2"),
        (b"rbd image v2\n" + b"e", "version 2"),
        (b"rbd diff v1\r" + b"e", "at byte 0"),
        (BANNER + name(b"t", b"two") + b"e", "size of the image is missing"),
        (BANNER + size(5) + b"e", "brings no snapshot"),
        (START + name(b"t", b"two") + b"e", "'t' is there twice"),
        (START + size(4096) + b"e", "'s' is there twice"),
        (BANNER + b"t" + struct.pack("<I", 0) + b"e", "name of 0 bytes"),
        (BANNER + b"t" + struct.pack("<I", MAX_NAME + 1) + b"x" * 5000, "name of 4097 bytes"),
        (BANNER + b"t" + struct.pack("<I", 0xFFFFFFFF), "name of 4294967295 bytes"),
        (BANNER + name(b"t", b"\xff\xfe") + size(1) + b"e", "not UTF-8"),
        (BANNER + name(b"t", b"t") + size(MAX_VOLUME_SIZE + 1) + b"e", "at most"),
        (START + record(b"w", 0, 0) + b"e", "a record of 0 bytes"),
        (START + record(b"z", 0, 0) + b"e", "a record of 0 bytes"),
        (START + record(b"z", 0, 4097) + b"e", "a record of 4097 bytes at 0, where one between 0 and 4096"),
        (START + record(b"z", (1 << 64) - 1, 2) + b"e", "at 18446744073709551615"),
        (START + record(b"w", 8, (1 << 64) - 1), "a record of 18446744073709551615 bytes"),
        (START + record(b"z", 8, 8) + record(b"z", 0, 8) + b"e", "where one between 16 and"),
        (START + record(b"z", 8, 8) + record(b"z", 15, 8) + b"e", "where one between 16 and"),
        (START + record(b"z", 8, 8) + name(b"f", b"late") + b"e", "unknown kind b'f'"),
        (START + b"x", "unknown kind b'x'"),
        (START + b"\0", "unknown kind"),
        (START + b"e\n", "more behind its end"),
        (START + b"e" + START + b"e", "more behind its end"),
    ],
)
def test_what_is_no_such_diff_is_refused_with_its_place(data: bytes, why: str) -> None:
    with pytest.raises(BadDiff) as refused:
        read(data)
    assert why in str(refused.value)
    assert refused.value.hint


def test_a_header_in_any_order_is_read() -> None:
    data = BANNER + size(9) + name(b"t", b"two") + name(b"f", b"one") + b"e"
    assert read(data) == (DiffHeader("one", "two", 9), [])


def test_memory_is_bounded_by_what_is_there_and_not_by_what_it_says() -> None:
    asked: list[int] = []
    inner = io.BytesIO(BANNER + name(b"t", b"t") + size(1 << 50) + record(b"w", 0, 1 << 50, pattern(100)))

    def watched(wanted: int) -> bytes:
        asked.append(wanted)
        return inner.read(wanted)

    with pytest.raises(BadDiff, match="cut short"):
        list(DiffReader(watched))
    assert max(asked) <= CHUNK_SIZE
