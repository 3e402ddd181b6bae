"""Images of one Ceph cluster under random writers, replicated to another one by real daemons on a short schedule."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from replicator.control import State
from tests.lab.ceph import Cluster
from tests.support import rbd_writer
from tests.support.rbd_case import RbdCase
from tests.support.sites import JOB, MIB, Site, Sites, sites

LOG = logging.getLogger(__name__)
pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(3600)]
PAUSE = 1.0
"""Seconds between two changes of an image, on average."""
ROUNDING = 0.01
"""Seconds."""
LATE = 10.0
"""Seconds after which the lag metric knows of what has arrived: a tenth of one, but for machines that are busy."""
READ = 4 * MIB


def create(case: RbdCase, name: str, number: int) -> None:
    """An image, of one of the kinds that there are."""
    kinds: tuple[dict[str, Any], ...] = (
        {"features": 61},
        {"features": 61, "order": 20},
        {"features": 1},
        {"features": 61, "stripe_unit": 65536, "stripe_count": 4},
        {"features": 5},
    )
    with case.session() as session, session.ioctx(case.namespace or "") as ioctx:
        pool: Any = session.pool
        pool.create(ioctx, name, 48 * MIB, old_format=False, **{"order": 22, **kinds[number % len(kinds)]})


def sha256(site: Site, volume: str, snapshot: str) -> str:
    """Of all bytes of a snapshot, its length with them. :raises: an error of the binding, if it is gone"""
    made = hashlib.sha256()
    with site.case.image(site.volume(volume), read_only=True) as image:
        image.set_snap(snapshot)
        size = image.size()
        for offset in range(0, size, READ):
            made.update(image.read(offset, min(READ, size - offset)))
    return f"{size}:{made.hexdigest()}"


@dataclass
class Watch:
    """Looks at both clusters and at the metrics from outside, while replication goes on.

    :ivar equal: snapshots (volume, name) that are the same on both sides
    :ivar differ: those that are not
    :ivar unseen: those that were listed and were gone on one side before they were read there
    :ivar log: when the guests wrote something
    :ivar too_little: seconds that the lag metric was below the truth, at most
    :ivar late: seconds after which it knew of what the target had, at most
    :ivar lags: of every look
    """

    sites: Sites
    volumes: list[str]
    log: Path
    equal: set[tuple[str, str]] = field(default_factory=set)
    differ: set[tuple[str, str]] = field(default_factory=set)
    unseen: set[tuple[str, str]] = field(default_factory=set)
    too_little: float = 0.0
    late: float = 0.0
    lags: list[float] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    failed: list[BaseException] = field(default_factory=list)

    def run(self, do: Callable[[], None]) -> None:
        """Do it again and again, until ``stop``."""
        try:
            while not self.stop.is_set():
                do()
        except BaseException as error:
            self.failed.append(error)
            raise

    def compare(self) -> None:
        """Read what came to the target since the last look, on both sides."""
        for volume in self.volumes:
            try:
                names = self.sites.target.snapshots(volume)
            except Exception as error:  # before its first run
                if "no such" not in str(error).lower() and "not found" not in str(error).lower():
                    raise
                continue
            for name in names:
                key = (volume, name)
                if key in self.equal | self.differ | self.unseen:
                    continue
                try:
                    same = sha256(self.sites.source, volume, name) == sha256(self.sites.target, volume, name)
                except Exception as error:
                    if "not found" not in str(error).lower():
                        raise
                    self.unseen.add(key)
                else:
                    (self.equal if same else self.differ).add(key)

    def newest(self, volume: str) -> float:
        """When the newest snapshot that the target has was taken."""
        return max(version.created.timestamp() for version in self.sites.target.catalog(volume).versions)

    def lag(self, volume: str) -> tuple[float, float, float]:
        """When the metric was asked for, when it was there, and what it is."""
        begin = time.time()
        metrics = self.sites.metrics()
        key = f'replicator_replica_lag_seconds{{job="{JOB}",target="b:copies",volume="vms:{volume}"}}'
        return begin, time.time(), metrics[key]

    def missing_since(self, volume: str) -> float:
        """When the first write that the target surely lacks was done; in the future, where it lacks none."""
        newest = self.sites.target.catalog(volume).versions[-1]
        (taken,) = (
            s.raw.taken.time for s in self.sites.source.catalog(volume).snapshots if s.version.guid == newest.guid
        )
        after = taken.timestamp() + 1  # RBD says it in whole seconds
        return min((done for begun, done in rbd_writer.times(self.log, volume) if begun > after), default=math.inf)

    def measure(self) -> None:
        """Compare the metric with what the target cluster has, before and after. It may say too much for a moment,
        until the source's node has been told of what has arrived; too little never: where an image had not changed
        since its snapshot when it was looked at, it is behind since that look only, but no change is from before."""
        for volume in self.volumes:
            before, looked = self.newest(volume), time.time()
            begin, end, lag = self.lag(volume)
            self.lags.append(lag)
            self.too_little = max(self.too_little, begin - self.missing_since(volume) - lag)
            while lag > end - before and not self.stop.is_set():
                begin, end, lag = self.lag(volume)
                self.late = max(self.late, begin - looked)


def test_images_under_random_writers(
    tmp_path: Path, ceph_sites: Mapping[str, Cluster], count: Callable[[int, int], int]
) -> None:
    number, seconds, kept = count(6, 20), count(30, 600), count(12, 30)
    keep = f'keep = {{source = "last={kept}", target = "last={kept}"}}'
    job = f'schedule = "{count(5, 10)}s"\nunchanged = "snapshot"\n{keep}'
    volumes = [f"vm-{n}" for n in range(number)]
    with sites(tmp_path, ceph_sites, job=job) as pair:
        pair.a.must("pause", JOB)
        for n, volume in enumerate(volumes):
            create(pair.source.case, volume, n)
        pair.settle()
        watch = Watch(pair, volumes, tmp_path)
        guests = rbd_writer.start(pair.source.case, volumes, PAUSE, tmp_path)
        threads = [threading.Thread(target=watch.run, args=(do,)) for do in (watch.compare, watch.measure)]
        for thread in threads:
            thread.start()
        pair.a.must("resume", JOB)
        watch.stop.wait(seconds)
        done = rbd_writer.end(guests)
        pair.until(lambda rows: all(row.state is State.OK for row in rows), 300)
        pair.a.must("pause", JOB)
        watch.stop.set()
        for thread in threads:
            thread.join(300)
        pair.settle()
        assert not watch.failed
        watch.stop.clear()
        watch.compare()
        LOG.info(
            "%d changes; %d snapshots are equal, %d differ, %d were gone before they were read; "
            "lag from %.1f to %.1f s; the metric is too small by %.3f s and late by %.2f s at most, in %d looks",
            done,
            len(watch.equal),
            len(watch.differ),
            len(watch.unseen),
            min(watch.lags),
            max(watch.lags),
            watch.too_little,
            watch.late,
            len(watch.lags),
        )
        assert not watch.differ
        assert not watch.unseen
        assert len(watch.equal) >= number * 3
        assert watch.too_little <= ROUNDING
        assert watch.late <= LATE
        assert_nothing_leaks(pair, volumes, kept)
        for volume in volumes:
            last = pair.common(volume)[-1]
            with pair.source.case.image(volume, read_only=True) as head:
                live = head.read(0, head.size())
            assert pair.target.read(volume, last) == live, "the last state did not arrive"


def assert_nothing_leaks(pair: Sites, volumes: list[str], kept: int) -> None:
    """Snapshots, locks, records: what there is, is what the policy and the next run need."""
    pair.assert_tidy()
    for volume in volumes:
        for site in (pair.source, pair.target):
            catalog = site.catalog(volume)
            assert len(catalog.raw) == len(catalog.versions) == min(kept, len(catalog.raw)), site.name
            holds = [version.name for version in catalog.versions if version.holds]
            assert holds == [catalog.versions[-1].name], (site.name, holds)


def test_verification_reads_both_snapshots(tmp_path: Path, ceph_sites: Mapping[str, Cluster]) -> None:
    """A snapshot whose bytes are wrong, while no diff says so, is found, and made anew from the source."""
    with sites(tmp_path, ceph_sites) as pair:
        data = random.Random(7).randbytes(24 * MIB)
        pair.source.case.create("vm", data)
        pair.must_sync()
        newest = pair.target.catalog("vm").versions[-1]
        pair.target.case.damage("a/vm", newest, 5 * MIB + 17, b"damage")
        found = pair.a.run("verify", "vms:vm", "--json", timeout=300)
        assert found.returncode == 3, found.stderr
        assert str(5 * MIB) in found.stdout
        pair.a.must("verify", "vms:vm", "--repair", "--yes", timeout=300)
        pair.a.must("verify", "vms:vm", timeout=300)
        assert pair.target.case.read_snapshot("a/vm", newest) == data
        pair.source.case.write("vm", 0, b"more")
        pair.settle()
        assert pair.target.read("vm", pair.common("vm")[-1]) == pair.source.case.read("vm")
