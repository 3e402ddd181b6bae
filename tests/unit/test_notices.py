"""Notices: told once per change, of all in one message, rate-limited, over restarts; by command and by real SMTP."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import config, notices
from replicator.control import ReplicaStatus, State, Status
from replicator.errors import ConfigError, HookFailed
from replicator.model import Progress
from replicator.notices import Condition, changes, compose, condition
from replicator.notifying import Notifier, send
from replicator.settings import Notify
from replicator.tracker import ReplicaKey
from tests.support import values

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)


def row(state: State = State.OK, volume: str = "images:a", **changes: Any) -> ReplicaStatus:
    facts: dict[str, Any] = {
        "job": "vms", "target": "prox2:backup", "lag": 5.0, "objective": 60.0, "last_sync": NOW, "next_sync": NOW,
        "duration": 1.0, "done": 1, "sent": 1, "failures": 0,
    }  # fmt: skip
    return ReplicaStatus(volume=volume, state=state, **(facts | changes))


def status(*rows: ReplicaStatus) -> Status:
    return Status("prox1", "0.1.0", True, NOW, rows)


RUNNING = Progress("images:a", "prox2:backup", "", 1, 2, 1, 1.0, NOW)


@pytest.mark.parametrize(
    ("found", "before", "now"),
    [
        (row(), Condition.FAILED, Condition.WELL),
        (row(State.FAILED), Condition.WELL, Condition.FAILED),
        (row(State.FAILED, lag=61.0), Condition.FAILED, Condition.LAGGING),
        (row(State.FAILED, lag=None), Condition.WELL, Condition.FAILED),
        (row(State.NEVER, lag=None), Condition.WELL, Condition.WELL),
        (row(State.CONFLICT, differing=4), Condition.WELL, Condition.CONFLICT),
        (row(differing=4), Condition.WELL, Condition.DIFFERS),
        (row(State.LAGGING, lag=61.0), Condition.WELL, Condition.LAGGING),
        (row(State.PAUSED), Condition.WELL, Condition.WELL),
        (row(State.RUNNING, progress=RUNNING), Condition.FAILED, Condition.FAILED),
        (row(State.RUNNING, progress=RUNNING), Condition.CONFLICT, Condition.CONFLICT),
        (row(State.RUNNING, progress=RUNNING), Condition.LAGGING, Condition.WELL),
        (row(State.RUNNING, progress=RUNNING, lag=61.0), Condition.WELL, Condition.LAGGING),
    ],
)
def test_how_a_replica_is(found: ReplicaStatus, before: Condition, now: Condition) -> None:
    assert condition(found, before) is now


def test_one_message_has_all_changes_what_is_bad_first() -> None:
    bad = row(State.FAILED, "images:b", message="no route", hint="start it")
    found = changes(status(row(), bad), {ReplicaKey("vms", "images:a", "prox2:backup"): Condition.LAGGING})
    message = compose("prox1", found)
    assert message.subject == "replicator on prox1: 1 bad, 1 recovered"
    assert message.text == (
        "images:b to prox2:backup (job vms) failed\n  5 s behind, 1 min allowed\n  no route\n  hint: start it\n"
        "images:a to prox2:backup (job vms) recovered\n  5 s behind, 1 min allowed\n"
    )
    assert compose("prox1", found[:1]).subject == "replicator on prox1: images:a to prox2:backup recovered"
    many = changes(status(*(row(State.CONFLICT, f"images:{n}") for n in range(60))), {})
    assert compose("prox1", many).text.endswith("... and 10 more: replicator status\n")


@given(st.lists(values.of(ReplicaStatus), min_size=1, max_size=4))
def test_a_subject_is_one_line_whatever_names_there_are(rows: list[ReplicaStatus]) -> None:
    found = changes(status(*rows), {})
    if found:
        message = compose("prox1", found)
        assert message.subject.isprintable()
        letter = EmailMessage()
        letter["Subject"] = message.subject


# -- when


@dataclass
class World:
    """A notifier whose command writes into a file, and a clock."""

    folder: Path
    rows: tuple[ReplicaStatus, ...] = ()
    now: float = 0.0
    script: str = 'printf "%s\\n" "$REPLICATOR_SUBJECT" >> "$1"; cat >> "$1.text"'
    notifier: Notifier = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        command = ["sh", "-c", self.script, "sh", str(self.folder / "told")]
        settings = Notify.model_validate({"command": command, "every": "10min"})
        self.notifier = Notifier(settings, "prox1", lambda: status(*self.rows), self.folder, clock=lambda: self.now)

    def look(self, *rows: ReplicaStatus, at: float) -> list[str]:
        """What was told then."""
        path = self.folder / "told"
        before = path.read_text().splitlines() if path.exists() else []
        self.rows, self.now = rows, at
        self.notifier.look()
        after = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix("replicator on prox1: ") for line in after[len(before) :]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FAILED = "images:a to prox2:backup failed"
RECOVERED = "images:a to prox2:backup recovered"


def test_a_change_is_told_once(world: World) -> None:
    assert world.look(row(), at=0) == []
    assert world.look(row(State.FAILED, failures=1), at=5) == [FAILED]
    for minutes in range(1, 60, 7):
        assert world.look(row(State.FAILED, failures=minutes), at=minutes * 60) == []
    assert world.look(row(), at=4000) == [RECOVERED]
    assert world.look(row(), at=9000) == []


def test_not_more_often_than_that_and_what_passed_meanwhile_is_not_told(world: World) -> None:
    assert world.look(row(State.FAILED), at=0) == [FAILED]
    assert world.look(row(), at=60) == []
    assert world.look(row(State.FAILED), at=300) == []
    assert world.look(row(State.FAILED), at=601) == [], "it is as people know it"
    assert world.look(row(), row(State.CONFLICT, "images:b"), at=660) == ["1 bad, 1 recovered"]
    assert world.look(row(State.FAILED), row(State.CONFLICT, "images:b"), at=700) == []
    assert world.look(row(State.FAILED), row(State.CONFLICT, "images:b"), at=1260) == [FAILED]


def test_what_was_told_outlives_a_restart(world: World) -> None:
    assert world.look(row(State.FAILED), at=0) == [FAILED]
    world.restart()
    assert world.look(row(State.FAILED), at=6000) == []
    assert world.look(row(), at=7000) == [RECOVERED]
    world.restart()
    assert world.look(row(), at=8000) == []
    (world.folder / notices.FILE_NAME).write_text('[["a", 1]]')
    world.restart()
    assert world.look(row(State.FAILED), at=9000) == [FAILED]


def test_what_could_not_be_sent_is_tried_again_later(world: World) -> None:
    world.script = "exit 1"
    world.restart()
    with pytest.raises(HookFailed, match="ended with status 1"):
        world.look(row(State.FAILED), at=0)
    assert world.look(row(State.FAILED), at=10) == [], "not at once"
    with pytest.raises(HookFailed):
        world.look(row(State.FAILED), at=601)


def test_a_replica_that_is_no_longer_replicated_is_forgotten(world: World) -> None:
    assert world.look(row(State.FAILED), at=0) == [FAILED]
    assert world.look(row(volume="images:b"), row(State.FAILED, "images:c"), at=700) == [FAILED.replace(":a", ":c")]
    assert set(notices.load(world.folder / notices.FILE_NAME)) == {ReplicaKey("vms", "images:c", "prox2:backup")}


def test_the_command_gets_the_text(world: World) -> None:
    long = "x" * 300_000
    world.look(row(State.FAILED, message=long), at=0)
    assert long in (world.folder / "told.text").read_text()


# -- mail


class Mailbox(socketserver.ThreadingTCPServer):
    """A mail server that takes everything (RFC 5321)."""

    allow_reuse_address = True

    def __init__(self, refuse: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.refuse = refuse
        self.letters: list[tuple[list[str], bytes]] = []


class _Session(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        box = cast(Mailbox, self.server)
        self.wfile.write(b"220 here\r\n")
        to: list[str] = []
        for line in self.rfile:
            word = line.split()[0].upper()
            if word == b"RCPT":
                to.append(line.decode().strip().partition(":")[2])
                self.wfile.write(b"550 nobody\r\n" if box.refuse else b"250 ok\r\n")
            elif word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                letter = b""
                for part in self.rfile:
                    if part == b".\r\n":
                        break
                    letter += part
                box.letters.append((to, letter))
                self.wfile.write(b"250 ok\r\n")
            elif word == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            else:
                self.wfile.write(b"250 ok\r\n")


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with Mailbox() as box:
        thread = threading.Thread(target=box.serve_forever, daemon=True)
        thread.start()
        yield box
        box.shutdown()


def by_mail(box: Mailbox, **more: Any) -> Notify:
    smtp = {
        "server": f"127.0.0.1:{box.server_address[1]}", "sender": "replicator@prox1", "tls": "none",
        "to": ["admin@example.org", "night@example.org"],
    }  # fmt: skip
    return Notify.model_validate({"smtp": smtp, "timeout": "5s", **more})


def test_mail(mailbox: Mailbox) -> None:
    found = changes(status(row(State.FAILED, "images:虚拟机", message="ü")), {})
    send(by_mail(mailbox), "prox1", compose("prox1", found))
    ((to, letter),) = mailbox.letters
    assert to == ["<admin@example.org>", "<night@example.org>"]
    read = message_from_bytes(letter, policy=policy.default)
    assert read["Subject"] == "replicator on prox1: images:虚拟机 to prox2:backup failed"
    assert read["From"] == "replicator@prox1"
    assert read["Auto-Submitted"] == "auto-generated"
    assert read["Message-ID"]
    assert "  ü\n" in read.get_content().replace("\r\n", "\n")


def test_one_way_that_fails_does_not_keep_the_other_from_being_tried(mailbox: Mailbox, tmp_path: Path) -> None:
    mailbox.refuse = True
    message = compose("prox1", changes(status(row(State.FAILED)), {}))
    with pytest.raises(HookFailed, match=r"mail by 127\.0\.0\.1.*nobody"):
        send(by_mail(mailbox, command=["touch", str(tmp_path / "told")]), "prox1", message)
    assert (tmp_path / "told").exists()
    mailbox.refuse = False
    with pytest.raises(HookFailed, match=r"\[notify\] command ended with status 1"):
        send(by_mail(mailbox, command=["false"]), "prox1", message)
    assert len(mailbox.letters) == 1


def test_tls_is_not_left_out_where_the_server_has_none(mailbox: Mailbox) -> None:
    wanted = by_mail(mailbox)
    assert wanted.smtp is not None
    wanted = wanted.model_copy(update={"smtp": wanted.smtp.model_copy(update={"tls": "starttls"})})
    with pytest.raises(HookFailed, match="STARTTLS"):
        send(wanted, "prox1", compose("prox1", changes(status(row(State.FAILED)), {})))
    assert mailbox.letters == []


# -- settings


CONFIG = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[notify]
"""
SMTP = 'smtp = {server = "mail.example.org:587", sender = "a@b.org", to = ["c@d.org"]'


