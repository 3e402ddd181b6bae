"""What a node does for a peer that has the right to ask: pruning, and looking into what is encrypted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from backends.memory import MemoryBackend
from backends.zfs import ZfsBackend
from replicator import config
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, PruneOutcome, PruneRequest, ReceiveRequest, RoleChange
from replicator.errors import Cancelled, NotAReplica, NotReadable, Unsupported, VolumeBusy
from replicator.local import LocalEndpoint, PeerView
from replicator.model import Lineage, Role, StreamKind, VolumeId, hold_tag, rejoin_tag, snapshot_name
from replicator.nodes import endpoint_for_peers
from replicator.streams import BlockChunk, ChunkStream
from tests.support.blocks import KEY, full_chunks, make_chunk, make_stream, make_version, pattern
from tests.support.versions import LINEAGE, at
from tests.support.zfs_records import RecordedRunner, row
from transport import checksum

OWN, THEIRS = VolumeId("store", "vm"), VolumeId("store", "prox2/vm")
CONFIG = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.store]
kind = "zfs"
root = "tank/vm"
[peer.prox2]
address = "10.99.0.2:8571"
may_push_to = ["store"]
may_pull_from = ["store"]
[peer.prox3]
address = "10.99.0.3:8571"
[job.nightly]
source = "store:*"
targets = ["prox2:backup"]
[job.fetch]
source = {node = "prox3", volumes = "tank:*"}
targets = ["store"]
"""


@pytest.fixture
def memory() -> MemoryBackend:
    """A primary and a replica of prox2, both with snapshots of several jobs."""
    made = MemoryBackend("store", checksums=checksum)
    for volume, role in ((OWN, Role.PRIMARY), (THEIRS, Role.REPLICA)):
        made.create(volume.name, pattern(8192))
        made.set_lineage(volume.name, Lineage(LINEAGE, role, 1))
        for minute in range(3):
            for job in ("nightly", "pull", "fetch"):
                made.snapshot((volume.name,), snapshot_name(job, at(minute)))
    return made


def view(memory: MemoryBackend) -> LocalEndpoint:
    """What prox2 gets to ask."""
    found = endpoint_for_peers(config.parse(CONFIG), LocalEndpoint("prox1", {"store": memory}))("prox2")
    assert isinstance(found, LocalEndpoint)
    return found


def going(endpoint: LocalEndpoint, volume: VolumeId, job: str, *, dry_run: bool = True) -> list[PruneOutcome]:
    outcomes = endpoint.prune(PruneRequest(volume, job, "last=1", (), dry_run=dry_run))
    return [outcome for outcome in outcomes if not outcome.kept]


def test_a_peer_that_pulls_prunes_what_its_own_jobs_made(memory: MemoryBackend) -> None:
    peer = view(memory)
    assert going(peer, OWN, "pull") == [], "nothing says that the job is the peer's"
    state = memory.state(OWN.name)
    assert state is not None
    newest = state.versions[-2]
    memory.hold(OWN.name, newest.ref, hold_tag("pull", "prox3", "backup"))
    assert going(peer, OWN, "pull") == [], "it is another's"
    memory.hold(OWN.name, newest.ref, hold_tag("pull", "prox2", "backup"))
    assert len(going(peer, OWN, "pull")) == 2
    assert going(peer, OWN, "fetch") == []
    memory.hold(OWN.name, newest.ref, hold_tag("nightly", "prox2", "backup"))
    refused = peer.prune(PruneRequest(OWN, "nightly", "last=1", ()))
    assert all(outcome.kept for outcome in refused)
    assert "kept: job nightly is one of node prox1" in {outcome.reason for outcome in refused}
    assert len(going(peer, OWN, "pull", dry_run=False)) == 2
    after = memory.state(OWN.name)
    assert after is not None
    assert len(after.versions) == 7
    assert len(going(LocalEndpoint("prox1", {"store": memory}), OWN, "nightly")) == 2, "this node prunes its own"


def test_a_peer_prunes_its_replicas(memory: MemoryBackend) -> None:
    for job in ("pull", "nightly"):
        assert len(going(view(memory), THEIRS, job)) == 2
    memory.set_lineage(THEIRS.name, Lineage(LINEAGE, Role.PRIMARY, 2))
    assert going(view(memory), THEIRS, "pull") == [], "after a promotion it is this node's"


def test_a_peer_does_not_end_a_primary_but_by_a_change_of_role(memory: MemoryBackend) -> None:
    primary, follower = Lineage(LINEAGE, Role.PRIMARY, 2), Lineage(LINEAGE, Role.REPLICA, 2)
    memory.set_lineage(THEIRS.name, primary)
    with pytest.raises(NotAReplica) as caught:
        view(memory).set_aside(THEIRS, "diverged-now")
    assert "demote" in caught.value.hint
    with pytest.raises(NotAReplica):
        view(memory).adopt(THEIRS, Lineage(LINEAGE, Role.PRIMARY, 3))
    state = memory.state(THEIRS.name)
    assert state is not None
    assert state.lineage == primary
    newest = state.snapshots[-1].ref
    down = RoleChange(THEIRS, primary, follower, newest)
    with pytest.raises(NotAReplica, match="never replicated here"):
        view(memory).change_role(down)
    with pytest.raises(NotAReplica, match="never replicated here"):
        view(memory).change_role(RoleChange(OWN, Lineage(LINEAGE, Role.PRIMARY, 1), follower, newest))
    memory.hold(THEIRS.name, newest, hold_tag("pull", "prox1", "store"))
    assert view(memory).change_role(down) == follower


