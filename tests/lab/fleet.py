"""Replicator on several guests: one cluster, a daemon on each, ZFS storages.

The daemons are asked from this host, through their sockets, as the command line asks them: to start Python and import
that command line takes a guest a second and more.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from replicator.cancellation import Cancellation
from replicator.client import DaemonClient, Timeouts
from replicator.control import RunReport
from replicator.errors import ReplicatorError
from tests.lab import deploy
from tests.lab.guests import Background, CommandFailed, Done, LabError, Node

CONFIG = "/etc/replicator/replicator.toml"
LOG = "/root/replicator.log"
SOCKET = "/var/lib/replicator/replicator.sock"
PORT = 8571
LOOK_AGAIN = 1.5
"""Seconds: each look is eight processes in the guest."""
ANSWER_SECONDS = 30
SILENCE_SECONDS = 60
START_SECONDS = 300
"""Until a daemon answers: Python starts slowly in a guest, and much slower beside other guests."""


@dataclass
class Member:
    """A guest with the program on it.

    :ivar tables: TOML that follows ``[node]`` and ``[network]``: storages, peers' rights, jobs
    """

    node: Node
    tables: str
    rights: str = ""
    daemon: Background | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.node.name

    def cli(self, *arguments: str, timeout: float = 600, check: bool = True) -> Done:
        """A command of the program."""
        return self.node.run("replicator", *arguments, timeout=timeout, check=check)

    def client(self) -> DaemonClient:
        """Its daemon, to be asked from here; close it. Lasts until the guest crashes."""
        return client_of(self.node)

    def sync(self, job: str) -> tuple[RunReport, ...]:
        """Run a job and wait for it. :raises ReplicatorError: it could not be run"""
        with self.client() as client:
            return client.sync(job, None, None, lambda _: None, Cancellation())

    def begin(self, job: str) -> Run:
        """Let a job run."""
        return Run(self, job)

    def configure(self, others: list[Member]) -> None:
        """Write its configuration."""
        peers = "".join(
            f'[peer.{other.name}]\naddress = "{other.node.address()}:{PORT}"\n{self.rights}\n' for other in others
        )
        self.node.write(
            CONFIG,
            f'[node]\nname = "{self.name}"\n[network]\ncluster = "10.99.0.0/24"\n'
            f'listen = "{self.node.address()}:{PORT}"\n{peers}{self.tables}',
        )

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        self.daemon = self.node.start("replicator", "serve", log=LOG)
        until(self._answers, START_SECONDS, self.said)

    def _answers(self) -> bool:
        with suppress(ReplicatorError), self.client() as client:
            client.status()
            return True
        return False

    def stop(self, signal_name: str = "TERM") -> None:
        """End the daemon."""
        if self.daemon is not None:
            self.daemon.stop(signal_name, timeout=START_SECONDS)
            self.daemon = None

    def said(self) -> str:
        """The end of the daemon's log."""
        return self.node.run("tail", "-n", "40", LOG, check=False).out

    def zfs(self, *arguments: str, timeout: float = 120) -> str:
        """What a zfs command prints."""
        return self.node.run("zfs", *arguments, timeout=timeout).out


def client_of(node: Node, silence: float = SILENCE_SECONDS) -> DaemonClient:
    """The daemon of a guest, to be asked from here; close it. Lasts until the guest crashes."""
    folder = node.lab.folder / node.name
    path = next(path for n in itertools.count() if not (path := folder / f"daemon-{n}").exists())
    node.forward(path, SOCKET)
    return DaemonClient(path, timeouts=Timeouts(connect=ANSWER_SECONDS, silence=silence))


class Run:
    """A job that was asked for, running."""

    def __init__(self, member: Member, job: str) -> None:
        self._member = member
        self._job = job
        self._told = "it has not ended"
        self._thread = threading.Thread(target=self._run, name=f"run-{member.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._told = described(self._member.sync(self._job))
        except (ReplicatorError, LabError) as error:
            self._told = str(error)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def said(self) -> str:
        """How it ended."""
        return self._told


def described(reports: Sequence[RunReport]) -> str:
    """What came of a run, a line for each replica."""
    return "\n".join(f"{r.volume} -> {r.target}: {r.outcome} {r.message} {r.hint}" for r in reports)


def until(holds: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Look again and again until something holds. :raises LabError: not within ``seconds``; with what ``told`` says"""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except CommandFailed:
            pass
        if time.monotonic() > deadline:
            raise LabError(f"not within {seconds:g} s", told())
        time.sleep(LOOK_AGAIN)


def make_cluster(members: list[Member]) -> None:
    """Put the program on all of them, make the first one's cluster, let the others join, start all daemons."""
    for member in members:
        deploy.deploy(member.node)
        member.node.run("rm", "-rf", "/var/lib/replicator", "/etc/replicator")
        member.configure([other for other in members if other is not member])
    first, *others = members
    first.cli("cluster", "create")
    first.start()
    for other in others:
        token = first.cli("cluster", "invite", other.name).out.strip()
        other.cli("cluster", "join", token)
        other.start()
