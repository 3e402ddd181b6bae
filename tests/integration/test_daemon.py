"""The daemon and the command line as users have them: schedules, pauses, metrics, pulling, restoring, working alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from replicator.control import State
from replicator.demo.node import DemoNode, join, loopback_network
from tests.support.cluster import JOB, MIB, VOLUME, change, cluster, fill, idle

pytestmark = pytest.mark.timeout(300)


def test_a_schedule_runs_by_itself_and_a_pause_survives_a_restart(tmp_path: Path) -> None:
    with cluster(tmp_path, job='schedule = "5s"\nmax_lag = "20s"') as pair:
        fill(pair.image, 4 * MIB)
        first = pair.until(lambda row: row.snapshot != "" and idle(row)).snapshot
        second = pair.until(lambda row: row.snapshot not in ("", first) and idle(row))
        assert second.state is State.OK
        assert second.lag is not None
        assert second.lag < 20
        assert second.next_sync is not None
        pair.a.must("pause", JOB)
        pair.a.stop()
        pair.a.start()
        row = pair.until(lambda row: row.state is State.PAUSED)
        assert row.next_sync is None
        paused_at = pair.until(idle).snapshot
        pair.a.must("sync", JOB)  # by hand it runs all the same
        assert pair.until(idle).snapshot > paused_at
        pair.a.must("resume", JOB)
        by_hand = pair.until(idle).snapshot
        pair.until(lambda row: row.snapshot > by_hand)
        pair.a.stop()
        pair.assert_equal()


def test_metrics_and_status_tell_the_same_and_exit_codes_are_kept(tmp_path: Path) -> None:
    with cluster(tmp_path, job='schedule = "1h"\nmax_lag = "1s"') as pair:
        fill(pair.image, 8 * MIB)
        pair.a.must("sync", JOB)
        row = pair.until(lambda row: row.lag is not None and row.lag > 1)
        assert row.state is State.LAGGING
        assert pair.a.run("status").returncode == 3
        shown = json.loads(pair.a.run("status", "--json").stdout)
        assert shown["replicas"][0]["volume"] == VOLUME
        assert pair.a.run("sync", "nosuch").returncode == 2
        assert pair.a.run("verify", "images:nosuch").returncode == 1
        with httpx.Client(base_url=f"http://{pair.addresses[0]}:9571", timeout=10) as client:
            text = client.get("/metrics").text
            # The listener without a password is read-only.
            assert client.post("/api/v1/pause", params={"job": JOB}).status_code in (404, 405)
        labels = f'job="{JOB}",target="b:replicas",volume="{VOLUME}"'
        lag = float(text.split(f"replicator_replica_lag_seconds{{{labels}}} ")[1].split()[0])
        assert lag > 1
        assert f'replicator_runs_total{{job="{JOB}",outcome="ok",target="b:replicas"}} 1.0' in text
        assert 'replicator_peer_up{peer="b"}' in text
        assert "replicator_scheduler_heartbeat_timestamp_seconds" in text
        assert "replicator_build_info" in text
        assert 'replicator_storage_up{storage="images"} 1.0' in text
        assert 'replicator_storage_free_bytes{storage="images"}' in text


def test_health_of_a_daemon_that_works_stands_still_and_is_gone(tmp_path: Path) -> None:
    with cluster(tmp_path, job='schedule = "1h"\nmax_lag = "1h"') as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        pair.until(idle)
        deadline = time.monotonic() + 60
        while (well := pair.a.run("health", "--volume", VOLUME)).returncode == 1 and time.monotonic() < deadline:
            assert "peer b is down" in well.stdout  # until it is asked again
        assert (well.returncode, well.stderr) == (0, ""), well.stdout
        assert re.fullmatch(
            r"REPLICATOR OK: 1 replica, .* behind \| 'lag b:replicas'=[0-9.]+s;;3600;0 .*\n", well.stdout
        )
        # A node that only takes replicas is well too.
        assert pair.b.run("health").stdout.startswith("REPLICATOR OK: b replicates nothing by itself, and answers | ")
        pair.b.stop()
        assert pair.a.run("sync", JOB).returncode == 1
        failed = pair.a.run("health")
        assert failed.returncode == 1
        assert re.match(r"REPLICATOR WARNING: images:disk.raw to b:replicas failed: .*", failed.stdout), failed.stdout
        assert pair.a.process is not None
        pair.a.process.send_signal(signal.SIGSTOP)
        try:
            still = pair.a.run("health", "--timeout", "2s")
        finally:
            pair.a.process.send_signal(signal.SIGCONT)
        assert still.returncode == 2
        assert "did not answer within 2 s" in still.stdout
        pair.a.stop()
        gone = pair.a.run("health")
        assert (gone.returncode, gone.stdout) == (
            2, "REPLICATOR CRITICAL: no daemon runs on a, so nothing is replicated by itself\n",
        )  # fmt: skip


def test_people_and_programs_are_told_how_runs_end(tmp_path: Path) -> None:
    """By [notify] of changes, by after_run of every run."""
    told, ran = tmp_path / "told", tmp_path / "ran"

    def noting(variable: str, path: Path) -> str:
        return "command = " + json.dumps(["sh", "-c", f'echo "$REPLICATOR_{variable}" >> {path}'])

    with cluster(
        tmp_path,
        job=f'schedule = "1h"\nafter_run = {{{noting("OUTCOME", ran)}}}',
        extra_a=f'[notify]\nevery = "1s"\n{noting("SUBJECT", told)}\n',
    ) as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        pair.b.stop()
        for _ in range(2):
            assert pair.a.run("sync", JOB).returncode == 1
        lines = until_lines(told, 1)
        assert lines == [f"replicator on a: {VOLUME} to b:replicas failed"]
        pair.b.start()
        pair.a.must("sync", JOB)
        assert until_lines(told, 2)[1:] == [f"replicator on a: {VOLUME} to b:replicas recovered"]
        assert ran.read_text().split() == ["ok", "failed", "failed", "ok"]


def until_lines(path: Path, count: int) -> list[str]:
    """The lines of a file, once there are so many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.05)
    raise AssertionError(f"{path} has not {count} lines")