def test_a_peer_that_only_pushes_prunes_no_primary(memory: MemoryBackend) -> None:
    memory.set_lineage(THEIRS.name, Lineage(LINEAGE, Role.PRIMARY, 2))
    peer = LocalEndpoint("prox1", {"store": memory}).for_peer(PeerView("prox2"))
    with pytest.raises(NotAReplica, match="prunes it no more"):
        peer.prune(PruneRequest(THEIRS, "pull", "last=1", ()))


def test_what_a_copy_may_still_need_is_not_pruned(memory: MemoryBackend) -> None:
    own = LocalEndpoint("prox1", {"store": memory})
    state = memory.state(OWN.name)
    assert state is not None
    middle = state.versions[4]
    memory.hold(OWN.name, middle.ref, rejoin_tag("prox3"))
    outcomes = own.prune(PruneRequest(OWN, "nightly", "last=1", (), dry_run=True))
    kept = [outcome for outcome in outcomes if outcome.version.job == "nightly"]
    assert [outcome.kept for outcome in kept] == [True, True, True]
    assert "has not followed yet" in kept[0].reason
    memory.release(OWN.name, middle.ref, rejoin_tag("prox3"))
    assert len(going(own, OWN, "nightly")) == 2


def test_a_promotion_ends_a_receive_that_is_under_way() -> None:
    """Its peer may be dead, and nobody may have noticed yet."""
    size, started = 4096 * 4096, threading.Event()
    memory = MemoryBackend("store", checksums=checksum)
    node = LocalEndpoint("prox2", {"store": memory})
    place, primary = VolumeId("store", "prox1/vm"), Lineage(LINEAGE, Role.PRIMARY, 1)
    one, two = make_version("one", 4096), make_version("two", size)
    ask = ReceiveRequest(place, primary, None, one, KEY)
    node.receive(ask, make_stream(*full_chunks(pattern(4096))), Cancellation())

    def endless() -> Iterator[BlockChunk]:
        for page in range(1, 4096):
            yield make_chunk((page * 4096, pattern(4096)))
            started.set()
            threading.Event().wait(0.005)

    ended: list[str] = []

    def receive() -> None:
        stream = ChunkStream(StreamKind.BLOCKS, endless())
        request = replace(ask, base=one.ref, to=two)
        try:
            node.receive(request, stream, Cancellation())
        except Cancelled as error:
            ended.append(str(error))

    thread = threading.Thread(target=receive)
    thread.start()
    assert started.wait(30)
    with pytest.raises(VolumeBusy):
        node.abort_receive(place)
    promoted = Lineage(LINEAGE, Role.PRIMARY, 1_000_001)
    assert node.change_role(RoleChange(place, replace(primary, role=Role.REPLICA), promoted, one.ref)) == promoted
    thread.join(30)
    assert ended == ["store:prox1/vm is being promoted"]
    state = memory.state(place.name)
    assert state is not None
    assert (state.resume, [v.name for v in state.versions]) == (None, ["one"])
    assert memory.read(place.name) == pattern(4096)


def test_a_witness_knows_only_its_own_peers(memory: MemoryBackend) -> None:
    with pytest.raises(Unsupported):
        view(memory).sight("prox9", LINEAGE)
    assert [copy.volume for copy in view(memory).copies(LINEAGE).found] == [THEIRS, OWN]


def test_a_peer_is_not_told_what_is_in_what_it_gets_encrypted(
    memory: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(endpoint: LocalEndpoint, volume: VolumeId) -> int:
        state = memory.state(volume.name)
        assert state is not None
        request = DigestRequest(volume, state.versions[0].ref, KEY)
        return sum(len(batch) for batch in endpoint.digests(request, Cancellation()))

    peer = view(memory)
    assert digests(peer, OWN) > 0
    monkeypatch.setattr(memory, "is_sealed", lambda _: True)
    with pytest.raises(NotReadable, match="sent encrypted, so node prox2 is told neither"):
        digests(peer, OWN)
    assert digests(peer, THEIRS) > 0, "what it has sent itself"
    assert digests(LocalEndpoint("prox1", {"store": memory}), OWN) > 0


@pytest.mark.parametrize(
    ("encryption", "stream", "sealed"),
    [("off", "-", False), ("aes-256-gcm", "-", True), ("aes-256-gcm", "plain", False), ("aes-256-gcm", "raw", True)],
)
def test_what_is_sent_encrypted(encryption: str, stream: str, sealed: bool) -> None:
    listed = row(
        "tank/vm/a", "filesystem", guid=9, encryption=encryption, replicator__lineage=LINEAGE,
        replicator__role="primary", replicator__epoch=1, replicator__of=9, replicator__stream=stream,
    )  # fmt: skip
    runner = RecordedRunner({("zfs", "list"): listed})
    assert ZfsBackend("store", "tank/vm", checksums=checksum, runner=runner).is_sealed("a") is sealed


def test_a_view_is_of_one_peer() -> None:
    view = PeerView("prox2", replicas_only=frozenset({"flat"}))
    replica, primary = (Lineage(LINEAGE, role, 1) for role in (Role.REPLICA, Role.PRIMARY))
    assert view.owns(THEIRS, replica)
    assert view.owns(VolumeId("flat", "vm"), replica)
    for volume, lineage in (
        (OWN, replica),
        (THEIRS, primary),
        (THEIRS, None),
        (VolumeId("store", "prox3/vm"), replica),
    ):
        assert not view.owns(volume, lineage)
