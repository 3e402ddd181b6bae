"""A replica of a native storage is put back to what both sides have, and continues from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint, ReceiveMode, ReceiveRequest, SendRequest
from replicator.model import Capability, Lineage, Role, StorageInfo, StreamKind, Version, VersionRef, VolumeState
from replicator.planning import SendPolicy
from replicator.rejoining import rejoin
from replicator.replication import Options, Pair
from replicator.streams import Chunk, ChunkStream, NativeChunk, Stream
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

    def storage(self, name: str) -> StorageInfo:
        return StorageInfo(name, "zfs", StreamKind.NATIVE, Capability.SEND | Capability.RECEIVE, 0, 0, "")

    def state(self, _volume: object) -> VolumeState | None:
        return self.now

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
        chunks: Iterator[Chunk] = iter([NativeChunk(request.to.guid.encode())])
        return ChunkStream(StreamKind.NATIVE, chunks)

    def receive(self, request: ReceiveRequest, stream: Stream, _cancel: Cancellation) -> Version:
        list(stream)
        self.received.append(request)
        assert self.now is not None
        kept: tuple[Version, ...] = self.now.versions
        if request.mode is ReceiveMode.REBUILD:
            guids = [v.guid for v in kept]
            kept = kept[: guids.index(request.base.guid) + 1] if request.base else ()
        self.now = replace(self.now, versions=(*kept, request.to), head_changed=False)
        return request.to


def run(source: VolumeState, target: VolumeState) -> tuple[Side, tuple[str, ...]]:
    left, right = Side("prox1", source), Side("prox2", target)
    pair = Pair(cast(Endpoint, left), SOURCE, cast(Endpoint, right), TARGET, TAG)
    done = rejoin(pair, source.versions[-1], Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation())
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


def test_live_data_alone_is_kept_too() -> None:
    right, aside = run(source_state(ONE, TWO), target_state(ONE, head_changed=True))
    assert [r.mode for r in right.received] == [ReceiveMode.REBUILD]
    assert len(aside) == 1


def test_without_anything_in_common_everything_is_sent() -> None:
    right, aside = run(source_state(ONE, TWO), target_state(OWN))
    assert [(r.mode, r.base) for r in right.received] == [(ReceiveMode.REBUILD, None)]
    assert len(aside) == 1


@pytest.mark.parametrize("there", [(ONE,), (ONE, TWO)])
def test_a_replica_that_is_right_is_not_put_back(there: tuple[Version, ...]) -> None:
    right, aside = run(source_state(ONE, TWO), target_state(*there))
    assert [r.mode for r in right.received] == [ReceiveMode.REPLICA] * (2 - len(there))
    assert aside == ()
