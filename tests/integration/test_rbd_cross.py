"""Volumes from a Ceph cluster to raw images on disk, and from raw images into a cluster, by jobs like any other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicator.demo.node import DemoNode, join, loopback_network
from tests.lab.ceph import Cluster
from tests.support.cluster import change, fill
from tests.support.rbd_case import RbdCase, purge
from tests.support.sites import ADMIN, MIB, storage

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(300)]
SIZE = 24 * MIB


class Crossing:
    """Node ``a`` has a Ceph cluster, node ``b`` a directory of raw images. Job ``out`` of ``a`` goes there, job
    ``back`` of ``b`` comes from there."""

    def __init__(self, folder: Path, ceph: Cluster) -> None:
        prefix = loopback_network()
        self.a, self.b = DemoNode("a", folder / "a"), DemoNode("b", folder / "b")
        self.case = RbdCase(ceph.conf)
        self.images = folder / "images"
        self.images.mkdir()
        network = f"{prefix}.0/24"
        self.a.configure(
            f"{prefix}.1:8571",
            cluster=network,
            http="",
            rest=storage("vms", self.case, ADMIN)
            + f'[peer.b]\naddress = "{prefix}.2:8571"\nmay_push_to = ["vms"]\n\n'
            + '[job.out]\nsource = "vms:*"\ntargets = ["b:images"]\nschedule = "1d"\n',
        )
        self.b.configure(
            f"{prefix}.2:8571",
            cluster=network,
            http="",
            rest=f'[storage.images]\nkind = "image"\npath = "{self.images}"\n\n'
            f'[peer.a]\naddress = "{prefix}.1:8571"\nmay_push_to = ["images"]\n\n'
            '[job.back]\nsource = "images:*"\ntargets = ["a:vms"]\nschedule = "1d"\n',
        )

    def newest_image(self) -> Path:
        """The newest snapshot of ``a/vm`` among the images, as a file."""
        found = [path for path in self.images.glob(".replicator/**/snapshots/*/image") if "=vm" in str(path)]
        return max(found, key=lambda path: path.parent.name)

    def newest_in_ceph(self, volume: str) -> bytes:
        """The newest snapshot of a volume in the cluster."""
        state = self.case.backend.state(volume)
        assert state is not None
        return self.case.read_snapshot(volume, state.versions[-1])


@contextmanager
def crossing(folder: Path, ceph: Cluster) -> Iterator[Crossing]:
    made = Crossing(folder, ceph)
    try:
        join(made.a, made.b)
        made.b.start()
        yield made
    finally:
        made.a.stop()
        made.b.stop()
        made.case.close()


def test_from_ceph_to_images_and_back(tmp_path: Path, ceph: Cluster) -> None:
    with crossing(tmp_path, ceph) as pair:
        case = pair.case
        case.create("vm", os.urandom(SIZE))
        pair.a.must("sync", "out")
        for step in range(3):
            with case.image("vm") as image:
                image.write(os.urandom(70_000), step * MIB + 512)
                image.discard(8 * MIB, 4 * MIB)
                image.write_zeroes(15 * MIB, 300_000)
                image.resize((20 + 7 * step) * MIB)
            report = json.loads(pair.a.must("sync", "out", "--json"))
            assert report[0]["done"] < 8 * MIB, "more than what changed crossed"
            assert pair.newest_image().read_bytes() == case.read("vm")
        pair.a.must("verify", "vms:vm")
        image_file = pair.newest_image()
        assert image_file.stat().st_blocks * 512 < image_file.stat().st_size, "holes did not cross"
        snapshot = image_file.parent.name
        frozen = image_file.read_bytes()

        # The image is lost: it comes back from the file, as a new one.
        remove(case, "vm")
        pair.a.must("restore", f"vms:vm@{snapshot}", "--to", "vms:vm-back")
        assert case.read("vm-back") == frozen


def remove(case: RbdCase, volume: str) -> None:
    with case.session() as session:
        place = case.naming.place(volume)
        purge(session, place)
        with session.ioctx(place.namespace) as ioctx:
            session.pool.remove(ioctx, place.image)


def test_from_images_to_ceph(tmp_path: Path, ceph: Cluster) -> None:
    with crossing(tmp_path, ceph) as pair:
        disk = pair.images / "disk.raw"
        fill(disk, SIZE, density=0.5)
        pair.b.must("sync", "back")
        for step in range(3):
            change(disk, seed=step)
            os.truncate(disk, (20 + 5 * step) * MIB + 4096)
            report = json.loads(pair.b.must("sync", "back", "--json"))
            assert report[0]["done"] < 8 * MIB, "more than what changed crossed"
            assert pair.newest_in_ceph("b/disk.raw") == disk.read_bytes()
        pair.b.must("verify", "images:disk.raw")
        pair.b.must("resync", "images:disk.raw", "--yes")
        assert pair.newest_in_ceph("b/disk.raw") == disk.read_bytes()


def test_an_odd_size_crosses_as_it_is(tmp_path: Path, ceph: Cluster) -> None:
    """No storage rounds a size."""
    with crossing(tmp_path, ceph) as pair:
        disk = pair.images / "odd.raw"
        fill(disk, 5 * MIB + 512)
        pair.b.must("sync", "back")
        assert pair.newest_in_ceph("b/odd.raw") == disk.read_bytes()


def test_a_damaged_replica_of_another_kind_is_found_and_mended(tmp_path: Path, ceph: Cluster) -> None:
    with crossing(tmp_path, ceph) as pair:
        pair.case.create("vm", os.urandom(SIZE))
        pair.a.must("sync", "out")
        path = pair.newest_image()
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"damage")
        found = pair.a.run("verify", "vms:vm", "--json")
        assert found.returncode == 3
        assert str(5 * MIB) in found.stdout
        pair.a.must("verify", "vms:vm", "--repair", "--yes")
        pair.a.must("verify", "vms:vm")
        assert pair.newest_image().read_bytes() == pair.case.read("vm")
