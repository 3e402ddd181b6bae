"""Two sites for tests: a real Ceph cluster each, and a node each, whose daemon replicates from one to the other."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from backends.rbd.catalog import Catalog, read_catalog
from backends.rbd.naming import HIDDEN, Place
from backends.rbd.records import snapshot_of
from replicator.cancellation import Cancellation
from replicator.control import Happening, ReplicaStatus, RunReport
from replicator.demo.node import DemoNode, join, loopback_network
from replicator.errors import ReplicatorError
from replicator.model import Progress
from tests.lab.ceph import Cluster
from tests.support.rbd_case import RbdCase

JOB = "j"
MIB = 1 << 20


@dataclass(frozen=True)
class Who:
    """A cephx user that a node works as."""

    user: str = "admin"
    keyring: Path | None = None


ADMIN = Who()


@dataclass
class Site:
    """One side.

    :ivar case: its storage, as hands that are no part of replication have it
    :ivar volume: what a volume of the source is called here
    """

    name: str
    cluster: Cluster
    node: DemoNode
    case: RbdCase
    prefix: str = ""

    def volume(self, name: str) -> str:
        """What a volume of the source is called here."""
        return self.prefix + name

    def spec(self, name: str) -> str:
        """The image of a volume as the command ``rbd`` takes it."""
        place = self.case.naming.place(self.volume(name))
        return f"{self.case.pool}/{place.namespace}/{place.image}"

    def rbd(self, *argv: str) -> str:
        """A command of RBD on this site's cluster."""
        return self.cluster.run("rbd", *argv)

    def catalog(self, name: str) -> Catalog:
        """What is known of the image of a volume."""
        with self.case.session() as session, self.case.image(self.volume(name), read_only=True) as image:
            return read_catalog(session, image, name)

    def snapshots(self, name: str) -> list[str]:
        """Its versions' names, oldest first."""
        return [version.name for version in self.catalog(name).versions]

    def read(self, name: str, snapshot: str) -> bytes:
        """All of a snapshot."""
        with self.case.image(self.volume(name), read_only=True) as image:
            image.set_snap(snapshot)
            data: bytes = image.read(0, image.size())
            return data

    def purge(self, name: str) -> None:
        """Remove all snapshots of a volume, as a determined operator does."""
        for snapshot in self.catalog(name).raw:
            with self.case.image(self.volume(name)) as image:
                if image.is_protected_snap(snapshot.name):
                    image.unprotect_snap(snapshot.name)
                image.remove_snap(snapshot.name)

    def unreachable(self) -> None:
        """No daemon of the cluster answers any more; connections stay."""
        self._signal(signal.SIGSTOP)

    def reachable(self) -> None:
        """They go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self.cluster.conf.parent / "run").glob("*.pid"):
            os.kill(int(pid.read_text()), number)

    def leftovers(self) -> list[str]:
        """What is there and should not be when nothing runs: a sentence each."""
        found: list[str] = []
        with self.case.session() as session, session.ioctx(self.case.namespace or "") as ioctx:
            pool: Any = session.pool
            objects = [item.key for item in ioctx.list_objects()]  # type: ignore[attr-defined]
            found += [f"object {key}" for key in objects if key.startswith("replicator")]
            found += [f"image in the trash: {item['name']}" for item in pool.trash_list(ioctx)]
            images = [str(name) for name in pool.list(ioctx)]
        found += [f"hidden image {name}" for name in images if name.startswith(HIDDEN)]
        for name in images:
            if not name.startswith(HIDDEN):
                found += self._leftovers_of(name)
        return found

    def _leftovers_of(self, image_name: str) -> list[str]:
        found: list[str] = []
        with self.case.session() as session, session.image(Place(self.case.namespace or "", image_name)) as image:
            catalog = read_catalog(session, image, image_name)
            present = {raw.id for raw in catalog.raw}
            found += [f"{image_name}: hidden snapshot {raw.name}" for raw in catalog.raw if raw.name.startswith(HIDDEN)]
            for key in catalog.metadata:
                of = snapshot_of(key)
                if of is not None and of not in present:
                    found.append(f"{image_name}: record {key} of a snapshot that is gone")
            if catalog.partial is not None:
                found.append(f"{image_name}: partial state")
            held = {snapshot.raw.name for snapshot in catalog.snapshots if snapshot.version.holds}
            for raw in catalog.raw:
                if image.is_protected_snap(raw.name) and raw.name not in held:
                    found.append(f"{image_name}: snapshot {raw.name} is protected and not held")
            watchers = [str(watcher["addr"]) for watcher in image.watchers_list()]
            if watchers:
                found.append(f"{image_name}: watchers {watchers}")
            if len(held) > 1:
                found.append(f"{image_name}: {len(held)} snapshots are held")
        return found


@dataclass
class Sites:
    """Node ``a`` replicates all volumes of its storage ``vms`` to ``b:copies``."""

    source: Site
    target: Site
    addresses: tuple[str, str]

    @property
    def a(self) -> DemoNode:
        return self.source.node

    @property
    def b(self) -> DemoNode:
        return self.target.node

    def side(self, name: str) -> Site:
        """``source`` or ``target``."""
        return {"source": self.source, "target": self.target}[name]

    def sync(self, at: Callable[[], None] | None = None, after: int = 0) -> RunReport:
        """A run of the job's only volume; what came of it.

        :param at: is done once, in the middle of the run: when ``after`` bytes have been transferred
        """
        waiting = [at] if at is not None else []

        def listen(happening: Happening) -> None:
            if waiting and isinstance(happening, Progress) and happening.done > after:
                waiting.pop()()

        with self.a.control() as control:
            (report,) = control.sync(JOB, None, None, listen, Cancellation())
        assert not waiting, f"the run ended before it could be disturbed: {report}"
        return report

    def must_sync(self) -> RunReport:
        """A run that has to succeed."""
        report = self.sync()
        assert report.outcome == "ok", report
        return report

    def settle(self, timeout: float = 600.0) -> None:
        """Runs by hand until one finds nobody else at work, and everything in order."""
        deadline = time.monotonic() + timeout
        while True:
            with self.a.control() as control:
                reports = control.sync(JOB, None, None, lambda _: None, Cancellation())
            if all(report.outcome == "ok" for report in reports):
                return
            assert time.monotonic() < deadline, reports

    def rows(self) -> tuple[ReplicaStatus, ...]:
        with self.a.control() as control:
            return control.status().replicas

    def until(self, holds: Callable[[tuple[ReplicaStatus, ...]], bool], timeout: float = 60.0) -> None:
        """Poll the status until it holds."""
        deadline = time.monotonic() + timeout
        rows: tuple[ReplicaStatus, ...] = ()
        while time.monotonic() < deadline:
            try:
                rows = self.rows()
            except ReplicatorError:
                rows = ()
            if rows and holds(rows):
                return
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout} s; last: {rows}; {self.a.tail()}; {self.b.tail()}")

    def common(self, volume: str) -> list[str]:
        """Names of the snapshots that both sides have, oldest first."""
        ours, theirs = self.source.catalog(volume).versions, self.target.catalog(volume).versions
        guids = {version.guid for version in ours}
        return [version.name for version in theirs if version.guid in guids]

    def assert_equal(self, volume: str) -> str:
        """Every snapshot that both have is the same, byte for byte; the newest one's name."""
        common = self.common(volume)
        assert common, "no common snapshot"
        for name in common:
            assert self.source.read(volume, name) == self.target.read(volume, name), f"{name} differs"
        return common[-1]

    def assert_tidy(self) -> None:
        """Nothing is left behind on either side."""
        left = self.source.leftovers(), self.target.leftovers()
        assert left == ([], []), left

    def metrics(self) -> dict[str, float]:
        """What node ``a`` serves: each line's value by its name and labels."""
        with httpx.Client(base_url=f"http://{self.addresses[0]}:9571", timeout=30) as client:
            text = client.get("/metrics").text
        return {key: float(value) for key, value in re.findall(r"^(replicator_\S+?(?:\{.*\})?) (\S+)$", text, re.M)}