def test_settings() -> None:
    read = config.parse(CONFIG + f'command = ["mail", "root"]\nevery = "1h"\n{SMTP}}}\n').notify
    assert read is not None
    assert read.smtp is not None
    assert (read.smtp.tls, read.smtp.to) == ("starttls", ("c@d.org",))
    assert config.parse(CONFIG.replace("[notify]", "")).notify is None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "notify"),
        (SMTP + ', user = "x"}', "notify.smtp"),
        (SMTP + ', user = "x", password_file = "/p", tls = "none"}', "notify.smtp.tls"),
        (SMTP.replace(":587", "") + "}", "notify.smtp.server"),
        (SMTP.replace(":587", ":0") + "}", "notify.smtp.server"),
        (SMTP.replace("a@b.org", "a@b.org\\nBcc: x@y.org") + "}", "notify.smtp.sender"),
        (SMTP.replace('["c@d.org"]', "[]") + "}", "notify.smtp.to"),
        ('command = "mail root"', "notify.command"),
        ('command = ["mail"]\nloud = true', "notify.loud"),
    ],
)
def test_what_is_refused(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(CONFIG + text)
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_change_of_nothing_is_none() -> None:
    same = row(State.FAILED)
    told = {ReplicaKey(same.job, same.volume, same.target): Condition.FAILED}
    assert changes(status(same, replace(row(), volume="images:z")), told) == ()
