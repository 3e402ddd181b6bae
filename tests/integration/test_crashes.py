"""kill -9 of either daemon at random moments of transfers: nothing complete is lost, nothing half is visible."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import JOB, MIB, Pair, change, cluster, fill


def _check_no_half_snapshot(pair: Pair) -> None:
    """What is visible on the target now is complete: equal to what the source froze under that name."""
    for name, folder in pair.replica_snapshots().items():
        source = pair.source_snapshots().get(name)
        if source is not None:
            assert (folder / "image").read_bytes() == (source / "image").read_bytes(), f"{name} is half a snapshot"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", ["source", "target"])
def test_kill_at_random_moments(tmp_path: Path, victim: str, count: Callable[[int, int], int]) -> None:
    rounds = count(4, 50)
    seed = random.Random(f"kill {victim}")
    keep = 'keep = {source = "last=3", target = "last=3"}\nrate_limit = "64MiB/s"'
    with cluster(tmp_path, job=keep) as pair:
        fill(pair.image, 24 * MIB)
        pair.a.must("sync", JOB)
        node = pair.a if victim == "source" else pair.b
        for number in range(rounds):
            change(pair.image, seed=number, pieces=8, length=MIB)
            base = pair.assert_equal()
            transfer = threading.Thread(target=lambda: pair.a.run("sync", JOB, timeout=120))
            transfer.start()
            time.sleep(seed.uniform(0.05, 0.9))  # the moment is what is random here
            node.kill()
            _check_no_half_snapshot(pair)
            assert base in pair.replica_snapshots(), "the base was lost on the target"
            assert base in pair.source_snapshots(), "the base was lost on the source"
            transfer.join(120)
            node.start()
            pair.a.must("sync", JOB)
            newest = pair.assert_equal()
            assert newest > base
            assert len(pair.replica_snapshots()) <= 4
        snapshot = pair.assert_equal()
        assert (pair.source_snapshots()[snapshot] / "image").read_bytes() == pair.image.read_bytes()


def test_sigterm_ends_at_a_resumable_point(tmp_path: Path) -> None:
    with cluster(tmp_path, job='rate_limit = "16MiB/s"') as pair:
        fill(pair.image, 64 * MIB)
        transfer = threading.Thread(target=lambda: pair.a.run("sync", JOB, timeout=120))
        transfer.start()
        pair.until(lambda row: row.progress is not None and row.progress.done > 24 * MIB)
        assert pair.a.stop() == 0
        transfer.join(60)
        pair.a.start()
        done = pair.a.run("plan", JOB)
        assert done.returncode == 0, done.stderr
        with pair.a.control() as control:
            steps = control.plan(JOB)[0].steps
        assert steps
        assert steps[0].resumes_at, "the transfer does not continue where it ended"
        pair.a.must("sync", JOB)
        pair.assert_equal()
