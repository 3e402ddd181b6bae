"""What happens to ZFS storages in the field: each ends in the documented state, and the way out that is named works.

Run by pytest in a guest (``test_zfs_scenarios.py``): our command line, in this process, over two pools; ``here`` has
the volumes, ``there`` the replicas.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from replicator.cli.main import main
from tests import tiers

MIB = 1 << 20
PLACE = Path("/srv/field")
ROOT, BACKUP = "fielda/vm", "fieldb/backup"
TAG = "replicator:vms:node1:there"
_SECONDS = 1800
_WAIT = 1800

pytestmark = [pytest.mark.tier("zfs"), pytest.mark.timeout(7200)]

CONFIG = """
[node]
name = "node1"
state_dir = "/srv/field/state"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
http = ""
[storage.here]
kind = "zfs"
root = "fielda/vm"
[storage.there]
kind = "zfs"
root = "fieldb/backup"
[job.vms]
source = "here:*"
targets = ["there"]
keep = {source = "last=2", target = "last=9"}
"""
SETUP = """
mkdir -p /srv/field/state
for p in fielda fieldb; do
    zpool destroy -f $p 2> /dev/null
    truncate -s 700M /srv/field/$p.img
    zpool create -f -O mountpoint=none $p /srv/field/$p.img
done
zfs create fielda/vm
zfs create fieldb/backup
"""


class Field:
    """Two pools and our program."""

    def shell(self, script: str, *, check: bool = True) -> str:
        """A shell command; what it printed."""
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=_SECONDS, check=False)
        assert done.returncode == 0 or not check, (script, done)
        return done.stdout.strip()

    def zfs(self, *argv: str, check: bool = True) -> str:
        """zfs; what it printed."""
        done = subprocess.run(["zfs", *argv], capture_output=True, text=True, timeout=_SECONDS, check=False)
        assert done.returncode == 0 or not check, (argv, done)
        return done.stdout.strip()

    def replicator(self, *argv: str, config: str = "field") -> tuple[int, str]:
        """Our command line; its exit status and what it said, on one line."""
        done = CliRunner().invoke(main, ["--config", str(PLACE / f"{config}.toml"), *argv])
        return done.exit_code, " ".join(done.output.split())

    def start(self, *argv: str, config: str) -> subprocess.Popen[bytes]:
        """Our command line as a process of its own."""
        command = ["replicator", "--config", str(PLACE / f"{config}.toml"), *argv]
        with (PLACE / "log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def said(self) -> str:
        """What that process said, on one line."""
        return " ".join((PLACE / "log").read_text().split())

    def sync(self, volume: str) -> tuple[int, str]:
        """One run for one volume."""
        return self.replicator("sync", "vms", "--volume", f"here:{volume}")

    def ok(self, volume: str) -> None:
        """A run that succeeds."""
        status, said = self.sync(volume)
        assert status == 0, said
        self.equal(volume)

    def refused(self, volume: str, *words: str) -> None:
        """A run that fails with these words."""
        status, said = self.sync(volume)
        assert status == 1, said
        for word in words:
            assert word in said, (word, said)

    def resync(self, volume: str) -> None:
        """The way out that conflicts name, and that the run after it succeeds."""
        status, said = self.replicator("resync", f"here:{volume}", "--yes")
        assert status == 0, said
        self.ok(volume)

    def make(self, volume: str, *options: str) -> None:
        """A filesystem with a file."""
        self.zfs("create", "-o", f"mountpoint=/srv/field/mnt/{volume}", *options, f"{ROOT}/{volume}")
        self.write(volume, 1)

    def write(self, volume: str, size: int, name: str = "file") -> None:
        """``size`` MiB of new data in a file."""
        self.shell(f"head -c {size * MIB} /dev/urandom > /srv/field/mnt/{volume}/{name}")

    def snapshots(self, dataset: str) -> dict[str, str]:
        """Snapshots of a dataset, oldest first: names by guid."""
        listed = self.zfs("list", "-H", "-d1", "-t", "snapshot", "-s", "createtxg", "-o", "guid,name", dataset)
        rows = [line.split("\t") for line in listed.splitlines()]
        return {guid: name.partition("@")[2] for guid, name in rows}

    def bookmarks(self, dataset: str) -> list[str]:
        """Bookmarks of a dataset, in full."""
        return self.zfs("list", "-H", "-d1", "-t", "bookmark", "-o", "name", dataset).split()

    def source(self, volume: str) -> str:
        """Its dataset."""
        return f"{ROOT}/{volume}"

    def replica(self, volume: str) -> str:
        """Its replica's dataset."""
        return f"{BACKUP}/node1/{volume}"

    def token(self, volume: str) -> str:
        """The replica's resume token, "-" for none."""
        return self.zfs("get", "-H", "-o", "value", "receive_resume_token", self.replica(volume), check=False) or "-"

    def equal(self, volume: str) -> None:
        """The replica has the source's newest snapshot, with the same content, and is no further."""
        source, replica = self.snapshots(self.source(volume)), self.snapshots(self.replica(volume))
        (guid, name), (there, its_name) = list(source.items())[-1], list(replica.items())[-1]
        assert guid == there
        assert self.token(volume) == "-"
        sums = [self.sums(f"{self.source(volume)}@{name}"), self.sums(f"{self.replica(volume)}@{its_name}")]
        encrypted = self.zfs("get", "-H", "-o", "value", "keystatus", self.replica(volume)) == "unavailable"
        assert sums[0] == sums[1] or encrypted
        assert sums[0]

    def sums(self, snapshot: str) -> str:
        """Digests of all files of a filesystem's snapshot."""
        pool = snapshot.partition("/")[0]
        return self.shell(
            f"zfs clone -o mountpoint=/srv/field/look -o canmount=on -o readonly=on '{snapshot}' {pool}/look && "
            f"cd /srv/field/look && find . -type f -exec sha256sum {{}} + | sort; cd /; zfs destroy {pool}/look"
        )

    def drop(self, snapshot: str) -> None:
        """Destroy a snapshot, whoever holds it."""
        for line in self.zfs("holds", "-H", snapshot).splitlines():
            self.zfs("release", line.split("\t")[1], snapshot)
        self.zfs("destroy", snapshot)

    def plan(self, volume: str) -> dict[str, Any]:
        """What a run of that volume would do."""
        done = CliRunner().invoke(main, ["--config", str(PLACE / "field.toml"), "plan", "vms", "--json"])
        listed = json.loads(done.stdout)
        replicas = listed if isinstance(listed, list) else listed["replicas"]
        return next(entry for entry in replicas if entry["volume"] == f"here:{volume}")

    def until(self, what: Callable[[], bool], said: Callable[[], str] = str) -> None:
        """Wait for it."""
        until = time.monotonic() + _WAIT
        while not what():
            assert time.monotonic() < until, said()
            time.sleep(0.2)

    def interrupt(self, volume: str) -> None:
        """A run that is killed in the middle of its transfer."""
        run = self.start("sync", "vms", "--volume", f"here:{volume}", config="slow")
        self.until(lambda: self.token(volume) != "-", self.said)
        run.kill()
        run.wait(_WAIT)
        self.shell("while pgrep -x zfs; do sleep 0.1; done")
        assert self.token(volume) != "-"


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    if reason := tiers.missing("zfs"):
        pytest.skip(reason)
    made = Field()
    made.shell(SETUP)
    (PLACE / "field.toml").write_text(CONFIG)
    (PLACE / "slow.toml").write_text(CONFIG + 'rate_limit = "2MiB/s"\n')
    yield made
    for pool in ("fielda", "fieldb"):
        made.shell(f"zpool destroy -f {pool}", check=False)


