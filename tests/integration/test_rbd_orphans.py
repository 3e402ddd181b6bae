"""Images that are deleted at their source, in whole runs over a real cluster: the replica stays until somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import config
from replicator.assembly import open_engine
from replicator.cancellation import Cancellation
from replicator.control import OrphanReport, RunReport, Status
from tests.lab.ceph import Cluster
from tests.support.blocks import pattern
from tests.support.rbd_case import POOL, RbdCase, purge

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
DATA = pattern(1 << 20)
CONFIG = """
[node]
name = "prox1"
state_dir = "{state}"
[network]
cluster = "127.0.0.0/8"
listen = "127.0.0.1:8571"
[storage.live]
kind = "rbd"
pool = "{pool}"
namespace = "{source}"
conffile = "{conf}"
snapshots = "together"
[storage.backup]
kind = "rbd"
pool = "{pool}"
namespace = "{target}"
conffile = "{conf}"
[job.vms]
source = "live:*"
targets = ["backup"]
keep = {{source = "last=1", target = "last=1"}}
unchanged = "snapshot"
"""


class World:
    """Images a and b of one namespace, and a job that replicates them into another."""

    def __init__(self, conf: Path, state: Path) -> None:
        self.source = RbdCase(conf, name="live")
        self.target = RbdCase(conf, name="backup")
        text = CONFIG.format(
            state=state, pool=POOL, conf=conf, source=self.source.namespace, target=self.target.namespace
        )
        self._config = config.parse(text)
        for volume in ("a", "b"):
            self.source.create(volume, DATA)

    def sync(self) -> None:
        with open_engine(self._config) as engine:
            reports: tuple[RunReport, ...] = engine.sync("vms", None, None, lambda _: None, Cancellation())
        assert {report.outcome for report in reports} == {"ok"}, reports

    def status(self) -> Status:
        with open_engine(self._config) as engine:
            return engine.status()

    def prune(self) -> None:
        with open_engine(self._config) as engine:
            assert not any(report.message for report in engine.prune("vms", False))

    def orphans(self) -> tuple[OrphanReport, ...]:
        with open_engine(self._config) as engine:
            return engine.orphans("vms")

    def remove(self, wanted: tuple[OrphanReport, ...]) -> tuple[OrphanReport, ...]:
        with open_engine(self._config) as engine:
            return engine.remove_orphans("vms", wanted)

    def delete(self, volume: str) -> None:
        """As an operator does who means it."""
        with self.source.session() as session:
            place = self.source.naming.place(volume)
            purge(session, place)
            with session.ioctx(place.namespace) as ioctx:
                session.pool.remove(ioctx, place.image)

    def versions(self, volume: str) -> list[str]:
        state = self.target.backend.state(f"prox1/{volume}")
        return [] if state is None else [version.name for version in state.versions]

    def close(self) -> None:
        self.source.close()
        self.target.close()


@pytest.fixture
def world(ceph: Cluster, tmp_path: Path) -> Iterator[World]:
    made = World(ceph.conf, tmp_path)
    yield made
    made.close()


def test_a_deleted_image_is_kept_and_removed_on_request(world: World, ceph: Cluster) -> None:
    world.sync()
    old = world.versions("b")
    assert len(old) == 1
    assert world.orphans() == ()
    world.delete("b")
    for _ in range(2):
        world.sync()
    world.prune()
    assert world.versions("b") == old
    assert world.versions("a") != old
    status = world.status()
    assert [(o.job, o.volume, o.target, o.replica) for o in status.orphans] == [
        ("vms", "live:b", "prox1:backup", "backup:prox1/b")
    ]
    assert [row.volume for row in status.replicas] == ["live:a"]
    (found,) = world.orphans()
    assert (found.kept, found.size, [v.name for v in found.versions]) == ("", len(DATA), old)
    (done,) = world.remove((found,))
    assert done.gone
    assert world.status().orphans == ()
    assert ceph.run("rbd", "ls", f"{POOL}/{world.target.namespace}").split() == ["prox1%2Fa"]
    assert "lock" not in ceph.run("rados", "-p", POOL, "-N", str(world.target.namespace), "ls")
    world.sync()
    (again,) = world.remove((found,))
    assert again.kept.startswith("it is no orphan")


def test_one_that_is_in_use_or_has_a_source_again_stays(world: World) -> None:
    world.sync()
    world.delete("b")
    (found,) = world.orphans()
    with world.target.image("prox1/b"):  # somebody has it open
        (kept,) = world.remove((found,))
        assert "in use" in kept.kept
    world.source.create("b", DATA)
    (kept,) = world.remove((found,))
    assert kept.kept.startswith("it is no orphan")
    assert world.target.backend.state("prox1/b") is not None
