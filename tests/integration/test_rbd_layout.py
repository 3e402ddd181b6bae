"""What RBD replicas take over from their sources beside the data, on real Ceph clusters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.image import ImageBackend
from backends.rbd.binding import load
from backends.rbd.layout import layout_of
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest, SendRequest
from replicator.errors import StorageUnavailable, VolumeBusy
from replicator.local import LocalEndpoint
from replicator.model import Property, VolumeId, hold_tag
from replicator.planning import SendPolicy
from replicator.replication import Options, Pair, Replication
from tests.conformance.replicas import SIZE as SMALL
from tests.conformance.replicas import VM, asked, first
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, make_stream, make_version
from tests.support.image_case import ImageCase
from tests.support.rbd_case import RbdCase
from tests.support.rbd_sites import Sites, Writer, make_clone, replica, take
from transport import checksum

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
MIB = 1 << 20


@pytest.fixture
def sites(ceph: Cluster, other_ceph: Cluster) -> Iterator[Sites]:
    """Two empty storages."""
    source, target = RbdCase(ceph.conf), RbdCase(other_ceph.conf, name="backup")
    yield Sites(source, target)
    source.close()
    target.close()


def make(case: RbdCase, volume: str, size: int, **options: Any) -> None:
    """An image as people make it."""
    with case.session() as session, session.ioctx(str(case.namespace)) as ioctx:
        session.pool.create(ioctx, case.naming.place(volume).image, size, **{"features": 61, **options})


def layout(case: RbdCase, volume: str) -> Any:
    with case.session() as session, case.image(volume, read_only=True) as image:
        return layout_of(session, image)


def notes(case: RbdCase, volume: str) -> Mapping[str, str]:
    with case.image(volume, read_only=True) as image:
        return {key: value for key, value in image.metadata_list() if not key.startswith("replicator.")}


def make_pool(cluster: Cluster, name: str) -> None:
    if name not in cluster.run("ceph", "osd", "pool", "ls").split():
        cluster.run("ceph", "osd", "pool", "create", name, "8")
        cluster.run("ceph", "osd", "pool", "application", "enable", name, "rbd")


def test_a_replica_is_laid_out_as_its_source(sites: Sites) -> None:
    features = (61 & ~load().rbd.RBD_FEATURE_DEEP_FLATTEN) | load().rbd.RBD_FEATURE_STRIPINGV2
    make(sites.source, "vm", 5 * MIB, order=20, features=features, stripe_unit=65536, stripe_count=3)
    sites.source.write("vm", MIB - 100, random.Random(1).randbytes(MIB))
    with sites.source.image("vm") as image:
        for key, value in {
            "description": "the mail server",
            "user.ticket": "42",
            "conf_rbd_qos_iops_limit": "1",
            "conf_rbd_cache": "true",
            "rbd.csi.ceph.com/dek": "secret",
            "csi.storage.k8s.io/pv/name": "pv-1",
            ".rbd_internal": "x",
        }.items():
            image.metadata_set(key, value)
    take(sites.source, "vm", "s1")
    sites.replicate("vm")
    assert layout(sites.target, replica("vm").name) == layout(sites.source, "vm")
    assert notes(sites.target, replica("vm").name) == {"description": "the mail server", "user.ticket": "42"}
    with sites.source.image("vm") as image:
        image.metadata_set("description", "the old mail server")
    take(sites.source, "vm", "s2")
    sites.replicate("vm")
    assert notes(sites.target, replica("vm").name)["description"] == "the old mail server"
    assert sites.target.backend.info().warnings == ()


def test_a_data_pool_of_the_same_name_is_used(sites: Sites, ceph: Cluster, other_ceph: Cluster) -> None:
    for cluster in (ceph, other_ceph):
        make_pool(cluster, "fast")
    make(sites.source, "vm", MIB, data_pool="fast")
    sites.source.write("vm", 0, b"data")
    take(sites.source, "vm", "s1")
    make_clone(sites.source, "vm", "s1", "copy", data_pool="fast")
    sites.source.write("copy", 100, b"copy")
    take(sites.source, "copy", "s1")
    sites.replicate("vm", "copy")
    for volume in ("vm", "copy"):
        assert layout(sites.target, replica(volume).name).data_pool == "fast"
    assert sites.parent("copy") == "one/vm@s1"


def test_a_data_pool_that_is_not_there_is_told(sites: Sites, ceph: Cluster) -> None:
    make_pool(ceph, "only-here")
    make(sites.source, "vm", MIB, data_pool="only-here")
    sites.source.write("vm", 0, b"data")
    take(sites.source, "vm", "s1")
    sites.replicate("vm")
    assert layout(sites.target, replica("vm").name).data_pool is None
    told = [text for text in sites.target.backend.info().warnings if "only-here" in text]
    assert told
    assert "not in this cluster" in told[0]


def test_a_data_pool_that_the_user_may_not_write_to_is_not_used(
    sites: Sites, ceph: Cluster, other_ceph: Cluster
) -> None:
    for cluster in (ceph, other_ceph):
        make_pool(cluster, "closed")
    make(sites.source, "vm", MIB, data_pool="closed")
    sites.source.write("vm", 0, b"data")
    take(sites.source, "vm", "s1")
    make_clone(sites.source, "vm", "s1", "copy", data_pool="closed")
    take(sites.source, "copy", "s1")
    keyring = other_ceph.user("narrow", mon="profile rbd", osd=f"profile rbd pool={sites.target.pool}")
    sites.target.backend.close()
    sites.target.backend = sites.target.open(sites.target.where("narrow", keyring))
    other = Sites(sites.source, sites.target)
    other.replicate("vm", "copy")
    assert sites.parent("copy") == "one/vm@s1"
    for volume in ("vm", "copy"):
        assert layout(sites.target, replica(volume).name).data_pool is None
    assert any("closed" in text for text in sites.target.backend.info().warnings)


def test_a_storage_says_where_its_replicas_have_their_data(sites: Sites, ceph: Cluster, other_ceph: Cluster) -> None:
    make_pool(ceph, "only-here")
    make_pool(other_ceph, "cheap")
    make(sites.source, "vm", MIB, data_pool="only-here")
    sites.source.write("vm", 0, b"data")
    take(sites.source, "vm", "s1")
    for pool in ("missing", "cheap"):
        sites.target.backend.close()
        sites.target.backend = sites.target.open(replace(sites.target.where(), data_pool=pool))
        other = Sites(sites.source, sites.target)
        if pool == "missing":
            with pytest.raises(StorageUnavailable, match="missing"):
                other.replicate("vm")
            assert sites.target.backend.state(replica("vm").name) is None
        else:
            other.replicate("vm")
    assert layout(sites.target, replica("vm").name).data_pool == "cheap"
    assert sites.target.backend.info().warnings == ()


@pytest.mark.parametrize(("order", "stripes"), [(14, None), (16, (4096, 5)), (22, None)])
def test_data_is_right_whatever_the_layouts(sites: Sites, order: int, stripes: tuple[int, int] | None) -> None:
    """A replica that was made otherwise (by another cluster, from another image) stays as it is, and that is told."""
    options: dict[str, Any] = {"order": order}
    if stripes is not None:
        features = 61 | load().rbd.RBD_FEATURE_STRIPINGV2
        options |= {"features": features, "stripe_unit": stripes[0], "stripe_count": stripes[1]}
    make(sites.source, "vm", 300_000, **options)
    writer = Writer(sites.source, order)
    writer.work("vm")
    one = take(sites.source, "vm", "s0")
    lineage = sites.here.ensure_primary(VolumeId("store", "vm"))
    odd = (Property("order", "17"), Property("stripe_unit", "32768"), Property("stripe_count", "3"))
    request = ReceiveRequest(replica("vm"), lineage, None, one, KEY, properties=odd)
    with sites.source.backend.send(SendRequest(VolumeId("store", "vm"), None, one.ref, KEY), Cancellation()) as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    assert layout(sites.target, replica("vm").name).order == 17
    for number in range(1, 8):
        writer.work("vm")
        take(sites.source, "vm", f"s{number}")
        if number % 2:
            sites.replicate("vm")
    assert sites.check_equal("vm") == 8
    assert any("laid out as it was made" in text for text in sites.target.backend.info().warnings)


def test_properties_that_cannot_be_meant(sites: Sites) -> None:
    """They come from a peer; the data is taken all the same."""
    nonsense = (
        Property("order", "99"),
        Property("order", "x"),
        Property("stripe_unit", "-1"),
        Property("stripe_count", "0"),
        Property("data_pool", "a b/../c"),
        Property("deep_flatten", "maybe"),
        Property("features", "journaling"),
        Property("meta:conf_rbd_cache", "true"),
        Property("meta:replicator.lineage", "{}"),
        Property("meta:description", "x" * 5000),
        Property("meta:user.", "fine"),
        *(Property(f"meta:user.{number}", "x") for number in range(100)),
    )
    to = make_version("one", MIB)
    lineage = replace(asked(to).lineage, epoch=1)  # type: ignore[type-var]
    request = ReceiveRequest(replica("vm"), lineage, None, to, KEY, properties=nonsense)
    with make_stream() as stream:
        sites.target.backend.receive(request, stream, Cancellation())
    found = notes(sites.target, replica("vm").name)
    assert len(found) == 32
    assert all(key.startswith("user.") for key in found)


def test_from_an_image_and_back(sites: Sites, tmp_path: Path) -> None:
    """Storages of other kinds have no such properties: data crosses, and the rest is the target's own."""
    files = ImageCase(tmp_path)
    data = random.Random(3).randbytes(3 * MIB)
    files.create("vm", data)
    files.backend.snapshot(("vm",), "s1")
    here, there = LocalEndpoint("one", {"store": files.backend}), sites.there
    pair = Pair(here, VolumeId("store", "vm"), there, replica("vm"), hold_tag("vms", "two", "backup"))
    Replication(pair, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation()).run()
    (version,) = sites.target.backend.state(replica("vm").name).versions  # type: ignore[union-attr]
    assert sites.target.read_snapshot(replica("vm").name, version) == data
    make(sites.source, "disk", 3 * MIB, order=16)
    sites.source.write("disk", 0, data)
    take(sites.source, "disk", "base")
    make_clone(sites.source, "disk", "base", "copy")
    sites.source.write("copy", MIB, b"copy")
    take(sites.source, "copy", "s1")
    replicas = ImageBackend("backup", tmp_path / "replicas", checksums=checksum)
    (tmp_path / "replicas").mkdir()
    there = LocalEndpoint("three", {"backup": replicas})
    for volume in ("disk", "copy"):
        pair = Pair(sites.here, VolumeId("store", volume), there, replica(volume), hold_tag("vms", "three", "backup"))
        options = Options(SendPolicy(origins=frozenset({"base"})), origin_first=volume == "copy")
        Replication(pair, options, observer=lambda _: None, cancel=Cancellation()).run()
    state = replicas.state(replica("copy").name)
    assert state is not None
    request = SendRequest(state.id, None, state.versions[0].ref, KEY)
    arrived = apply(replicas.send(request, Cancellation()), b"", 3 * MIB).data
    assert bytes(arrived) == data[:MIB] + b"copy" + data[MIB + 4 :]
    replicas.close()
    files.close()