def replicated(field: Field, volume: str, runs: int = 1, *options: str) -> None:
    """A volume with some snapshots on both sides."""
    field.make(volume, *options)
    for _ in range(runs):
        field.ok(volume)
        field.write(volume, 1)


# -- tokens


def test_a_token_is_continued(field: Field) -> None:
    replicated(field, "resumed")
    field.write("resumed", 12)
    field.interrupt("resumed")
    field.ok("resumed")


def test_a_stale_token_is_discarded_and_all_is_planned_afresh(field: Field) -> None:
    replicated(field, "stale")
    field.write("stale", 12)
    field.interrupt("stale")
    newest = list(field.snapshots(field.source("stale")).values())[-1]
    field.drop(f"{field.source('stale')}@{newest}")
    for mark in field.bookmarks(field.source("stale")):
        if mark.split(":")[-1] not in field.snapshots(field.source("stale")):
            field.zfs("destroy", mark)
    (note,) = [note for note in field.plan("stale")["notes"] if "half-received" in note]
    assert note == f"the half-received {newest} is discarded: the source no longer has that snapshot"
    field.ok("stale")


def test_a_token_whose_base_is_only_a_bookmark_is_continued(field: Field) -> None:
    replicated(field, "marked")
    field.write("marked", 12)
    field.interrupt("marked")
    base = next(iter(field.snapshots(field.source("marked")).values()))
    field.drop(f"{field.source('marked')}@{base}")
    assert field.bookmarks(field.source("marked"))
    field.ok("marked")


