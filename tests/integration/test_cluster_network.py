"""Two daemons in namespaces: what crosses which network, and what happens when the cable is cut."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.control import State
from tests.support.cluster import JOB, MIB, Pair, change, cluster, fill, idle
from tests.support.netns import CLUSTER, PUBLIC, Topology, bridged

pytestmark = [pytest.mark.tier("netns"), pytest.mark.timeout(300)]


@pytest.fixture
def topology() -> Iterator[Topology]:
    with bridged() as found:
        yield found


def test_all_bytes_cross_the_cluster_network_and_none_the_public_one(tmp_path: Path, topology: Topology) -> None:
    with cluster(tmp_path, topology=topology) as pair:
        fill(pair.image, 24 * MIB)
        public = [topology.sent(node, PUBLIC) for node in (1, 2)]
        before = topology.sent(1, CLUSTER)
        pair.a.must("sync", JOB)
        change(pair.image, seed=2)
        pair.a.must("sync", JOB)
        pair.assert_equal()
        assert topology.sent(1, CLUSTER) - before > 24 * MIB
        # Neighbour discovery of the interfaces themselves is a few hundred bytes; replication would be megabytes.
        assert all(topology.sent(node, PUBLIC) - was < 4096 for node, was in zip((1, 2), public, strict=True))


def test_a_cut_cable_fails_the_run_and_the_next_one_completes(tmp_path: Path, topology: Topology) -> None:
    limits = '[limits]\nconnect_timeout = "2s"\nstall_timeout = "5s"\n'
    with cluster(
        tmp_path, topology=topology, job='schedule = "5s"\nrate_limit = "4MiB/s"', extra_a=limits, extra_b=limits
    ) as pair:
        fill(pair.image, 64 * MIB)
        pair.until(lambda row: row.progress is not None and row.progress.done > MIB)
        topology.cut(2)
        row = pair.until(lambda row: row.failures >= 1 and idle(row), timeout=120)
        assert "b" in row.target
        assert row.message
        assert row.hint
        assert not pair.replica_snapshots(), "a half-received snapshot is visible"
        topology.mend(2)
        row = pair.until(lambda row: row.failures == 0 and row.state is State.OK and row.snapshot != "", timeout=120)
        pair.a.must("pause", JOB)
        pair.until(idle)
        pair.assert_equal()


def test_without_an_address_on_the_cluster_network_the_daemon_says_so(tmp_path: Path, topology: Topology) -> None:
    with cluster(tmp_path, topology=topology) as pair:
        pair.a.stop()
        subprocess.run(
            ["ip", "-n", topology.namespace(1), "addr", "flush", "dev", CLUSTER], check=True, capture_output=True
        )
        done = pair.a.run("serve", timeout=30)
        assert done.returncode != 0
        log = done.stderr + done.stdout
        assert "10.99.0.0/24" in log
        assert "Traceback" not in log


def test_resumes_where_the_durable_state_ended(tmp_path: Path, topology: Topology) -> None:
    limits = '[limits]\nconnect_timeout = "2s"\nstall_timeout = "5s"\n'
    size = 96 * MIB
    with cluster(tmp_path, topology=topology, job='rate_limit = "24MiB/s"', extra_a=limits, extra_b=limits) as pair:
        fill(pair.image, size)
        transfer = _in_background(pair)
        pair.until(lambda row: row.progress is not None and row.progress.done > size * 3 // 4)
        topology.cut(2)
        pair.until(lambda row: row.failures >= 1 and idle(row), timeout=120)
        transfer.join(60)
        topology.mend(2)
        before = topology.sent(1, CLUSTER)
        pair.a.must("sync", JOB)
        pair.assert_equal()
        again = topology.sent(1, CLUSTER) - before
        assert again < size * 3 // 4, f"{again} of {size} bytes were sent again"


def _in_background(pair: Pair) -> threading.Thread:
    thread = threading.Thread(target=lambda: pair.a.run("sync", JOB, timeout=200))
    thread.start()
    return thread
