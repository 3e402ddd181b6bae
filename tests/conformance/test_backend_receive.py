"""Every backend of block streams: a version appears when all of it is durable, or not at all; what was interrupted can
be continued."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.cancellation import Cancellation
from replicator.errors import (
    Cancelled,
    ConnectionLost,
    NotAReplica,
    ProtocolError,
    ReplicatorError,
    StaleResume,
    VolumeBusy,
)
from replicator.model import Lineage, ResumeState, Role, StreamKind
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, MAX_EXTENTS
from tests.conformance.replicas import (
    DATA,
    PRIMARY,
    SIZE,
    TAG,
    VM,
    asked,
    first,
    interrupted,
    receive,
    rest_of,
    state_of,
)
from tests.support.blocks import (
    Change,
    changed,
    full_chunks,
    make_chunk,
    make_stream,
    make_version,
    pattern,
    untouched_stream,
)
from tests.support.cases import BackendCase

STREAMS = [StreamKind.BLOCKS]

# -- what arrives


def test_a_first_copy(case: BackendCase) -> None:
    to = make_version("one", SIZE)
    made = receive(case, asked(to, hold=TAG), make_stream(*full_chunks(DATA)))
    case.reopen()
    state = state_of(case)
    assert state.versions == (made,)
    assert (made.name, made.guid, made.created, made.size, made.holds) == ("one", to.guid, to.created, SIZE, (TAG,))
    assert state.lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    assert (state.id, state.size, state.resume, state.head_changed) == (VM, SIZE, None, False)
    assert case.read_snapshot(VM.name, made) == DATA
    assert [v.id for v in case.backend.volumes()] == [VM]


def test_what_a_first_copy_does_not_carry_is_zero(case: BackendCase) -> None:
    made = receive(case, asked(make_version("one", SIZE)), make_stream(make_chunk((5, b"x"), (BLOCK_SIZE, 99))))
    assert case.read_snapshot(VM.name, made) == changed(bytes(SIZE), [(5, b"x")])


@pytest.mark.parametrize("size", [0, 1, 4097, CHUNK_SIZE + 3])
def test_a_first_copy_without_any_change(case: BackendCase, size: int) -> None:
    made = receive(case, asked(make_version("one", size)), make_stream())
    assert case.read_snapshot(VM.name, made) == bytes(size)


CHANGES: list[Change] = [
    (5, b"x" * 5000),
    (BLOCK_SIZE + 3, b"in the hole"),
    (3 * BLOCK_SIZE, BLOCK_SIZE),
    (SIZE - 1, b"!"),
]


def test_an_increment(case: BackendCase) -> None:
    one = first(case)
    two = receive(case, asked(make_version("two", SIZE), one), make_stream(*(make_chunk(c) for c in CHANGES)))
    case.reopen()
    assert case.read_snapshot(VM.name, two) == changed(DATA, CHANGES)
    assert case.read_snapshot(VM.name, one) == DATA
    assert state_of(case).versions == (one, two)
    assert two.position > one.position
    assert not state_of(case).head_changed


def test_an_increment_without_any_change(case: BackendCase) -> None:
    two = receive(case, asked(make_version("two", SIZE), first(case)), make_stream())
    assert case.read_snapshot(VM.name, two) == DATA


def test_a_chunk_may_have_very_many_extents(case: BackendCase) -> None:
    changes: list[Change] = [(n * 16, b"abcdefgh"[: 1 + n % 8]) for n in range(MAX_EXTENTS)]
    two = receive(case, asked(make_version("two", SIZE), first(case)), make_stream(make_chunk(*changes)))
    assert case.read_snapshot(VM.name, two) == changed(DATA, changes)


def test_growing_and_shrinking(case: BackendCase) -> None:
    one = first(case)
    grown = receive(case, asked(make_version("two", SIZE + 5000), one), make_stream(make_chunk((SIZE + 4999, b"!"))))
    assert case.read_snapshot(VM.name, grown) == DATA + bytes(4999) + b"!"
    cut = receive(case, asked(make_version("three", 100), grown), make_stream(make_chunk((99, b"?"))))
    assert case.read_snapshot(VM.name, cut) == DATA[:99] + b"?"
    again = receive(case, asked(make_version("four", SIZE), cut), make_stream())
    assert case.read_snapshot(VM.name, again) == (DATA[:99] + b"?").ljust(SIZE, b"\0")
    assert [v.size for v in state_of(case).versions] == [SIZE, SIZE + 5000, 100, SIZE]
    assert case.read_snapshot(VM.name, one) == DATA


def test_an_older_version_can_be_the_base(case: BackendCase) -> None:
    one = first(case)
    receive(case, asked(make_version("two", SIZE), one), make_stream(make_chunk((0, b"two"))))
    three = receive(case, asked(make_version("three", SIZE), one), make_stream(make_chunk((9, b"three"))))
    assert case.read_snapshot(VM.name, three) == changed(DATA, [(9, b"three")])


def test_nothing_is_listed_before_all_of_it_is_there(case: BackendCase) -> None:
    one = first(case)
    seen = []
    look = lambda: seen.append(state_of(case).versions)  # noqa: E731
    two = receive(case, asked(make_version("two", SIZE), one), make_stream(*full_chunks(DATA), meanwhile=look))
    assert set(seen) == {(one,)}
    assert len(seen) > 4
    assert state_of(case).versions == (one, two)


def test_a_lost_confirmation(case: BackendCase) -> None:
    """The version is there: the stream is not read, and the hold is set nevertheless."""
    to = make_version("one", SIZE)
    made = receive(case, asked(to), make_stream(*full_chunks(DATA)))
    assert made.holds == ()
    again = receive(case, asked(to, hold=TAG), untouched_stream())
    assert again.guid == made.guid
    case.reopen()
    assert state_of(case).versions == (replace(made, holds=(TAG,)),)
    assert receive(case, asked(replace(to, name="renamed-meanwhile")), untouched_stream()).name == "one"


def test_a_lost_confirmation_of_a_resumed_step(case: BackendCase) -> None:
    to = make_version("one", SIZE)
    chunks = full_chunks(DATA)
    with pytest.raises(ConnectionLost):
        receive(case, asked(to), make_stream(*chunks[:2], then=ConnectionLost("cut")))
    resume = state_of(case).resume
    assert resume is not None
    rest = [c for c in chunks if c.extents[0].offset >= resume.offset]
    receive(case, asked(to, resume=resume), make_stream(*rest))
    assert receive(case, asked(to, resume=resume), untouched_stream()).guid == to.guid
    assert case.read_snapshot(VM.name, to) == DATA


# -- interruptions


@pytest.mark.parametrize("error", [ConnectionLost("cut"), OSError("the peer is gone")])
@pytest.mark.parametrize("arrived", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("full", [True, False])
def test_an_interrupted_receive_is_continued(case: BackendCase, full: bool, arrived: int, error: Exception) -> None:
    base = None if full else first(case)
    to, target = make_version("two", SIZE), pattern(SIZE, seed=7)
    chunks = full_chunks(target)
    with pytest.raises((ReplicatorError, OSError)):
        receive(case, asked(to, base), make_stream(*chunks[:arrived], then=error))
    case.reopen()
    state = state_of(case)
    assert state.versions == (() if base is None else (base,))
    assert state.lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    assert not state.head_changed
    resume = state.resume
    if resume is None:  # a storage may forget what is not worth keeping, but not more
        assert arrived == 0
        made = receive(case, asked(to, base), make_stream(*chunks))
    else:
        guid = base.guid if base else None
        assert (resume.kind, resume.to_guid, resume.to_name) == (StreamKind.BLOCKS, to.guid, "two")
        assert resume.base_guid == guid
        assert 0 <= resume.offset <= (chunks[arrived - 1].end if arrived else 0)
        made = receive(case, asked(to, base, resume=resume, hold=TAG), rest_of(target, resume))
    assert case.read_snapshot(VM.name, made) == target
    assert state_of(case).resume is None
    assert state_of(case).versions[-1] == made


def test_progress_is_durable_in_the_end(case: BackendCase) -> None:
    """A receive that is cut after much data does not begin from the start."""
    target = pattern(64 * BLOCK_SIZE, seed=3)
    to = make_version("one", len(target))
    with pytest.raises(ConnectionLost):
        receive(case, asked(to), make_stream(*full_chunks(target), then=ConnectionLost("cut")))
    case.reopen()
    resume = state_of(case).resume
    assert resume is not None
    assert resume.offset > 0


def test_a_receive_that_is_interrupted_again_and_again(case: BackendCase) -> None:
    one = first(case)
    to, target = make_version("two", SIZE), pattern(SIZE, seed=9)
    resume: ResumeState | None = None
    for end in range(BLOCK_SIZE, SIZE, BLOCK_SIZE):
        start = resume.offset if resume else 0
        chunk = make_chunk((start, target[start:end]))
        with pytest.raises(ConnectionLost):
            receive(case, asked(to, one, resume=resume), make_stream(chunk, then=ConnectionLost("cut")))
        case.reopen()
        resume = state_of(case).resume
        assert resume is not None
        assert resume.offset >= start
    assert resume is not None
    made = receive(case, asked(to, one, resume=resume), rest_of(target, resume))
    assert case.read_snapshot(VM.name, made) == target


def test_a_fresh_start_discards_what_was_begun(case: BackendCase) -> None:
    one = first(case)
    to = make_version("two", SIZE)
    interrupted(case, one, to, b"\xee" * SIZE)
    made = receive(case, asked(to, one), make_stream(make_chunk((SIZE - 1, b"!"))))
    assert case.read_snapshot(VM.name, made) == changed(DATA, [(SIZE - 1, b"!")])
    assert state_of(case).resume is None


def test_another_version_discards_what_was_begun(case: BackendCase) -> None:
    one = first(case)
    interrupted(case, one, make_version("two", SIZE), b"\xee" * SIZE)
    made = receive(case, asked(make_version("three", SIZE), one), make_stream())
    assert case.read_snapshot(VM.name, made) == DATA
    assert state_of(case).resume is None


def test_discarding(case: BackendCase) -> None:
    one = first(case)
    interrupted(case, one, make_version("two", SIZE), DATA)
    for _ in range(2):
        case.backend.abort_receive(VM.name)
        case.reopen()
        assert state_of(case).resume is None
    assert state_of(case).versions == (one,)
    assert case.read_snapshot(VM.name, one) == DATA
    case.backend.abort_receive("missing")
    assert case.backend.state("missing") is None


def test_discarding_a_first_copy(case: BackendCase) -> None:
    interrupted(case, None, make_version("one", SIZE), DATA)
    case.backend.abort_receive(VM.name)
    assert case.read_snapshot(VM.name, first(case)) == DATA


def test_a_resume_that_fits_nothing(case: BackendCase) -> None:
    one = first(case)
    to = make_version("two", SIZE)
    none = ResumeState(StreamKind.BLOCKS, to.guid, to.name, one.guid, BLOCK_SIZE)
    with pytest.raises(StaleResume):
        receive(case, asked(to, one, resume=none), make_stream(*full_chunks(DATA)[1:]))
    right = interrupted(case, one, to, DATA)
    for wrong in (
        replace(right, offset=right.offset + 1),
        replace(right, to_guid="f" * 32),
        replace(right, base_guid=None),
        replace(right, kind=StreamKind.NATIVE),
    ):
        with pytest.raises(StaleResume):
            receive(case, asked(to, one, resume=wrong), make_stream(*full_chunks(DATA)))
    assert state_of(case).versions == (one,)
    receive(case, asked(to, one, resume=right), rest_of(DATA, right))


def test_a_resumed_stream_may_not_go_back(case: BackendCase) -> None:
    one = first(case)
    to = make_version("two", SIZE)
    resume = interrupted(case, one, to, DATA)
    assert resume.offset > 0
    with pytest.raises(ProtocolError):
        receive(case, asked(to, one, resume=resume), make_stream(make_chunk((0, b"back"))))


def test_cancelling(case: BackendCase) -> None:
    one = first(case)
    cancel = Cancellation()
    moments = iter(range(10))

    def cancel_later() -> None:
        if next(moments) == 2:
            cancel.cancel()

    stream = make_stream(*full_chunks(DATA), meanwhile=cancel_later)
    with pytest.raises(Cancelled):
        receive(case, asked(make_version("two", SIZE), one), stream, cancel)
    assert state_of(case).versions == (one,)
    assert state_of(case).resume is not None


def test_cancelling_at_the_end(case: BackendCase) -> None:
    """All data is there, but whoever cancelled was told that nothing was done: nothing may appear afterwards."""
    cancel = Cancellation()
    stream = make_stream(*full_chunks(DATA), make_chunk((SIZE - 1, b"!")))
    cancel.cancel()
    with pytest.raises(Cancelled):
        receive(case, asked(make_version("one", SIZE)), stream, cancel)
    state = case.backend.state(VM.name)
    assert state is None or state.versions == ()


# -- removing it


def test_a_replica_is_removed_once_it_has_no_version(case: BackendCase) -> None:
    one = first(case)
    interrupted(case, one, make_version("two", SIZE), pattern(SIZE, seed=2))
    with pytest.raises(VolumeBusy):
        case.backend.remove(VM.name)
    case.backend.destroy(VM.name, one.ref)
    case.backend.remove(VM.name)
    case.reopen()
    assert case.backend.state(VM.name) is None
    assert case.backend.volumes() == ()
    case.backend.remove(VM.name)
    again = first(case)
    assert case.read_snapshot(VM.name, again) == DATA


def test_only_a_replica_is_removed(case: BackendCase) -> None:
    case.create("vm", DATA)
    for lineage in (None, PRIMARY):
        if lineage is not None:
            case.backend.set_lineage("vm", lineage)
        with pytest.raises(NotAReplica):
            case.backend.remove("vm")
    assert case.read("vm") == DATA