def test_a_token_whose_base_is_gone_is_a_conflict_that_resync_solves(field: Field) -> None:
    replicated(field, "baseless")
    field.write("baseless", 12)
    field.interrupt("baseless")
    base = next(iter(field.snapshots(field.source("baseless")).values()))
    field.drop(f"{field.source('baseless')}@{base}")
    for mark in field.bookmarks(field.source("baseless")):
        field.zfs("destroy", mark)
    field.refused("baseless", "no snapshot in common", "replicator resync here:baseless")
    field.resync("baseless")


# -- the target


def diverged(field: Field, volume: str) -> list[str]:
    """What was kept aside of a replica."""
    listed = field.zfs("list", "-H", "-o", "name", "-r", BACKUP).split()
    return [name for name in listed if name.startswith(f"{field.replica(volume)}-diverged-")]


def test_a_target_that_was_mounted_and_written(field: Field) -> None:
    replicated(field, "written", 2)
    replica = field.replica("written")
    field.zfs("set", "readonly=off", replica)
    field.zfs("set", "mountpoint=/srv/field/there", replica)
    field.zfs("mount", replica)
    field.shell("echo own > /srv/field/there/own && zpool sync")
    field.refused("written", "was written to since", "replicator resync here:written")
    field.resync("written")
    (kept,) = diverged(field, "written")
    last = list(field.snapshots(kept).values())[-1]
    assert "own" in field.sums(f"{kept}@{last}")
    assert field.zfs("get", "-H", "-o", "value", "readonly,mounted", replica).split() == ["on", "no"]


def test_a_target_that_was_rolled_back_is_brought_forward_again(field: Field) -> None:
    replicated(field, "back", 2)
    replica = field.replica("back")
    first, second = field.snapshots(replica).values()
    field.shell(f"zfs release {TAG} {replica}@{second}")
    field.zfs("rollback", "-r", f"{replica}@{first}")
    field.ok("back")
    assert next(iter(field.snapshots(replica).values())) == first


def test_a_target_without_its_newest_snapshots_starts_from_an_older_one(field: Field) -> None:
    replicated(field, "older", 2)
    replica = field.replica("older")
    first, second = field.snapshots(replica).values()
    field.drop(f"{replica}@{second}")
    field.refused("older", "was written to since", "replicator resync here:older")
    field.resync("older")
    assert first in field.snapshots(replica).values()


def test_a_target_whose_common_snapshot_is_only_a_bookmark(field: Field) -> None:
    replicated(field, "marks", 2)
    replica = field.replica("marks")
    for number, name in enumerate(list(field.snapshots(replica).values())):
        field.zfs("bookmark", f"{replica}@{name}", f"{replica}#{number}")
        field.drop(f"{replica}@{name}")
    field.refused("marks", "replicator resync here:marks")  # ZFS receives onto snapshots only
    field.resync("marks")
    (kept,) = diverged(field, "marks")
    assert len(field.bookmarks(kept)) == 2


def test_a_replica_that_was_renamed_is_found_again(field: Field) -> None:
    replicated(field, "moved", 2)
    replica = field.replica("moved")
    before = field.snapshots(replica)
    field.zfs("rename", replica, f"{BACKUP}/elsewhere")
    field.ok("moved")
    assert before.items() <= field.snapshots(replica).items()
    assert "elsewhere" not in field.zfs("list", "-H", "-o", "name", "-r", BACKUP)


def test_a_target_that_has_nothing_left(field: Field) -> None:
    replicated(field, "nothing", 2)
    replica = field.replica("nothing")
    for name in field.snapshots(replica).values():
        field.drop(f"{replica}@{name}")
    field.refused("nothing", "replicator resync here:nothing")
    field.resync("nothing")
    assert diverged(field, "nothing")


def test_a_source_whose_base_is_only_a_bookmark(field: Field) -> None:
    replicated(field, "bookmark")
    (only,) = field.snapshots(field.source("bookmark")).values()
    field.drop(f"{field.source('bookmark')}@{only}")
    field.ok("bookmark")
    assert len(field.bookmarks(field.source("bookmark"))) == 1  # that of the new one


def test_a_source_that_has_nothing_left(field: Field) -> None:
    replicated(field, "bare")
    (only,) = field.snapshots(field.source("bare")).values()
    field.drop(f"{field.source('bare')}@{only}")
    for mark in field.bookmarks(field.source("bare")):
        field.zfs("destroy", mark)
    field.refused("bare", "no snapshot in common", "replicator resync here:bare")
    field.resync("bare")
    assert diverged(field, "bare")