def test_plan_snapshots_history_and_prune(tmp_path: Path) -> None:
    with cluster(tmp_path, job='keep = {source = "last=2", target = "last=3"}') as pair:
        fill(pair.image, 4 * MIB)
        for number in range(5):
            change(pair.image, seed=number)
            pair.a.must("sync", JOB)
        assert len(pair.source_snapshots()) == 2
        assert len(pair.replica_snapshots()) == 3
        pair.assert_equal()
        plan = json.loads(pair.a.must("plan", JOB, "--json"))
        assert plan[0]["steps"] == []
        sides = json.loads(pair.a.must("snapshots", VOLUME, "--json"))
        assert [len(side["versions"]) for side in sides] == [2, 3]
        assert [side["role"] for side in sides] == ["primary", "replica"]
        history = json.loads(pair.a.must("history", "--json"))
        assert sum(entry["kind"] == "run" and entry["outcome"] == "ok" for entry in history) == 5
        pruned = json.loads(pair.a.must("prune", JOB, "--dry-run", "--json"))
        assert all(outcome["kept"] for report in pruned for outcome in report["outcomes"])


def test_restore_from_the_other_node(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 6 * MIB)
        pair.a.must("sync", JOB)
        name = pair.assert_equal()
        frozen = pair.image.read_bytes()
        change(pair.image, seed=4)
        pair.a.must("sync", JOB)
        for folder in (pair.source_snapshots()[name],):  # gone here, so it has to come from there
            for item in sorted(folder.rglob("*"), reverse=True):
                item.rmdir() if item.is_dir() else item.unlink()
            folder.rmdir()
        pair.a.must("restore", f"{VOLUME}@{name}", "--to", "images:back.raw")
        assert (pair.images / "back.raw").read_bytes() == frozen
        again = pair.a.run("restore", f"{VOLUME}@{name}", "--to", "images:back.raw")
        assert again.returncode == 1
        assert "exists" in again.stderr


