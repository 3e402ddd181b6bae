"""Holds that nothing needs any more, and rights that are missing: what is found, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.memory import MemoryBackend
from backends.zfs import privileges
from backends.zfs.context import Context
from backends.zfs.library import CommandLibrary
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.privileges import Account, granted
from backends.zfs.taking_over import Terms
from replicator import checks, config, leftovers
from replicator.cancellation import Cancellation
from replicator.config import Config
from replicator.control import Level
from replicator.errors import StorageError, StorageUnavailable
from replicator.local import LocalEndpoint
from replicator.model import (
    Capability,
    HoldPurpose,
    HoldTag,
    Lack,
    Lineage,
    Role,
    Version,
    VersionKind,
    VolumeId,
    VolumeState,
    clone_tag,
    cursor_name,
    hold_tag,
    restore_tag,
    restored_by,
    verify_tag,
)
from replicator.restoring import Restores
from tests.support.versions import EPOCH as NOW
from tests.support.zfs_records import Answer, RecordedRunner, failed
from tests.unit.test_unchanged import CONFIG, World
from transport import checksum

BASE = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.tank]
kind = "zfs"
root = "tank/vm"
[storage.backup]
kind = "zfs"
root = "tank/backup"
[peer.prox2]
address = "10.99.0.2:8571"
may_push_to = ["backup"]
[job.vms]
source = "tank:*"
targets = ["prox2:backup", "backup"]
[job.pulled]
source = {node = "prox2", volumes = "tank:*"}
targets = ["backup"]
"""
UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
OTHER = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d01"
RIGHT = hold_tag("vms", "prox2", "backup")
OLD_JOB = hold_tag("old", "prox2", "backup")
OLD_TARGET = hold_tag("vms", "prox3", "backup")


def read(tmp_path: Path, text: str = BASE) -> Config:
    path = tmp_path / "replicator.toml"
    path.write_text(text)
    return config.load(path)


def version(number: int, *holds: str, kind: VersionKind = VersionKind.SNAPSHOT, name: str = "") -> Version:
    return Version(name or f"s{number}", str(number), NOW, number, kind, holds=holds)


def state(*versions: Version, role: Role = Role.PRIMARY, volume: str = "tank:vm") -> VolumeState:
    return VolumeState(VolumeId.parse(volume), None, versions, Lineage(UUID, role, 1))


def found(what: VolumeState, read_config: Config) -> list[tuple[str, str]]:
    return [(left.tag, left.why) for left in leftovers.find(what, read_config)]


def test_tags_of_ours_say_whose_they_are() -> None:
    assert HoldTag.parse(RIGHT) == HoldTag("vms", "prox2", "backup")
    assert str(HoldTag.parse(RIGHT)) == "job vms for prox2:backup"
    assert HoldTag.parse(clone_tag(RIGHT)) == HoldTag("vms", "prox2", "backup", HoldPurpose.CLONE)
    assert str(HoldTag.parse(verify_tag(RIGHT))) == "job vms for prox2:backup, which verifies it"
    assert (restored_by(restore_tag("prox1")), restored_by(RIGHT)) == ("prox1", None)
    for other in (
        "",
        "replicator",
        restore_tag("prox1"),
        f"{RIGHT}:",
        "replicator:a:b",
        "replicator:a:b:c:d",
        "other:a:b:c",
        "replicator:rejoin",
    ):
        assert HoldTag.parse(other) is None
    mark = version(5, kind=VersionKind.BOOKMARK, name=cursor_name(RIGHT, "5"))
    assert mark.tags == (RIGHT,)
    for name, kind in (
        (cursor_name(RIGHT, "6"), VersionKind.BOOKMARK),
        (cursor_name(verify_tag(RIGHT), "5"), VersionKind.BOOKMARK),
        (cursor_name(RIGHT, "5"), VersionKind.SNAPSHOT),
        ("replicator:x:5", VersionKind.BOOKMARK),
    ):
        assert version(5, kind=kind, name=name).tags == ()


