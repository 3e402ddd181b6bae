"""A real Prometheus scrapes two real daemons by the exported files and fires the exported alerts: those that can be
provoked within seconds, with ``--at-once``."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from replicator.monitoring.dashboard import PANELS
from replicator.monitoring.yaml_text import Value, to_yaml
from tests.support.cluster import JOB, MIB, VOLUME, Pair, change, cluster, fill, idle

pytestmark = [pytest.mark.timeout(420), pytest.mark.tier("promtool")]

PATIENCE = 90.0
TARGET = "b:replicas"


@dataclass
class Prometheus:
    """A running server."""

    http: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def firing(self) -> set[tuple[str, str]]:
        """Names of alerts that fire, with their node."""
        alerts = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {(a["labels"]["alertname"], a["labels"]["node"]) for a in alerts if a["state"] == "firing"}

    def until_firing(self, *wanted: tuple[str, str]) -> list[dict[str, Any]]:
        """All alerts, once these fire."""
        self.until(lambda: set(wanted) <= self.firing(), lambda: f"{wanted} do not fire, but {self.firing()}")
        found: list[dict[str, Any]] = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return found

    def until_quiet(self, name: str, node: str) -> None:
        self.until(lambda: (name, node) not in self.firing(), lambda: f"{name} goes on to fire for {node}")

    @staticmethod
    def until(holds: Any, otherwise: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, otherwise()
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def prometheus(folder: Path, exported: Path) -> Iterator[Prometheus]:
    """With the configuration of docs/monitoring.md, but that it looks every two seconds."""
    configuration: Value = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "1s", "scrape_timeout": "2s"},
        "rule_files": [f"{exported}/*.rules.yml"],
        "scrape_configs": [
            {
                "job_name": "replicator",
                "honor_labels": True,
                "file_sd_configs": [{"files": [f"{exported}/*.targets.json"]}],
            }
        ],
    }
    folder.mkdir()
    (folder / "prometheus.yml").write_text(to_yaml(configuration))
    port = free_port()
    argv = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (
        (folder / "log").open("wb") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as http,
    ):
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _until_ready(http, process, folder / "log")
            yield Prometheus(http)
        finally:
            process.terminate()
            process.wait(30)


def _until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def export(pair: Pair, folder: Path) -> None:
    for node in (pair.a, pair.b):
        node.must("monitoring", "export", str(folder), "--at-once")


def test_two_daemons_are_watched_and_alerts_fire(tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    rights = 'may_push_to = ["replicas"]\nmay_switch = ["replicas"]'
    with cluster(tmp_path, job='schedule = "1h"\nmax_lag = "2s"', rights=rights) as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        pair.until(idle)
        export(pair, exported)
        with prometheus(tmp_path / "prometheus", exported) as server:
            server.until(
                lambda: {found["metric"]["node"] for found in server.query("up == 1")} == {"a", "b"},
                lambda: "not both are scraped",
            )
            # The label job is the job of replicator.toml: so it was not renamed to exported_job.
            server.until(
                lambda: server.query(f'replicator_replica_lag_seconds{{node="a",job="{JOB}"}}'), lambda: "no lag"
            )
            found = server.until_firing(("ReplicatorLagging", "a"))
            lagging = next(alert for alert in found if alert["labels"]["alertname"] == "ReplicatorLagging")
            assert lagging["labels"]["volume"] == VOLUME
            assert lagging["labels"]["severity"] == "critical"
            assert lagging["annotations"]["summary"].startswith(f"{VOLUME} on {TARGET} is ")
            assert lagging["annotations"]["runbook"] == "runbook.md#replicatorlagging"
            quiet = {"ReplicatorDown", "ReplicatorSchedulerStalled", "ReplicatorFailing", "ReplicatorSplitBrain"}
            # ReplicatorDown fires until the first scrape: nothing is known of the node before.
            server.until(lambda: {name for name, _ in server.firing()}.isdisjoint(quiet), lambda: f"{server.firing()}")
            every_panel_has_something(server)

            pair.a.must("pause", JOB)
            server.until_firing(("ReplicatorJobPaused", "a"))
            pair.a.must("resume", JOB)
            server.until_quiet("ReplicatorJobPaused", "a")

            damage(pair)
            assert pair.a.run("verify", VOLUME).returncode == 3
            server.until_firing(("ReplicatorMismatch", "a"))
            pair.a.must("verify", VOLUME, "--repair", "--yes")
            server.until_quiet("ReplicatorMismatch", "a")

            pair.images.rename(tmp_path / "gone")
            server.until_firing(("ReplicatorStorageMissing", "a"))
            (tmp_path / "gone").rename(pair.images)

            pair.b.stop()
            server.until_firing(("ReplicatorDown", "b"), ("ReplicatorPeerDown", "a"))
            for _ in range(3):
                pair.a.run("sync", JOB)
            server.until_firing(("ReplicatorFailing", "a"))

            pair.a.stop()
            server.until_firing(("ReplicatorDown", "a"))
            pair.b.start()
            server.until_quiet("ReplicatorDown", "b")
            pair.b.must("promote", "replicas:a/disk.raw", "--primary-is-down", "--yes")
            change(pair.image, seed=9)
            pair.a.start()
            pair.a.run("sync", JOB)
            server.until_firing(("ReplicatorSplitBrain", "a"), ("ReplicatorConflict", "a"))


def every_panel_has_something(server: Prometheus) -> None:
    """But those of what did not happen, or happens only while bytes flow."""
    may_be_empty = {"Failures in a row", "How long runs take, 95 of 100"}
    for panel in PANELS:
        for query, _ in panel.queries:
            asked = query.replace("$node", ".*").replace("$__rate_interval", "10s")
            if panel.title not in may_be_empty:
                server.until(lambda asked=asked: server.query(asked), lambda asked=asked: f"nothing for {asked}")


def damage(pair: Pair) -> None:
    """Change a block of the replica's snapshot behind its back."""
    (snapshot,) = pair.replica_snapshots().values()
    image = snapshot / "image"
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(4096))
