"""Verdicts from two mappings, against working them out byte by byte."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from backends.image.extents import Judged, Verdict, data_segments, judge, trusted_end
from backends.image.linux import (
    FIEMAP_EXTENT_DELALLOC,
    FIEMAP_EXTENT_LAST,
    FIEMAP_EXTENT_SHARED,
    FIEMAP_EXTENT_UNWRITTEN,
    Mapped,
)
from replicator.streams import BLOCK_SIZE

UNIT = 4096
LENGTH = 24
ENCODED = 0x8

flags = st.sampled_from(
    [0, FIEMAP_EXTENT_SHARED, FIEMAP_EXTENT_SHARED, FIEMAP_EXTENT_UNWRITTEN, FIEMAP_EXTENT_DELALLOC, ENCODED]
)


@st.composite
def mappings(draw: st.DrawFn) -> list[Mapped]:
    """Disjoint extents, ascending, some of which may begin before and end behind the range in question."""
    cuts = sorted(draw(st.sets(st.integers(-2, LENGTH + 2), max_size=8)))
    found = []
    for start, end in itertools.pairwise(cuts):
        if draw(st.booleans()):
            physical = (start + draw(st.sampled_from([100, 100, 101, 200]))) * UNIT
            found.append(Mapped(start * UNIT, physical, (end - start) * UNIT, draw(flags)))
    return found


def at(extents: Sequence[Mapped], offset: int) -> Mapped | None:
    return next((extent for extent in extents if extent.logical <= offset < extent.end), None)


def expected(newer: Mapped | None, older: Mapped | None) -> set[Verdict]:
    """What may be said of one block."""
    empty = {None, FIEMAP_EXTENT_UNWRITTEN}
    new_hole = (newer.flags if newer else None) in empty
    old_hole = (older.flags if older else None) in empty
    if new_hole:
        return {Verdict.SAME} if old_hole else {Verdict.ZEROED}
    if old_hole or newer is None or older is None:
        return {Verdict.CHANGED}
    plain = newer.flags in (0, FIEMAP_EXTENT_SHARED) and older.flags in (0, FIEMAP_EXTENT_SHARED)
    if not plain:
        return {Verdict.SUSPECT}
    if newer.physical - newer.logical != older.physical - older.logical:
        return {Verdict.CHANGED}
    return {Verdict.SAME} if newer.flags and older.flags else {Verdict.SUSPECT}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Mapped], list[Mapped]]:
    """Two mappings: of nothing to do with each other, or of a file and what became of it."""
    older = draw(mappings())
    if draw(st.booleans()):
        return draw(mappings()), older
    kept = [extent for extent in older if draw(st.integers(0, 4))]
    return [extent._replace(physical=4096) if draw(st.integers(0, 4)) == 0 else extent for extent in kept], older


@given(pairs())
def test_every_block_gets_its_verdict(pair: tuple[list[Mapped], list[Mapped]]) -> None:
    newer, older = pair
    judged = list(judge(newer, older, 0, LENGTH * UNIT))
    position = 0
    for item in judged:
        assert item.offset == position
        position += item.length
        for offset in range(item.offset, item.offset + item.length, UNIT):
            assert item.verdict in expected(at(newer, offset), at(older, offset)), offset
    assert position == LENGTH * UNIT


def test_equal_places_that_are_not_shared_are_not_believed() -> None:
    here = [Mapped(0, 81920, 4096, FIEMAP_EXTENT_LAST)]
    assert list(judge(here, here, 0, 4096)) == [Judged(0, 4096, Verdict.SUSPECT)]
    shared = [Mapped(0, 81920, 4096, FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_SHARED)]
    assert list(judge(shared, shared, 0, 4096)) == [Judged(0, 4096, Verdict.SAME)]


def test_the_end_of_a_shorter_file_is_not_trusted() -> None:
    assert trusted_end(5000, 5000) == 5000
    assert trusted_end(BLOCK_SIZE + 1, 3 * BLOCK_SIZE) == BLOCK_SIZE
    assert trusted_end(3 * BLOCK_SIZE, BLOCK_SIZE - 1) == 0


def test_segments_of_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(40 * BLOCK_SIZE)
        for block in (0, 1, 20):
            file.seek(block * BLOCK_SIZE)
            file.write(b"x" * BLOCK_SIZE)
    fd = os.open(path, os.O_RDONLY)
    try:
        whole = list(data_segments(fd, 0, 40 * BLOCK_SIZE))
        assert whole == [(0, 2 * BLOCK_SIZE), (20 * BLOCK_SIZE, BLOCK_SIZE)]
        assert list(data_segments(fd, BLOCK_SIZE // 2, BLOCK_SIZE)) == [(BLOCK_SIZE // 2, BLOCK_SIZE // 2)]
        assert list(data_segments(fd, 3 * BLOCK_SIZE, 20 * BLOCK_SIZE)) == []
        assert list(data_segments(fd, 30 * BLOCK_SIZE, 40 * BLOCK_SIZE)) == []
        assert list(data_segments(fd, 40 * BLOCK_SIZE, 40 * BLOCK_SIZE)) == []
    finally:
        os.close(fd)
