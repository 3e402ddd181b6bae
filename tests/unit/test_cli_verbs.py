"""Every verb: what it asks of Control, what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from rich.cells import cell_len

from replicator import errors
from replicator.cli import output
from replicator.cli.main import SECTIONS, main
from replicator.cli.output import DONE, FAILED, MISSED, USAGE
from replicator.control import (
    Finding,
    HistoryEntry,
    Level,
    Note,
    Orphan,
    OrphanReport,
    PlannedReplica,
    PlannedStep,
    PruneReport,
    Range,
    Restored,
    ResyncPreview,
    RunReport,
    SideSnapshots,
    Status,
)
from replicator.endpoint import PruneOutcome
from replicator.errors import Problem
from replicator.model import Lineage, Role, Version, VersionKind, snapshot_name
from replicator.verification import Method, Mismatch, Resync, Verification
from tests.support.cli import Terminal, terminal
from tests.support.versions import LINEAGE

__all__ = ["terminal"]

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
VOLUME, TARGET = "images:vm-100", "prox2:backup"


def version(number: int, *, holds: tuple[str, ...] = (), kind: VersionKind = VersionKind.SNAPSHOT) -> Version:
    moment = NOW - timedelta(minutes=10 - number)
    return Version(snapshot_name("vms", moment), f"guid-{number}", moment, number, kind, 1 << 30, holds)


def report(outcome: str = "ok", **changes: Any) -> RunReport:
    return RunReport("vms", VOLUME, TARGET, outcome, 1.2, 1, 38 << 20, 21 << 20, **changes)


def verification(differing: int = 0, *, repaired: bool = False) -> Verification:
    ranges = (Range(65536, 65536),) * (differing // 65536)
    aside = "diverged-x" if repaired else ""
    return Verification(VOLUME, TARGET, "snap", 1 << 30, differing, ranges[:3], len(ranges), repaired, aside)


PREVIEW = ResyncPreview(VOLUME, TARGET, ("live data is moved into a snapshot diverged-<time>",))
RESYNC = Resync(VOLUME, TARGET, "snap", 1 << 30, 192 << 10, 90 << 10, ("diverged-1",))
GOING = PruneReport(
    "prox1", VOLUME, (PruneOutcome(version(1), False, "beyond last=3"), PruneOutcome(version(2), True, "last=3"))
)

EVERY: dict[str, tuple[tuple[str, ...], Any, int]] = {
    "status": (("status",), Status("prox1", "1", True, NOW, ()), DONE),
    "plan": (("plan", "vms"), (PlannedReplica("vms", VOLUME, TARGET, ()),), DONE),
    "sync": (("sync", "vms"), (report(),), DONE),
    "resync": (("resync", VOLUME, "--yes"), (RESYNC,), DONE),
    "verify": (("verify", VOLUME), (verification(),), DONE),
    "snapshots": (("snapshots", VOLUME), (SideSnapshots("prox1", VOLUME, "primary", 1, (version(1),)),), DONE),
    "prune": (("prune", "vms", "--yes"), (GOING,), DONE),
    "history": (("history",), (HistoryEntry(NOW, "run", "vms", VOLUME, TARGET, "ok", 1.0, 5, 5),), DONE),
    "pause": (("pause", "vms"), None, DONE),
    "resume": (("resume", "vms"), None, DONE),
    "restore": (("restore", f"{VOLUME}@snap", "--to", "a:new"), Restored("a:new", "snap", "prox2", 5, 0), DONE),
    "check": (("check",), (Finding("storage images", Level.OK, "reflink copies"),), DONE),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_verb_ends_with_its_code(terminal: Terminal, name: str) -> None:
    words, answer, code = EVERY[name]
    terminal.control.answers[name] = answer
    result = terminal.run(*words)
    assert result.exit_code == code, result.output
    assert result.stdout.strip()
    assert name in [call[0] for call in terminal.control.calls]


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"pause", "resume"}))
def test_every_verb_has_the_same_facts_as_json(terminal: Terminal, name: str) -> None:
    words, answer, code = EVERY[name]
    terminal.control.answers[name] = answer
    result = terminal.run(*words, "--json")
    assert result.exit_code == code
    json.loads(result.stdout)


ERRORS = [
    (errors.NoSuchVolume("there is no volume", hint="see status"), FAILED),
    (errors.ConfigError("wrong", hint="correct it"), USAGE),
    (errors.UsageError("what?", hint="like this"), USAGE),
    (errors.PeerUnreachable("no answer", hint="start it"), FAILED),
    (errors.Cancelled("stopped", hint="it continues"), FAILED),
    (errors.MissingBinding("needs python3-rbd", hint="apt install python3-rbd"), USAGE),
]


@pytest.mark.parametrize("name", sorted(EVERY))
@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: getattr(value, "code", value))
def test_every_error_is_told_calmly(terminal: Terminal, name: str, error: errors.ReplicatorError, code: int) -> None:
    terminal.control.answers[name] = error
    result = terminal.run(*EVERY[name][0])
    assert result.exit_code == code
    assert f"error: {error}\nhint: {error.hint}\n" in result.stderr
    assert "Traceback" not in result.output


def test_a_mistake_in_the_program_shows_no_traceback(terminal: Terminal) -> None:
    terminal.control.answers["status"] = KeyError("oops")
    result = terminal.run("status")
    assert result.exit_code == FAILED
    assert "internal error: KeyError: 'oops'" in result.stderr
    assert "--debug" in result.stderr
    for words in (("--debug", "status"), ("status", "--debug")):
        assert isinstance(terminal.run(*words).exception, KeyError)


def test_all_problems_of_a_configuration_are_told(terminal: Terminal) -> None:
    problems = (Problem("r.toml", "job.a.keep", "is wrong", "write last=3"), Problem("r.toml", "", "is odd", ""))
    terminal.control.answers["check"] = errors.ConfigError(
        "r.toml has 2 problems:\n  a\n  b", hint="correct them all", problems=problems
    )
    result = terminal.run("check")
    assert result.exit_code == USAGE
    assert result.stderr.splitlines() == [
        "error: r.toml has 2 problems:",
        "  r.toml: job.a.keep: is wrong",
        "    write last=3",
        "  r.toml: is odd",
        "hint: correct them all",
    ]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("statsu",), "did you mean `replicator status`?"),
        (("elevate", "x"), "there is no verb 'elevate'"),
        (("switchover", "a:b"), "missing option '--to'"),
        (("rejoin", "a:b"), "missing option '--from'"),
        (("sync",), "missing argument 'JOB'"),
        (("sync", "a", "b"), "unexpected extra argument"),
        (("status", "--wat"), "no such option"),
        (("restore", "a:b@c"), "missing option '--to'"),
        (("history", "--limit", "0"), "invalid value"),
        (("cluster", "promote"), "no such command"),
        ((), "Usage: replicator"),
        (("cluster",), "Usage: replicator cluster"),
    ],
)
def test_wrong_usage_is_two(terminal: Terminal, words: tuple[str, ...], part: str) -> None:
    result = terminal.run(*words)
    assert result.exit_code == USAGE
    assert part in result.stderr
    assert result.stdout == ""


def _all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(main)
    for name in main.list_commands(context):
        found.append((name,))
        command = main.get_command(context, name)
        if isinstance(command, click.Group):
            found += [(name, sub) for sub in command.list_commands(context)]
    return found


@pytest.mark.parametrize("words", _all_commands(), ids=" ".join)
def test_every_verb_has_help_with_an_example(terminal: Terminal, words: tuple[str, ...]) -> None:
    result = terminal.run(*words, "--help")
    assert result.exit_code == DONE
    assert "Example" in result.stdout
    assert f"replicator {words[0]}" in result.stdout
    assert all(cell_len(line) <= 110 for line in result.stdout.splitlines())


def test_help_lists_every_verb() -> None:
    names = [entry.name for _, entries in SECTIONS for entry in entries]
    assert len(set(names)) == len(names)
    assert {
        "init", "cluster", "check", "serve", "status", "plan", "sync", "resync", "verify", "snapshots", "prune",
        "history", "pause", "resume", "restore", "export", "import", "demo", "promote", "demote", "switchover",
        "rejoin", "health", "monitoring", "config",
    } == set(names)  # fmt: skip


def test_help_loads_nothing_that_it_does_not_need() -> None:
    code = (
        "import sys\nfrom replicator.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'rich', 'pydantic', 'fastapi', 'httpx', 'sqlalchemy', 'cryptography'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Replicate:" in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_terminal_and_no_reader_end_it_badly(encoding: str, tmp_path: Path) -> None:
    """A terminal that lacks letters, and a reader that has seen enough (`| head`)."""
    config = tmp_path / "nöne.toml"
    argv = [sys.executable, "-m", "replicator.cli.main", "--config", str(config)]
    environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*argv, "status"], capture_output=True, timeout=60, check=False, env=environment)
    assert done.returncode == USAGE
    assert b"error: " in done.stderr
    assert b"Traceback" not in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [*argv, "--help"], stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False, env=environment
        )
    assert done.returncode == FAILED
    assert done.stderr == b""


# -- what each says


def test_sync_fails_if_any_replica_did(terminal: Terminal) -> None:
    for outcome, code in (("ok", DONE), ("skipped", DONE), ("failed", FAILED), ("conflict", FAILED), ("cancelled", 1)):
        terminal.control.answers["sync"] = (report(), report(outcome, message="the cause", hint="the remedy"))
        result = terminal.run("sync", "vms", "--volume", VOLUME, "--target", TARGET)
        assert result.exit_code == code
        assert "the cause" in result.stdout
        assert "hint: the remedy" in result.stdout
    assert terminal.control.calls[-1] == ("sync", "vms", VOLUME, TARGET)
    assert "76.0 MiB of changes, 42.0 MiB sent" in result.stdout


def test_long_work_keeps_results_on_stdout(terminal: Terminal) -> None:
    terminal.control.happenings = (Note("comparing things"), report())
    terminal.control.answers["sync"] = (report(),)
    result = terminal.run("sync", "vms")
    assert "comparing things" in result.stderr
    assert "working alone" in result.stderr
    assert "comparing things" not in result.stdout


@pytest.mark.parametrize("method", [Method.SCRUB, Method.BLOCKS])
def test_verify_says_what_an_equal_one_does_not_end(terminal: Terminal, method: Method) -> None:
    terminal.control.answers["verify"] = (
        replace(verification(), method=method, standing=(Mismatch("older", 65536, "guid"),)),
    )
    result = terminal.run("verify", VOLUME)
    assert result.exit_code == MISSED
    assert "That does not end what was found before: the replica differs from its source: 64.0 KiB of older." in (
        " ".join(result.stdout.split())
    )
    assert f"replicator verify {VOLUME} --target {TARGET} --snapshot older --repair" in " ".join(result.stdout.split())


def test_verify_says_what_differs_and_how_to_mend_it(terminal: Terminal) -> None:
    terminal.control.answers["verify"] = (verification(), verification(5 * 65536))
    result = terminal.run("verify", VOLUME)
    assert result.exit_code == MISSED
    assert "equal. All 1.00 GiB of snap were read and compared on both sides." in result.stdout
    assert "320 KiB of 1.00 GiB differ, in 5 ranges" in result.stdout
    assert "65536" in result.stdout
    assert f"replicator verify {VOLUME} --target {TARGET} --repair" in result.stdout
    terminal.control.answers["verify"] = (verification(65536, repaired=True),)
    result = terminal.run("verify", VOLUME, "--repair", "--yes", "--snapshot", "snap", "--target", TARGET)
    assert result.exit_code == DONE
    assert "kept as diverged-x" in result.stdout
    assert terminal.control.calls[-1] == ("verify", VOLUME, TARGET, "snap", True, False)


@pytest.mark.parametrize(
    "words", [("resync", VOLUME), ("verify", VOLUME, "--repair"), ("prune", "vms")], ids=lambda words: words[0]
)
def test_consent_is_asked_for_and_never_assumed(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    terminal.control.answers |= {
        "preview_resync": (PREVIEW,), "resync": (RESYNC,), "verify": (verification(),), "prune": (GOING,)
    }  # fmt: skip

    def changes() -> list[tuple[Any, ...]]:
        done = [
            call for call in terminal.control.calls if call[0] != "preview_resync" and call != ("prune", "vms", True)
        ]
        terminal.control.calls.clear()
        return done

    result = terminal.run(*words)
    assert result.exit_code == USAGE
    assert "add --yes" in result.stderr
    assert changes() == []
    monkeypatch.setattr(output, "interactive", lambda: True)
    result = terminal.run(*words, answer="n\n")
    assert result.exit_code == FAILED
    assert changes() == []
    result = terminal.run(*words, answer="y\n")
    assert result.exit_code == DONE
    assert len(changes()) == 1
    result = terminal.run(*words, "--yes")
    assert result.exit_code == DONE
    assert len(changes()) == 1


def test_resync_says_first_what_it_will_do(terminal: Terminal) -> None:
    terminal.control.answers |= {"preview_resync": (PREVIEW,), "resync": (RESYNC,)}
    result = terminal.run("resync", VOLUME, "--target", TARGET, "--yes")
    assert "- live data is moved into a snapshot diverged-<time>" in result.stderr
    assert "1.00 GiB compared, 192 KiB replaced, 90.0 KiB sent" in result.stdout
    assert "kept there as diverged-1" in result.stdout


def test_prune_shows_reasons_and_can_only_look(terminal: Terminal) -> None:
    terminal.control.answers["prune"] = (GOING,)
    result = terminal.run("prune", "vms", "--dry-run")
    assert result.exit_code == DONE
    assert "beyond last=3" in result.stdout
    assert "1 would be destroyed, 1 kept" in result.stdout
    assert terminal.control.calls == [("prune", "vms", True)]
    terminal.control.answers["prune"] = (PruneReport("prox1", VOLUME, ()),)
    assert terminal.run("prune", "vms").exit_code == DONE  # nothing to destroy, so nothing to ask


def test_prune_fails_if_something_stays_that_should_go(terminal: Terminal) -> None:
    held = PruneReport("prox2", VOLUME, (PruneOutcome(version(1), False, "beyond last=3", "it is held"),))
    for reports in ((held,), (PruneReport("prox3", VOLUME, (), "cannot reach prox3"),)):
        terminal.control.answers["prune"] = reports
        result = terminal.run("prune", "vms", "--yes")
        assert result.exit_code == FAILED
    assert "cannot reach prox3" in result.stdout


def test_replicas_without_sources_are_removed_on_request(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("prune", "vms", "--orphans")
    orphan = Orphan("vms", "images:old", TARGET, "backup:prox1/old")
    going = OrphanReport(orphan, Lineage(LINEAGE, Role.REPLICA, 1), 1 << 30, (version(1), version(2)))
    stays = replace(going, orphan=replace(orphan, replica="backup:prox1/x"), kept="somebody wrote to it")
    terminal.control.answers |= {"orphans": (going, stays), "remove_orphans": (replace(going, gone=True),)}
    result = terminal.run(*words, "--dry-run")
    assert result.exit_code == DONE
    shown = " ".join(result.stdout.split())
    assert "prox2/backup:prox1/old" in shown
    assert "1.00 GiB 2" in shown
    assert "somebody wrote to it" in shown
    result = terminal.run(*words)
    assert result.exit_code == USAGE
    assert "add --yes" in result.stderr
    monkeypatch.setattr(output, "interactive", lambda: True)
    assert terminal.run(*words, answer="n\n").exit_code == FAILED
    assert {call[0] for call in terminal.control.calls} == {"orphans"}
    result = terminal.run(*words, answer="y\n")
    assert result.exit_code == DONE
    assert "1 removed, 1 kept" in result.stdout
    assert terminal.control.calls[-1] == ("remove_orphans", "vms", (going,))
    told = json.loads(terminal.run(*words, "--yes", "--json").stdout)
    assert [each["gone"] for each in told] == [True]
    terminal.control.answers["remove_orphans"] = (replace(going, kept="it is held"),)
    result = terminal.run(*words, "--yes")
    assert result.exit_code == FAILED
    assert "it is held" in result.stdout
    terminal.control.answers["orphans"] = ()
    result = terminal.run(*words, "--yes")
    assert result.exit_code == DONE
    assert "has no replicas whose sources are gone" in result.stdout


def test_plan_shows_steps_prunes_and_conflicts(terminal: Terminal) -> None:
    going = (PruneOutcome(version(1), False, "beyond last=3"), PruneOutcome(version(2), True, "last=3"))
    steps = (PlannedStep(None, version(2).name, 10 << 30), PlannedStep(version(2).name, version(3).name, None, 1 << 20))
    terminal.control.answers["plan"] = (
        PlannedReplica("vms", VOLUME, TARGET, steps, going, (), ("first takes a snapshot",)),
        PlannedReplica("vms", "images:vm-101", TARGET, (), conflict="it has diverged", hint="replicator resync it"),
        PlannedReplica("vms", "images:vm-102", TARGET, ()),
    )
    for columns in (80, 120):
        result = terminal.run("plan", columns=columns)
        assert result.exit_code == MISSED
        for part in (
            "first takes a snapshot", version(3).name, f"changes since {version(2).name}", "continued at 1.00 MiB",
            "10.0 GiB", "not known", "beyond last=3", "stopped: it has diverged", "hint: replicator resync it",
            "nothing to send", "3 replicas: 2 transfers of at least 10.0 GiB, 1 snapshot pruned, 1 stopped",
        ):  # fmt: skip
            assert part in result.stdout, part
    assert terminal.control.calls == [("plan", None)] * 2


def test_snapshots_of_all_sides_stand_side_by_side(terminal: Terminal) -> None:
    tag = "replicator:vms:prox2:backup"
    here = SideSnapshots(
        "prox1", VOLUME, "primary", 1, (version(2, kind=VersionKind.BOOKMARK), version(3, holds=(tag,)))
    )
    renamed = Version("renamed", "guid-3", version(3).created, 9)
    there = SideSnapshots(
        "prox2", "backup:prox1/vm-100", "replica", 1, (version(1), version(2), renamed), "x at byte 7"
    )
    away = SideSnapshots("prox3", "backup:prox1/vm-100", "", None, None, message="cannot reach prox3")
    gone = SideSnapshots("prox4", "backup:prox1/vm-100", "", None, None)
    terminal.control.answers["snapshots"] = (here, there, away, gone)
    result = terminal.run("snapshots", VOLUME)
    rows = {line.split()[0]: line.split()[3:] for line in result.stdout.splitlines() if line.startswith("replicator_")}
    assert rows[version(1).name] == ["-", "yes", "-", "-"]
    assert rows[version(2).name] == ["bookmark", "yes", "-", "-"]
    assert rows[version(3).name] == ["yes,", "held", "yes", "-", "-"]
    for part in (
        "as renamed", "is held by job vms for prox2:backup", "half received: x at byte 7", "cannot reach prox3",
        "could not be asked", "does not exist", "replica, epoch 1, 3 snapshots", "1 snapshot, 1 bookmark",
    ):  # fmt: skip
        assert part in result.stdout, part


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", ["snapshots", "history", "prune", "sync", "check"])
def test_long_names_fit(terminal: Terminal, name: str, columns: int) -> None:
    long = "images:customers/" + "虚拟机-disk-" * 6
    answers: dict[str, Any] = {
        "snapshots": (SideSnapshots("prox1", long, "primary", 1, (version(1),)),) * 2,
        "history": (HistoryEntry(NOW, "run", "vms", long, TARGET, "failed", 1.0, 5, 5, "a long cause " * 9),),
        "prune": (PruneReport("prox1", long, (PruneOutcome(version(1), False, "a reason " * 9),)),),
        "sync": (RunReport("vms", long, TARGET, "ok", 1.2, 1, 38 << 20, 21 << 20),),
        "check": (Finding(f"storage {long}", Level.FAILED, "a cause " * 20, "a remedy " * 20),),
    }
    terminal.control.answers[name] = answers[name]
    words = {"snapshots": (VOLUME,), "prune": ("vms", "--dry-run"), "sync": ("vms",)}.get(name, ())
    result = terminal.run(name, *words, columns=columns)
    table = result.stdout.split("\n\n")[0] if name == "snapshots" else result.stdout
    assert all(cell_len(line.rstrip()) <= columns for line in table.splitlines())
    assert "…" not in result.stdout


def test_check_ends_by_the_worst_finding(terminal: Terminal) -> None:
    for level, code, words in (
        (Level.OK, DONE, "All is well."),
        (Level.WARNING, DONE, "1 warning."),
        (Level.FAILED, FAILED, "1 thing must be put right"),
    ):
        terminal.control.answers["check"] = (Finding("a", Level.OK, "fine"), Finding("b", level, "so", "do that"))
        result = terminal.run("check")
        assert result.exit_code == code
        assert words in result.stdout
        assert "hint: do that" in result.stdout


def test_history_passes_its_limit(terminal: Terminal) -> None:
    assert "Nothing has happened yet." in terminal.run("history", "--limit", "7").stdout
    assert terminal.control.calls == [("history", 7)]


def test_restore_says_what_is_there_now(terminal: Terminal) -> None:
    terminal.control.answers["restore"] = Restored("images:new", "snap", "prox2", 1 << 30, 5 << 20)
    result = terminal.run("restore", f"{VOLUME}@snap", "--to", "images:new")
    assert result.stdout == "images:new is there, 1.00 GiB: snapshot snap of node prox2; 5.00 MiB copied.\n"
    assert terminal.control.calls == [("restore", f"{VOLUME}@snap", "images:new")]
