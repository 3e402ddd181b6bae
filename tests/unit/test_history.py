"""The history: remembered, bounded, and never in the way."""

from __future__ import annotations

import logging
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from sqlalchemy import create_engine, inspect

from replicator import history
from replicator.history import Check, Difference, History, Outcome, Run
from replicator.history_schema import METADATA, MIGRATIONS

NOW = datetime(2026, 11, 20, 8, 17, 10, 123456, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / history.FILE_NAME


def run(outcome: str = "ok", *, at: datetime = NOW, volume: str = "tank:vm-1", done: int = 5) -> Run:
    return Run("vms", volume, "prox2:backup", at - timedelta(seconds=3), at, outcome, bytes_done=done)


def test_runs_come_back_as_they_were(path: Path) -> None:
    told = Run(
        "vms", "tank:vm-1", "prox2:backup", NOW - timedelta(seconds=3), NOW, "failed", "no_space", "full", 10, 4, "g1",
        "replicator_vms_x", 2,
    )  # fmt: skip
    past = History(path)
    past.add_run(told)
    past.close()
    again = History(path)
    assert again.runs() == [told]
    assert again.runs()[0].seconds == 3.0
    assert again.runs(volume="tank:vm-2") == []
    assert again.runs(job="vms", volume="tank:vm-1", target="prox2:backup") == [told]


def test_newest_first_and_limited(path: Path) -> None:
    past = History(path)
    for number in range(5):
        past.add_run(run(done=number))
    assert [r.bytes_done for r in past.runs(limit=2)] == [4, 3]


def test_checks_and_events(path: Path) -> None:
    past = History(path, clock=Clock())
    check = Check("vms", "tank:vm-1", "prox2:backup", "repair", NOW, "s", 100, 8, 2, True, 9)
    past.add_check(check)
    assert past.checks(volume="tank:vm-1") == [check]
    past.add_event("paused", "vms", "by hand")
    past.add_event("started", "prox1")
    assert [(e.time, e.kind, e.message) for e in past.events()] == [(NOW, "started", ""), (NOW, "paused", "by hand")]
    assert [e.subject for e in past.events(kind="paused")] == ["vms"]


@pytest.mark.parametrize(
    ("outcomes", "failures", "success"),
    [
        (["ok"], 0, True),
        (["failed", "conflict"], 2, False),
        (["failed", "ok", "failed", "skipped", "cancelled", "conflict"], 2, True),
        (["failed", "ok"], 0, True),
        (["cancelled"], 0, False),
    ],
)
def test_summary(path: Path, outcomes: list[str], failures: int, success: bool) -> None:
    past = History(path)
    past.add_run(run("failed", volume="tank:other"))
    for outcome in outcomes:
        past.add_run(run(Outcome(outcome)))
    found = past.summary("vms", "tank:vm-1", "prox2:backup")
    assert found is not None
    assert found.failures == failures
    assert found.last_run.outcome == outcomes[-1]
    assert (found.last_success is not None) is success
    assert past.summary("vms", "tank:none", "prox2:backup") is None


def test_pruned_by_age(path: Path) -> None:
    clock = Clock()
    past = History(path, keep=timedelta(days=90), clock=clock)
    past.add_run(run(at=NOW - timedelta(days=91)))
    past.add_run(run())
    past.add_event("old", "x")
    clock.now += timedelta(days=89)
    past.add_event("new", "x")
    clock.now += timedelta(days=2)
    assert past.prune() == 3
    assert past.runs() == []
    assert [e.kind for e in past.events()] == ["new"]


def test_pruned_by_number_as_it_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_ROWS", 10)
    monkeypatch.setattr(history, "PRUNE_EVERY", 20)
    past = History(path, keep=None)
    for number in range(40):
        past.add_run(run(done=number))
    assert [r.bytes_done for r in past.runs()] == list(range(39, 29, -1))


def test_long_and_odd_texts(path: Path) -> None:
    past = History(path)
    past.add_event("x" * 10_000, "\udcff'; DROP TABLE runs; --\0", "é")
    (event,) = past.events()
    assert len(event.kind) == history.MAX_TEXT
    assert event.subject == "\\udcff'; DROP TABLE runs; --\0"
    past.add_run(run())
    assert len(past.runs()) == 1


def test_schema_is_what_the_tables_say(path: Path) -> None:
    past = History(path)
    past.add_run(run())
    past.close()
    engine = create_engine(f"sqlite:///{path}")
    there = inspect(engine)
    assert set(there.get_table_names()) == set(METADATA.tables)
    for name, table in METADATA.tables.items():
        columns = {column["name"]: column["nullable"] for column in there.get_columns(name)}
        assert columns == {column.name: bool(column.nullable) or column.name == "id" for column in table.columns}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA user_version").scalar() == len(MIGRATIONS)
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def test_migrations_are_applied_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = History(path)
    past.add_run(run())
    past.close()
    monkeypatch.setattr(history, "MIGRATIONS", (*MIGRATIONS, ("ALTER TABLE runs ADD COLUMN extra TEXT",)))
    later = History(path)
    later.add_run(run())
    assert len(later.runs()) == 2
    later.close()
    assert len(History(path).runs()) == 2
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)


