"""What an image's header says that it is a clone of, and what a peer says that a source is like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.rbd.layout import Layout, is_note, wanted
from backends.rbd.parents import Parent, decode
from replicator.model import Property

ANSWER = bytes.fromhex("0101240000000100000000000000000000000c0000003130313833353936653834350400000000000000")
"""As Ceph 16.2 answered ``parent_get`` for a clone of snapshot 4 of image 10183596e845 in pool 1."""
NOTHING = bytes.fromhex("010118000000ffffffffffffffff0000000000000000feffffffffffffff")
"""And for an image that is no clone."""


def test_what_ceph_answers() -> None:
    assert decode(ANSWER) == Parent(1, "", "10183596e845", 4)
    assert decode(NOTHING) is None


@pytest.mark.parametrize("length", range(len(ANSWER)))
def test_an_answer_that_ends_too_early(length: int) -> None:
    assert decode(ANSWER[:length]) is None


@given(st.binary(max_size=64), st.integers(0, len(ANSWER)))
def test_any_answer(data: bytes, place: int) -> None:
    for answer in (data, ANSWER[:place] + data):
        found = decode(answer)
        assert found is None or isinstance(found.snapshot, int)


def test_an_answer_of_a_form_that_is_not_known() -> None:
    assert decode(b"\x03\x02" + ANSWER[2:]) is None


names = st.sampled_from(
    ["order", "stripe_unit", "stripe_count", "data_pool", "deep_flatten", "meta:owner", "meta:conf_x"]
)


@given(st.lists(st.builds(Property, names, st.text(max_size=12) | st.integers().map(str)), max_size=8))
def test_properties_of_a_peer(properties: list[Property]) -> None:
    """Whatever it says, what comes of it is a layout that may be asked for."""
    found = wanted(properties)
    layout = found.layout
    assert layout.order is None or 12 <= layout.order <= 25
    assert (layout.stripe_unit is None) == (layout.stripe_count is None)
    if layout.stripe_unit is not None and layout.order is not None:
        assert (1 << layout.order) % layout.stripe_unit == 0
    assert set(found.notes) <= {"owner"}


def test_what_is_tried_where_a_cluster_cannot() -> None:
    layout = Layout(16, 4096, 3, True, "fast")
    tried = [each.options for each in layout.simpler()]
    assert tried[0] == {"order": 16, "stripe_unit": 4096, "stripe_count": 3, "data_pool": "fast"}
    assert tried[1] == {"order": 16, "stripe_unit": 4096, "stripe_count": 3}
    assert tried[2] == {"order": 16, "stripe_unit": 65536, "stripe_count": 1}
    assert tried[3] == {}
    only = Layout(16, None, None, True, "fast", only_there=True)
    assert all(each.data_pool == "fast" for each in only.simpler())
    assert Layout().simpler() == (Layout(),)


@pytest.mark.parametrize(
    "key", ["conf_rbd_cache", "replicator.lineage", ".rbd", "rbd.csi.ceph.com/dek", "user", "owner ", ""]
)
def test_what_is_no_note(key: str) -> None:
    assert not is_note(key)


@pytest.mark.parametrize("key", ["owner", "description", "user.ticket", "label.a-b_c"])
def test_what_is_a_note(key: str) -> None:
    assert is_note(key)
