"""Replicator on several guests: one cluster, a daemon on each, ZFS storages; driven by its command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.lab import deploy
from tests.lab.guests import Background, CommandFailed, Done, LabError, Node

CONFIG = "/etc/replicator/replicator.toml"
LOG = "/root/replicator.log"
PORT = 8571
LOOK_AGAIN = 1.5
"""Seconds: each look is eight processes in the guest."""
START_SECONDS = 120
"""Until a daemon answers: Python starts slowly under emulation."""


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

    def json(self, *arguments: str, timeout: float = 600) -> Any:
        """What a command says with ``--json``, whatever its exit status."""
        done = self.cli(*arguments, "--json", timeout=timeout, check=False)
        try:
            return json.loads(done.out)
        except ValueError:
            raise LabError(f"{self.name}: replicator {' '.join(arguments)} gave no JSON", done.out + done.err) from None

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
        until(lambda: self.cli("status", check=False).status in (0, 3), START_SECONDS, self.said)

    def stop(self, signal_name: str = "TERM") -> None:
        """End the daemon."""
        if self.daemon is not None:
            self.daemon.stop(signal_name, timeout=60)
            self.daemon = None

    def said(self) -> str:
        """The end of the daemon's log."""
        return self.node.run("tail", "-n", "40", LOG, check=False).out

    def zfs(self, *arguments: str, timeout: float = 120) -> str:
        """What a zfs command prints."""
        return self.node.run("zfs", *arguments, timeout=timeout).out


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
