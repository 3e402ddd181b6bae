"""Replicas whose sources are gone: what is shown of them, and what may remove them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends.memory import MemoryBackend
from replicator import config
from replicator.cancellation import Cancellation
from replicator.control import Orphan
from replicator.endpoint import ReceiveRequest, RemoveRequest
from replicator.errors import (
    NotAReplica,
    NotAuthorized,
    ReplicatorError,
    SnapshotHeld,
    StorageUnavailable,
    VolumeChanged,
)
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, VolumeId, hold_tag, restore_tag, verify_tag
from replicator.nodes import endpoint_for_peers
from replicator.orphans import examine, remove
from tests.support.blocks import KEY, full_chunks, make_stream, make_version, pattern
from tests.support.faults import Fault, FaultyEndpoint, Point
from tests.support.versions import LINEAGE
from transport import checksum
from transport.authorization import Authority, PeerRights
from transport.messages import Remove

SOURCE, REPLICA = VolumeId("images", "vm"), VolumeId("store", "prox2/vm")
ORPHAN = Orphan("vms", str(SOURCE), "prox1:store", str(REPLICA))
CONFIG = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.store]
kind = "image"
path = "/nowhere"
[peer.prox2]
address = "10.99.0.2:8571"
may_push_to = ["store"]
"""


class World:
    """Node prox2 had a volume, of which prox1 has a replica with two snapshots, one of them held by the job."""

    def __init__(self) -> None:
        self.sources = MemoryBackend("images", checksums=checksum)
        self.store = MemoryBackend("store", checksums=checksum)
        self.source = LocalEndpoint("prox2", {"images": self.sources})
        self.target = LocalEndpoint("prox1", {"store": self.store})
        lineage = Lineage(LINEAGE, Role.PRIMARY, 1)
        base = None
        for name in ("one", "two"):
            to = make_version(name, 8192)
            request = ReceiveRequest(REPLICA, lineage, base, to, KEY, hold=hold_tag("vms", "prox1", "store"))
            self.target.receive(request, make_stream(*full_chunks(pattern(8192))), Cancellation())
            base = to.ref

    def request(self) -> RemoveRequest:
        state = self.target.state(REPLICA)
        assert state is not None
        assert state.lineage is not None
        return RemoveRequest(REPLICA, "vms", state.lineage, tuple(version.guid for version in state.versions))

    def peer(self, keep: str = "") -> LocalEndpoint:
        text = CONFIG + (f'keep = "{keep}"' if keep else "")
        found = endpoint_for_peers(config.parse(text), self.target)("prox2")
        assert isinstance(found, LocalEndpoint)
        return found


@pytest.fixture
def world() -> World:
    return World()


def test_one_is_removed_as_it_was_looked_at(world: World) -> None:
    found = examine(ORPHAN, world.source, world.target)
    assert (found.kept, found.gone, len(found.versions)) == ("", False, 2)
    done = remove(found, world.source, world.target)
    assert done.gone
    assert world.target.state(REPLICA) is None
    assert remove(found, world.source, world.target).kept == "it is gone"
    world.target.remove(RemoveRequest(REPLICA, "vms", Lineage(LINEAGE, Role.REPLICA, 1), ()))


def test_not_while_there_is_a_source(world: World) -> None:
    """Whatever it is: in the middle of a switchover both are replicas."""
    world.sources.create(SOURCE.name, b"data")
    found = examine(ORPHAN, world.source, world.target)
    assert "there is a volume images:vm on prox2" in found.kept
    done = remove(replace(found, kept=""), world.source, world.target)
    assert not done.gone
    assert world.target.state(REPLICA) is not None


def test_not_where_nobody_answers(world: World) -> None:
    silent = FaultyEndpoint(world.source, Fault("state", Point.BEFORE, StorageUnavailable("it is not there", hint="")))
    assert "not known" in examine(ORPHAN, silent, world.target).kept


def test_not_what_has_changed_since(world: World) -> None:
    request = world.request()
    with pytest.raises(VolumeChanged, match="snapshot two"):
        world.target.remove(replace(request, versions=request.versions[:1]))
    for other in (replace(request.lineage, epoch=2), Lineage("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.REPLICA, 1)):
        with pytest.raises(NotAReplica):
            world.target.remove(replace(request, lineage=other))
    world.store.write(REPLICA.name, 0, b"mine")
    with pytest.raises(VolumeChanged, match="live data"):
        world.target.remove(request)
    assert examine(ORPHAN, world.source, world.target).kept.startswith("somebody wrote to it")


def test_not_what_is_a_primary_now(world: World) -> None:
    request = world.request()
    promoted = Lineage(LINEAGE, Role.PRIMARY, 2)
    world.store.set_lineage(REPLICA.name, promoted)
    assert examine(ORPHAN, world.source, world.target).kept == "it is no replica any more"
    for lineage in (request.lineage, promoted):
        with pytest.raises(NotAReplica):
            world.target.remove(replace(request, lineage=lineage))


@pytest.mark.parametrize(
    "tag",
    [
        hold_tag("other", "prox1", "store"),
        hold_tag("vms", "prox3", "store"),
        verify_tag(hold_tag("vms", "prox1", "store")),
        restore_tag("prox1"),
        "by-hand",
    ],
)
def test_not_what_somebody_else_holds(world: World, tag: str) -> None:
    request = world.request()
    state = world.store.state(REPLICA.name)
    assert state is not None
    world.store.hold(REPLICA.name, state.versions[0].ref, tag)
    with pytest.raises(SnapshotHeld, match=tag):
        world.target.remove(request)
    after = world.store.state(REPLICA.name)
    assert after is not None
    assert len(after.versions) == 2
    assert hold_tag("vms", "prox1", "store") in after.versions[1].holds, "it is protected as before"


def test_a_node_that_keeps_a_minimum_decides_by_itself(world: World) -> None:
    request = world.request()
    with pytest.raises(NotAuthorized, match="keeps the least"):
        world.peer(keep="last=1").remove(request)
    assert world.target.state(REPLICA) is not None
    world.peer().remove(request)
    assert world.target.state(REPLICA) is None


def test_a_peer_removes_only_below_its_name(world: World) -> None:
    rights = PeerRights(may_push_to=frozenset({"store"}), may_pull_from=frozenset({"store"}))
    Authority("prox2", "prox1", rights).check(Remove(world.request()))
    for peer, allowed in (("prox3", rights), ("prox2", PeerRights(may_pull_from=frozenset({"store"})))):
        with pytest.raises(NotAuthorized):
            Authority(peer, "prox1", allowed).check(Remove(world.request()))


def test_what_was_interrupted_is_done_by_the_next(world: World) -> None:
    request = world.request()
    state = world.store.state(REPLICA.name)
    assert state is not None
    world.store.release(REPLICA.name, state.versions[0].ref, hold_tag("vms", "prox1", "store"))
    world.store.destroy(REPLICA.name, state.versions[0].ref)
    world.target.remove(request)
    assert world.target.state(REPLICA) is None


def test_errors_say_what_to_do(world: World) -> None:
    with pytest.raises(ReplicatorError) as caught:
        world.peer(keep="last=1").remove(world.request())
    assert "by hand on prox1" in caught.value.hint
