"""What is exported for Prometheus and Grafana: promtool takes it, the tests of the rules hold, nothing is invented."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from replicator import config
from replicator.cli.main import main
from replicator.metrics_table import METRICS
from replicator.monitoring.alerts import ALERTS
from replicator.monitoring.dashboard import PANELS, dashboard
from replicator.monitoring.files import files, write
from replicator.monitoring.rules import alerts_of, rules, runbook
from replicator.monitoring.site import Site, longest_gap, patience, site_of
from replicator.monitoring.yaml_text import to_yaml
from scheduler.schedule import parse_schedule

pytestmark = pytest.mark.timeout(480)

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
ROOT = Path(__file__).parents[2]
CONFIG = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.images]
kind = "image"
path = "/images"
[peer.prox2]
address = "10.99.0.2:8571"
[job.vms]
source = "images:*"
targets = ["prox2:backup"]
schedule = "*/15"
max_lag = "45min"
[job.nightly]
source = "images:*"
targets = ["prox2:archive"]
schedule = "mon..fri 02:00"
[job.off]
source = "images:*"
targets = ["prox2:other"]
enabled = false
"""


def site(text: str = CONFIG, *, at_once: bool = False) -> Site:
    return site_of(config.parse(text), "10.0.0.1:9571", at_once=at_once, now=NOW)


def promtool(*words: str, folder: Path) -> str:
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def without_peers() -> Site:
    found = site()
    return replace(found, peers=False, objectives=False, patience={})


@pytest.mark.tier("promtool")
@pytest.mark.parametrize("made", [site(), site(at_once=True), without_peers()], ids=["all", "at-once", "alone"])
def test_promtool_takes_the_rules_and_their_tests_hold(tmp_path: Path, made: Site) -> None:
    write(tmp_path, files(made))
    assert f"SUCCESS: {len(alerts_of(made))} rules found" in promtool(
        "check", "rules", "prox1.rules.yml", folder=tmp_path
    )
    assert "SUCCESS" in promtool("test", "rules", "prox1.tests.yml", folder=tmp_path)


@pytest.mark.tier("promtool")
def test_the_tests_of_the_rules_fail_when_rules_are_wrong(tmp_path: Path) -> None:
    """Every rule is made one that never fires, and for each of them that is noticed."""
    write(tmp_path, files(site(at_once=True)))
    path = tmp_path / "prox1.rules.yml"
    path.write_text(re.sub(r"expr: .*", 'expr: "up < -1"', path.read_text()))
    words = ["promtool", "test", "rules", "prox1.tests.yml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    missed = {alert.name for alert in ALERTS if f"alertname: {alert.name}, time" in said}
    assert missed == {alert.name for alert in ALERTS}, said


@pytest.mark.tier("promtool")
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    expressions = [query.replace("$__rate_interval", "5m") for panel in PANELS for query, _ in panel.queries]
    recorded = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(expressions)]
    (tmp_path / "panels.yml").write_text(to_yaml({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"SUCCESS: {len(expressions)} rules found" in promtool("check", "rules", "panels.yml", folder=tmp_path)


def test_only_metrics_that_there_are() -> None:
    known = {metric.name for metric in METRICS} | {f"{m.name}_bucket" for m in METRICS if m.type == "histogram"}
    used = set(re.findall(r"replicator_[a-z_]+", rules(site()) + dashboard()))
    assert used
    assert used <= known


def test_each_alert_has_its_section_and_the_page_is_the_generated_one() -> None:
    text = runbook()
    for alert in ALERTS:
        assert f"\n## {alert.name}\n" in text
        assert f"runbook.md#{alert.name.lower()}" in rules(replace(site(), peers=True))
    assert (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8") == text


def test_verbs_and_keys_that_the_runbook_names_exist() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    verbs = set(re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE))
    named = set(re.findall(r"`replicator ([a-z]+)", runbook() + (ROOT / "docs" / "monitoring.md").read_text()))
    assert {"status", "resync", "promote"} <= named <= verbs


@pytest.mark.parametrize(
    ("schedule", "gap"),
    [
        ("30s", timedelta(seconds=30)),
        ("*/15", timedelta(minutes=15)),
        ("mon..fri 02:00", timedelta(days=3)),
        ("8..17:00", timedelta(hours=15)),
        ("*-*-01 03:00", timedelta(days=31)),
        ("2026-12-24 20:00", None),
    ],
)
def test_the_longest_time_between_two_runs(schedule: str, gap: timedelta | None) -> None:
    assert longest_gap(parse_schedule(schedule, UTC), NOW) == gap


def test_how_long_a_job_may_be_late() -> None:
    assert patience(timedelta(seconds=5)) == timedelta(minutes=5, seconds=5)
    assert patience(timedelta(minutes=20)) == timedelta(minutes=30)
    assert patience(timedelta(days=1)) == timedelta(hours=26)
    assert set(site().patience) == {"vms", "nightly"}
    assert 'job=\\"off\\"' not in rules(site())


def test_what_is_not_there_is_not_watched() -> None:
    names = {alert.name for alert in alerts_of(without_peers())}
    gone = {"ReplicatorPeerDown", "ReplicatorClocksDiffer", "ReplicatorCertificateExpiring", "ReplicatorLagging"}
    assert names.isdisjoint(gone)
    assert gone < {alert.name for alert in alerts_of(site())} == {alert.name for alert in ALERTS}


def test_panels_do_not_overlap_and_fit() -> None:
    made = json.loads(dashboard())
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in made["panels"]}) == len(PANELS)


def test_yaml() -> None:
    made = to_yaml({"a": [{"b": 'x: "y"\n', "c": [1, 2.5]}, "d"], "e": {"f": True, "g": []}})
    assert made == 'a:\n  - b: "x: \\"y\\"\\n"\n    c:\n      - 1\n      - 2.5\n  - "d"\ne:\n  f: true\n  g: []\n'


# -- the verb


def run(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(path), "monitoring", "export", *words])


def test_the_verb_writes_the_files_and_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "replicator.toml"
    path.write_text(CONFIG)
    folder = tmp_path / "out"
    result = run(path, str(folder))
    assert result.exit_code == 0, result.output
    assert {file.name for file in folder.iterdir()} == {
        "prox1.rules.yml", "prox1.tests.yml", "prox1.targets.json", "dashboard.json", "runbook.md",
    }  # fmt: skip
    assert json.loads((folder / "prox1.targets.json").read_text()) == [
        {"targets": ["127.0.0.1:9571"], "labels": {"node": "prox1"}}
    ]
    assert 'for: "5m"' in (folder / "prox1.rules.yml").read_text()
    assert run(path, str(folder), "--at-once", "--address", "10.0.0.1:80").exit_code == 0
    assert 'for: "5m"' not in (folder / "prox1.rules.yml").read_text()
    assert "10.0.0.1:80" in (folder / "prox1.targets.json").read_text()
    assert (folder / "prox1.rules.yml").stat().st_mode & 0o777 == 0o644


def test_what_the_verb_refuses(tmp_path: Path) -> None:
    path = tmp_path / "replicator.toml"
    path.write_text(CONFIG)
    assert run(path, str(tmp_path / "out"), "--address", "nowhere").exit_code == 2
    path.write_text(CONFIG.replace('listen = "10.99.0.1:8571"', 'listen = "10.99.0.1:8571"\nhttp = ""'))
    silent = run(path, str(tmp_path / "out"))
    assert silent.exit_code == 2
    assert "serves no metrics" in silent.output
    assert not (tmp_path / "out").exists()
    taken = tmp_path / "file"
    taken.write_text("")
    assert run(path, str(taken), "--address", "h:1").exit_code == 1