def test_holds_of_a_job_or_target_that_is_gone_are_left_over(tmp_path: Path) -> None:
    mark = version(3, kind=VersionKind.BOOKMARK, name=cursor_name(OLD_JOB, "3"))
    own = hold_tag("pulled", "prox1", "backup")
    made = state(version(1, RIGHT, OLD_JOB, "by hand"), version(2, OLD_TARGET), mark, version(4, own))
    assert found(made, read(tmp_path)) == [
        (OLD_JOB, "this node has no job old"),
        (OLD_TARGET, "job vms has no target prox3:backup"),
        (OLD_JOB, "this node has no job old"),
        (own, "this node has no job pulled"),
    ]


def test_what_may_be_anothers_is_left_alone(tmp_path: Path) -> None:
    pulls = BASE.replace('may_push_to = ["backup"]', 'may_pull_from = ["tank"]')
    assert found(state(version(1, OLD_JOB)), read(tmp_path, pulls)) == []
    theirs = state(version(1, hold_tag("theirs", "prox1", "backup")), role=Role.REPLICA, volume="backup:prox2/vm")
    assert found(theirs, read(tmp_path)) == []
    own = state(version(1, OLD_JOB, verify_tag(OLD_JOB)), role=Role.REPLICA, volume="backup:prox1/vm")
    assert [tag for tag, _ in found(own, read(tmp_path))] == [OLD_JOB, verify_tag(OLD_JOB)]
    # A replica that no peer may push can only have been pulled by a job of this node.
    nobody = BASE.replace('may_push_to = ["backup"]', "")
    assert found(theirs, read(tmp_path, nobody)) == [(theirs.versions[0].holds[0], "this node has no job theirs")]
    pulled = state(version(1, hold_tag("pulled", "prox1", "backup")), role=Role.REPLICA, volume="backup:prox2/vm")
    assert found(pulled, read(tmp_path, nobody)) == []
    anywhere = BASE.replace('may_push_to = ["backup"]', 'may_push_to = ["backup"]\nsame_path = ["backup"]')
    theirs = state(version(1, OLD_JOB), role=Role.REPLICA, volume="backup:vm")
    assert found(theirs, read(tmp_path, anywhere)) == []


def test_what_is_left_over_is_released(tmp_path: Path) -> None:
    read_config = read(tmp_path)
    memory = MemoryBackend("tank", checksums=checksum)
    local = LocalEndpoint("prox1", {"tank": memory})
    for name in ("vm", "other"):
        memory.create(name, b"data")
    memory.set_lineage("vm", Lineage(UUID, Role.PRIMARY, 1))
    for volume in ("vm", "other"):
        (made,) = memory.snapshot((volume,), "s1")
        for tag in (RIGHT, OLD_JOB, OLD_TARGET, "by-hand"):
            memory.hold(volume, made.ref, tag)
    leftovers.release(read_config, local)  # storage "backup" is not there
    held = {}
    for volume in ("vm", "other"):
        after = memory.state(volume)
        assert after is not None
        held[volume] = set(after.versions[0].holds)
    assert held == {"vm": {RIGHT, "by-hand"}, "other": {RIGHT, OLD_JOB, OLD_TARGET, "by-hand"}}


class Ways:
    """This node and its peers, in memory."""

    def __init__(self, *endpoints: LocalEndpoint) -> None:
        self._endpoints = {endpoint.node: endpoint for endpoint in endpoints}

    def endpoint(self, node: str) -> LocalEndpoint:
        return self._endpoints[node]


def held_by(memory: MemoryBackend, volume: str) -> set[str]:
    after = memory.state(volume)
    assert after is not None
    return {tag for version in after.versions for tag in version.holds}


