"""Hello, errors and heartbeats as bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import NoSpace, ProtocolError, RemoteError, ReplicatorError, error_classes
from transport.frames import CAPS, FrameType
from transport.payloads import ClockFilter, Hello, decode_error, encode_error

SECOND = 10**9


@pytest.mark.parametrize("code", sorted(set(error_classes()) - {"error"}))
def test_every_error_crosses_with_its_class(code: str) -> None:
    error = error_classes()[code]("the thing: the cause", hint="the remedy")
    found = decode_error(encode_error(error), "one")
    assert (type(found), found.message, found.hint) == (type(error), error.message, error.hint)


def test_a_long_error_is_cut_to_its_frame() -> None:
    assert len(encode_error(NoSpace("\N{SNOWMAN}" * 100_000, hint="x" * 100_000))) <= CAPS[FrameType.ERROR]


def test_an_error_of_a_later_version_keeps_its_text() -> None:
    found = decode_error(b'{"code": "later", "message": "m", "hint": "h"}', "one")
    assert isinstance(found, RemoteError)
    assert "m" in found.message
    assert "later" in found.message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_error_of_some_kind(data: bytes) -> None:
    assert isinstance(decode_error(data, "one"), ReplicatorError)
    with pytest.raises(ProtocolError):
        Hello.decode(data)


@pytest.mark.parametrize(
    "facts",
    [[], {"node": "a"}, {"node": 1, "version": 1, "features": []}, {"node": "a", "version": 1, "features": [1]}],
)
def test_hellos_with_wrong_facts(facts: object) -> None:
    with pytest.raises(ProtocolError):
        Hello.decode(json.dumps(facts).encode())


def test_a_hello_of_another_version_says_what_to_do() -> None:
    with pytest.raises(ProtocolError, match="speaks version 2") as raised:
        Hello.decode(Hello("one", version=2).encode())
    assert "same version" in raised.value.hint


def round_trip(clock: ClockFilter) -> float:
    assert clock.best is not None
    return clock.best.round_trip


def test_round_trip_and_clock_difference() -> None:
    clock = ClockFilter(longest=30)
    # Out in 2 s, 1 s there, back in 2 s; the peer is 100 s ahead.
    clock.learn((0, 102 * SECOND, 103 * SECOND), 0, 5 * SECOND)
    assert clock.best is not None
    assert (clock.best.round_trip, clock.best.clock_difference) == (4.0, 100.0)


def test_the_quickest_of_the_last_eight_counts() -> None:
    clock = ClockFilter(longest=30)
    clock.learn((0, 0, 0), 0, SECOND)
    clock.learn((0, 5 * SECOND, 5 * SECOND), 0, 9 * SECOND)
    assert round_trip(clock) == 1.0
    for _ in range(7):
        clock.learn((0, 0, 0), 0, 3 * SECOND)
    assert round_trip(clock) == 3.0


@pytest.mark.parametrize(
    ("times", "pinged", "now"),
    [((1, 2, 3), 0, 5), ((0, 0, 9), 0, 5), ((0, 0, 0), 0, 31 * SECOND)],
    ids=["of another ping", "a clock went back", "too long"],
)
def test_what_tells_nothing_is_ignored(times: tuple[int, int, int], pinged: int, now: int) -> None:
    clock = ClockFilter(longest=30)
    clock.learn(times, pinged, now)
    assert clock.best is None