def test_restore_of_a_volume_that_is_lost(tmp_path: Path) -> None:
    """Its replica is what it comes back from, and nobody needs to know how that is called."""
    with cluster(tmp_path) as pair:
        fill(pair.image, 6 * MIB)
        pair.a.must("sync", JOB)
        name = pair.assert_equal()
        frozen = pair.image.read_bytes()
        shutil.rmtree(pair.images)
        pair.images.mkdir()
        pair.a.must("restore", f"{VOLUME}@{name}", "--to", "images:back.raw")
        assert (pair.images / "back.raw").read_bytes() == frozen
        lost = pair.a.run("restore", f"{VOLUME}@nosuch", "--to", "images:back-2.raw")
        assert lost.returncode == 1
        assert "looked in a/images:disk.raw, b/replicas:a/disk.raw" in lost.stderr


def test_only_one_daemon_and_commands_work_without_one(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 4 * MIB)
        second = pair.a.run("serve", timeout=30)
        assert second.returncode == 1
        assert "daemon" in second.stderr
        pair.a.stop()
        done = pair.a.run("sync", JOB)
        assert done.returncode == 0, done.stderr
        assert "no daemon runs here" in done.stderr
        pair.a.must("verify", VOLUME)
        assert pair.a.run("status").returncode == 0
        pair.assert_equal()


def test_pulling_from_another_node(tmp_path: Path) -> None:
    prefix = loopback_network()
    network = f"{prefix}.0/24"
    a, b = DemoNode("a", tmp_path / "a"), DemoNode("b", tmp_path / "b")
    images, copies = tmp_path / "images", tmp_path / "copies"
    images.mkdir()
    copies.mkdir()
    a.configure(
        f"{prefix}.1:8571",
        cluster=network,
        http="",
        rest=f'[storage.images]\nkind = "image"\npath = "{images}"\n\n'
        f'[peer.b]\naddress = "{prefix}.2:8571"\nmay_pull_from = ["images"]\n',
    )
    b.configure(
        f"{prefix}.2:8571",
        cluster=network,
        http="",
        rest=f'[storage.copies]\nkind = "image"\npath = "{copies}"\n\n[peer.a]\naddress = "{prefix}.1:8571"\n\n'
        '[job.pull]\nsource = {node = "a", volumes = "images:*"}\ntargets = ["copies"]\nschedule = "1h"\n'
        'keep = {source = "last=2", target = "last=2"}\n',
    )
    fill(images / "disk.raw", 8 * MIB)
    try:
        join(a, b)
        b.start()
        for number in range(3):
            change(images / "disk.raw", seed=number)
            b.must("sync", "pull")
        newest = max(copies.glob(".replicator/**/snapshots/*/image"), key=lambda path: path.parent.name)
        assert newest.read_bytes() == (images / "disk.raw").read_bytes()
        assert len(list(images.glob(".replicator/**/snapshots/*/image"))) == 2
        b.must("verify", "a/images:disk.raw")
        shown = json.loads(b.run("status", "--json").stdout)
        assert shown["replicas"][0]["volume"] == "a/images:disk.raw"
        # The puller may read and prune by policy; it may not write.
        done = b.run("resync", "a/images:disk.raw", "--yes")
        assert done.returncode == 0, done.stderr
    finally:
        a.stop()
        b.stop()


def test_two_jobs_and_a_verify_schedule(tmp_path: Path) -> None:
    with cluster(tmp_path, job='schedule = "1h"\nverify = "5s"') as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            history = json.loads(pair.a.must("history", "--json"))
            if any(entry["kind"] == "verify" and entry["outcome"] == "equal" for entry in history):
                break
            time.sleep(0.5)
        else:
            pytest.fail("the scheduled verification did not run")
        row = pair.status()
        assert row is not None
        assert row.state in (State.OK, State.RUNNING)
