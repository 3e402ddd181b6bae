"""Transfers of ZFS datasets that are cut off in the middle: cable, daemon, and the power of either node.

Each goes on where it was: less than a tenth crosses the network twice, and both sides end up equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.lab import deploy
from tests.lab.fleet import Member, Run, described, make_cluster, until
from tests.lab.guests import Lab
from tests.lab.test_zfs_tree import contents

NODES = 2
JOB = "cut"
MIB = 1 << 20
SIZE = 48 * MIB
RATE = "1MiB/s"
"""Slow enough to cut it in the middle, and below what a guest manages on a busy machine: what a power cut
loses is what crossed within TXG_SECONDS and a little."""
TXG_SECONDS = 1
"""How often ZFS makes durable what it has received. Its default is 5 s, which at this rate would be a tenth of SIZE; on
a busy machine it takes up to three times as long as it should."""
DATASET = "tank/src/data"
REPLICA = "tank/copies/node1/data"

_LOG = logging.getLogger(__name__)

pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(7200)]

SOURCE = f"""
[storage.src]
kind = "zfs"
root = "tank/src"
[limits]
connect_timeout = "5s"
stall_timeout = "10s"
[job.{JOB}]
source = "src:*"
targets = ["node2:copies"]
enabled = false
rate_limit = "{RATE}"
compress = "never"
keep = {{source = "last=2", target = "last=2"}}
"""
TARGET = """
[storage.copies]
kind = "zfs"
root = "tank/copies"
[limits]
connect_timeout = "5s"
stall_timeout = "10s"
"""


@dataclass
class Pair:
    """Node 1 replicates one dataset to node 2."""

    one: Member
    two: Member

    def write(self) -> None:
        """New data, random and so of the same size in a stream."""
        fill = f"head -c {SIZE} /dev/urandom > /src/data/file && zpool sync tank"
        self.one.node.run("sh", "-c", fill, timeout=300)

    def begin(self) -> Run:
        """Start a run and wait until the target has made a good part of it durable."""
        before = self.used()
        run = self.one.begin(JOB)

        def far() -> bool:
            return self.used() - before > SIZE * 2 // 5

        until(far, 600, lambda: run.said() + self.one.said() + self.two.said())
        assert run.running(), run.said()
        return run

    def used(self) -> int:
        """Bytes of the target's pool that the replica takes, with what is half received."""
        return int(self.two.node.run("zfs", "list", "-Hpo", "used", REPLICA, check=False).out.strip() or 0)

    def wire(self, *, seen_by_target: bool = False) -> int:
        """Bytes that node 1 has sent to node 2 on the cluster network since the boot of the one that counts."""
        node, counter = (self.two.node, "rx_bytes") if seen_by_target else (self.one.node, "tx_bytes")
        interface = node.run("ip", "-o", "-4", "addr", "show", "to", node.address()).out.split()[1]
        return int(node.read(f"/sys/class/net/{interface}/statistics/{counter}"))

    def equal(self) -> None:
        """The newest snapshot is on both sides, with the same GUID and content."""
        listed = self.one.zfs("list", "-Hpo", "name", "-t", "snapshot", "-S", "createtxg", "-d", "1", DATASET)
        newest = listed.split()[0].partition("@")[2]
        source, copy = contents(self.one.node, "tank/src", newest), contents(self.two.node, "tank/copies/node1", newest)
        assert list(source) == [f"data@{newest}"]
        assert copy == source


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    one, two = Member(lab.nodes[0], SOURCE), Member(lab.nodes[1], TARGET, 'may_push_to = ["copies"]')
    for member, root in ((one, "src"), (two, "copies")):
        member.node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/ubdb")
        member.node.run("zfs", "create", *(["-o", "mountpoint=/src"] if root == "src" else []), f"tank/{root}")
    one.node.run("zfs", "create", DATASET)
    make_cluster([one, two])
    quicken(one)
    quicken(two)
    yield Pair(one, two)
    one.stop()
    two.stop()


def quicken(member: Member) -> None:
    """See TXG_SECONDS."""
    member.node.run("sh", "-c", f"echo {TXG_SECONDS} > /sys/module/zfs/parameters/zfs_txg_timeout")


@pytest.fixture(autouse=True)
def settled(pair: Pair) -> None:
    """What a test before this one left behind, because it failed, is not counted in this one."""
    for member in (pair.one, pair.two):
        if member.daemon is None or not member.daemon.running():
            member.start()
    pair.one.sync(JOB)


def finish(pair: Pair, before: int, *, seen_by_target: bool = False) -> None:
    """The next run goes on where the cut one was; little was sent twice."""
    reports = pair.one.sync(JOB)
    assert [report.outcome for report in reports] == ["ok"], described(reports)
    twice = pair.wire(seen_by_target=seen_by_target) - before - SIZE
    _LOG.info("%.1f of %g MiB were sent twice", twice / MIB, SIZE / MIB)
    assert twice < SIZE / 10, f"{twice / MIB:.1f} of {SIZE / MIB:g} MiB were sent twice"
    pair.equal()


@pytest.mark.long
def test_the_cable_is_cut(pair: Pair, count: Callable[[int, int], int]) -> None:
    for _ in range(count(1, 10)):
        pair.write()
        before = pair.wire()
        run = pair.begin()
        pair.two.node.cut()
        try:
            until(lambda run=run: not run.running(), 300, run.said)  # type: ignore[misc]
        finally:
            pair.two.node.mend()
        finish(pair, before)


@pytest.mark.long
@pytest.mark.parametrize("side", ["source", "target"])
def test_the_daemon_is_killed(pair: Pair, side: str, count: Callable[[int, int], int]) -> None:
    member = pair.one if side == "source" else pair.two
    for _ in range(count(1, 10)):
        pair.write()
        before = pair.wire()
        run = pair.begin()
        member.stop("KILL")
        until(lambda run=run: not run.running(), 300, run.said)  # type: ignore[misc]
        member.start()
        finish(pair, before)


@pytest.mark.long
@pytest.mark.parametrize("side", ["source", "target"])
def test_the_power_is_cut(pair: Pair, side: str, count: Callable[[int, int], int]) -> None:
    member, by_target = (pair.one, True) if side == "source" else (pair.two, False)
    for _ in range(count(1, 10)):
        pair.write()
        before = pair.wire(seen_by_target=by_target)  # the counters of the other node begin anew
        run = pair.begin()
        member.node.crash()
        if side == "target":
            until(lambda run=run: not run.running(), 300, run.said)  # type: ignore[misc]
        member.node.boot()
        member.daemon = None
        deploy.deploy(member.node)
        if side == "source":
            pair.one.node.run("zfs", "mount", "-a", check=False)
        quicken(member)
        member.start()
        finish(pair, before, seen_by_target=by_target)
