"""The tree of errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import errors
from replicator.errors import (
    Cancelled,
    ConfigError,
    ConflictError,
    Problem,
    RemoteError,
    ReplicatorError,
    UsageError,
    error_classes,
    rebuild_error,
)

CLASSES = sorted(
    (
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, ReplicatorError) and each is not ReplicatorError
    ),
    key=lambda each: each.__name__,
)


def test_codes_are_unique_and_found() -> None:
    assert len({each.code for each in CLASSES}) == len(CLASSES)
    found = error_classes()
    assert all(found[each.code] is each for each in CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    lines = [line for line in errors.__doc__.splitlines() if "──" in line]
    drawn = {line.split("── ")[1].split()[0]: line for line in lines}
    assert set(drawn) == {each.__name__ for each in CLASSES}
    for each in CLASSES:
        line = drawn[each.__name__]
        assert ("retryable" in line) == each.retryable, line
        depth = line.index("──") // 4
        assert depth == len(each.__mro__) - len(ReplicatorError.__mro__), line
        assert ("exit 2" in line) <= (each.exit_code == 2), line


def test_what_is_said_and_what_is_advised() -> None:
    error = UsageError("the thing and the cause", hint="the remedy")
    assert (str(error), error.message, error.hint) == (
        "the thing and the cause",
        "the thing and the cause",
        "the remedy",
    )
    assert UsageError("x").hint == UsageError.default_hint
    assert UsageError("x", hint="").hint == ""


@pytest.mark.parametrize("each", CLASSES)
def test_every_error_crosses_the_wire(each: type[ReplicatorError]) -> None:
    again = rebuild_error(each.code, "message", "hint")
    assert type(again) is each
    assert (again.message, again.hint, again.retryable) == ("message", "hint", each.retryable)
    assert each.exit_code in (1, 2)


@given(st.text(), st.text(), st.text())
def test_any_code_of_a_peer_becomes_some_error(code: str, message: str, hint: str) -> None:
    error = rebuild_error(code, message, hint)
    assert isinstance(error, ReplicatorError)
    assert message in str(error)
    assert error.hint == hint
    if code not in {each.code for each in CLASSES}:
        assert isinstance(error, RemoteError)
        assert not error.retryable


def test_the_root_is_not_a_code_of_its_own() -> None:
    assert isinstance(rebuild_error(ReplicatorError.code, "m", "h"), RemoteError)


def test_a_configuration_error_has_every_problem() -> None:
    problems = [
        Problem("replicator.toml", "job.vms.keep", "is wrong", "write it right"),
        Problem("replicator.toml", "", "is empty", ""),
    ]
    error = ConfigError("2 problems", problems=iter(problems))
    assert error.problems == tuple(problems)
    assert [str(p) for p in error.problems] == [
        "replicator.toml: job.vms.keep: is wrong (write it right)",
        "replicator.toml: is empty",
    ]
    assert error.exit_code == 2


def test_a_conflict_has_its_kind() -> None:
    assert ConflictError("m", kind="diverged").kind == "diverged"
    assert not ConflictError("m").retryable
    assert Cancelled("m").retryable
