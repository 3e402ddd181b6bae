"""Throw-away Ceph clusters for tests: ``ceph-lab`` with deadlines and typed errors.

::

    with Cluster.up("source") as cluster:
        cluster.run("rbd", "create", "--size", "1G", "vm")
        cluster.crash("osd")
        cluster.start("osd")
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.lab.guests import DeadlinePassed, LabError

SCRIPT = Path(__file__).with_name("ceph-lab")
FOLDER = Path(os.environ.get("LAB_DIR", "/tmp/replicator-lab"))  # noqa: S108 - as the script has it

UP_SECONDS = 240
"""On a busy machine; a quiet one takes 11."""
COMMAND_SECONDS = 60
Daemon = Literal["mon", "mgr", "osd"]


def _call(argv: list[str], timeout: float) -> str:
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as said:
        # Not a pipe: the daemons that the script starts would keep it open.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the script's children end with it, but for the daemons
        )
        try:
            status = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said.seek(0)
            if isinstance(error, subprocess.TimeoutExpired):
                raise DeadlinePassed(f"{shlex.join(argv)}: not done in {timeout:g} s", said.read()[-4000:]) from None
            raise
        said.seek(0)
        text = said.read()
    if status:
        raise LabError(f"{shlex.join(argv)}: exit status {status}", text[-4000:])
    return text


def _free_port() -> int:
    """One that nothing listens on now, below those that the system gives to clients."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10))
            except OSError:
                continue
            return port
    raise LabError("no free ports for a cluster")


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    name: str

    @classmethod
    def up(cls, name: str) -> Cluster:
        """Start one; ``down`` ends it. One of that name that an earlier run left is ended first."""
        made = cls(name)
        made.down()
        try:
            _call([str(SCRIPT), "up", name, str(_free_port())], UP_SECONDS)
        except BaseException:
            made.down()
            raise
        return made

    @property
    def conf(self) -> Path:
        """Its ceph.conf."""
        return FOLDER / f"ceph-{self.name}" / "ceph.conf"

    def run(self, command: Literal["ceph", "rbd", "rados"], *argv: str, timeout: float = COMMAND_SECONDS) -> str:
        """What a command of Ceph says. :raises LabError: it failed"""
        return _call([command, "-c", str(self.conf), *argv], timeout)

    def user(self, name: str, **caps: str) -> Path:
        """The keyring of a new user ``client.NAME`` with these capabilities."""
        path = self.conf.parent / f"keyring.{name}"
        words = [word for service, allowed in caps.items() for word in (service, allowed)]
        self.run("ceph", "auth", "get-or-create", f"client.{name}", *words, "-o", str(path))
        return path

    def crash(self, daemon: Daemon) -> None:
        """Kill a daemon, and wait until it is gone."""
        _call([str(SCRIPT), "crash", self.name, daemon], COMMAND_SECONDS)

    def start(self, daemon: Daemon) -> None:
        """Start a daemon again."""
        _call([str(SCRIPT), "start", self.name, daemon], COMMAND_SECONDS)

    def down(self) -> None:
        """End it, and delete its data."""
        _call([str(SCRIPT), "down", self.name], COMMAND_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