def test_replicas_at_peers_are_released_too(tmp_path: Path) -> None:
    here, there = MemoryBackend("tank", checksums=checksum), MemoryBackend("backup", checksums=checksum)
    here.create("vm", b"data")
    here.set_lineage("vm", Lineage(UUID, Role.PRIMARY, 1))
    tags = {RIGHT, OLD_JOB, verify_tag(OLD_JOB), hold_tag("old", "prox2", "other"), "by-hand"}
    replicas = {"prox1/vm": UUID, "prox1/gone": OTHER, "prox3/vm": OTHER, "vm": UUID}
    for name, lineage in replicas.items():
        there.create(name, b"data")
        (made,) = there.snapshot((name,), "s1")
        for tag in tags:
            there.hold(name, made.ref, tag)
        there.set_lineage(name, Lineage(lineage, Role.REPLICA, 1))
    ways = Ways(LocalEndpoint("prox1", {"tank": here}), LocalEndpoint("prox2", {"backup": there}))
    pulls = BASE.replace('may_push_to = ["backup"]', 'may_pull_from = ["tank"]')
    leftovers.release_at_peers(read(tmp_path, pulls), ways)
    assert {name: held_by(there, name) for name in replicas} == dict.fromkeys(replicas, tags)
    leftovers.release_at_peers(read(tmp_path), ways)
    left = tags - {OLD_JOB, verify_tag(OLD_JOB)}
    assert {name: held_by(there, name) for name in replicas} == {
        "prox1/vm": left, "prox1/gone": left, "prox3/vm": tags, "vm": left
    }  # fmt: skip


def both_held(world: World, tag: str, snapshot: int = 0) -> None:
    for memory, volume in ((world.memory["a"], "vm-1"), (world.memory["b"], "a/vm-1")):
        kept = memory.state(volume)
        assert kept is not None
        memory.hold(volume, kept.versions[snapshot].ref, tag)


def both_holds(world: World) -> list[set[str]]:
    return [held_by(world.memory["a"], "vm-1"), held_by(world.memory["b"], "a/vm-1")]


def test_what_a_cut_off_work_left_on_a_volume_that_stands_still() -> None:
    world = World()
    world.run()
    world.memory["a"].write("vm-1", 0, b"!")
    world.run()
    tag = hold_tag("vms", "b", "store")
    for each in (tag, clone_tag(tag), verify_tag(tag), "by-hand"):
        both_held(world, each)
    both_held(world, verify_tag(tag), -1)
    read_config = config.parse(CONFIG.format(targets='["b:store"]', rest=""))
    (task, *_) = world.runner.tasks.of(world.job)
    with world.tracker.running(task.key):
        leftovers.release_idle(read_config, world.runner.tasks, world.runner.turns, Cancellation())
    assert both_holds(world) == [{tag, clone_tag(tag), verify_tag(tag), "by-hand"}] * 2
    leftovers.release_idle(read_config, world.runner.tasks, world.runner.turns, Cancellation())
    assert both_holds(world) == [{tag, "by-hand"}] * 2
    for memory, volume in ((world.memory["a"], "vm-1"), (world.memory["b"], "a/vm-1")):
        after = memory.state(volume)
        assert after is not None
        assert [tag in version.holds for version in after.snapshots] == [False, True]
    world.run()
    assert world.calls("b") == {"heads"}, "it is as settled as before"


def test_a_run_releases_what_a_verification_left() -> None:
    world = World()
    world.run()
    both_held(world, verify_tag(hold_tag("vms", "b", "store")))
    world.memory["a"].write("vm-1", 0, b"!")
    world.run()
    assert both_holds(world) == [{hold_tag("vms", "b", "store")}] * 2


def test_what_a_restore_left_is_released_where_none_is_under_way() -> None:
    world = World()
    world.run()
    both_held(world, restore_tag("a"))
    both_held(world, restore_tag("c"))
    read_config = config.parse(CONFIG.format(targets='["b:store"]', rest=""))
    restores = Restores()
    with restores.under_way():
        leftovers.release_restores(read_config, world, world.runner.tasks, restores)
    tag = hold_tag("vms", "b", "store")
    assert both_holds(world) == [{tag, restore_tag("a"), restore_tag("c")}] * 2
    leftovers.release_restores(read_config, world, world.runner.tasks, restores)
    assert both_holds(world) == [{tag, restore_tag("c")}] * 2


