"""A volume with two replicas, on three real daemons and real images: once one of them has become the primary, the other
follows it by itself, from the newest snapshot that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from replicator.demo.node import DemoNode, join, loopback_network
from tests.support.cluster import JOB, MIB, VOLUME, change, fill

pytestmark = pytest.mark.timeout(600)

REPLICA = "replicas:a/disk.raw"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Fan:
    """Node ``a`` replicates ``images:disk.raw`` to ``b:replicas`` and ``c:replicas``."""

    a: DemoNode
    b: DemoNode
    c: DemoNode

    @property
    def image(self) -> Path:
        return self.a.folder / "images" / "disk.raw"

    def live(self, node: DemoNode) -> Path:
        """The image of a replica that was promoted."""
        return node.folder / "images" / "a" / "disk.raw"

    def snapshots(self, node: DemoNode) -> list[Path]:
        """The images of a copy's snapshots, oldest first."""
        found = (node.folder / "images" / ".replicator").rglob("snapshots/*/image")
        return sorted((path for path in found if not path.parent.name.startswith(".")), key=lambda p: p.parent.name)

    def sync(self) -> dict[str, dict[str, Any]]:
        """A run that has to succeed; its reports by target."""
        reports = json.loads(self.a.must("sync", JOB, "--json"))
        return {report["target"]: report for report in reports}

    def assert_follows(self, content: str) -> None:
        """Node ``c`` has it, and it was sent as a difference."""
        report = self.sync()["c:replicas"]
        assert report["outcome"] == "ok"
        assert report["done"] < 2 * MIB
        assert digest(self.snapshots(self.c)[-1]) == content


@contextmanager
def fan(folder: Path) -> Iterator[Fan]:
    prefix = loopback_network()
    nodes = [DemoNode(name, folder / name) for name in "abc"]
    for number, node in enumerate(nodes, 1):
        (node.folder / "images").mkdir(parents=True)
        storage = "images" if node.name == "a" else "replicas"
        rights = {"a": "", "b": 'may_push_to = ["replicas"]\nmay_switch = ["replicas"]\n'}
        rights["c"] = rights["b"]
        peers = "".join(
            f'[peer.{other.name}]\naddress = "{prefix}.{at}:8571"\n{rights[node.name] if other.name == "a" else ""}\n'
            for at, other in enumerate(nodes, 1)
            if other is not node
        )
        job = f'[job.{JOB}]\nsource = "images:disk.raw"\ntargets = ["b:replicas", "c:replicas"]\nschedule = "1d"\n'
        node.configure(
            f"{prefix}.{number}:8571",
            cluster=f"{prefix}.0/24",
            http="",
            rest=f'[storage.{storage}]\nkind = "image"\npath = "{node.folder / "images"}"\n\n{peers}'
            + (job if node.name == "a" else ""),
        )
    made = Fan(*nodes)
    try:
        join(made.a, made.b)
        made.b.start()
        token = made.a.must("cluster", "invite", "c").strip().splitlines()[-1].strip()
        made.c.must("cluster", "join", token)
        made.c.start()
        fill(made.image, 16 * MIB)
        made.sync()
        yield made
    finally:
        for node in nodes:
            node.stop()


def test_after_a_switchover_the_other_replica_follows(tmp_path: Path) -> None:
    with fan(tmp_path) as made:
        change(made.image, seed=1)
        made.a.must("switchover", VOLUME, "--to", "b", "--yes")
        for seed in (2, 3):
            change(made.live(made.b), seed=seed)
            made.assert_follows(digest(made.live(made.b)))
        made.a.must("switchover", VOLUME, "--to", "a", "--yes")
        change(made.image, seed=4)
        made.assert_follows(digest(made.image))


def test_after_a_promotion_the_other_replica_follows(tmp_path: Path) -> None:
    with fan(tmp_path) as made:
        change(made.image, seed=1)
        made.a.kill()
        made.b.must("promote", REPLICA, "--yes")  # the third node does not reach the primary either
        change(made.live(made.b), seed=2)
        made.a.start()
        made.a.must("rejoin", VOLUME, "--from", "b", "--yes")
        made.assert_follows(digest(made.live(made.b)))
