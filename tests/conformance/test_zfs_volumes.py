"""Whole runs over real ZFS: what becomes of replicas when datasets are cloned, renamed, promoted, made anew, gone.

A job of one node, from one root of the pool to another: the engine, the driver and the backend as the daemon has them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import config
from replicator.assembly import open_engine
from replicator.cancellation import Cancellation
from replicator.control import Orphan, PlannedReplica, RunReport
from replicator.errors import NoSpace, ReplicatorError
from tests.support.zfs_case import POOL, device, zfs

pytestmark = [pytest.mark.tier("zfs"), pytest.mark.timeout(1800)]  # whole runs, in a guest that is slow

_NUMBERS = itertools.count()
SIZE = 4 << 20
CONFIG = """
[node]
name = "prox1"
state_dir = "{state}"
[network]
cluster = "127.0.0.0/8"
listen = "127.0.0.1:8571"
[storage.tank]
kind = "zfs"
root = "{root}/src"
[storage.backup]
kind = "zfs"
root = "{root}/dst"
[job.all]
source = ["tank:*", "!tank:*-swap"]
targets = ["backup"]
keep = {{source = "last=2", target = "last=3"}}
foreign_snapshots = ["by-hand*"]
"""


class World:
    """A pool's two halves, and a job between them."""

    def __init__(self, root: str, state: Path) -> None:
        self.source, self.target = f"{root}/src", f"{root}/dst/prox1"
        self._config = config.parse(CONFIG.format(root=root, state=state))

    def sync(self) -> dict[str, RunReport]:
        with open_engine(self._config) as engine:
            reports = engine.sync("all", None, None, lambda _: None, Cancellation())
        return {report.volume.removeprefix("tank:"): report for report in reports}

    def sync_well(self) -> dict[str, RunReport]:
        reports = self.sync()
        assert {report.outcome for report in reports.values()} == {"ok"}, reports
        return reports

    def plan(self) -> dict[str, PlannedReplica]:
        with open_engine(self._config) as engine:
            return {item.volume.removeprefix("tank:"): item for item in engine.plan("all")}

    def orphans(self) -> tuple[Orphan, ...]:
        with open_engine(self._config) as engine:
            return engine.status().orphans

    def resync(self, volume: str, *, full: bool = False) -> tuple[str, ...]:
        """Resync, and what it said beforehand."""
        with open_engine(self._config) as engine:
            (preview,) = engine.preview_resync(f"tank:{volume}", None, full)
            engine.resync(f"tank:{volume}", None, full, lambda _: None, Cancellation())
        return preview.effects

    def zvol(self, name: str) -> None:
        zfs("create", "-s", "-b", "4096", "-V", str(SIZE), f"{self.source}/{name}")
        self.write(name, 0, os.urandom(SIZE))

    def write(self, name: str, offset: int, data: bytes) -> None:
        with device(f"{self.source}/{name}").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, offset)
            os.fsync(file.fileno())

    def replicas(self) -> list[str]:
        listed = zfs("list", "-H", "-o", "name,replicator:role", "-t", "filesystem,volume", "-r", self.target)
        rows = [line.split("\t") for line in listed.splitlines()]
        return [name.removeprefix(f"{self.target}/") for name, role in rows if role == "replica"]

    def guids(self, dataset: str) -> list[str]:
        argv = ("list", "-H", "-p", "-t", "snapshot", "-o", "guid", "-s", "createtxg", "-d", "1", dataset)
        return zfs(*argv).split()

    def check_common(self, name: str, replica: str = "") -> None:
        """The newest snapshot of both is the same."""
        source, target = self.guids(f"{self.source}/{name}"), self.guids(f"{self.target}/{replica or name}")
        assert source[-1] == target[-1], (source, target)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = f"{POOL}/volumes-{os.getpid()}-{next(_NUMBERS)}"
    zfs("create", "-o", "mountpoint=none", root)
    for half in ("src", "dst"):
        zfs("create", f"{root}/{half}")
    yield World(root, tmp_path / "state")
    for line in zfs("list", "-H", "-o", "name", "-r", "-t", "snapshot", root).split("\n"):
        for held in zfs("holds", "-H", line).split("\n") if line else ():
            if held:
                zfs("release", held.split("\t")[1], line)
    os.system(f"udevadm settle; zfs destroy -R {root}")  # noqa: S605 - a name of ours


