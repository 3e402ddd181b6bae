"""Clones on real Ceph clusters: what librbd says of them, and what becomes of them on a target."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from backends.rbd.binding import load
from replicator.cancellation import Cancellation
from replicator.cli.main import main
from replicator.endpoint import PruneRequest, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import (
    ConnectionLost,
    NoSuchSnapshot,
    SnapshotHeld,
    StaleResume,
    StorageError,
    Unsupported,
    UsageError,
)
from replicator.model import Version, VolumeId, snapshot_name
from replicator.origins import origins_of
from replicator.planning import Plan, SendPolicy, origin_guids
from replicator.streams import Chunk, ChunkStream, Stream
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, make_stream
from tests.support.rbd_case import RbdCase, purge
from tests.support.rbd_sites import Sites, Writer, make_clone, replica, take
from tests.support.versions import at

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """An empty storage in a namespace."""
    made = RbdCase(ceph.conf)
    yield made
    made.close()


def received(case: RbdCase, volume: str, base: Version | None, to: Version, old: bytes) -> tuple[bytes, int]:
    """What a stream makes of ``old``, and how much was carried."""
    request = SendRequest(VolumeId("store", volume), base.ref if base else None, to.ref, KEY)
    done = apply(case.backend.send(request, Cancellation()), old, to.size or 0)
    return bytes(done.data), done.written


@pytest.mark.parametrize("kind", ["plain", "striped", "no map", "other objects", "deep", "flattened"])
@pytest.mark.parametrize("seed", range(3))
def test_all_changes_of_clones_are_found(case: RbdCase, kind: str, seed: int) -> None:
    """Of a clone, and of a clone of that: in full, against what they began as, and between any two snapshots."""
    writer = Writer(case, seed * 100 + len(kind))
    rbd = load().rbd
    options: dict[str, Any] = {"order": 16}
    if kind == "striped":
        options |= {"features": 61 | rbd.RBD_FEATURE_STRIPINGV2, "stripe_unit": 16384, "stripe_count": 3}
    if kind == "no map":
        options["features"] = rbd.RBD_FEATURE_LAYERING
    if kind == "other objects":
        options |= {"order": 15, "stripe_unit": 32768, "stripe_count": 1}
    if kind in ("plain", "flattened"):
        options["features"] = 61 & ~rbd.RBD_FEATURE_DEEP_FLATTEN
    case.create("vm", b"")
    with case.session() as session, session.ioctx(str(case.namespace)) as ioctx:
        session.pool.remove(ioctx, "vm")
        session.pool.create(ioctx, "vm", 300_000, features=61, order=16)
    writer.work("vm")
    writer.work("vm")
    begun, chain = {}, ["vm", "copy", "copy-of-it"]
    for parent, volume in itertools.pairwise(chain):
        with case.image(parent) as image:
            if not image.size():  # RBD makes no clone of nothing
                image.resize(1)
        begun[volume] = take(case, parent, "base")
        make_clone(case, parent, "base", volume, **options)
        take(case, volume, "s0")
        for round_number in range(1, 4):
            writer.work(volume)
            writer.work(parent)
            take(case, volume, f"s{round_number}")
            if kind == "flattened" and round_number == 2:
                with case.image(volume) as image:
                    image.flatten()
    for parent, volume in itertools.pairwise(chain):
        state = case.backend.state(volume)
        assert state is not None
        content = {v.guid: case.read_snapshot(volume, v) for v in state.versions}
        origin = case.read_snapshot(parent, begun[volume])
        for index, newer in enumerate(state.versions):
            expected = content[newer.guid]
            assert received(case, volume, None, newer, b"")[0] == expected
            if state.origin is not None:
                assert received(case, volume, begun[volume], newer, origin)[0] == expected, (volume, newer)
            for older in state.versions[:index]:
                assert received(case, volume, older, newer, content[older.guid])[0] == expected, (volume, older, newer)


# -- to another cluster


@pytest.fixture
def sites(ceph: Cluster, other_ceph: Cluster) -> Iterator[Sites]:
    """Two empty storages."""
    source, target = RbdCase(ceph.conf), RbdCase(other_ceph.conf, name="backup")
    yield Sites(source, target)
    source.close()
    target.close()


SIZE = 20 << 20
MIB = 1 << 20


def template(sites: Sites, data: bytes | None = None) -> bytes:
    """A volume ``vm`` with a snapshot ``base``, and its clone ``copy``."""
    content = data or random.Random(1).randbytes(SIZE)
    sites.source.create("vm", content)
    take(sites.source, "vm", "base")
    make_clone(sites.source, "vm", "base", "copy")
    return content


def test_a_clone_stays_a_clone(sites: Sites) -> None:
    """Copied up in part, cut, grown, its parent resized; and nothing is sent but the difference."""
    template(sites)
    source = sites.source
    source.write("copy", 5 * MIB, b"x" * 4096)  # a part of an object: the rest of it is copied up
    with source.image("copy") as image:
        image.discard(8 * MIB, 4 * MIB)
        image.write_zeroes(13 * MIB, 4096)
    take(source, "copy", "s1")
    source.resize("vm", 10 * MIB)
    source.write("vm", 0, b"changed in the parent")
    take(source, "vm", "later")
    sites.replication("vm", "copy").run()
    first = sites.replication("copy", "vm").run()
    assert first.done <= 4 * MIB + 3 * 4096, "the difference to the parent, and not all that was copied up"
    assert sites.parent("copy") == "one/vm@base"
    source.resize("copy", 7 * MIB)
    source.resize("copy", 30 * MIB)  # what its parent had there is gone
    take(source, "copy", "s2")
    source.write("copy", 29 * MIB, b"grown")
    take(source, "copy", "s3")
    source.resize("copy", 3 * MIB)
    take(source, "copy", "s4")
    sites.replicate("vm", "copy")
    assert sites.check_equal("copy") == 4
    assert sites.parent("copy") == "one/vm@base"
    again = sites.replication("copy", "vm").plan()[0]
    assert isinstance(again, Plan)
    assert again.up_to_date


@pytest.mark.parametrize("size", [3 * MIB, 26 * MIB])
def test_a_clone_that_was_cut_or_grown_at_first(sites: Sites, size: int) -> None:
    template(sites)
    sites.source.resize("copy", 2 * MIB)
    sites.source.resize("copy", size)
    sites.source.write("copy", 0, b"x")
    take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    assert sites.parent("copy") == "one/vm@base"
    sites.source.resize("copy", SIZE)
    take(sites.source, "copy", "s2")
    sites.replicate("vm", "copy")


def test_a_clone_of_a_clone(sites: Sites) -> None:
    template(sites)
    sites.source.write("copy", MIB, b"copy")
    take(sites.source, "copy", "base")
    make_clone(sites.source, "copy", "base", "grandchild")
    sites.source.write("grandchild", 2 * MIB, b"grandchild")
    take(sites.source, "grandchild", "s1")
    sites.replicate("vm", "copy", "grandchild")
    assert (sites.parent("copy"), sites.parent("grandchild")) == ("one/vm@base", "one/copy@base")
    sites.source.write("grandchild", 19 * MIB, b"more")
    take(sites.source, "grandchild", "s2")
    sites.replicate("vm", "copy", "grandchild")


@pytest.mark.parametrize("seed", range(2))
def test_a_chain_of_clones_under_writers(sites: Sites, seed: int) -> None:
    """All of them written to, cut and grown between runs, the parents too; runs that bring one snapshot and several."""
    writer = Writer(sites.source, seed)
    sites.source.create("vm", writer.number.randbytes(500_000))
    chain = ["vm", "copy", "copy-of-it"]
    for parent, volume in itertools.pairwise(chain):
        take(sites.source, parent, "base")
        make_clone(sites.source, parent, "base", volume, order=16 + seed, stripe_unit=65536, stripe_count=1)
        writer.work(volume)
        with sites.source.image(volume) as image:
            if not image.size():
                image.resize(1)
    for number in range(8):
        for volume in chain:
            writer.work(volume)
            if not number or writer.number.random() < 0.8:
                take(sites.source, volume, f"s{number}")
        if number % 3 != 1:
            sites.replicate(*chain)
            for parent, volume in itertools.pairwise(chain):
                assert sites.parent(volume) in ("", f"one/{parent}@base")
    assert all(sites.check_equal(volume) > 1 for volume in chain)


def test_a_clone_whose_parent_is_not_replicated(sites: Sites) -> None:
    """It is sent in full, and the plan says so."""
    content = template(sites)
    sites.source.write("copy", 0, b"copy")
    take(sites.source, "copy", "s1")
    found, _, _ = sites.replication("copy").plan()
    assert isinstance(found, Plan)
    assert "sent in full" in found.notes[0]
    assert sites.replication("copy").run().done >= SIZE - 4096
    assert sites.check_equal("copy") == 1
    assert sites.parent("copy") == ""
    (version,) = sites.target.backend.state(replica("copy").name).versions  # type: ignore[union-attr]
    assert sites.target.read_snapshot(replica("copy").name, version) == b"copy" + content[4:]


def test_a_clone_waits_for_its_parent(sites: Sites) -> None:
    template(sites)
    take(sites.source, "copy", "s1")
    with pytest.raises(StorageError, match="goes to"):
        sites.replication("copy", "vm").run()
    assert sites.target.backend.state(replica("copy").name) is None


@pytest.mark.parametrize("features", [61, 61 & ~32])
def test_a_clone_that_is_flattened_at_the_source(sites: Sites, features: int) -> None:
    """With deep-flatten and without: what follows is the difference to the snapshot before."""
    template(sites)
    rbd = load().rbd
    if not features & rbd.RBD_FEATURE_DEEP_FLATTEN:
        with sites.source.image("copy") as image:
            image.update_features(rbd.RBD_FEATURE_DEEP_FLATTEN, False)
    sites.source.write("copy", 0, b"copy")
    take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    with sites.source.image("copy") as image:
        image.flatten()
    sites.source.write("copy", 9 * MIB, b"flat")
    take(sites.source, "copy", "s2")
    assert sites.replication("copy", "vm").run().done <= 4096
    sites.source.write("copy", 10 * MIB, b"later")
    take(sites.source, "copy", "s3")
    assert sites.replication("copy", "vm").run().done <= 4096
    assert sites.check_equal("copy") == 3
    assert sites.parent("copy") == "one/vm@base"


def test_an_interrupted_clone_continues(sites: Sites) -> None:
    template(sites)
    sites.source.write("copy", 0, random.Random(2).randbytes(16 * MIB))
    to = take(sites.source, "copy", "s1")
    sites.replicate("vm")
    request = clone_request(sites, to)
    with pytest.raises(ConnectionLost), cut_short(sent(sites, request), 6 * MIB) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    state = sites.target.backend.state(request.volume.name)
    assert state is not None
    assert state.resume is not None
    assert (state.versions, state.resume.base_guid) == ((), request.base.guid if request.base else "")
    assert 0 < state.resume.offset < 16 * MIB
    continued = replace(request, resume=state.resume)
    sites.target.create("own", b"no replica")
    with pytest.raises(NoSuchSnapshot), make_stream() as stream:
        sites.target.backend.receive(replace(continued, origin=VolumeId("backup", "own")), stream, Cancellation())
    assert sites.replication("copy", "vm").run().done < 16 * MIB
    assert sites.check_equal("copy") == 1
    assert sites.parent("copy") == "one/vm@base"


def test_a_half_received_clone_that_is_none_any_more(sites: Sites) -> None:
    """What was received is of no use without what it was the difference to."""
    template(sites)
    sites.source.write("copy", 0, random.Random(2).randbytes(16 * MIB))
    request = clone_request_of(sites, take(sites.source, "copy", "s1"))
    with pytest.raises(ConnectionLost), cut_short(sent(sites, request), 6 * MIB) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    state = sites.target.backend.state(request.volume.name)
    assert state is not None
    with sites.target.image(request.volume.name) as image:
        image.flatten()
    with pytest.raises(StaleResume), make_stream() as stream:
        sites.target.backend.receive(replace(request, resume=state.resume), stream, Cancellation())
    with pytest.raises(StaleResume):
        sites.replication("copy", "vm").run()
    sites.replicate("vm", "copy")
    assert sites.parent("copy") == "one/vm@base"


def test_a_clone_that_was_discarded_begins_anew(sites: Sites) -> None:
    """As a clone after it began in full, and in full after it began as a clone."""
    template(sites)
    sites.source.write("copy", 0, random.Random(2).randbytes(16 * MIB))
    to = take(sites.source, "copy", "s1")
    sites.replicate("vm")
    as_clone = clone_request(sites, to)
    in_full = replace(as_clone, base=None, origin=None)
    backend = sites.target.backend
    for before, after in ((in_full, as_clone), (as_clone, in_full), (as_clone, as_clone)):
        with pytest.raises(ConnectionLost), cut_short(sent(sites, before), 6 * MIB) as stream:
            backend.receive(before, stream, Cancellation())
        if before is in_full:
            backend.abort_receive(before.volume.name)
        with sent(sites, after) as stream:
            made = backend.receive(after, stream, Cancellation())
        assert sites.check_equal("copy") == 1
        assert sites.parent("copy") == ("one/vm@base" if after is as_clone else "")
        backend.destroy(after.volume.name, made.ref)
        remove(sites.target, after.volume.name)


def test_what_a_replica_cannot_be_a_clone_of(sites: Sites) -> None:
    template(sites)
    to = take(sites.source, "copy", "s1")
    sites.replicate("vm")
    good = clone_request(sites, to)
    sites.target.create("own", b"not a replica")
    own = take(sites.target, "own", "base")
    for request, error in (
        (replace(good, origin=replica("missing")), NoSuchSnapshot),
        (replace(good, origin=VolumeId("backup", "own"), base=own.ref), NoSuchSnapshot),
        (replace(good, base=replace(good.base or own.ref, guid="another")), NoSuchSnapshot),
        (replace(good, origin=VolumeId("elsewhere", "one/vm")), Unsupported),
        (replace(good, base=None), UsageError),
    ):
        with pytest.raises(error), make_stream() as stream:
            sites.target.backend.receive(request, stream, Cancellation())
        assert sites.target.backend.state(good.volume.name) is None
    sites.replicate("vm", "copy")
    another = replace(good, to=replace(to, guid="another", name="another"))
    with pytest.raises(NoSuchSnapshot, match="already"), make_stream() as stream:
        sites.target.backend.receive(another, stream, Cancellation())
    assert sites.check_equal("copy") == 1


def test_a_snapshot_of_the_same_name_is_not_what_a_clone_began_as(sites: Sites) -> None:
    """The one that it began as lives on in the trash, as clones of format 2 do not protect it."""
    template(sites)
    sites.source.write("copy", 0, b"copy")
    with sites.source.image("vm") as image:
        image.remove_snap("base")
        image.write(b"another", 0)
        image.create_snap("base")
    take(sites.source, "copy", "s1")
    state = sites.source.backend.state("copy")
    assert state is not None
    assert state.origin is None
    sites.replicate("vm", "copy")
    assert sites.parent("copy") == ""


def test_reading_is_enough_to_send_a_clone(sites: Sites, ceph: Cluster) -> None:
    template(sites)
    sites.source.write("copy", 0, b"copy")
    to = take(sites.source, "copy", "s1")
    sites.replicate("vm")
    keyring = ceph.user("reads-clones", mon="profile rbd", osd=f"profile rbd-read-only pool={sites.source.pool}")
    reader = sites.source.open(sites.source.where("reads-clones", keyring))
    assert [v.origin for v in reader.volumes()] == [v.origin for v in sites.source.backend.volumes()]
    request = clone_request(sites, to)
    send = SendRequest(VolumeId("store", "copy"), request.base, to.ref, KEY)
    assert reader.estimate("copy", request.base, to.ref) == 4 * MIB
    with reader.send(send, Cancellation()) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    assert sites.check_equal("copy") == 1
    reader.close()


def test_pruning_leaves_what_clones_need(sites: Sites) -> None:
    """On both sides, while the job has the clone; and what is removed all the same does no harm."""
    base, between, newest = (snapshot_name("vms", at(minute)) for minute in range(3))
    sites.source.create("vm", random.Random(1).randbytes(SIZE))
    take(sites.source, "vm", base)
    make_clone(sites.source, "vm", base, "copy")
    sites.source.write("copy", 0, b"copy")
    take(sites.source, "copy", "s1")
    for name in (between, newest):
        take(sites.source, "vm", name)
    sites.replicate("vm", "copy")
    listed = [v for v in sites.source.backend.volumes() if v.id.name in ("vm", "copy")]
    ours = sites.source.backend.state("vm")
    assert ours is not None
    protect = origin_guids(ours, SendPolicy(origins=origins_of(listed)[VolumeId("store", "vm")]))
    for endpoint, volume in ((sites.here, VolumeId("store", "vm")), (sites.there, replica("vm"))):
        endpoint.prune(PruneRequest(volume, "vms", "last=1", tuple(protect)))
        state = endpoint.state(volume)
        assert state is not None
        assert [version.name for version in state.versions] == [base, newest]
    assert sites.parent("copy") == f"one/vm@{base}"
    # By a job that knows nothing of the clone: of format 2, it goes to the trash until its clones do.
    sites.there.prune(PruneRequest(replica("vm"), "vms", "last=1", ()))
    assert sites.parent("copy") == "", "nothing that could be named"
    assert sites.check_equal("copy") == 1
    sites.source.write("copy", MIB, b"more")
    take(sites.source, "copy", "s2")
    sites.replicate("vm", "copy")


def test_a_clone_of_the_old_format_keeps_its_parent(sites: Sites, ceph: Cluster) -> None:
    sites.source.create("vm", random.Random(1).randbytes(SIZE))
    base = take(sites.source, "vm", "base")
    space = f"rbd/{sites.source.namespace}"
    ceph.run("rbd", "snap", "protect", f"{space}/vm@base")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "1", f"{space}/vm@base", f"{space}/copy")
    sites.source.write("copy", 0, b"copy")
    take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    assert sites.parent("copy") == "one/vm@base"
    take(sites.source, "vm", "later")
    sites.replicate("vm", "copy")
    with pytest.raises(SnapshotHeld, match="clones"):
        sites.source.backend.destroy("vm", base.ref)
    assert sites.check_equal("copy") == 1


def clone_request_of(sites: Sites, to: Version) -> ReceiveRequest:
    """The same, once the target has that."""
    sites.replicate("vm")
    return clone_request(sites, to)


def clone_request(sites: Sites, to: Version) -> ReceiveRequest:
    """Take ``to`` of ``copy`` as a clone of what ``vm``'s replica has."""
    origin = sites.target.backend.state(replica("vm").name)
    assert origin is not None
    base = origin.find("base")
    assert base is not None
    lineage = sites.here.ensure_primary(VolumeId("store", "copy"))
    return ReceiveRequest(replica("copy"), lineage, base.ref, to, KEY, origin=replica("vm"))