# -- rights

ALLOWED = """---- Permissions on tank/vm ------------------------------------------
Permission sets:
\t@keep hold,release
\t@more @keep,bookmark
Create time permissions:
\trollback
Local permissions:
\tuser replicator diff
Descendent permissions:
\tuser replicator rename
Local+Descendent permissions:
\tuser other destroy
\tuser replicator @more,send
\tgroup backup operators mount
\tgroup staff share
\teveryone userprop
---- Permissions on tank ---------------------------------------------
Local permissions:
\tuser replicator destroy
Descendent permissions:
\tuser replicator diff
Local+Descendent permissions:
\tuser replicator snapshot
"""
WHO = Account("replicator", frozenset({"replicator", "backup operators"}))


def test_rights_are_read_with_groups_sets_and_what_is_above() -> None:
    rights = granted(ALLOWED, "tank/vm", WHO)
    assert {r for r in rights if not r.startswith("@")} == {
        "bookmark", "diff", "hold", "mount", "release", "send", "snapshot", "userprop"
    }  # fmt: skip
    assert granted("", "tank/vm", WHO) == frozenset()


def lacking(said: Answer, uses: Capability, terms: Terms, account: Account = WHO) -> list[Lack]:
    runner = RecordedRunner({("zfs", "allow", "tank/vm"): said})
    dataset_names = DatasetNames("tank", "tank/vm")
    library = CommandLibrary("tank", runner)
    context = Context(dataset_names, runner, Listing(dataset_names, runner), lambda: library)
    return list(privileges.lacking(context, uses, terms, account))


def test_what_is_missing() -> None:
    assert lacking(ALLOWED, Capability.SEND, Terms()) == [
        Lack("user replicator is not allowed to destroy on tank/vm", "zfs allow -u replicator destroy tank/vm")
    ]
    terms = Terms(override={"compression": "zstd"}, exclude=frozenset({"atime"}))
    needed, wished = lacking(ALLOWED, Capability.RECEIVE, terms)
    assert "compression" in needed.message
    assert "receive" in needed.message
    assert "recordsize" in wished.message
    assert not {"atime", "compression"} & set(wished.message.replace(",", "").split())
    assert (needed.needed, wished.needed) == (True, False)
    assert lacking("", Capability.SEND | Capability.RECEIVE, terms, Account("root", frozenset(), root=True)) == []
    with pytest.raises(StorageError, match="listing the permissions on tank/vm failed: cannot open"):
        lacking(failed("cannot open"), Capability.SEND, terms)


def test_check_asks_for_what_each_storage_is_used_for(tmp_path: Path) -> None:
    asked: dict[str, Capability] = {}

    def lacking(storage: str, uses: Capability) -> tuple[Lack, ...]:
        asked[storage] = uses
        if storage == "tank":
            raise StorageUnavailable("not there", hint="")
        return (
            Lack("user x is not allowed to send on tank/vm", "zfs allow -u x send tank/vm"),
            Lack("slower", "apt install", needed=False),
        )

    findings = list(checks.privileges(read(tmp_path), lacking))
    assert asked == {"tank": Capability.SEND, "backup": Capability.RECEIVE}
    assert [(f.subject, f.level, f.remedy) for f in findings] == [
        ("storage backup", Level.FAILED, "zfs allow -u x send tank/vm"),
        ("storage backup", Level.WARNING, "apt install"),
    ]
    pulled = BASE.replace('may_push_to = ["backup"]', 'may_pull_from = ["backup"]')
    list(checks.privileges(read(tmp_path, pulled), lacking))
    assert asked["backup"] == Capability.SEND | Capability.RECEIVE
