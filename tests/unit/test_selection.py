"""Globs and the volumes that they select."""

from __future__ import annotations

import fnmatch
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import InvalidName, ReplicatorError, UsageError
from replicator.model import Lineage, Role, VolumeId, VolumeInfo
from replicator.selection import Glob, Pattern, included_storages, overlap, select


def patterns(*texts: str) -> list[Pattern]:
    return [Pattern.parse(text) for text in texts]


def volume(name: str, role: Role | None = None) -> VolumeInfo:
    lineage = None if role is None else Lineage(str(uuid.uuid4()), role, 1)
    return VolumeInfo(VolumeId.parse(name), None, lineage)


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("*", "vm-100/disk-0", True),
        ("vm-*", "vm-100/disk-0", True),
        ("vm-*", "VM-100", False),
        ("vm-?", "vm-1", True),
        ("vm-?", "vm-10", False),
        ("vm-[13]", "vm-3", True),
        ("vm-[!13]", "vm-3", False),
        ("vm-[1-3]*", "vm-25", True),
        ("[]]", "]", True),
        ("[a-]", "-", True),
        ("vm.1", "vm-1", False),
        ("*a*b", "xxaxxb", True),
        ("*a*b", "xxaxxbc", False),
        ("$HOME^|()", "$HOME^|()", True),
    ],
)
def test_globs(glob: str, name: str, matches: bool) -> None:
    assert Glob(glob).matches(name) is matches


@given(st.text("ab/*?[]!-", min_size=1, max_size=8), st.text("ab/-", max_size=8))
def test_globs_are_those_of_the_standard_library(glob: str, name: str) -> None:
    try:
        ours = Glob(glob)
    except UsageError:
        return
    assert ours.matches(name) is fnmatch.fnmatchcase(name, glob)


def test_a_contrived_pattern_takes_no_time() -> None:
    assert not Glob("*a" * 40 + "b").matches("a" * 400)


@pytest.mark.parametrize("text", ["tank", "tank:", "!", "", ":vm", "ta nk:vm", "tank:vm[", "tank:" + "x" * 2000])
def test_patterns_refused(text: str) -> None:
    with pytest.raises(ReplicatorError) as caught:
        Pattern.parse(text)
    assert isinstance(caught.value, UsageError | InvalidName)
    assert caught.value.hint


def test_patterns_read_back() -> None:
    for text in ("tank:*", "!tank:vm-1", "!*-swap"):
        assert str(Pattern.parse(text)) == text


def test_select() -> None:
    volumes = [
        volume("tank:vm-2"),
        volume("tank:vm-1", Role.PRIMARY),
        volume("tank:vm-1-swap"),
        volume("tank:prox2/vm-7", Role.REPLICA),
        volume("other:vm-1"),
        volume("pool:vm-9"),
    ]
    chosen = select(patterns("!*-swap", "tank:*", "pool:vm-?"), volumes)
    assert [str(v.id) for v in chosen] == ["pool:vm-9", "tank:vm-1", "tank:vm-2"]
    assert select(patterns("tank:prox2/*"), volumes) == []
    assert select(patterns("!tank:*"), volumes) == []
    assert included_storages(patterns("!*-swap", "tank:*", "pool:vm-?", "tank:x")) == ["tank", "pool"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["tank:vm-1"], ["tank:vm-*"], "vm-1"),
        (["tank:vm-1"], ["tank:vm-2"], None),
        (["tank:a*"], ["tank:*z"], "az"),
        (["tank:*", "!tank:vm-1"], ["tank:vm-1"], None),
        (["tank:*", "!vm-1*disk"], ["tank:vm-1*disk"], None),
        (["tank:vm-1*", "!vm-1*disk"], ["tank:*disk"], None),
        (["tank:vm-[1-4]"], ["tank:vm-[5-9]"], None),
        (["tank:vm-[1-5]"], ["tank:vm-[5-9]"], "vm-5"),
        (["tank:vm-[!1-5]"], ["tank:vm-[1-6]"], "vm-6"),
        (["tank:vm-??"], ["tank:vm-?"], None),
        (["pool:*"], ["tank:*"], None),
    ],
)
def test_overlap(first: list[str], second: list[str], expected: str | None) -> None:
    assert overlap(patterns(*first), "tank", patterns(*second), "tank") == expected
    assert overlap(patterns(*second), "tank", patterns(*first), "tank") == expected


def test_overlap_of_two_storages() -> None:
    both = patterns("tank:vm-*", "pool:vm-1")
    assert overlap(both, "tank", both, "pool") == "vm-1"
    assert overlap(both, "pool", both, "other") is None


def test_overlap_of_everything_names_something() -> None:
    found = overlap(patterns("tank:*"), "tank", patterns("tank:*"), "tank")
    assert found


@settings(max_examples=300)
@given(
    st.lists(st.text("ab*?", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab*?", min_size=1, max_size=4), max_size=2),
    st.text("ab*?", min_size=1, max_size=4),
    st.text("abc", min_size=1, max_size=5),
)
def test_overlap_agrees_with_matching(includes: list[str], excludes: list[str], other: str, name: str) -> None:
    first = patterns(*(f"tank:{g}" for g in includes), *(f"!{g}" for g in excludes))
    second = patterns(f"tank:{other}")

    def chosen(side: list[Pattern], candidate: str) -> bool:
        return bool(select(side, [volume(f"tank:{candidate}")]))

    found = overlap(first, "tank", second, "tank")
    if found is None:
        assert not (chosen(first, name) and chosen(second, name))
    else:
        assert chosen(first, found)
        assert chosen(second, found)