def test_a_source_that_was_rolled_back(field: Field) -> None:
    replicated(field, "undone", 2)
    source = field.source("undone")
    first, second = field.snapshots(source).values()
    field.shell(f"zfs release {TAG} {source}@{second}")
    field.zfs("rollback", "-r", f"{source}@{first}")
    field.refused("undone", "has snapshots that the source does not have", second, "replicator resync here:undone")
    field.resync("undone")
    (kept,) = diverged(field, "undone")
    assert second in field.snapshots(kept).values()


# -- the pools


def test_a_target_that_is_full(field: Field) -> None:
    replicated(field, "full")
    used = int(field.zfs("list", "-Hpo", "used", BACKUP))
    field.zfs("set", f"quota={used + 9 * MIB}", BACKUP)
    try:
        field.write("full", 24)
        field.refused("full", "fieldb/backup/node1/full", "raise the dataset's quota")
    finally:
        field.zfs("set", "quota=none", BACKUP)
    field.ok("full")


def test_a_pool_that_is_full(field: Field) -> None:
    replicated(field, "crowded")
    room = int(field.zfs("get", "-H", "-p", "-o", "value", "available", "fieldb"))
    field.zfs("create", "-o", f"reservation={room - 4 * MIB}", "fieldb/else")
    try:
        field.write("crowded", 24)
        field.refused("crowded", "make room in the pool")
    finally:
        field.zfs("destroy", "fieldb/else")
    field.ok("crowded")


def test_a_key_that_is_not_loaded(field: Field) -> None:
    field.shell("head -c 32 /dev/urandom > /srv/field/key")
    secret = ("-o", "encryption=on", "-o", "keyformat=raw", "-o", "keylocation=file:///srv/field/key")
    replicated(field, "raw", 1, *secret)
    field.zfs("unmount", field.source("raw"))
    field.zfs("unload-key", field.source("raw"))
    assert field.sync("raw")[0] == 0  # raw streams need no key
    field.make("open", *secret)
    field.zfs("set", "replicator:stream=plain", field.source("open"))
    assert field.sync("open")[0] == 0
    field.write("open", 1)
    if field.zfs("get", "-H", "-o", "value", "replicator:stream", field.source("open")) != "plain":
        pytest.fail("the form that somebody pinned was changed")
    field.zfs("unmount", field.source("open"))
    field.zfs("unload-key", field.source("open"))
    field.refused("open", "zfs load-key")
    field.zfs("load-key", field.source("open"))
    field.zfs("mount", field.source("open"))
    field.ok("open")


def suspend(field: Field, table: str) -> None:
    """Give the device under a pool another table."""
    field.shell(
        f"dmsetup suspend --noflush --nolockfs sick && dmsetup load sick --table '{table}'; dmsetup resume sick"
    )


def test_a_pool_that_is_suspended_keeps_nothing_else_waiting(field: Field) -> None:
    size = int(field.shell("blockdev --getsz /dev/ubdc"))
    field.shell("zpool destroy -f sick; dmsetup remove --retry sick; zpool labelclear -f /dev/ubdc", check=False)
    field.shell(f"dmsetup create sick --table '0 {size} linear /dev/ubdc 0'")
    field.shell("zpool create -f -O mountpoint=none sick /dev/mapper/sick && zfs create sick/backup")
    config = CONFIG.replace('targets = ["there"]', 'targets = ["there", "ill"]').replace(
        "[job.vms]", '[storage.ill]\nkind = "zfs"\nroot = "sick/backup"\n[job.vms]'
    )
    (PLACE / "ill.toml").write_text(config)
    (PLACE / "slow-ill.toml").write_text(config + 'rate_limit = "2MiB/s"\n')
    run = ("sync", "vms", "--volume", "here:ill")
    field.make("ill")
    assert field.replicator(*run, config="ill")[0] == 0
    field.write("ill", 24)
    begun = field.start(*run, config="slow-ill")
    there = "sick/backup/node1/ill"
    field.until(lambda: field.zfs("get", "-H", "-o", "value", "receive_resume_token", there) != "-", field.said)
    suspend(field, f"0 {size} error")
    assert begun.wait(_WAIT) == 1
    assert "pool sick is suspended" in field.said()
    assert re.search(r"here:ill → node1:there: done", field.said()), field.said()
    field.equal("ill")
    field.write("ill", 1)
    status, said = field.replicator(*run, config="ill")
    assert status == 1
    assert "zpool clear sick" in said
    field.equal("ill")
    assert "pool sick is suspended" in field.replicator("check", config="ill")[1]
    suspend(field, f"0 {size} linear /dev/ubdc 0")
    field.shell("zpool clear sick")
    assert field.replicator(*run, config="ill")[0] == 0
    newest = list(field.snapshots(field.source("ill")))[-1]
    assert newest in field.snapshots(there)
    field.shell("zpool destroy -f sick && dmsetup remove sick")