# -- encryption


def test_an_encrypted_image_arrives_as_ciphertext(sites: Sites) -> None:
    """Byte for byte what is on the disks of the source, of a clone as well; who has the passphrase can read it."""
    rbd = load().rbd
    luks, algorithm = rbd.RBD_ENCRYPTION_FORMAT_LUKS2, rbd.RBD_ENCRYPTION_ALGORITHM_AES256
    secret = b"nobody else may read this" * 4000
    make(sites.source, "vm", 24 * MIB)
    with sites.source.image("vm") as image:
        image.encryption_format(luks, "passphrase", algorithm)  # and is loaded by that
        image.write(secret, MIB)
    take(sites.source, "vm", "s1")
    make_clone(sites.source, "vm", "s1", "copy")
    sites.replicate("vm")
    with sites.source.image("vm") as image:
        image.encryption_load(luks, "passphrase")
        image.write(b"more", 2 * MIB)
    with sites.source.image("copy") as image:  # as a guest with keys of its own writes
        image.write(random.Random(5).randbytes(MIB), 20 * MIB)
    versions = {volume: take(sites.source, volume, "s2") for volume in ("vm", "copy")}
    sites.replicate("vm", "copy")
    assert sites.parent("copy") == "one/vm@s1"
    for volume, version in versions.items():
        raw = sites.target.read_snapshot(replica(volume).name, version)
        assert raw == sites.source.read_snapshot(volume, version)
        assert raw.startswith(b"LUKS\xba\xbe")
        assert secret[:100] not in raw
    sites.target.backend.clone(replica("vm").name, versions["vm"].ref, "restored")
    with sites.target.image("restored") as image:
        image.flatten()  # Ceph 16.2 opens no encrypted clones
        image.encryption_load(luks, "passphrase")
        assert image.read(MIB, len(secret)) == secret
        assert image.read(2 * MIB, 4) == b"more"


# -- in use


def test_a_replica_that_somebody_has_locked_is_not_written_to(sites: Sites) -> None:
    """Also one that is not open anywhere: the one who locked it may come back."""
    case = sites.target
    case.name = "store"
    case.reopen()
    one = first(case)
    request = asked(make_version("two", SMALL), one)
    for lock in ("exclusive", "shared"):
        with case.image(VM.name) as image:
            image.lock_exclusive("by-hand") if lock == "exclusive" else image.lock_shared("by-hand", "tag")
        with (
            pytest.raises(VolumeBusy, match=r"locked by client\.\d+ at 127\.0\.0\.1.* \(by-hand\)"),
            make_stream() as s,
        ):
            case.backend.receive(request, s, Cancellation())
        state = case.backend.state(VM.name)
        assert state is not None
        assert state.versions == (one,)
        with case.image(VM.name) as image:
            image.unlock("by-hand")
    with make_stream() as s:
        case.backend.receive(request, s, Cancellation())
