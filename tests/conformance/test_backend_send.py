"""Every backend of block streams: what it sends brings a copy of the base to the snapshot, and carries little else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import Range, SendRequest
from replicator.errors import Cancelled, NoSuchSnapshot, StaleResume
from replicator.model import Capability, ResumeState, StreamKind, Version, VersionKind, VersionRef, VolumeId
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, Stream
from tests.support.blocks import KEY, OTHER_KEY, Applied, Change, apply, changed, pattern
from tests.support.cases import BackendCase

STREAMS = [StreamKind.BLOCKS]
VM = VolumeId("store", "vm")
SIZE = 3 * CHUNK_SIZE + 5 * BLOCK_SIZE
HOLE = (CHUNK_SIZE, CHUNK_SIZE)
DATA = changed(pattern(SIZE), [HOLE])
GONE = VersionRef("gone", "0" * 32)


def take(case: BackendCase, name: str) -> Version:
    (version,) = case.backend.snapshot(("vm",), name)
    return version


def make(case: BackendCase, *rounds: list[Change] | int) -> list[Version]:
    """The volume with DATA, a snapshot; then a snapshot after each round of changes (or after a resize)."""
    case.create("vm", DATA)
    made = [take(case, "s0")]
    for number, changes in enumerate(rounds, 1):
        if isinstance(changes, int):
            case.resize("vm", changes)
        else:
            for offset, what in changes:
                case.write("vm", offset, bytes(what) if isinstance(what, int) else what)
        made.append(take(case, f"s{number}"))
    return made


def opened(case: BackendCase, base: Version | None, to: Version, key: str = KEY, **request: object) -> Stream:
    made = SendRequest(VM, base.ref if base else None, to.ref, key)
    return case.backend.send(replace(made, **request), Cancellation())  # type: ignore[arg-type]


def sent(case: BackendCase, base: Version | None, to: Version) -> Applied:
    """Send, apply, and see that the result is the snapshot."""
    old = case.read_snapshot("vm", base) if base else b""
    assert to.size is not None
    done = apply(opened(case, base, to), old, to.size)
    assert bytes(done.data) == case.read_snapshot("vm", to)
    return done


def test_a_full_stream_carries_everything_but_holes(case: BackendCase) -> None:
    (to,) = make(case)
    done = sent(case, None, to)
    assert bytes(done.data) == DATA
    assert done.written == SIZE - CHUNK_SIZE


def test_a_volume_that_is_one_hole(case: BackendCase) -> None:
    case.create("vm", b"")
    case.resize("vm", SIZE)
    to = take(case, "s0")
    assert sent(case, None, to).written == 0
    assert sent(case, None, to).data == bytes(SIZE)


@pytest.mark.parametrize("size", [0, 1, 512, 4095, BLOCK_SIZE + 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_sizes(case: BackendCase, size: int) -> None:
    case.create("vm", DATA[:size])
    sent(case, None, take(case, "s0"))


def test_an_increment_follows_the_change_and_not_the_size(case: BackendCase) -> None:
    base, to = make(case, [(5, b"x"), (2 * CHUNK_SIZE + 70_000, b"y" * 5000)])
    done = sent(case, base, to)
    assert 0 < done.written <= 4 * BLOCK_SIZE


def test_an_increment_over_several_snapshots(case: BackendCase) -> None:
    made = make(case, [(5, b"x")], [(CHUNK_SIZE + 9, b"in the hole")], [(5, b"z"), (SIZE - 1, b"!")])
    for index, base in enumerate(made):
        for to in made[index:]:
            sent(case, base, to)


def test_nothing_changed(case: BackendCase) -> None:
    base, to = make(case, [])
    done = sent(case, base, to)
    assert done.written == 0


def test_data_that_became_zeros(case: BackendCase) -> None:
    base, to = make(case, [(2 * CHUNK_SIZE, CHUNK_SIZE)])
    assert sent(case, base, to).written <= 2 * BLOCK_SIZE


def test_a_volume_that_grew(case: BackendCase) -> None:
    base, grown, written = make(case, SIZE + CHUNK_SIZE, [(SIZE + 5000, b"new")])
    assert sent(case, base, grown).written <= 2 * BLOCK_SIZE
    sent(case, grown, written)
    sent(case, base, written)
    assert grown.size == SIZE + CHUNK_SIZE


def test_a_volume_that_shrank(case: BackendCase) -> None:
    base, cut, again = make(case, CHUNK_SIZE // 2 + 100, SIZE)
    assert sent(case, base, cut).written <= 2 * BLOCK_SIZE
    sent(case, cut, again)
    done = sent(case, base, again)
    assert bytes(done.data) == DATA[: CHUNK_SIZE // 2 + 100].ljust(SIZE, b"\0")


def test_the_live_data_may_change_while_a_snapshot_is_sent(case: BackendCase) -> None:
    (to,) = make(case)
    stream = opened(case, None, to)
    chunks = iter(stream)
    first = next(chunks)
    assert len(first.data) < SIZE
    first.release()
    case.write("vm", 3 * CHUNK_SIZE, bytes(100))
    case.resize("vm", 50)
    for chunk in chunks:
        chunk.release()
    stream.close()
    sent(case, None, to)


def test_two_streams_at_once(case: BackendCase) -> None:
    base, to = make(case, [(5, b"x")])
    first, second = opened(case, base, to), opened(case, None, to, OTHER_KEY)
    assert bytes(apply(second, b"", SIZE, OTHER_KEY).data) == case.read_snapshot("vm", to)
    assert bytes(apply(first, DATA, SIZE).data) == case.read_snapshot("vm", to)


def test_a_stream_left_in_the_middle_holds_nothing(case: BackendCase) -> None:
    base, to = make(case, [(5, b"x")])
    stream = opened(case, base, to)
    next(iter(stream))
    stream.close()
    stream.close()
    opened(case, base, to).close()
    for version in (base, to):
        case.backend.destroy("vm", version.ref)


def test_the_estimate_is_near(case: BackendCase) -> None:
    base, to = make(case, [(2 * CHUNK_SIZE, b"y" * BLOCK_SIZE)])
    for start in (base, None):
        done = sent(case, start, to)
        for estimate in (
            opened(case, start, to).estimate,
            case.backend.estimate("vm", start.ref if start else None, to.ref),
        ):
            assert estimate is None or done.written <= estimate <= SIZE


def test_what_is_gone_cannot_be_sent(case: BackendCase) -> None:
    (to,) = make(case)
    with pytest.raises(NoSuchSnapshot), case.backend.send(SendRequest(VM, None, GONE, KEY), Cancellation()) as stream:
        list(stream)
    with pytest.raises(NoSuchSnapshot), case.backend.send(SendRequest(VM, GONE, to.ref, KEY), Cancellation()) as stream:
        list(stream)


def test_the_identity_counts_and_not_the_name(case: BackendCase) -> None:
    base, to = make(case, [(5, b"x")])
    renamed = SendRequest(VM, VersionRef("old-name", base.guid), VersionRef("other", to.guid), KEY)
    done = apply(case.backend.send(renamed, Cancellation()), DATA, SIZE)
    assert bytes(done.data) == case.read_snapshot("vm", to)
    with pytest.raises(NoSuchSnapshot):
        case.backend.send(replace(renamed, to=VersionRef(to.name, "f" * 32)), Cancellation()).close()


def test_cancelling(case: BackendCase) -> None:
    (to,) = make(case)
    cancel = Cancellation()
    with case.backend.send(SendRequest(VM, None, to.ref, KEY), cancel) as stream:
        chunks = iter(stream)
        next(chunks)
        cancel.cancel()
        with pytest.raises(Cancelled):
            for _ in chunks:
                pass


def test_a_bookmark_as_base(case: BackendCase) -> None:
    if Capability.BOOKMARKS not in case.backend.capabilities:
        return
    base, to = make(case, [(5, b"x")])
    mark = case.bookmark("vm", base)
    assert (mark.guid, mark.kind) == (base.guid, VersionKind.BOOKMARK)
    case.backend.destroy("vm", base.ref)
    state = case.backend.state("vm")
    assert state is not None
    assert mark in state.versions
    done = apply(opened(case, mark, to), DATA, SIZE)
    assert bytes(done.data) == case.read_snapshot("vm", to)
    assert done.written <= 2 * BLOCK_SIZE


# -- resumed streams


def resume_of(base: Version | None, to: Version, offset: int) -> ResumeState:
    return ResumeState(StreamKind.BLOCKS, to.guid, to.name, base.guid if base else None, offset)


@pytest.mark.parametrize(
    "offset", [0, 1, 5, 4096, BLOCK_SIZE, CHUNK_SIZE, CHUNK_SIZE + 77, 2 * CHUNK_SIZE - 1, SIZE - 1, SIZE]
)
@pytest.mark.parametrize("full", [True, False])
def test_a_resumed_stream_carries_the_rest(case: BackendCase, offset: int, full: bool) -> None:
    base, to = make(case, [(5, b"x" * 9000), (CHUNK_SIZE - 10, b"y" * 20), (SIZE - 2, b"zz")])
    start = None if full else base
    old = b"" if full else DATA
    target = case.read_snapshot("vm", to)
    half = target[:offset] + old[offset:].ljust(SIZE - offset, b"\0")
    done = apply(opened(case, start, to, resume=resume_of(start, to, offset)), half, SIZE)
    assert bytes(done.data) == target
    assert done.first >= offset


def test_a_resumed_stream_must_be_the_same_step(case: BackendCase) -> None:
    base, to, other = make(case, [(5, b"x")], [(6, b"y")])
    right = resume_of(base, to, 4096)
    for wrong in (
        replace(right, to_guid=other.guid),
        replace(right, base_guid=other.guid),
        replace(right, base_guid=None),
        replace(right, kind=StreamKind.NATIVE),
    ):
        with pytest.raises(StaleResume):
            opened(case, base, to, resume=wrong).close()


# -- ranges


def test_ranges_are_sent_whatever_changed(case: BackendCase) -> None:
    (to,) = make(case)
    ranges = (
        Range(0, BLOCK_SIZE),
        Range(CHUNK_SIZE - BLOCK_SIZE, 3 * BLOCK_SIZE),
        Range(SIZE - BLOCK_SIZE, 10 * BLOCK_SIZE),
        Range(SIZE + 10 * BLOCK_SIZE, BLOCK_SIZE),
    )
    garbage = b"\xee" * SIZE
    done = apply(opened(case, None, to, ranges=ranges), garbage, SIZE)
    expected = bytearray(garbage)
    for item in ranges:
        expected[item.offset : item.end] = DATA[item.offset : item.end]
    assert bytes(done.data) == bytes(expected)
    assert done.written <= 3 * BLOCK_SIZE  # the two blocks of the hole need not be written


def test_no_ranges_are_an_empty_stream(case: BackendCase) -> None:
    (to,) = make(case)
    assert apply(opened(case, None, to, ranges=()), b"", SIZE).extents == []
