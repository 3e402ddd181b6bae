"""Damage, full disks, vanished state: each gives its clear error, loses nothing, and heals."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.support.cluster import JOB, MIB, VOLUME, Pair, change, cluster, fill
from transport.identity import Identity


def _sync(pair: Pair) -> None:
    pair.a.must("sync", JOB)


def _flip(path: Path, offset: int) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(mode)


def _newest(snapshots: dict[str, Path]) -> Path:
    return snapshots[max(name for name in snapshots if name.startswith("replicator_"))]


def test_bits_flipped_in_the_target_are_found_and_mended(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 16 * MIB)
        _sync(pair)
        _flip(_newest(pair.replica_snapshots()) / "image", 5 * MIB + 17)
        done = pair.a.run("verify", VOLUME, "--json")
        assert done.returncode == 3, done.stderr
        assert "5242880" in done.stdout
        done = pair.a.run("verify", VOLUME, "--repair", "--yes")
        assert done.returncode == 0, done.stderr
        pair.a.must("verify", VOLUME)
        pair.assert_equal()


def test_resync_mends_a_damaged_replica_and_keeps_the_old_data_aside(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 16 * MIB)
        _sync(pair)
        damaged = _newest(pair.replica_snapshots())
        _flip(damaged / "image", 3 * MIB)
        pair.a.must("resync", VOLUME, "--yes")
        pair.a.must("verify", VOLUME)
        newest = _newest(pair.replica_snapshots())
        assert (newest / "image").read_bytes() == pair.image.read_bytes()


def test_resync_after_the_target_was_lost(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 8 * MIB)
        _sync(pair)
        shutil.rmtree(pair.replicas / ".replicator")
        pair.a.must("resync", VOLUME, "--yes")
        pair.assert_equal()


def test_a_target_whose_snapshots_were_all_deleted_gets_a_full_copy(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 8 * MIB)
        _sync(pair)
        for folder in pair.replica_snapshots().values():
            shutil.rmtree(folder)
        pair.a.must("resync", VOLUME, "--yes")
        pair.assert_equal()


def test_a_source_whose_common_snapshot_was_deleted_is_a_conflict_that_resync_resolves(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 8 * MIB)
        _sync(pair)
        for folder in pair.source_snapshots().values():
            shutil.rmtree(folder)
        done = pair.a.run("sync", JOB, "--json")
        assert done.returncode == 1
        assert "resync" in done.stdout
        before = pair.replica_snapshots().keys()
        done = pair.a.run("resync", VOLUME, "--yes", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["sent"] < MIB, "blocks that are equal were sent"
        assert before <= pair.replica_snapshots().keys(), "resync destroyed snapshots of the target"
        pair.assert_equal()


def test_resync_after_the_targets_snapshots_were_deleted_and_it_was_written(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 8 * MIB)
        _sync(pair)
        newest = _newest(pair.replica_snapshots()).name
        pair.b.must("restore", f"replicas:a/disk.raw@{newest}", "--to", "replicas:copy.raw")
        live = pair.replicas / "a" / "disk.raw"
        live.parent.mkdir(exist_ok=True)
        (pair.replicas / "copy.raw").rename(live)  # somebody starts using the replica
        change(live, seed=9)
        written = live.read_bytes()
        change(pair.image, seed=10)
        done = pair.a.run("sync", JOB)
        assert done.returncode == 1
        assert "resync" in done.stderr + done.stdout
        pair.a.must("resync", VOLUME, "--yes")
        assert not live.exists()
        aside = [path for name, path in pair.replica_snapshots().items() if name.startswith("diverged-")]
        assert [path for path in aside if (path / "image").read_bytes() == written], "what was written there is lost"
        pair.assert_equal()
        change(pair.image, seed=11)
        _sync(pair)
        pair.assert_equal()


@pytest.mark.tier("ext4")
def test_a_full_target_loses_nothing_and_continues_when_there_is_room(tmp_path: Path, small_ext4_dir: Path) -> None:
    with cluster(tmp_path, replicas=small_ext4_dir, job='keep = {source = "last=2", target = "last=1"}') as pair:
        fill(pair.image, 20 * MIB)
        _sync(pair)
        ballast = small_ext4_dir / "ballast"
        ballast.write_bytes(os.urandom(22 * MIB))
        before = pair.assert_equal()
        change(pair.image, seed=3, pieces=12, length=MIB)
        done = pair.a.run("sync", JOB, "--json")
        assert done.returncode == 1
        report = json.loads(done.stdout)
        assert "no_space" in json.dumps(report), report
        assert before in pair.replica_snapshots()
        ballast.unlink()
        _sync(pair)
        pair.assert_equal()


def test_the_history_may_be_deleted_at_any_time(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 4 * MIB)
        _sync(pair)
        for path in pair.a.state_dir.glob("history*"):
            path.unlink()
        change(pair.image, seed=1)
        _sync(pair)
        pair.a.stop()
        for path in pair.a.state_dir.glob("history*"):
            path.unlink()
        pair.a.start()
        change(pair.image, seed=2)
        _sync(pair)
        pair.assert_equal()
        row = pair.status()
        assert row is not None
        assert row.snapshot


def test_a_damaged_history_is_put_aside(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 4 * MIB)
        _sync(pair)
        pair.a.stop()
        (pair.a.state_dir / "history.sqlite").write_bytes(b"not a database" * 1000)
        pair.a.start()
        _sync(pair)
        assert list(pair.a.state_dir.glob("history.sqlite.damaged-*"))


def test_an_image_truncated_in_use_is_an_error_and_heals(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 8 * MIB)
        _sync(pair)
        os.truncate(pair.image, 5 * MIB)  # it shrank: that is a change like any other
        _sync(pair)
        pair.assert_equal()
        os.truncate(pair.image, 9 * MIB)
        _sync(pair)
        newest = pair.assert_equal()
        assert (pair.replica_snapshots()[newest] / "image").stat().st_size == 9 * MIB


def test_without_a_right_to_the_storage_the_run_is_refused_and_says_so(tmp_path: Path) -> None:
    with cluster(tmp_path, rights="") as pair:
        fill(pair.image, 4 * MIB)
        done = pair.a.run("sync", JOB)
        assert done.returncode == 1
        assert "may_push_to" in done.stdout + done.stderr
        assert not pair.replica_snapshots()
        text = httpx.get(f"http://{pair.addresses[1]}:9571/metrics", timeout=10).text
        assert 'replicator_connections_refused_total{reason="unauthorized"}' in text
        assert "unauthorized" in pair.b.tail()


def test_certificates_are_renewed_before_they_expire(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, MIB)
        pair.stop()
        long_ago = datetime.now(UTC) - timedelta(days=345)
        authority = Identity(pair.a.state_dir, clock=lambda: long_ago)
        for node in (pair.a, pair.b):
            identity = Identity(node.state_dir)
            key, request = identity.renewal_request()
            identity.install(key, authority.sign(identity.node, request))
            assert identity.needs_renewal()
        pair.a.start()
        pair.b.start()
        deadline = time.monotonic() + 30
        while any(Identity(node.state_dir).needs_renewal() for node in (pair.a, pair.b)):
            assert time.monotonic() < deadline, pair.a.tail() + pair.b.tail()
            time.sleep(0.1)
        _sync(pair)


def test_a_revoked_node_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 4 * MIB)
        _sync(pair)
        pair.a.must("cluster", "revoke", "b", "--yes")
        deadline = time.monotonic() + 15
        while (done := pair.a.run("sync", JOB)).returncode == 0:  # the daemon looks for changes every two seconds
            assert time.monotonic() < deadline, "a revoked node still takes data"
        assert done.returncode == 1
        assert "revoked" in done.stdout + done.stderr


def test_bad_configuration_names_every_problem(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        text = pair.a.config.read_text()
        pair.a.config.write_text(text.replace('schedule = "1h"', 'schedule = "often"\nkep = "x"\nmax_lag = 5'))
        done = pair.a.run("status")
        assert done.returncode == 2
        for part in ("replicator.toml", "schedule", "kep", "keep", "max_lag"):
            assert part in done.stderr, done.stderr