def test_what_stood_before_there_was_a_table_for_it_stands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(
        volume: str, kind: Literal["verify", "repair", "resync"], differing: int, *, right: bool = False
    ) -> Check:
        return Check("vms", volume, "b:s", kind, NOW, f"{kind}-{differing}", 10, differing, 1, repaired=right)

    with monkeypatch.context() as before:
        before.setattr(history, "MIGRATIONS", MIGRATIONS[:1])
        past = History(path)
        for volume, *later in (
            ("stands", check("stands", "resync", 0)),
            ("again", check("again", "verify", 7)),
            ("equal", check("equal", "verify", 0)),
            ("mended", check("mended", "repair", 5, right=True)),
            ("anew", check("anew", "resync", 5, right=True)),
        ):
            for each in (check(volume, "verify", 5), *later):
                past.add_check(each)
        past.close()
    past = History(path)
    known = {
        volume: past.differences("vms", volume, "b:s") for volume in ("stands", "again", "equal", "mended", "anew")
    }
    assert {volume: [(d.snapshot_name, d.differing_bytes) for d in found] for volume, found in known.items()} == {
        "stands": [("verify-5", 5)], "again": [("verify-7", 7)], "equal": [], "mended": [], "anew": [],
    }  # fmt: skip
    assert known["stands"][0] == Difference("vms", "stands", "b:s", NOW, "verify-5", "", 5, True, False, False)


def test_a_migration_that_fails_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    History(path).add_run(run())
    broken = ("CREATE TABLE half (id INTEGER)", "CREATE TABLE runs (id INTEGER)")
    monkeypatch.setattr(history, "MIGRATIONS", (*MIGRATIONS, broken))
    assert History(path).runs() == []
    with sqlite3.connect(path) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert "half" not in names


def aside(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.glob("*.damaged-*") if not p.name.endswith(("-wal", "-shm")))


def test_a_file_that_is_no_database_is_moved_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not at all" * 1000)
    past = History(path, clock=Clock())
    with caplog.at_level(logging.WARNING):
        past.add_run(run())
    assert len(past.runs()) == 1
    assert [p.name for p in aside(path)] == ["history.sqlite.damaged-20261120T081710.123Z"]
    assert aside(path)[0].read_bytes().startswith(b"not at all")
    assert "history damaged" in caplog.text
    assert [e.kind for e in past.events()] == ["history_damaged"]


def test_damage_inside_is_found_by_a_thorough_look(path: Path) -> None:
    past = History(path)
    for _ in range(200):
        past.add_run(run())
    past.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 5] = b"\xa5" * 8192
    path.write_bytes(data)
    past = History(path, thorough=True)
    past.add_run(run())
    assert len(past.runs()) == 1
    assert len(aside(path)) == 1


def test_a_database_of_a_newer_version_is_kept_aside(path: Path) -> None:
    History(path).add_run(run())
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    past = History(path)
    assert past.runs() == []
    assert "newer version" in past.events()[0].message


def test_deleted_while_open(path: Path) -> None:
    past = History(path)
    past.add_run(run(done=1))
    for file in path.parent.iterdir():
        file.unlink()
    past.add_run(run(done=2))
    assert [r.bytes_done for r in past.runs()] == [2]
    path.unlink()  # its write-ahead log stays
    past.add_run(run(done=3))
    assert [r.bytes_done for r in past.runs()] == [3]
    assert [r.bytes_done for r in History(path).runs()] == [3]


def test_state_directory_deleted_while_open(path: Path) -> None:
    past = History(path)
    past.add_run(run(done=1))
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    past.add_run(run(done=2))
    assert [r.bytes_done for r in past.runs()] == [2]


def test_tables_dropped_while_open(path: Path) -> None:
    past = History(path)
    past.add_run(run())
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE runs")
    past.add_run(run(done=2))
    assert [r.bytes_done for r in past.runs()] == [2]


def test_replaced_by_garbage_while_open(path: Path) -> None:
    past = History(path)
    past.add_run(run())
    other = path.with_name("other")
    other.write_bytes(b"\0" * 100 + b"rubbish" * 1000)
    other.rename(path)
    past.add_run(run(done=2))
    # What the write-ahead log has in full may come back; what counts is that writing goes on.
    assert past.runs()[0].bytes_done == 2
    past.close()
    assert History(path, thorough=True).runs()[0].bytes_done == 2


def test_what_cannot_be_written_is_logged_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    past = History(tmp_path / "file" / "history.sqlite")  # its directory is a file
    with caplog.at_level(logging.WARNING):
        past.add_run(run())
    assert "history unavailable" in caplog.text
    assert past.runs() == []
    assert past.summary("vms", "tank:vm-1", "prox2:backup") is None
    assert past.prune() == 0

    monkeypatch.setattr(history, "BUSY_TIMEOUT", 0.05)
    locked = History(tmp_path / "history.sqlite")
    locked.add_run(run())
    other = sqlite3.connect(tmp_path / "history.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    locked.close()
    locked.add_run(run())
    other.rollback()
    other.close()
    locked.add_run(run())
    assert len(locked.runs()) == 2
    assert aside(tmp_path / "history.sqlite") == []


def test_many_threads_and_two_processes_worth_of_connections(path: Path) -> None:
    writers = [History(path), History(path)]

    def write(past: History) -> None:
        for _ in range(50):
            past.add_run(run())

    threads = [threading.Thread(target=write, args=(writers[n % 2],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(History(path).runs(limit=1000)) == 300
