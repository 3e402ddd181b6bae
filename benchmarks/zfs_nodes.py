"""Two guests with real OpenZFS for the benchmarks: replicator as a daemon on both, and its peers beside it.

Datasets are below ``tank/src`` on node1. Ours replicates them into ``tank/dst`` of node2, the peers into ``tank/peer``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from replicator.cancellation import Cancellation
from replicator.client import DaemonClient
from tests.lab.deploy import deploy
from tests.lab.fleet import client_of
from tests.lab.guests import Background, CommandFailed, Lab, LabError, Node

REPLICATOR = "/opt/replicator/bin/replicator"
CONFIG = "/etc/replicator/replicator.toml"
SOURCE, TARGET, PEER = "tank/src", "tank/dst", "tank/peer"
JOB = "j"
LONG = 3600.0
"""Seconds: filling a pool takes a while."""
_START = 300.0
_SNAPSHOT = "replicator_j_20261119T{:02d}{:02d}00.000Z"
_SNAPSHOT_FORMAT = "replicator_j_20261119T%02d%02d00.000Z"

_NODE = """[node]
name = "{name}"
state_dir = "/var/lib/replicator"
[network]
cluster = "10.99.0.0/24"
listen = "{address}:8571"
http = ""
[limits]
connect_timeout = "60s"
"""
_ONE = f"""[storage.src]
kind = "zfs"
root = "{SOURCE}"
[peer.node2]
address = "10.99.0.2:8571"
[job.{JOB}]
source = "src:*"
targets = ["node2:dst"]
schedule = "2099-01-01"
intermediates = "all"
keep = {{source = "all", target = "all"}}
"""
_TWO = f"""[storage.dst]
kind = "zfs"
root = "{TARGET}"
[peer.node1]
address = "10.99.0.1:8571"
may_push_to = ["dst"]
"""


@dataclass(frozen=True)
class Cost:
    """What something took.

    :ivar cpu: seconds of this host's processor time that both guests used, their kernels included
    """

    seconds: float
    cpu: float


class Nodes:
    """node1, which replicates, and node2; both with a pool, and in a cluster."""

    def __init__(self, lab: Lab) -> None:
        self.one, self.two = lab.nodes[:2]
        self.nodes = (self.one, self.two)
        self._daemons: dict[int, Background] = {}

    def prepare(self) -> None:
        """Pools, our program, and a cluster of both; the daemons run afterwards."""
        for node, rest in ((self.one, _ONE), (self.two, _TWO)):
            deploy(node)
            node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/ubdb", timeout=120)
            node.write(CONFIG, _NODE.format(name=node.name, address=node.address()) + rest)
        self.one.run("zfs", "create", SOURCE)
        self.two.run("zfs", "create", TARGET)
        self.two.run("zfs", "create", PEER)
        self.one.run(REPLICATOR, "cluster", "create", timeout=_START)
        self.start(self.one)
        said = self.one.run(REPLICATOR, "cluster", "invite", self.two.name, timeout=_START).out
        token = re.findall(r"\brj1-\S+", said)[-1]
        self.two.run(REPLICATOR, "cluster", "join", token, timeout=_START)
        self.start(self.two)

    def start(self, node: Node) -> None:
        """Start the daemon and wait until it answers."""
        daemon = node.start(REPLICATOR, "serve", log="/var/log/replicator.log")
        self._daemons[node.index] = daemon
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and daemon.running():
            with suppress(CommandFailed):
                node.run("grep", "-q", "daemon started", daemon.log)
                return
            time.sleep(0.5)
        raise LabError(f"the daemon of {node.name} did not start", daemon.said())

    def fill(self, datasets: int, snapshots: int) -> None:
        """Datasets on node1, each with that many snapshots of our job."""
        script = (
            'for i in $(seq "$1"); do zfs create tank/src/vm-$i; done\n'
            'for s in $(seq "$2"); do\n'
            f"  zfs snapshot -r tank/src@$(printf '{_SNAPSHOT_FORMAT}' $((s / 60)) $((s % 60)))\n"
            "done\n"
        )
        self.one.run("sh", "-ec", script, "sh", str(datasets), str(snapshots), timeout=LONG)

    def copy_for_peers(self, datasets: int, snapshots: int) -> None:
        """All of it to node2, as zfs itself sends it. Not with -R: with that, zfs receive compares all snapshots of all
        datasets with each other, which takes it half an hour here."""
        first, last = (_SNAPSHOT.format(number // 60, number % 60) for number in (1, snapshots))
        script = (
            'for i in $(seq "$1"); do\n'
            '  zfs send "tank/src/vm-$i@$2" | ssh root@node2 zfs receive -u "tank/peer/vm-$i"\n'
            '  zfs send -I "@$2" "tank/src/vm-$i@$3" | ssh root@node2 zfs receive -u "tank/peer/vm-$i"\n'
            "done\n"
        )
        self.one.run("sh", "-ec", script, "sh", str(datasets), first, last, timeout=LONG)

    def fill_with_data(self, name: str, size: int, snapshot: str) -> None:
        """A dataset on node1 with ``size`` MiB of random data and a snapshot of our job."""
        script = (
            'zfs create -o "mountpoint=/mnt/$1" "tank/src/$1"; head -c "$2M" /dev/urandom > "/mnt/$1/data"\n'
            'zfs snapshot "tank/src/$1@$3"; zpool sync tank\n'
        )
        self.one.run("sh", "-ec", script, "sh", name, str(size), snapshot, timeout=LONG)

    @staticmethod
    def destroy(node: Node, dataset: str) -> None:
        """A dataset with its snapshots, held or not."""
        script = (
            'zfs list -H -o name -t snapshot "$1" | while read -r held; do\n'
            '  zfs holds -H "$held" | cut -f 2 | while read -r tag; do zfs release "$tag" "$held"; done\n'
            'done; zfs destroy -r "$1"\n'
        )
        node.run("sh", "-ec", script, "sh", dataset, timeout=LONG)

    def run_job(self, volume: str = "") -> Cost:
        """A run of our job by the daemon, of all volumes or one; asked through its socket, as its timer starts it."""
        with client_of(self.one, silence=LONG) as daemon:
            return self._timed(lambda: self._run(daemon, volume))

    @staticmethod
    def _run(daemon: DaemonClient, volume: str) -> None:
        reports = daemon.sync(JOB, volume or None, None, lambda _: None, Cancellation())
        failed = [f"{report.volume}: {report.message}" for report in reports if report.outcome != "ok"]
        if failed or not reports:
            raise LabError("; ".join(failed) or "the job has no volumes")

    def command(self, *argv: str) -> Cost:
        """A command on node1, less what it takes to start one there that does nothing."""
        nothing = self._timed(lambda: self.one.run("true"))
        found = self._timed(lambda: self.one.run(*argv, timeout=LONG))
        return Cost(found.seconds - nothing.seconds, found.cpu - nothing.cpu)

    def _timed(self, way: Callable[[], object]) -> Cost:
        cpu, began = self._busy(), time.monotonic()
        way()
        return Cost(time.monotonic() - began, self._busy() - cpu)

    def _busy(self) -> float:
        return sum(node.processor_seconds() for node in self.nodes)
