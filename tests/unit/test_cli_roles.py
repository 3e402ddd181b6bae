"""The verbs that change roles: what they ask for, what they say before they ask, and what they say when it is done."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from replicator.cli.output import DONE, FAILED, MISSED, USAGE
from replicator.control import CopyStatus, RoleOrder, RolePreview, RoleReport, RoleVerb, Status
from replicator.errors import ConflictError
from tests.support.cli import Terminal, terminal

__all__ = ["terminal"]

VOLUME = "backup:prox1/vm-100"
PREVIEW = RolePreview(RoleVerb.PROMOTE, VOLUME, ("it becomes the primary", "prox1 does not answer"))
REPORT = RoleReport(
    RoleVerb.PROMOTE, VOLUME, "prox2", "primary", 1_000_077, "snap-1", age=75.0, beyond="the primary has more",
    aside=("diverged-1",),
)  # fmt: skip


@pytest.fixture(autouse=True)
def answers(terminal: Terminal) -> None:
    terminal.control.answers |= {"preview_role": PREVIEW, "change_role": REPORT}


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (("promote", VOLUME), RoleOrder(RoleVerb.PROMOTE, VOLUME)),
        (
            ("promote", VOLUME, "--force", "--primary-is-down"),
            RoleOrder(RoleVerb.PROMOTE, VOLUME, force=True, primary_is_down=True),
        ),
        (("demote", VOLUME), RoleOrder(RoleVerb.DEMOTE, VOLUME)),
        (("switchover", VOLUME, "--to", "prox2"), RoleOrder(RoleVerb.SWITCHOVER, VOLUME, "prox2")),
        (("rejoin", VOLUME, "--from", "prox2"), RoleOrder(RoleVerb.REJOIN, VOLUME, "prox2")),
    ],
)
def test_what_they_ask_for_and_only_with_consent(terminal: Terminal, words: tuple[str, ...], order: RoleOrder) -> None:
    refused = terminal.run(*words)
    assert refused.exit_code == USAGE
    assert "- it becomes the primary" in refused.stderr
    assert terminal.control.calls == [("preview_role", order)]
    done = terminal.run(*words, "--yes")
    assert done.exit_code == DONE
    assert terminal.control.calls[-1] == ("change_role", order)


def test_a_promotion_says_how_much_is_lost(terminal: Terminal) -> None:
    said = terminal.run("promote", VOLUME, "--yes").stdout
    assert f"prox2/{VOLUME} is a primary now (epoch 1000077), at snap-1." in said
    assert "That is 1 min 15 s old" in said
    assert "The primary has more." in said
    assert "kept here as diverged-1" in said


def test_a_switchover_says_how_long_there_was_no_primary(terminal: Terminal) -> None:
    terminal.control.answers["change_role"] = replace(
        REPORT, verb=RoleVerb.SWITCHOVER, aside=(), without_primary=0.42, beyond=""
    )
    said = terminal.run("switchover", VOLUME, "--to", "prox2", "--yes").stdout
    assert "Nothing is lost. For 0.4 s there was no writable copy." in said


def test_a_rejoin_switches_back_only_when_it_is_told_to(terminal: Terminal) -> None:
    terminal.run("rejoin", VOLUME, "--from", "prox2", "--yes")
    terminal.control.answers["change_role"] = replace(REPORT, verb=RoleVerb.REJOIN, without_primary=0.42, beyond="")
    said = terminal.run("rejoin", VOLUME, "--from", "prox2", "--fail-back", "--yes").stdout
    assert "It was switched back without loss. For 0.4 s there was no writable copy." in said
    orders = [call[1] for call in terminal.control.calls if call[0] == "change_role"]
    assert [order.fail_back for order in orders] == [False, True]


def test_json_has_the_same_facts(terminal: Terminal) -> None:
    found = json.loads(terminal.run("promote", VOLUME, "--yes", "--json").stdout)
    assert (found["verb"], found["epoch"], found["aside"]) == ("promote", 1_000_077, ["diverged-1"])


def test_a_refusal_is_an_error_with_its_way_out(terminal: Terminal) -> None:
    terminal.control.answers["preview_role"] = ConflictError("it has a primary", hint="switch over", kind="x")
    result = terminal.run("promote", VOLUME, "--yes")
    assert result.exit_code == FAILED
    assert "error: it has a primary" in result.stderr
    assert "hint: switch over" in result.stderr
    assert [call[0] for call in terminal.control.calls] == ["preview_role"]


def test_status_shows_copies_whose_roles_were_changed(terminal: Terminal) -> None:
    copies = (CopyStatus(VOLUME, "primary", 1_000_077), CopyStatus("images:quiet", "primary", 1))
    moment = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
    terminal.control.answers["status"] = Status("prox2", "1", True, moment, (), copies=copies)
    shown = terminal.run("status")
    assert shown.exit_code in (DONE, MISSED)
    assert "1000077" in shown.stdout
    assert "images:quiet" not in shown.stdout
    assert len(json.loads(terminal.run("status", "--json").stdout)["copies"]) == 2
