"""How many processes a run costs, by step: so that the number does not grow unnoticed. Runs over pools in memory."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest

from backends.zfs import ZfsBackend
from backends.zfs.binding import LibraryChoice
from replicator.local import LocalEndpoint
from tests.support.zfs_fake import ByCommand, FakeZfs
from tests.unit.test_unchanged import VOLUMES, Watched, World
from transport import checksum

ONE_BY_ONE = "one by one"
"""A listing of what is named, whatever else there is."""
VERSIONS = "all versions"
TREE = "all datasets"


class ZfsWorld(World):
    """Nodes whose storages are ZFS by the command alone."""

    def __init__(self, *volumes: str) -> None:
        super().__init__(rest='keep = {source = "last=2", target = "last=3"}')
        self.pools = {name: FakeZfs() for name in "abc"}
        for name, pool in self.pools.items():
            choice = cast(LibraryChoice, ByCommand(pool))
            backend = ZfsBackend("store", "tank/vm", checksums=checksum, runner=pool, choice=choice)
            self.endpoints[name] = Watched(LocalEndpoint(name, {"store": backend}))
            backend.info()  # it is asked for now and then, not for each volume
        for volume in volumes:
            self.pools["a"].make(f"tank/vm/{volume}", volsize="4096")

    def counted(self, *volumes: str) -> dict[str, Counter[str]]:
        """Write to volumes and run; what each node was asked, by what it is."""
        for volume in volumes:
            self.pools["a"].write(f"tank/vm/{volume}")
        for pool in self.pools.values():
            pool.asked.clear()
        self.run()
        return {name: Counter(map(kind, pool.asked)) for name, pool in self.pools.items()}


def kind(argv: tuple[str, ...]) -> str:
    if argv[:2] == ("zfs", "list"):
        return TREE if "-r" in argv else VERSIONS if "-d" in argv else ONE_BY_ONE
    return "zfs send -n" if argv[:3] == ("zfs", "send", "-n") else " ".join(argv[:2])


def test_a_volume_that_changed() -> None:
    """Of everything that a run looks at, only what is asked once for all volumes, what a receive goes by and what a
    policy goes by is more than the two or three snapshots that a step is about."""
    world = ZfsWorld(*VOLUMES)
    for _ in range(4):
        world.counted("vm-1")
    found = world.counted("vm-1")
    assert found["a"] == {
        "zpool sync": 2,  # before each question of what has changed
        TREE: 2,  # the volumes; that those to snapshot exist
        VERSIONS: 4,  # two commands each: the plan, the policy
        ONE_BY_ONE: 10,  # heads: 2 and 2; snapshot: 2; hold, send, release, destroy: 1 each
        "zfs holds": 4,  # of both heads, of the plan, of the policy
        "zfs snapshot": 1,
        "zfs hold": 1,
        "zfs bookmark": 1,
        "zfs get": 1,
        "zfs send -n": 1,
        "zfs send": 1,
        "zfs release": 1,
        "zfs destroy": 2,  # the bookmark that goes with the hold; what the policy does not keep
    }
    assert found["b"] == {
        "zpool sync": 1,
        VERSIONS: 6,  # the plan, the receive, the policy
        ONE_BY_ONE: 6,  # heads: 2; may it be received, was it, release, destroy: 1 each
        "zfs holds": 4,
        "zfs receive": 1,
        "zfs hold": 1,
        "zfs release": 1,
        "zfs destroy": 1,
    }


def test_volumes_that_changed_are_listed_at_once() -> None:
    world = ZfsWorld(*VOLUMES)
    for _ in range(4):
        world.counted(*VOLUMES)
    one, all_of_them = world.counted("vm-1"), world.counted(*VOLUMES)
    more = len(VOLUMES) - 1
    for node, each in (("a", {VERSIONS: 2, ONE_BY_ONE: 4}), ("b", {VERSIONS: 4, ONE_BY_ONE: 4})):
        grown = {what: all_of_them[node][what] - one[node][what] for what in (VERSIONS, TREE)}
        assert grown == {VERSIONS: more * each[VERSIONS], TREE: 0}
        assert all_of_them[node][ONE_BY_ONE] - one[node][ONE_BY_ONE] <= more * each[ONE_BY_ONE]


@pytest.mark.parametrize("count", [2, 8])
def test_a_first_run_lists_the_whole_target_as_often_for_many_as_for_few(count: int) -> None:
    volumes = [f"vm-{number}" for number in range(count)]
    found = ZfsWorld(*volumes).counted()
    assert (found["a"][TREE], found["b"][TREE]) == (2, 2)
    assert found["b"]["zfs receive"] == count
    assert found["b"][VERSIONS] + found["b"][ONE_BY_ONE] <= 4 + 15 * count
    assert found["a"][VERSIONS] + found["a"][ONE_BY_ONE] <= 7 + 9 * count
