"""``health``: how grave what is, the line and exit status of a monitoring plugin, a daemon that does not answer."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from replicator.cli.main import main
from replicator.client import SOCKET_NAME
from replicator.control import PeerStatus, ReplicaStatus, State, Status
from replicator.health import Figure, Grade, Verdict, judge
from replicator.web.api import make_api
from replicator.web.messages import Health
from replicator.web.server import HttpServer
from tests.support import values
from tests.support.control import FakeControl

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
# https://www.monitoring-plugins.org/doc/guidelines.html#AEN197; no unit but s, %, B and its multiples, c.
FIGURE = re.compile(r"'[^'=]+'=-?[0-9.]+(e[+-]?[0-9]+)?(s|B)?;[0-9.]*;(-?[0-9.]+(e[+-]?[0-9]+)?)?;0")


def row(state: State = State.OK, **changes: Any) -> ReplicaStatus:
    facts: dict[str, Any] = {
        "job": "vms", "volume": "images:vm-100", "target": "prox2:backup", "lag": 240.0, "objective": 2700.0,
        "last_sync": NOW, "next_sync": NOW, "duration": 1.2, "done": 5, "sent": 5, "failures": 0,
    }  # fmt: skip
    return ReplicaStatus(state=state, **(facts | changes))


def judged(*rows: ReplicaStatus, peers: tuple[PeerStatus, ...] = (), **changes: Any) -> Verdict:
    facts: dict[str, Any] = {
        "jobs": ("vms",), "scheduler_seen": NOW - timedelta(seconds=1), "certificate_expires": NOW + timedelta(days=80),
    }  # fmt: skip
    return judge(Status("prox1", "0.1.0", True, NOW, rows, peers), **(facts | changes))


@pytest.mark.parametrize(
    ("grade", "text", "found"),
    [
        (Grade.OK, "1 replica, at most 4 min behind", row()),
        (Grade.OK, "1 replica", row(State.RUNNING)),
        (Grade.OK, "1 replica", row(State.RUNNING, lag=2700.0)),
        (Grade.OK, "1 replica", row(objective=None, lag=9e9)),
        (Grade.CRITICAL, "images:vm-100 to prox2:backup is 50 min behind, 45 min are allowed", row(lag=3000.0)),
        (Grade.CRITICAL, "50 min behind", row(State.RUNNING, lag=3000.0)),
        (Grade.CRITICAL, "45 min are allowed: no route", row(State.FAILED, lag=3e3, failures=9, message="no route")),
        (Grade.WARNING, "failed: no route", row(State.FAILED, failures=1, message="no route")),
        (Grade.WARNING, "failed 9 times in a row", row(State.FAILED, failures=9)),
        (Grade.WARNING, "failed 2 times in a row", row(State.FAILED, failures=2, objective=None)),
        (Grade.CRITICAL, "failed 3 times in a row", row(State.FAILED, failures=3, objective=None)),
        (Grade.CRITICAL, "failed", row(State.FAILED, failures=1, lag=None)),
        (Grade.CRITICAL, "is in conflict: it was written to", row(State.CONFLICT, message="it was written to")),
        (Grade.CRITICAL, "differs from its source in 4.00 KiB", row(differing=4096)),
        (Grade.CRITICAL, "has nothing yet", row(State.NEVER, lag=None)),
        (Grade.WARNING, "has nothing yet", row(State.NEVER, lag=None, objective=None)),
        (Grade.WARNING, "has nothing yet", row(State.RUNNING, lag=None)),
        (Grade.WARNING, "job vms is paused", row(State.PAUSED, paused=True)),
    ],
)  # fmt: skip
def test_how_grave_a_replica_is(grade: Grade, text: str, found: ReplicaStatus) -> None:
    verdict = judged(found)
    assert (verdict.grade, text in verdict.text) == (grade, True), verdict
    assert judged(found, volume="images:vm-100").grade == grade


def test_how_grave_the_node_is() -> None:
    soon, gone = NOW + timedelta(days=19), NOW - timedelta(days=1)
    away = PeerStatus("prox2", "10.99.0.2:8571", False, message="no route")
    cases: list[tuple[Grade, str, dict[str, Any]]] = [
        (Grade.CRITICAL, "the scheduler stands still for 1 min 1 s", {"scheduler_seen": NOW - timedelta(seconds=61)}),
        (Grade.CRITICAL, "the scheduler stands still", {"scheduler_seen": None}),
        (Grade.OK, "1 replica", {"scheduler_seen": NOW - timedelta(seconds=59)}),
        (Grade.WARNING, "the certificate ends in 19 d", {"certificate_expires": soon}),
        (Grade.CRITICAL, "the certificate expired 1 d ago", {"certificate_expires": gone}),
        (Grade.OK, "1 replica", {"certificate_expires": None}),
        (Grade.WARNING, "no volume of job db is known", {"jobs": ("vms", "db")}),
        (Grade.WARNING, "peer prox2 is down: no route", {"peers": (away,)}),
        (Grade.WARNING, "peer prox2 is down", {"peers": (away,), "volume": "images:vm-100"}),
        (Grade.OK, "1 replica", {"peers": (replace(away, node="prox3"),), "volume": "images:vm-100"}),
        (Grade.UNKNOWN, "no job of prox1 replicates a volume images:other", {"volume": "images:other"}),
    ]
    for grade, text, changes in cases:
        verdict = judged(row(), **changes)
        assert (verdict.grade, text in verdict.text) == (grade, True), (changes, verdict)
    assert judged(jobs=()).line().startswith("REPLICATOR OK: prox1 replicates nothing by itself, and answers | ")


def test_the_worst_comes_first_and_few_are_told() -> None:
    failed = [row(State.FAILED, volume=f"images:{number}", failures=1) for number in range(9)]
    verdict = judged(*failed, row(State.CONFLICT))
    assert verdict.grade is Grade.CRITICAL
    assert verdict.text.startswith("images:vm-100 to prox2:backup is in conflict; images:0")
    assert verdict.text.endswith("; and 7 more")


def test_figures() -> None:
    line = judged(row(), row(State.FAILED, volume="images:b", lag=3000.0, failures=2)).line()
    assert "'replicas'=2;;;0 'running'=0;;;0 'conflict'=0;;;0 'failed'=1;;;0" in line
    assert "'never_synced'=0;;;0 'paused'=0;;;0 'ok'=1;;;0 'behind'=1;;;0 'differing'=0B;;;0 'lag'=3000s;;;0" in line
    of_volume = judged(row(), row(target="prox3:backup", lag=None), volume="images:vm-100").line()
    assert "'lag prox2:backup'=240s;;2700;0 'failures prox2:backup'=0;;;0" in of_volume
    assert "'lag prox3:backup'" not in of_volume
    assert "'lag vms prox2:backup'=240s" in judged(row(), row(job="b"), volume="images:vm-100").line()


@given(st.lists(values.of(ReplicaStatus), max_size=4), values.of(tuple[PeerStatus, ...]), st.booleans())
def test_whatever_the_status_the_line_is_one_that_is_understood(
    rows: list[ReplicaStatus], peers: tuple[PeerStatus, ...], one: bool
) -> None:
    verdict = judged(*rows, peers=peers, volume=rows[0].volume if one and rows else None)
    line = verdict.line()
    assert line.isprintable()
    text, _, figures = line.partition(" | ")
    assert text.startswith(f"REPLICATOR {verdict.grade.name}: ")
    assert "|" not in text
    assert "|" not in figures
    assert len(FIGURE.findall(figures)) == len(verdict.figures)
    assert FIGURE.sub("", figures).strip() == ""


@pytest.mark.parametrize("label", ["it's=so", "a|b", "x"])
def test_a_label_stays_within_its_quotes(label: str) -> None:
    assert "'" not in str(Figure(label, 1))[1:].partition("'=")[0]


# -- the verb


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "replicator.toml"
    (tmp_path / "state").mkdir()
    path.write_text(
        f'[node]\nname = "prox1"\nstate_dir = "{tmp_path}/state"\n[network]\ncluster = "127.61.7.0/24"\n'
        'listen = "127.61.7.1:8571"\nhttp = ""\n[storage.images]\nkind = "image"\npath = "/nowhere"\n'
        '[storage.other]\nkind = "image"\npath = "/nowhere2"\n'
        '[job.vms]\nsource = "images:*"\ntargets = ["other"]\n[job.off]\nsource = "images:*"\ntargets = ["other"]\n'
        "enabled = false\n"
    )
    return path


@pytest.fixture
def daemon(config: Path) -> Iterator[FakeControl]:
    control = FakeControl()
    now = datetime.now(UTC)
    control.answers["status"] = Status("prox1", "0.1.0", True, now, (row(objective=60.0, lag=5.0),))
    api = make_api(control, metrics=lambda: b"", health=lambda: Health("ok", "0.1.0", datetime.now(UTC)))
    server = HttpServer(api, unix=config.parent / "state" / SOCKET_NAME)
    server.start()
    yield control
    server.stop()


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), "health", *words])


def test_the_verb_asks_the_daemon(config: Path, daemon: FakeControl) -> None:
    result = run(config)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("REPLICATOR OK: 1 replica, at most 5 s behind | 'replicas'=1")
    assert result.stdout.count("\n") == 1
    now = datetime.now(UTC)
    daemon.answers["status"] = Status("prox1", "0.1.0", True, now, (row(State.FAILED, failures=1),))
    assert run(config).exit_code == 1
    daemon.answers["status"] = Status("prox1", "0.1.0", True, now, (row(State.CONFLICT),))
    assert run(config, "--volume", "images:vm-100").exit_code == 2
    assert run(config, "--volume", "images:nosuch").exit_code == 3
    daemon.answers["status"] = KeyError("a mistake")
    assert run(config).exit_code == 3


def test_no_daemon_is_critical_and_what_cannot_be_found_out_unknown(config: Path, tmp_path: Path) -> None:
    none = run(config)
    assert (none.exit_code, none.stdout) == (
        2, "REPLICATOR CRITICAL: no daemon runs on prox1, so nothing is replicated by itself\n",
    )  # fmt: skip
    for words in (("--nosuch",), ("surplus",), ("--timeout", "soon")):
        wrong = run(config, *words)
        assert wrong.exit_code == 3, words
        assert wrong.stdout.startswith("REPLICATOR UNKNOWN: ")
    missing = run(tmp_path / "nosuch.toml")
    assert missing.exit_code == 3
    assert "there is no such file" in missing.stdout
    assert run(config, "--help").exit_code == 0


def test_a_daemon_that_hangs_is_critical(config: Path) -> None:
    """It takes the connection, as the kernel does for a process that stands still, and never answers."""
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(os.fspath(config.parent / "state" / SOCKET_NAME))
        hanging.listen()
        result = run(config, "--timeout", "300ms")
    assert result.exit_code == 2
    assert "did not answer within 0.3 s" in result.stdout