def origin(dataset: str) -> str:
    return zfs("get", "-H", "-o", "value", "origin", dataset).strip()


def test_clones_go_after_their_origins_and_stay_clones(world: World) -> None:
    world.zvol("z-template")
    zfs("snapshot", f"{world.source}/z-template@by-hand")
    zfs("clone", f"{world.source}/z-template@by-hand", f"{world.source}/a-clone")
    zfs("snapshot", f"{world.source}/z-template@other-program")
    zfs("create", "-V", "1M", f"{world.source}/x-swap")
    world.write("a-clone", 0, os.urandom(SIZE // 8))
    planned = world.plan()
    assert set(planned) == {"a-clone", "z-template"}
    reports = world.sync_well()
    assert origin(f"{world.target}/a-clone") == f"{world.target}/z-template@by-hand"
    assert reports["a-clone"].done < SIZE // 2 < reports["z-template"].done
    sent = zfs("list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", f"{world.target}/z-template")
    assert "@by-hand" in sent
    assert "@other-program" not in sent
    for number in range(2):
        world.write("a-clone", number * 4096, os.urandom(4096))
        world.sync_well()
    for name in ("a-clone", "z-template"):
        world.check_common(name)
    assert "@other-program" in zfs("list", "-H", "-o", "name", "-t", "snapshot", "-r", world.source)
    ours = zfs("list", "-H", "-o", "name", "-t", "snapshot", "-r", world.target).count("@replicator_all_")
    assert ours == 3 + 1  # nobody wrote to the template
    assert not [tag for name in zfs("list", "-H", "-o", "name", "-t", "snapshot", "-r", world.source).split()
                for tag in zfs("holds", "-H", name).split() if tag.endswith(":clone")]  # fmt: skip
    zfs("promote", f"{world.source}/a-clone")
    world.write("z-template", 0, os.urandom(4096))
    reports = world.sync_well()
    assert max(report.done for report in reports.values()) < SIZE // 2, "nothing is sent again"
    for name in ("a-clone", "z-template"):
        world.check_common(name)


def test_clones_of_what_no_job_sends_by_itself(world: World) -> None:
    """As Proxmox makes them: the template's only snapshot is not the job's, and one of the job's own is passed over for
    a newer one. Both go with it because clones began as them, and stay while the clones live."""
    world.zvol("base-100")
    zfs("snapshot", f"{world.source}/base-100@__base__")
    zfs("clone", f"{world.source}/base-100@__base__", f"{world.source}/a-linked")
    world.write("a-linked", 0, os.urandom(SIZE // 8))
    planned = world.plan()["a-linked"]
    assert any("goes to the target first" in note for note in planned.notes), planned.notes
    reports = world.sync_well()
    assert reports["a-linked"].done < SIZE // 2 < reports["base-100"].done
    assert origin(f"{world.target}/a-linked") == f"{world.target}/base-100@__base__"
    world.write("a-linked", 0, os.urandom(4096))
    world.sync_well()
    own = zfs("list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", f"{world.source}/a-linked").split()[-1]
    name = own.rpartition("@")[2]
    zfs("clone", own, f"{world.source}/b-linked")
    for number in range(4):
        world.write("a-linked", number * 4096, os.urandom(4096))
        world.sync_well()
    assert origin(f"{world.target}/b-linked") == f"{world.target}/a-linked@{name}"
    for volume in ("base-100", "a-linked", "b-linked"):
        world.check_common(volume)
    passed = "replicator_all_20260101T000000.000Z"
    zfs("snapshot", f"{world.source}/a-linked@{passed}")
    zfs("clone", f"{world.source}/a-linked@{passed}", f"{world.source}/c-linked")
    world.write("a-linked", 0, os.urandom(4096))
    world.sync_well()
    assert origin(f"{world.target}/c-linked") == f"{world.target}/a-linked@{passed}"
    zfs("snapshot", f"{world.source}/base-100@late")
    zfs("clone", f"{world.source}/base-100@late", f"{world.source}/d-swap")
    world.sync_well()
    assert "@late" not in zfs("list", "-H", "-o", "name", "-t", "snapshot", "-r", world.target), "no clone of the job's"


def test_names_change_and_replicas_follow(world: World) -> None:
    zfs("create", f"{world.source}/web")
    world.zvol("web/disk")
    world.zvol("vm.1 with space")
    world.sync_well()
    zfs("rename", f"{world.source}/web", f"{world.source}/www")
    zfs("create", "-o", "canmount=off", f"{world.source}/new")
    zfs("rename", f"{world.source}/vm.1 with space", f"{world.source}/new/vm")
    planned = world.plan()
    assert any("renamed" in note for note in planned["www"].notes)
    reports = world.sync_well()
    assert max(reports[name].done for name in ("www", "www/disk", "new/vm")) < SIZE // 2
    assert world.replicas() == ["new", "new/vm", "www", "www/disk"]
    for name in ("www", "www/disk", "new/vm"):
        world.check_common(name)


def test_volumes_appear_change_their_size_and_go(world: World) -> None:
    world.zvol("one")
    world.zvol("two")
    world.sync_well()
    zfs("set", f"volsize={2 * SIZE}", f"{world.source}/one")
    remove(f"{world.source}/two")
    world.zvol("three")
    assert set(world.sync_well()) == {"one", "three"}
    assert world.replicas() == ["one", "three", "two"]
    assert [orphan.replica for orphan in world.orphans()] == ["backup:prox1/two"]
    assert zfs("get", "-Hpo", "value", "volsize", f"{world.target}/one").strip() == str(2 * SIZE)
    zfs("set", f"volsize={SIZE // 2}", f"{world.source}/one")
    world.sync_well()
    assert zfs("get", "-Hpo", "value", "volsize", f"{world.target}/one").strip() == str(SIZE // 2)


def remove(dataset: str) -> None:
    """Destroy a dataset with snapshots that we hold, as an operator would who means it."""
    for name in zfs("list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", dataset).splitlines():
        for line in zfs("holds", "-H", name).splitlines():
            zfs("release", line.split("\t")[1], name)
    zfs("destroy", "-r", dataset)


def test_a_volume_made_anew_is_a_conflict_and_resync_keeps_the_old_replica(world: World) -> None:
    world.zvol("vm")
    world.sync_well()
    old = world.guids(f"{world.target}/vm")
    remove(f"{world.source}/vm")
    world.zvol("vm")
    assert world.plan()["vm"].conflict_kind == "recreated"
    for _ in range(2):
        report = world.sync()["vm"]
        assert (report.outcome, report.done) == ("conflict", 0)
        assert "destroyed and made anew" in report.message
        assert "resync" in report.hint
    assert world.guids(f"{world.target}/vm") == old
    effects = world.resync("vm")
    assert any("kept aside" in effect and "about 4." in effect and "free there" in effect for effect in effects), (
        effects
    )
    kept = next(name for name in world.replicas() if name.startswith("vm-diverged-"))
    assert world.guids(f"{world.target}/{kept}")[: len(old)] == old
    world.check_common("vm")
    world.write("vm", 0, b"more")
    world.sync_well()
    world.check_common("vm")


def test_a_volume_brought_back_from_its_replica_continues(world: World) -> None:
    """By zfs send of the replica: the same snapshots in a dataset with no lineage."""
    world.zvol("vm")
    world.sync_well()
    remove(f"{world.source}/vm")
    newest = zfs("list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", f"{world.target}/vm").split()[-1]
    assert os.system(f"zfs send {newest} | zfs receive -o readonly=off {world.source}/vm") == 0  # noqa: S605
    world.write("vm", 0, os.urandom(4096))
    report = world.sync()["vm"]
    assert report.outcome == "conflict"
    assert "without sending all" in report.hint
    effects = world.resync("vm")
    assert any(effect.startswith("what changed since") for effect in effects), effects
    assert world.replicas() == ["vm"]
    world.check_common("vm")


def test_a_full_resync_keeps_the_whole_replica_and_sends_everything(world: World) -> None:
    zfs("create", f"{world.source}/top")
    world.zvol("top/below")
    world.sync_well()
    world.sync_well()
    old, below = world.guids(f"{world.target}/top"), world.guids(f"{world.target}/top/below")
    effects = world.resync("top", full=True)
    assert any("all of" in effect and "everything is sent anew" in effect for effect in effects), effects
    kept = next(name for name in world.replicas() if name.startswith("top-diverged-"))
    assert set(old) <= set(world.guids(f"{world.target}/{kept}"))
    assert not set(old) & set(world.guids(f"{world.target}/top"))
    assert world.guids(f"{world.target}/top/below") == below, "what is below is a volume of its own"
    world.check_common("top")
    world.write("top/below", 0, b"more")
    world.sync_well()
    world.check_common("top/below")


def test_streams_of_another_form_are_a_conflict_that_resync_solves(world: World, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    options = ("-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}")
    zfs("create", *options, "-s", "-b", "4096", "-V", str(SIZE), f"{world.source}/vm")
    world.write("vm", 0, os.urandom(SIZE))
    world.sync_well()
    old = world.guids(f"{world.target}/vm")
    zfs("set", "replicator:stream=plain", f"{world.source}/vm")
    world.write("vm", 0, b"more")
    report = world.sync()["vm"]
    assert (report.outcome, report.done) == ("conflict", 0)
    assert "made of raw streams" in report.message
    assert "replicator resync tank:vm --target prox1:backup keeps the whole replica aside" in report.hint
    zfs("set", "replicator:stream=raw", f"{world.source}/vm")
    world.sync_well()
    world.check_common("vm")
    zfs("set", "replicator:stream=plain", f"{world.source}/vm")
    effects = world.resync("vm")
    assert any("which cannot be mixed: all of" in effect for effect in effects), effects
    kept = next(name for name in world.replicas() if name.startswith("vm-diverged-"))
    assert set(old) <= set(world.guids(f"{world.target}/{kept}"))
    values = zfs("get", "-H", "-o", "value", "encryption,replicator:stream", f"{world.target}/vm")
    assert values.split() == ["off", "plain"]
    world.write("vm", 0, b"still more")
    world.sync_well()
    world.check_common("vm")


def test_a_resync_of_a_source_that_cannot_be_sent_leaves_the_replica(world: World, tmp_path: Path) -> None:
    """Plain streams need the key, which is not loaded; once it is, the same resync goes through."""
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    options = ("-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}")
    zfs("create", *options, "-o", "replicator:stream=plain", f"{world.source}/fs")
    world.sync_well()
    old = world.guids(f"{world.target}/fs")
    if _mounted(f"{world.source}/fs"):
        zfs("unmount", f"{world.source}/fs")
    zfs("unload-key", f"{world.source}/fs")
    with pytest.raises(ReplicatorError):
        world.resync("fs", full=True)
    assert world.replicas() == ["fs"]
    assert world.guids(f"{world.target}/fs") == old
    zfs("load-key", f"{world.source}/fs")
    world.resync("fs", full=True)
    assert len(world.replicas()) == 2
    world.check_common("fs")


def _mounted(dataset: str) -> bool:
    return zfs("get", "-H", "-o", "value", "mounted", dataset).strip() == "yes"


def test_a_resync_for_which_there_is_no_room_leaves_the_replica(world: World) -> None:
    world.zvol("vm")
    world.sync_well()
    old = world.guids(f"{world.target}/vm")
    storage = world.target.rpartition("/")[0]
    used = int(zfs("get", "-Hpo", "value", "used", storage))
    zfs("set", f"quota={used + SIZE // 2}", storage)
    with pytest.raises(NoSpace, match="are free in"):
        world.resync("vm", full=True)
    assert world.replicas() == ["vm"]
    assert world.guids(f"{world.target}/vm") == old
    zfs("set", "quota=none", storage)
    world.resync("vm", full=True)
    world.check_common("vm")


def test_a_damaged_replica_that_was_renamed_is_not_continued_by_a_resync(world: World) -> None:
    world.zvol("vm")
    world.sync_well()
    old = world.guids(f"{world.target}/vm")
    zfs("rename", f"{world.target}/vm", f"{world.target}/vm-damaged")
    effects = world.resync("vm", full=True)
    assert any("vm-damaged becomes" in effect for effect in effects), effects
    assert not set(old) & set(world.guids(f"{world.target}/vm"))
    assert [name for name in world.replicas() if "damaged" in name] == []


def test_a_promotion_that_takes_the_common_snapshot_away(world: World) -> None:
    world.zvol("vm")
    world.sync_well()
    common = zfs("list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", f"{world.source}/vm").split()[-1]
    zfs("clone", common, f"{world.source}/vm-swap")
    zfs("promote", f"{world.source}/vm-swap")
    report = world.sync()["vm"]
    assert report.outcome == "conflict", report
    assert "which has its older ones" in report.message
    assert "zfs promote" in report.hint
    zfs("promote", f"{world.source}/vm")
    world.sync_well()
    world.check_common("vm")
