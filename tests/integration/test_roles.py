"""A replica takes over, on real daemons and real images: promoted when its primary is lost, brought back, switched over
and back again; what is where is compared by digest at each step."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from replicator.control import State
from replicator.demo.node import DemoNode
from tests.support.cluster import JOB, MIB, VOLUME, Pair, change, cluster, fill, idle

pytestmark = pytest.mark.timeout(300)

REPLICA = "replicas:a/disk.raw"
SWITCHING = 'may_push_to = ["replicas"]\nmay_switch = ["replicas"]'


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def roles(node: DemoNode) -> dict[str, tuple[str, int]]:
    shown = json.loads(node.run("status", "--json").stdout)
    return {copy["volume"]: (copy["role"], copy["epoch"]) for copy in shown["copies"]}


def promoted_image(pair: Pair) -> Path:
    return pair.replicas / "a" / "disk.raw"


def test_a_replica_takes_over_and_the_old_primary_rejoins(tmp_path: Path) -> None:
    with cluster(tmp_path, rights=SWITCHING) as pair:
        fill(pair.image, 16 * MIB)
        pair.a.must("sync", JOB)
        replicated = digest(pair.image)
        refused = pair.b.run("promote", REPLICA, "--yes")
        assert refused.returncode == 1
        assert "has a primary that answers" in refused.stderr

        change(pair.image, seed=7)  # what the primary has beyond its replica
        pair.a.kill()
        alone = pair.b.run("promote", REPLICA, "--yes")
        assert alone.returncode == 1
        assert "no third node can say so" in alone.stderr
        assert "--primary-is-down" in alone.stderr
        assert not promoted_image(pair).exists()
        report = json.loads(pair.b.must("promote", REPLICA, "--primary-is-down", "--yes", "--json"))
        assert report["role"] == "primary"
        assert report["epoch"] > 1
        assert digest(promoted_image(pair)) == replicated
        assert roles(pair.b) == {REPLICA: ("primary", report["epoch"])}
        again = json.loads(pair.b.must("promote", REPLICA, "--yes", "--json"))
        assert again["epoch"] == report["epoch"]

        change(promoted_image(pair), seed=8)
        newer, diverged = digest(promoted_image(pair)), digest(pair.image)
        pair.a.start()
        assert pair.a.run("sync", JOB).returncode == 1  # it is told that it was superseded
        assert roles(pair.a)[VOLUME][0] == "replica"
        row = pair.until(idle)
        assert row.state is State.CONFLICT
        before = sorted(pair.source_snapshots())
        assert pair.a.run("sync", JOB).returncode == 1
        assert sorted(pair.source_snapshots()) == before, "a superseded primary takes no more snapshots"
        assert digest(promoted_image(pair)) == newer
        assert digest(pair.image) == diverged

        back = json.loads(pair.a.must("rejoin", VOLUME, "--from", "b", "--yes", "--json"))
        assert (back["role"], back["epoch"]) == ("replica", report["epoch"])
        assert back["done"] < 2 * MIB, "only the difference is sent"
        assert not pair.image.exists()
        kept = pair.source_snapshots()
        assert [digest(kept[name] / "image") for name in back["aside"]] == [diverged]
        assert digest(kept[back["snapshot"]] / "image") == newer

        change(promoted_image(pair), seed=9)
        pair.a.must("sync", JOB)  # the job replicates the other way now
        row = pair.until(idle)
        assert row.state is State.OK
        newest = pair.assert_equal(all_common=False)
        assert digest(pair.source_snapshots()[newest] / "image") == digest(promoted_image(pair))


def test_a_switchover_and_back_loses_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, rights=SWITCHING) as pair:
        fill(pair.image, 16 * MIB)
        pair.a.must("sync", JOB)
        change(pair.image, seed=3)
        content = digest(pair.image)
        report = json.loads(pair.a.must("switchover", VOLUME, "--to", "b", "--yes", "--json"))
        assert (report["node"], report["role"]) == ("b", "primary")
        assert report["without_primary"] is not None
        assert not pair.image.exists()
        assert digest(promoted_image(pair)) == content
        assert roles(pair.a)[VOLUME] == ("replica", 1)

        change(promoted_image(pair), seed=4)
        pair.a.must("sync", JOB)
        assert roles(pair.a)[VOLUME] == ("replica", report["epoch"])
        change(promoted_image(pair), seed=5)
        content = digest(promoted_image(pair))
        second = json.loads(pair.a.must("switchover", VOLUME, "--to", "a", "--yes", "--json"))
        assert (second["node"], second["role"]) == ("a", "primary")
        assert second["epoch"] > report["epoch"]
        assert digest(pair.image) == content
        assert not promoted_image(pair).exists()
        change(pair.image, seed=6)
        pair.a.must("sync", JOB)
        pair.assert_equal()
        assert pair.until(idle).state is State.OK
        history = json.loads(pair.a.must("history", "--json"))
        assert sum(entry["kind"] == "switchover" for entry in history) == 2


def test_a_rejoin_that_fails_back_ends_where_it_began(tmp_path: Path) -> None:
    with cluster(tmp_path, rights=SWITCHING) as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        change(pair.image, seed=7)
        diverged = digest(pair.image)
        pair.a.kill()
        promoted = json.loads(pair.b.must("promote", REPLICA, "--primary-is-down", "--yes", "--json"))
        change(promoted_image(pair), seed=8)
        content = digest(promoted_image(pair))
        pair.a.start()
        back = json.loads(pair.a.must("rejoin", VOLUME, "--from", "b", "--fail-back", "--yes", "--json"))
        assert (back["node"], back["role"]) == ("a", "primary")
        assert back["epoch"] > promoted["epoch"]
        assert back["without_primary"] is not None
        assert digest(pair.image) == content
        assert not promoted_image(pair).exists()
        kept = pair.source_snapshots()
        assert [digest(kept[name] / "image") for name in back["aside"]] == [diverged]
        again = json.loads(pair.a.must("rejoin", VOLUME, "--from", "b", "--fail-back", "--yes", "--json"))
        assert again["epoch"] == back["epoch"], "run again, it finds all done"
        change(pair.image, seed=9)
        pair.a.must("sync", JOB)
        pair.assert_equal(all_common=False)
        assert roles(pair.b)[REPLICA] == ("replica", back["epoch"])


def test_who_may_switch_over_is_the_receivers_decision(tmp_path: Path) -> None:
    with cluster(tmp_path) as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        content = digest(pair.image)
        refused = pair.a.run("switchover", VOLUME, "--to", "b", "--yes")
        assert refused.returncode == 1
        assert "may_switch" in refused.stderr
        assert digest(pair.image) == content, "and the primary is the primary as before"
        change(pair.image, seed=2)
        pair.a.must("sync", JOB)
        pair.assert_equal()
        assert not promoted_image(pair).exists()


def test_a_forced_promotion_needs_the_fence(tmp_path: Path) -> None:
    told = tmp_path / "fenced"
    fence = tmp_path / "fence"
    fence.write_text('#!/bin/sh\necho "$REPLICATOR_FENCE_NODES" > "$1"\nexit $2\n')
    fence.chmod(0o755)
    failing = f'[fence]\ncommand = ["{fence}", "{told}", "1"]\ntimeout = "5s"\n'
    with cluster(tmp_path, extra_b=failing) as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        refused = pair.b.run("promote", REPLICA, "--force", "--yes")
        assert refused.returncode == 1
        assert "fencing command" in refused.stderr
        assert told.read_text() == "a\n"
        assert roles(pair.b)[REPLICA] == ("replica", 1)
        pair.b.stop()
        text = pair.b.config.read_text().replace(f'"{told}", "1"', f'"{told}", "0"')
        pair.b.config.write_text(text)
        pair.b.start()
        out = pair.b.must("promote", REPLICA, "--force", "--yes")
        assert "what was written to the primary after it is not in this copy" in out
        assert roles(pair.b)[REPLICA][0] == "primary"
        deadline = time.monotonic() + 60
        while roles(pair.a)[VOLUME][0] == "primary" and time.monotonic() < deadline:
            pair.a.run("sync", JOB)
        assert roles(pair.a)[VOLUME] == ("replica", 1)
