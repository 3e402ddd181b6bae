"""From a write to the snapshot that has it, complete in the other cluster: ours and rbd-mirror's, at the same time.

Ours is two daemons with a job on its shortest schedule. rbd-mirror is Debian's, in snapshot mode at its shortest
schedule, a minute. Each has an image in a pool of its own, in the same clusters.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from backends.rbd.binding import load
from backends.rbd.cluster import Connection, Where, is_absent
from backends.rbd.naming import Naming
from benchmarks.rbd_nodes import FEATURES, opened
from replicator.demo.node import DemoNode, join, loopback_network
from tests.lab.ceph import Cluster

OURS, MIRRORED = "ours", "mirrored"
"""Pools."""
IMAGE = "vm"
REPLICAS = "replicas"
"""The namespace of our replicas."""
SCHEDULE = "5s"
MIRROR_SCHEDULE = "1m"
_SIZE = "256M"
_DEADLINE = 300.0
_POLL = 0.05
_STOP = 30.0


def _prepare(source: Cluster, target: Cluster) -> None:
    for cluster, site in ((source, "source"), (target, "target")):
        for pool in (OURS, MIRRORED):
            cluster.run("ceph", "osd", "pool", "create", pool, "8")
            cluster.run("rbd", "pool", "init", pool)
        cluster.run("rbd", "mirror", "pool", "enable", "--site-name", site, MIRRORED, "image")
    for pool in (OURS, MIRRORED):
        source.run("rbd", "create", "--size", _SIZE, "--image-feature", FEATURES, f"{pool}/{IMAGE}")


@contextmanager
def _mirroring(source: Cluster, target: Cluster, folder: Path) -> Iterator[None]:
    """rbd-mirror of the second cluster, as a child in the foreground."""
    token = folder / "token"
    token.write_text(
        source.run("rbd", "mirror", "pool", "peer", "bootstrap", "create", "--site-name", "source", MIRRORED)
    )
    taking = ("--site-name", "target", "--direction", "rx-only", MIRRORED, str(token))
    target.run("rbd", "mirror", "pool", "peer", "bootstrap", "import", *taking)
    # It knows its own cluster only by a name, whose configuration it looks for where it is started.
    (folder / "target.conf").write_text(target.conf.read_text())
    argv = ("rbd-mirror", "-f", "--cluster", "target", "--id", "admin", "--log-file", str(folder / "rbd-mirror.log"))
    with (folder / "rbd-mirror.out").open("wb") as said:
        mirror = subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        source.run("rbd", "mirror", "image", "enable", f"{MIRRORED}/{IMAGE}", "snapshot")
        every = ("--pool", MIRRORED, "--image", IMAGE, MIRROR_SCHEDULE)
        source.run("rbd", "mirror", "snapshot", "schedule", "add", *every)
        yield
    finally:
        mirror.terminate()
        try:
            mirror.wait(_STOP)
        except subprocess.TimeoutExpired:
            mirror.kill()
            mirror.wait()


@contextmanager
def _replicating(source: Cluster, target: Cluster, folder: Path) -> Iterator[None]:
    """Our two daemons."""
    prefix = loopback_network()
    a, b = DemoNode("a", folder / "a"), DemoNode("b", folder / "b")
    storage = '[storage.{name}]\nkind = "rbd"\npool = "{pool}"\nconffile = "{conf}"\n'
    a.configure(
        f"{prefix}.1:8571",
        cluster=f"{prefix}.0/24",
        http="",
        rest=storage.format(name="images", pool=OURS, conf=source.conf)
        + f'[peer.b]\naddress = "{prefix}.2:8571"\n'
        + f'[job.j]\nsource = "images:{IMAGE}"\ntargets = ["b:replicas"]\nschedule = "{SCHEDULE}"\n',
    )
    b.configure(
        f"{prefix}.2:8571",
        cluster=f"{prefix}.0/24",
        http="",
        rest=storage.format(name="replicas", pool=OURS, conf=target.conf)
        + f'namespace = "{REPLICAS}"\n[peer.a]\naddress = "{prefix}.1:8571"\nmay_push_to = ["replicas"]\n',
    )
    try:
        join(a, b)
        b.start()
        yield
    finally:
        a.stop()
        b.stop()


class _Looking:
    """Looks into the newest complete snapshots of both copies."""

    def __init__(self, target: Cluster) -> None:
        self._hands = {
            pool: Connection("looking", Where(pool, target.conf, "admin", None), load) for pool in (OURS, MIRRORED)
        }
        place = Naming(REPLICAS).place(f"a/{IMAGE}")
        self._images = {OURS: (place.namespace, place.image), MIRRORED: ("", IMAGE)}

    def sees(self, which: str, marker: bytes) -> bool:
        """Whether a copy's newest complete snapshot has the marker."""
        namespace, name = self._images[which]
        with self._hands[which].session("looking") as session, session.ioctx(namespace) as ioctx:
            try:
                image: Any = session.binding.open_image(ioctx, name, read_only=True)
            except session.binding.errors as error:
                if is_absent(error):
                    return False
                raise
            try:
                complete = [int(s["id"]) for s in image.list_snaps() if self._is_complete(which, s)]
                if not complete:
                    return False
                image.set_snap_by_id(max(complete))
                return bool(image.read(0, len(marker)) == marker)
            finally:
                image.close()

    @staticmethod
    def _is_complete(which: str, snapshot: dict[str, Any]) -> bool:
        if which == OURS:
            return str(snapshot["name"]).startswith("replicator_")
        return bool(snapshot.get("mirror", {}).get("complete"))

    def close(self) -> None:
        """Leave the cluster."""
        for hands in self._hands.values():
            hands.close()


def _wait(looking: _Looking, marker: bytes, begun: float) -> dict[str, float]:
    """Seconds until each has the marker."""
    found: dict[str, float] = {}
    while len(found) < 2:
        assert time.perf_counter() - begun < _DEADLINE, f"only {list(found)} arrived in {_DEADLINE:g} s"
        for which in (OURS, MIRRORED):
            if which not in found and looking.sees(which, marker):
                found[which] = time.perf_counter() - begun
        time.sleep(_POLL)
    return found


def _mark(source: Cluster) -> bytes:
    marker = os.urandom(4096)
    for pool in (OURS, MIRRORED):
        with opened(source, IMAGE, pool) as live:
            live.write(marker, 0)
            live.flush()
    return marker


def delays(source: Cluster, target: Cluster, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of ours and of rbd-mirror, from the end of a write of 4 KiB; the writes come at random times."""
    rng = random.Random(1)
    _prepare(source, target)
    ours, mirrored = [], []
    with ExitStack() as stack:
        stack.enter_context(_replicating(source, target, folder))
        stack.enter_context(_mirroring(source, target, folder))
        looking = _Looking(target)
        stack.callback(looking.close)
        _wait(looking, _mark(source), time.perf_counter())  # both have made their first copies then
        for _ in range(rounds):
            time.sleep(rng.uniform(0, 60))
            marker = _mark(source)
            found = _wait(looking, marker, time.perf_counter())
            ours.append(found[OURS])
            mirrored.append(found[MIRRORED])
    return ours, mirrored