def storage(name: str, case: RbdCase, who: Who) -> str:
    """The table of a storage in replicator.toml."""
    keyring = "" if who.keyring is None else f'keyring = "{who.keyring}"\n'
    return (
        f'[storage.{name}]\nkind = "rbd"\npool = "{case.pool}"\nnamespace = "{case.namespace}"\n'
        f'conffile = "{case.conf}"\nuser = "{who.user}"\n{keyring}\n'
    )


@contextmanager
def sites(
    folder: Path,
    clusters: Mapping[str, Cluster],
    *,
    job: str = "",
    users: Mapping[str, Who] | None = None,
) -> Iterator[Sites]:
    """Two joined nodes with running daemons, and a new namespace on both clusters.

    :param job: more lines of the job's table
    :param users: of ``source`` and ``target``; admin otherwise
    """
    users = users or {}
    prefix = loopback_network()
    a, b = DemoNode("a", folder / "a"), DemoNode("b", folder / "b")
    source, target = RbdCase(clusters["source"].conf), RbdCase(clusters["target"].conf)
    schedule = "" if "schedule" in job else 'schedule = "1d"\n'
    a.configure(
        f"{prefix}.1:8571",
        cluster=f"{prefix}.0/24",
        http=f"{prefix}.1:9571",
        rest=storage("vms", source, users.get("source", ADMIN))
        + f'[peer.b]\naddress = "{prefix}.2:8571"\n\n'
        + f'[job.{JOB}]\nsource = "vms:*"\ntargets = ["b:copies"]\n{schedule}{job}\n',
    )
    b.configure(
        f"{prefix}.2:8571",
        cluster=f"{prefix}.0/24",
        http="",
        rest=storage("copies", target, users.get("target", ADMIN))
        + f'[peer.a]\naddress = "{prefix}.1:8571"\nmay_push_to = ["copies"]\n',
    )
    made = Sites(
        Site("source", clusters["source"], a, source),
        Site("target", clusters["target"], b, target, "a/"),
        (f"{prefix}.1", f"{prefix}.2"),
    )
    try:
        join(a, b)
        b.start()
        yield made
    finally:
        a.stop()
        b.stop()
        source.close()
        target.close()