def sent(sites: Sites, request: ReceiveRequest) -> Stream:
    """What the source sends for a request."""
    send = SendRequest(VolumeId("store", "copy"), request.base, request.to.ref, KEY)
    return sites.source.backend.send(send, Cancellation())


def cut_short(stream: Stream, limit: int) -> Stream:
    """The stream, until that many bytes have come."""

    def chunks() -> Iterator[Chunk]:
        done = 0
        for chunk in stream:
            yield chunk
            done += chunk.length
            if done >= limit:
                raise ConnectionLost("cut", hint="")

    return ChunkStream(stream.kind, chunks(), on_close=stream.close)


def remove(case: RbdCase, volume: str) -> None:
    """An image without versions."""
    place = case.naming.place(volume)
    with case.session() as session:
        purge(session, place)
        with session.ioctx(place.namespace) as ioctx:
            session.pool.remove(ioctx, place.image)


def test_a_clone_that_was_written_to_is_put_back(sites: Sites) -> None:
    """Also where it was cut, so that its parent shows no more in its head what it shows in its snapshots."""
    template(sites)
    sites.source.write("copy", 0, b"copy")
    take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    name = replica("copy").name
    sites.target.resize(name, 6 * MIB)
    sites.target.resize(name, SIZE)
    state = sites.target.backend.state(name)
    assert state is not None
    assert state.head_changed
    kept = sites.target.backend.set_aside(name, "diverged-by-hand")
    assert kept is not None
    to = take(sites.source, "copy", "s2")
    ours = sites.source.backend.state("copy")
    assert ours is not None
    request = replace(clone_request(sites, to), origin=None, base=ours.versions[0].ref, mode=ReceiveMode.REBUILD)
    with sent(sites, request) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    assert sites.check_equal("copy") == 2
    assert sites.target.read_snapshot(name, kept)[6 * MIB :] == bytes(SIZE - 6 * MIB)


