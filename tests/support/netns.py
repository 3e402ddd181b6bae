"""Two nodes in network namespaces of their own, joined by a "public" and a "cluster" bridge whose cables can be cut."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PUBLIC, CLUSTER = "pub", "clu"
_PREFIX = {PUBLIC: "10.97.0", CLUSTER: "10.99.0"}


def _ip(*argv: str) -> str:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Topology:
    """``nodes`` namespaces numbered from 1; the bridges are in a hub namespace."""

    prefix: str
    nodes: int

    def namespace(self, node: int) -> str:
        return f"{self.prefix}-{node}"

    def runner(self, node: int) -> tuple[str, ...]:
        """Put before a command line to run it on a node."""
        return ("ip", "netns", "exec", self.namespace(node))

    @staticmethod
    def address(node: int, net: str = CLUSTER) -> str:
        return f"{_PREFIX[net]}.{node}"

    def cut(self, node: int, net: str = CLUSTER) -> None:
        """Unplug a cable."""
        _ip("-n", f"{self.prefix}-hub", "link", "set", f"{net}{node}", "down")

    def mend(self, node: int, net: str = CLUSTER) -> None:
        """Plug it in again."""
        _ip("-n", f"{self.prefix}-hub", "link", "set", f"{net}{node}", "up")

    def sent(self, node: int, net: str) -> int:
        """Bytes that a node's interface has sent and received."""
        found = json.loads(_ip("-n", self.namespace(node), "-j", "-s", "link", "show", net))
        stats = found[0]["stats64"]
        return int(stats["tx"]["bytes"]) + int(stats["rx"]["bytes"])


@contextmanager
def bridged(nodes: int = 2) -> Iterator[Topology]:
    """Make the namespaces, the bridges and the cables; remove them afterwards."""
    topology = Topology(f"rep{os.getpid() % 100000}", nodes)
    hub = f"{topology.prefix}-hub"
    made = [hub, *(topology.namespace(i) for i in range(1, nodes + 1))]
    try:
        for namespace in made:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        for net in (PUBLIC, CLUSTER):
            _ip("-n", hub, "link", "add", net, "type", "bridge")
            _ip("-n", hub, "link", "set", net, "up")
            for node in range(1, nodes + 1):
                namespace = topology.namespace(node)
                _ip(
                    "-n", hub, "link", "add", f"{net}{node}", "type", "veth",
                    "peer", "name", net, "netns", namespace,
                )  # fmt: skip
                _ip("-n", hub, "link", "set", f"{net}{node}", "master", net, "up")
                _ip("-n", namespace, "addr", "add", f"{topology.address(node, net)}/24", "dev", net)
                _ip("-n", namespace, "link", "set", net, "up")
        yield topology
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=30, check=False)
