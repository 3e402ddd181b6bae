"""Uniting two lists of extents: every byte of either once, in order, and of the kind that the first one says."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from backends.rbd.changes import united
from replicator.streams import Extent

LENGTH = 40


@st.composite
def lists(draw: st.DrawFn) -> list[Extent]:
    """Ascending and disjoint."""
    kinds = draw(st.lists(st.sampled_from("-wz"), max_size=LENGTH))
    cuts = draw(st.sets(st.integers(1, LENGTH)))
    found: list[Extent] = []
    for offset, kind in enumerate(kinds):
        if kind == "-":
            continue
        last = found[-1] if found else None
        if last is not None and last.end == offset and last.zero == (kind == "z") and offset not in cuts:
            found[-1] = Extent(last.offset, last.length + 1, last.zero)
        else:
            found.append(Extent(offset, 1, kind == "z"))
    return found


def spread(extents: list[Extent]) -> dict[int, bool]:
    return {offset: extent.zero for extent in extents for offset in range(extent.offset, extent.end)}


@given(lists(), lists())
def test_united(first: list[Extent], second: list[Extent]) -> None:
    plain = [Extent(extent.offset, extent.length) for extent in second]
    found = list(united(first, plain))
    assert all(extent.length > 0 for extent in found)
    assert all(one.end <= other.offset for one, other in itertools.pairwise(found))
    assert spread(found) == spread(plain) | spread(first)