def test_a_discarded_change_of_a_clone(sites: Sites) -> None:
    template(sites)
    sites.source.write("copy", 0, b"copy")
    one = take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    sites.source.resize("copy", 3 * MIB)
    sites.source.write("copy", 0, random.Random(2).randbytes(3 * MIB))
    to = take(sites.source, "copy", "s2")
    request = replace(clone_request(sites, to), origin=None, base=one.ref)
    with pytest.raises(ConnectionLost), cut_short(sent(sites, request), 2 * MIB) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    sites.target.backend.abort_receive(request.volume.name)
    assert sites.target.read(request.volume.name) == sites.source.read_snapshot("copy", one)
    sites.replicate("vm", "copy")
    assert sites.check_equal("copy") == 2


def test_as_a_job(sites: Sites, tmp_path: Path) -> None:
    """With the command line: what it plans, and that the parent goes before its clones; what it brings is verified."""
    template(sites)
    sites.source.write("copy", 0, b"copy")
    make_clone(sites.source, "vm", "base", "a-clone-named-before-it")
    config = tmp_path / "replicator.toml"
    config.write_text(
        f"""
[node]
name = "one"
state_dir = "{tmp_path}"

[network]
cluster = "127.0.0.0/8"
listen = "127.0.0.1:1"

[storage.store]
kind = "rbd"
pool = "{sites.source.pool}"
namespace = "{sites.source.namespace}"
conffile = "{sites.source.conf}"

[storage.backup]
kind = "rbd"
pool = "{sites.target.pool}"
namespace = "{sites.target.namespace}"
conffile = "{sites.target.conf}"

[job.vms]
source = "store:*"
targets = ["backup"]

[job.alone]
source = "store:copy"
targets = ["backup"]
enabled = false
"""
    )

    def run(*words: str) -> str:
        done = CliRunner().invoke(main, ["--config", str(config), *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    take(sites.source, "copy", snapshot_name("alone", at(0)))
    assert "sent in full" in " ".join(run("plan", "alone").split())
    assert "goes to the target first" in " ".join(run("plan", "vms").split())
    run("sync", "vms")
    for name in ("copy", "a-clone-named-before-it"):
        assert sites.parent(name) == "one/vm@base"
    for name in ("vm", "copy", "a-clone-named-before-it"):
        assert sites.check_equal(name) >= 1
    sites.source.write("copy", MIB, b"more")
    run("sync", "vms")
    run("verify", "store:copy")
    assert sites.check_equal("copy") == 2
    run("prune", "vms", "--yes")
    assert sites.parent("copy") == "one/vm@base"
    assert "base" in run("snapshots", "backup:one/vm")
