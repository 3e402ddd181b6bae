"""A replica of a native storage is put back to what both sides have, and continues from there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import NoSpace, PeerUnreachable, ReplicatorError, Unsupported
from replicator.mending import Mender, Results
from replicator.model import (
    Capability,
    Lineage,
    Origin,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.planning import Intermediates, SendPolicy
from replicator.rejoining import rejoin
from replicator.replication import Options, Pair
from replicator.runs import Runner
from replicator.settings import Job
from replicator.streams import CHUNK_SIZE, Chunk, ChunkStream, NativeChunk, Stream
from replicator.surveys import Survey
from replicator.tasks import Task
from replicator.tracker import ReplicaKey, Tracker
from replicator.verification import Mismatch, Resync
from tests.support.versions import LINEAGE, SOURCE, TAG, TARGET, snap, source_state, target_state

ONE, TWO, THREE = snap(1), snap(2), snap(3)
OWN = snap(9, name="own", guid="own", position=9)


class Side:
    """One side: its state, and what was asked of it."""

    def __init__(self, node: str, state: VolumeState) -> None:
        self.node = node
        self.now: VolumeState | None = state
        self.received: list[ReceiveRequest] = []
        self.asked: list[str] = []
        self.aside: dict[VolumeId, VolumeState] = {}
        self.cut: ReplicatorError | None = None
        self.sending: ReplicatorError | None = None
        self.sends_first = 0
        self.opened = 0
        self.room = 0, 0
        self.sizes: list[int] = []

    def volumes(self, _storage: str) -> tuple[VolumeInfo, ...]:
        return tuple(VolumeInfo(volume, None, state.lineage, state.origin) for volume, state in self.aside.items())

    def snapshot(self, version: Version) -> None:
        assert self.now is not None
        self.now = replace(self.now, versions=(*self.now.versions, version))

    def estimate(self, *_asked: object) -> int:
        return 5 << 30

    def storage(self, name: str) -> StorageInfo:
        return StorageInfo(name, "zfs", StreamKind.NATIVE, Capability.SEND | Capability.RECEIVE, *self.room, "")

    def state(self, volume: VolumeId) -> VolumeState | None:
        return self.aside.get(volume, self.now)

    def ensure_primary(self, _volume: object) -> Lineage:
        return Lineage(LINEAGE, Role.PRIMARY, 1)

    def adopt(self, _volume: object, _lineage: Lineage) -> None:
        self.asked.append("adopt")

    def abort_receive(self, _volume: object) -> None:
        self.asked.append("abort")

    def hold(self, _volume: object, _version: VersionRef, _tag: str) -> None:
        pass

    release = hold

    def send(self, request: SendRequest, _cancel: Cancellation) -> Stream:
        def chunks() -> Iterator[Chunk]:
            for _ in range(self.sends_first):
                yield NativeChunk(bytes(CHUNK_SIZE // 4))
            if self.sending is not None:
                raise self.sending
            yield NativeChunk(request.to.guid.encode())

        def close() -> None:
            self.opened -= 1

        self.opened += 1
        return ChunkStream(StreamKind.NATIVE, chunks(), on_close=close)

    def receive(self, request: ReceiveRequest, stream: Stream, _cancel: Cancellation) -> Version:
        self.sizes.append(sum(chunk.length for chunk in stream))
        self.received.append(request)
        cut, self.cut = self.cut, None
        kept: tuple[Version, ...] = self.now.versions if self.now is not None else ()
        if request.mode is ReceiveMode.REBUILD:
            assert self.now is not None
            volume = replace(request.volume, name=f"{request.volume.name}-{request.aside}")
            guids = [v.guid for v in kept]
            origin = Origin(request.volume, request.base.name) if request.base else None
            left = guids.index(request.base.guid) + 1 if request.base else 0
            self.aside[volume] = replace(self.now, id=volume, versions=kept[left:], origin=origin)
            kept = kept[:left]
        if cut is not None:
            self.now = None if not kept else replace(target_state(*kept), resume=None)
            raise cut
        self.now = replace(target_state(*kept, request.to), head_changed=False)
        return request.to


def ignore(_: object) -> None:
    pass


def run(source: VolumeState, target: VolumeState) -> tuple[Side, tuple[str, ...]]:
    left, right = Side("prox1", source), Side("prox2", target)
    pair = Pair(cast(Endpoint, left), SOURCE, cast(Endpoint, right), TARGET, TAG)
    done = rejoin(pair, source.versions[-1], Options(SendPolicy()), observer=ignore, cancel=Cancellation())
    assert right.asked == ["adopt", "abort"]
    assert right.now is not None
    assert right.now.versions[-1].guid == source.versions[-1].guid
    return right, done.aside


def test_what_only_the_replica_has_is_kept_and_the_difference_sent() -> None:
    right, aside = run(source_state(ONE, TWO, THREE), target_state(ONE, OWN, head_changed=True))
    (request,) = right.received
    assert (request.mode, request.base, request.to.guid) == (ReceiveMode.REBUILD, ONE.ref, THREE.guid)
    assert request.hold == TAG
    assert aside == (f"{TARGET}-{request.aside}",)


def test_what_was_kept_already_is_found_where_its_storage_puts_it() -> None:
    kept = snap(8, name="diverged-20260101T000000.000Z", guid="kept", position=8)
    right, aside = run(source_state(ONE, TWO), target_state(ONE, kept))
    assert [r.aside for r in right.received] == [kept.name]
    assert aside == (f"{TARGET}-{kept.name}",)


def test_live_data_alone_is_kept_too() -> None:
    right, aside = run(source_state(ONE, TWO), target_state(ONE, head_changed=True))
    assert [r.mode for r in right.received] == [ReceiveMode.REBUILD]
    assert len(aside) == 1


def test_without_anything_in_common_everything_is_sent() -> None:
    right, aside = run(source_state(ONE, TWO), target_state(OWN))
    assert [(r.mode, r.base) for r in right.received] == [(ReceiveMode.REBUILD, None)]
    assert len(aside) == 1


def test_a_cut_of_a_whole_copy_is_continued_at_once_as_a_first_copy() -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target_state(ONE))
    right.cut = PeerUnreachable("cut", hint="")
    pair = Pair(cast(Endpoint, left), SOURCE, cast(Endpoint, right), TARGET, TAG)
    done = rejoin(pair, TWO, Options(SendPolicy()), observer=ignore, cancel=Cancellation(), anew=True)
    assert [(r.mode, r.base) for r in right.received][:2] == [(ReceiveMode.REBUILD, None), (ReceiveMode.REPLICA, None)]
    assert len(right.aside) == 1
    assert done.made_equal


def test_a_cut_before_anything_was_kept_aside_does_not_continue_the_old_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target_state(ONE))

    def refuse(_request: object, _stream: object, _cancel: object) -> Version:
        raise PeerUnreachable("cut", hint="")

    monkeypatch.setattr(right, "receive", refuse)
    pair = Pair(cast(Endpoint, left), SOURCE, cast(Endpoint, right), TARGET, TAG)
    with pytest.raises(PeerUnreachable):
        rejoin(pair, TWO, Options(SendPolicy()), observer=ignore, cancel=Cancellation(), anew=True)
    assert right.now == target_state(ONE)


WAYS = pytest.mark.parametrize(
    ("target", "anew"),
    [
        (target_state(ONE), True),
        (target_state(OWN), False),
        (target_state(ONE, OWN), False),
        (target_state(ONE, head_changed=True), False),
    ],
)


def tried(left: Side, right: Side, *, anew: bool) -> None:
    pair = Pair(cast(Endpoint, left), SOURCE, cast(Endpoint, right), TARGET, TAG)
    rejoin(pair, TWO, Options(SendPolicy()), observer=ignore, cancel=Cancellation(), anew=anew)


@WAYS
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("error", [Unsupported("no key", hint=""), PeerUnreachable("gone", hint="")])
def test_nothing_is_asked_of_the_target_before_the_source_begins_to_send(
    target: VolumeState, anew: bool, first: int, error: ReplicatorError
) -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target)
    left.sending, left.sends_first = error, first
    with pytest.raises(type(error)):
        tried(left, right, anew=anew)
    assert (right.asked, right.received, right.now) == ([], [], target)
    assert left.opened == 0


@WAYS
def test_the_stream_that_began_is_the_one_that_is_taken_in_full(target: VolumeState, anew: bool) -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target)
    left.sends_first = 9
    tried(left, right, anew=anew)
    assert right.asked == ["adopt", "abort"]
    assert right.sizes == [9 * CHUNK_SIZE // 4 + len(TWO.guid)]
    assert left.opened == 0


def test_what_does_not_fit_is_refused_before_anything_is_done() -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target_state(ONE))
    right.room = 8 << 30, 4 << 30
    with pytest.raises(NoSpace, match=r"about 5\.00 GiB.*4\.00 GiB are free") as raised:
        tried(left, right, anew=True)
    assert "make room" in raised.value.hint
    assert (right.asked, right.received, right.now) == ([], [], target_state(ONE))
    right.room = 8 << 30, 6 << 30
    tried(left, right, anew=True)
    assert len(right.received) == 1


def test_what_continues_needs_no_room_for_all() -> None:
    left, right = Side("prox1", source_state(ONE, TWO)), Side("prox2", target_state(ONE, OWN))
    right.room = 8 << 30, 4 << 30
    tried(left, right, anew=False)
    assert [request.base for request in right.received] == [ONE.ref]


# -- what a resync decides, says, and what becomes of the alarm


class Site:
    """A replica, and what is known of it."""

    def __init__(self, *there: Version, mismatch: str = "") -> None:
        self.source, self.target = Side("prox1", source_state(ONE, TWO)), Side("prox2", target_state(*there))
        self.pair = Pair(cast(Endpoint, self.source), SOURCE, cast(Endpoint, self.target), TARGET, TAG)
        self.task = Task(cast(Job, SimpleNamespace(name="vms")), ReplicaKey("vms", str(SOURCE), "b"), self.pair, "b")
        self.tracker = Tracker()
        if mismatch:
            self.tracker.recall(self.task.key, mismatches=(Mismatch(mismatch, 64),))
        self.results: list[Resync] = []
        self.known: list[tuple[Mismatch, ...]] = []
        self._numbers = itertools.count(3)
        self.turns = SimpleNamespace(exclusive=lambda _task, _cancel: nullcontext())
        self.surveys = SimpleNamespace(of=lambda _task: Survey(None, None, 0))
        self.snapshots = SimpleNamespace(take=self._take)

    def _take(
        self, _job: Job, _volumes: object, _cancel: Cancellation, *, at: object
    ) -> dict[VolumeId, ReplicatorError]:
        assert at is None, "its roles are as they always were"
        self.source.snapshot(snap(next(self._numbers)))
        return {}

    def mender(self) -> Mender:
        results = SimpleNamespace(
            resynced=lambda result, _job: self.results.append(result),
            known=lambda _key, known: self.known.append(known),
        )
        return Mender(cast(Runner, self), cast(Results, results))

    def resync(self, *, full: bool = False) -> Resync:
        return self.mender().resync(self.task, full, lambda _: None, Cancellation())

    def told(self, *, full: bool = False) -> str:
        return "\n".join(self.mender().effects(self.task, full))

    def alarm(self) -> bool:
        return bool(self.tracker.get(self.task.key).mismatches)

    # what Mender asks of a runner

    def options(self, _task: Task) -> Options:
        return Options(SendPolicy(Intermediates.NEWEST, "vms"))

    healed = Runner.healed

    def _clock(self) -> datetime:
        return datetime.now(UTC)


def test_a_damaged_replica_is_kept_aside_whole_and_everything_is_sent() -> None:
    site = Site(ONE, TWO, mismatch=TWO.name)
    told = site.told()
    assert f"64 B of {TWO.name}: all of prox2/{TARGET} is kept aside as prox2/{TARGET}-diverged-<time>" in told
    assert "everything is sent anew (about 5.00 GiB; 0 B are free there, which is too little)" in told
    done = site.resync()
    assert [(r.mode, r.base) for r in site.target.received] == [(ReceiveMode.REBUILD, None)]
    ((volume, kept),) = site.target.aside.items()
    assert done.aside == (str(volume),)
    assert kept.versions == (ONE, TWO)
    assert done.made_equal
    assert not site.alarm()
    assert site.known == [()]


@pytest.mark.parametrize("there", [(ONE, TWO), (ONE, OWN)])
def test_full_sends_everything_whatever_is_known(there: tuple[Version, ...]) -> None:
    site = Site(*there)
    assert "everything is sent anew" not in site.told().replace("with --full everything is sent anew", "")
    assert "everything is to be sent anew: all of" in site.told(full=True)
    assert site.resync(full=True).made_equal
    assert [r.base for r in site.target.received] == [None]


def test_a_replica_of_the_other_form_is_kept_aside_whole() -> None:
    site = Site(ONE, TWO)
    assert site.source.now is not None
    assert site.target.now is not None
    site.source.now = replace(site.source.now, form="plain")
    site.target.now = replace(site.target.now, form="raw")
    assert "made of raw streams and the source sends plain ones now, which cannot be mixed: all of" in site.told()
    assert site.resync().made_equal
    assert [r.base for r in site.target.received] == [None]


def test_an_ordinary_resync_claims_nothing_about_what_both_have() -> None:
    site = Site(ONE, OWN)
    assert "nobody looks whether what both have is equal" in site.told()
    assert not site.resync().made_equal
    site.tracker.recall(site.task.key, mismatches=(Mismatch("that nobody made right", 1),))
    site.mender()._runner.healed(site.task, made_equal=False)
    assert site.alarm()


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_copy_that_was_cut_off_is_continued_by_the_next_resync(full: bool) -> None:
    site = Site(ONE, TWO, mismatch=TWO.name)
    site.target.cut = Unsupported("cut for good", hint="")
    with pytest.raises(Unsupported):
        site.resync(full=full)
    assert site.alarm()
    assert "has nothing yet" in site.told(full=full)
    done = site.resync(full=full)
    assert len(site.target.aside) == 1, "kept aside once"
    assert done.made_equal
    assert not site.alarm()


def test_a_whole_copy_of_which_only_the_confirmation_was_lost_is_not_begun_again() -> None:
    site = Site(ONE, TWO, mismatch=TWO.name)
    site.resync()
    site.tracker.recall(
        site.task.key, mismatches=(Mismatch(TWO.name, 64),)
    )  # as if it had been cut off before it could tell
    assert "is kept aside" not in site.told()
    done = site.resync()
    assert len(site.target.aside) == 1
    assert done.made_equal
    assert not site.alarm()


def test_what_was_only_put_back_does_not_count_as_made_anew() -> None:
    site = Site(ONE, TWO, OWN)
    site.source.now = source_state(ONE)
    site.resync()
    ((_, kept),) = site.target.aside.items()
    assert kept.versions == (TWO, OWN)
    site.tracker.recall(site.task.key, mismatches=(Mismatch(TWO.name, 64),))
    assert "is kept aside" in site.told()


@pytest.mark.parametrize("there", [(ONE,), (ONE, TWO)])
def test_a_replica_that_is_right_is_not_put_back(there: tuple[Version, ...]) -> None:
    right, aside = run(source_state(ONE, TWO), target_state(*there))
    assert [r.mode for r in right.received] == [ReceiveMode.REPLICA] * (2 - len(there))
    assert aside == ()
