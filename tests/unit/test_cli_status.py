"""``status``: its table on terminals of all widths, and its verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from replicator.cli import tables
from replicator.cli.output import DONE, FAILED, MISSED, USAGE, safe
from replicator.control import Orphan, PeerStatus, ReplicaStatus, State, Status
from replicator.errors import DaemonUnreachable
from replicator.model import Progress
from replicator.web.messages import STATUS
from tests.support.cli import Terminal, terminal

__all__ = ["terminal"]

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
WIDE_NAME = "images:虚拟机-磁盘-数据库-生产"


def row(volume: str = "images:vm-100", state: State = State.OK, **changes: Any) -> ReplicaStatus:
    facts: dict[str, Any] = {
        "job": "vms",
        "target": "prox2:backup",
        "lag": 240.0,
        "objective": 2700.0,
        "last_sync": NOW - timedelta(seconds=230),
        "next_sync": NOW + timedelta(seconds=660),
        "duration": 1.2,
        "done": 38 << 20,
        "sent": 21 << 20,
        "failures": 0,
    }
    return ReplicaStatus(volume=volume, state=state, **(facts | changes))


def status(*rows: ReplicaStatus, daemon: bool = True, peers: tuple[PeerStatus, ...] = ()) -> Status:
    return Status("prox1", "0.1.0", daemon, NOW, rows, peers)


FAILING = row(
    "images:vm-101",
    State.FAILED,
    lag=9000.0,
    failures=12,
    message="cannot reach prox2 (10.99.0.2:8571): connection refused",
    hint="is its daemon running?",
)
MANY = status(
    row(),
    FAILING,
    row("prox2/tank:databases/accounting-primary-2026", State.NEVER, lag=None, last_sync=None, sent=0, job="pull"),
    row(WIDE_NAME, State.PAUSED, paused=True, next_sync=None),
    row("images:vm-103", State.RUNNING, progress=Progress("images:vm-103", "prox2:backup", "s", 5, 10, 5, 1.0, NOW)),
)


def test_one_line_a_replica_where_there_is_room(terminal: Terminal) -> None:
    terminal.control.answers["status"] = MANY
    lines = terminal.lines("status")
    headers = ["VOLUME", "TARGET", "STATE", "LAG", "OBJECTIVE", "LAST", "SYNC", "NEXT", "SYNC", "DURATION", "BYTES"]
    assert lines[0].split() == [*headers, "FAILURES", "JOB"]
    assert lines[1].split() == [
        "images:vm-100", "prox2:backup", "ok", "4min", "45min", "4min", "ago", "in", "11min", "1.2s", "21.0", "MiB",
        "0", "vms",
    ]  # fmt: skip
    assert "failed" in lines[2]
    assert " 12 " in lines[2]
    assert lines[3].startswith("prox2/tank:databases/accounting-primary-2026  ")
    assert "never synced" in lines[3]


def test_replicas_whose_sources_are_gone(terminal: Terminal) -> None:
    orphan = Orphan("vms", "images:old", "prox2:backup", "backup:prox1/old")
    terminal.control.answers["status"] = replace(status(row()), orphans=(orphan,))
    shown = " ".join(" ".join(terminal.lines("status")).split())
    assert "backup:prox1/old on prox2: its source is gone; the replica is kept" in shown
    assert "`replicator prune vms --orphans` removes it" in shown
    (told,) = json.loads(terminal.run("status", "--json").stdout)["orphans"]
    assert told == {"job": "vms", "volume": "images:old", "target": "prox2:backup", "replica": "backup:prox1/old"}
    assert terminal.run("status").exit_code == DONE


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
def test_nothing_is_wider_than_the_terminal(terminal: Terminal, columns: int) -> None:
    terminal.control.answers["status"] = MANY
    for line in terminal.lines("status", columns=columns):
        assert cell_len(line) <= columns


def test_eighty_columns_show_everything_in_two_lines(terminal: Terminal) -> None:
    terminal.control.answers["status"] = MANY
    text = terminal.run("status", columns=80).stdout
    for part in ("images:vm-100 ", "→ prox2:backup (vms)", "12 failures", "of 45min", "never synced", "50%", "生产"):
        assert part in text
    assert "…" not in text


def test_names_are_folded_after_separators() -> None:
    assert tables.fold("prox2/tank:databases/accounting-primary", 26) == "prox2/tank:databases/\naccounting-primary"
    assert tables.fold("short", 26) == "short"
    assert tables.fold("abcdefgh", 4) == "abcd\nefgh"


@given(st.text(max_size=80), st.integers(2, 40))
def test_folding_keeps_every_letter_and_the_width(text: str, width: int) -> None:
    folded = tables.fold(text, width)
    assert folded.replace("\n", "") == safe(text)
    assert all(cell_len(line) <= width for line in folded.split("\n"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0s"), (0.42, "0.4s"), (9.94, "9.9s"), (9.96, "10s"), (99, "99s"), (100, "2min"),
        (2700, "45min"), (99.4 * 60, "99min"), (6000, "2h"), (47 * 3600, "47h"), (48 * 3600, "2d"), (-90, "-90s"),
    ],
)  # fmt: skip
def test_durations_take_five_columns(seconds: float | None, text: str) -> None:
    assert tables.short(seconds) == text


@given(st.floats(0, 86400 * 3650))
def test_durations_never_take_more(seconds: float) -> None:
    assert len(tables.short(seconds)) <= 5


def test_problems_stand_beneath_with_what_to_do(terminal: Terminal) -> None:
    away = PeerStatus("prox3", "10.99.0.3:8571", False, message="no route")
    terminal.control.answers["status"] = status(row(), FAILING, peers=(away,))
    text = terminal.run("status").stdout
    assert "images:vm-101 → prox2:backup: cannot reach prox2" in text
    assert "hint: is its daemon running?" in text
    assert "peer prox3 (10.99.0.3:8571) is not reachable: no route" in text
    assert "prox1: 2 replicas, 1 failed, 1 ok; 1 behind the objective." in text


def test_one_cause_of_many_problems_is_said_once(terminal: Terminal) -> None:
    cause = "cannot reach prox2"
    rows = [row(f"images:vm-{number}", State.FAILED, message=cause, hint="start it") for number in range(9)]
    rows.append(row("images:again", State.RUNNING, message=cause, hint="start it"))
    peer = PeerStatus("prox2", "10.99.0.2:8571", False, message=cause)
    terminal.control.answers["status"] = status(*rows, peers=(peer,))
    text = terminal.run("status").stdout
    assert text.count(cause) == 1
    assert "images:vm-2 → prox2:backup and 6 more: cannot reach prox2" in text
    assert "peer prox2 (10.99.0.2:8571) is not reachable\n" in text


def test_what_there_is_not_is_said(terminal: Terminal) -> None:
    terminal.control.answers["status"] = status(daemon=False)
    result = terminal.run("status")
    assert result.exit_code == DONE
    assert "no replicas yet" in result.stdout
    assert "No daemon runs here, so nothing is scheduled." in result.stdout


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ((row(),), DONE),
        ((row(lag=2701.0),), MISSED),
        ((row(lag=None),), MISSED),
        ((row(lag=None, objective=None, state=State.NEVER),), DONE),
        ((row(), row(state=State.CONFLICT)), MISSED),
        ((row(state=State.FAILED),), MISSED),
        ((row(state=State.PAUSED, paused=True),), DONE),
    ],
)
def test_the_exit_code_says_whether_objectives_are_kept(
    terminal: Terminal, rows: tuple[ReplicaStatus, ...], code: int
) -> None:
    terminal.control.answers["status"] = status(*rows)
    assert terminal.run("status").exit_code == code
    assert terminal.run("status", "--json").exit_code == code


def test_json_has_the_same_facts(terminal: Terminal) -> None:
    terminal.control.answers["status"] = MANY
    result = terminal.run("status", "--json")
    assert STATUS.validate_json(result.stdout) == MANY
    assert json.loads(result.stdout)["replicas"][0]["lag"] == 240


def test_watching_needs_a_terminal(terminal: Terminal) -> None:
    result = terminal.run("status", "--watch")
    assert result.exit_code == USAGE
    assert "--watch needs a terminal" in result.stderr


def test_foreign_text_is_shown_without_control_characters_or_markup(terminal: Terminal) -> None:
    evil = "a\x1b[31mb\x07\r\u202e[bold red]c[/]"
    terminal.control.answers["status"] = status(row(evil, State.FAILED, message=evil, hint=evil))
    result = terminal.run("status")
    assert not set("\x1b\x07\r\u202e") & set(result.stdout)
    assert "[bold red]c[/]" in result.stdout


def test_plain_where_there_is_no_terminal(terminal: Terminal) -> None:
    terminal.control.answers["status"] = MANY
    assert "\x1b" not in terminal.run("status").stdout


def test_a_daemon_that_does_not_answer(terminal: Terminal) -> None:
    terminal.control.answers["status"] = DaemonUnreachable("no daemon answers", hint="start it")
    result = terminal.run("status")
    assert result.exit_code == FAILED
    assert result.stderr == "error: no daemon answers\nhint: start it\n"
    assert result.stdout == ""
