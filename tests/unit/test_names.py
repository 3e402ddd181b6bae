"""Names at the border."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import names
from replicator.errors import InvalidName

check_job = partial(names.check_word, "job name")

GOOD: list[tuple[Callable[[str], str], list[str]]] = [
    (names.check_node, ["a", "prox1", "prox-1.example.org", "1", "a" * 63]),
    (check_job, ["a", "vms", "VM_1.x-y", "0", "a" * 63]),
    (names.check_volume, ["vm", "prox1/vm-100", "a/b/c", "ä ö", "x" * 200, "..x", "x..", ".hidden", "日本", "a:b"]),
    (names.check_snapshot, ["daily", "replicator_vms_20261120T081710.123Z", "a b", "ä", "x" * 200, "a:b"]),
    (names.check_tag, ["replicator:vms:prox2:backup", "a", "a" * 200, "A_b.c=d+e"]),
]
BAD: list[tuple[Callable[[str], str], list[str]]] = [
    (names.check_node, ["", "A", "-a", "a-", "a..b", ".a", "a" * 64, "a_b", "a b", "a\n", "ä"]),
    (check_job, ["", "_a", "-a", ".a", "a" * 64, "a b", "a/b", "a:b", "ä", "a\n"]),
    (
        names.check_volume,
        [
            *(
                "",
                "/",
                "/a",
                "a/",
                "a//b",
                ".",
                "..",
                "a/..",
                "../a",
                "a/./b",
                " a",
                "a ",
                "a /b",
                "a@b",
                "a#b",
                "a\\b",
            ),
            *("a\0b", "a\nb", "a\x7f", "a\u2028b", "\ud800", "x" * 201, "ä" * 101, "/".join(["x" * 100] * 6)),
        ],
    ),
    (
        names.check_snapshot,
        ["", ".", "..", ".a", " a", "a ", "a/b", "a@b", "a#b", "a\\b", "a\0", "a\n", "x" * 201, "ä" * 101, "\udfff"],
    ),
    (names.check_tag, ["", ":a", "a b", "a/b", "a\n", "a" * 201, "ä"]),
]


@pytest.mark.parametrize(("check", "name"), [(check, name) for check, good in GOOD for name in good])
def test_good_names_are_returned(check: Callable[[str], str], name: str) -> None:
    assert check(name) == name


@pytest.mark.parametrize(("check", "name"), [(check, name) for check, bad in BAD for name in bad])
def test_bad_names_are_refused_with_a_remedy(check: Callable[[str], str], name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check(name)
    assert caught.value.hint
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()  # safe to write into a log or a terminal


@given(st.text(max_size=300))
def test_no_volume_name_leads_out_of_a_directory(name: str) -> None:
    try:
        names.check_volume(name)
    except InvalidName:
        return
    path = PurePosixPath("/root") / name
    assert path.is_relative_to("/root")
    assert ".." not in path.parts
    assert str(path) == f"/root/{name}"
    assert "\0" not in name


@given(st.text(max_size=300))
def test_no_snapshot_name_is_more_than_one_component(name: str) -> None:
    try:
        names.check_snapshot(name)
    except InvalidName:
        return
    assert PurePosixPath("/root", name).parent == PurePosixPath("/root")
    assert not name.startswith(".")
