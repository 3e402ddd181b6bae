"""A node in a directory of its own: its configuration, its commands, its daemon as a process of its own."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from replicator.client import DaemonClient
from replicator.errors import DaemonUnreachable, ReplicatorError

START_TIMEOUT = 90.0
STOP_TIMEOUT = 30.0


def loopback_network() -> str:
    """The first three numbers of a /24 of the loopback range in which nothing listens, for example ``127.83.12``.

    :raises ReplicatorError: none was found
    """
    for _ in range(100):
        prefix = f"127.{secrets.randbelow(200) + 30}.{secrets.randbelow(200) + 30}"
        with suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind((f"{prefix}.1", 8571))
            second.bind((f"{prefix}.2", 8571))
            return prefix
    raise ReplicatorError("no free addresses were found in the loopback range", hint="see `ip address show lo`")


@dataclass(slots=True)
class DemoNode:
    """One node.

    :ivar folder: everything of it: replicator.toml, state, its log
    :ivar runner: put before every command line, for example to enter a network namespace
    """

    name: str
    folder: Path
    runner: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def config(self) -> Path:
        """Its replicator.toml."""
        return self.folder / "replicator.toml"

    @property
    def state_dir(self) -> Path:
        """Its state directory."""
        return self.folder / "state"

    @property
    def log(self) -> Path:
        """What its daemon logged."""
        return self.folder / "daemon.log"

    def configure(self, address: str, *, cluster: str, http: str, rest: str) -> None:
        """Write its replicator.toml."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'[node]\nname = "{self.name}"\nstate_dir = "{self.state_dir}"\n\n'
            f'[network]\ncluster = "{cluster}"\nlisten = "{address}"\nhttp = "{http}"\n\n{rest}'
        )

    def argv(self, *words: str) -> list[str]:
        """The command line of a verb on this node."""
        return [*self.runner, sys.executable, "-m", "replicator.cli.main", "--config", str(self.config), *words]

    def run(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            self.argv(*words), capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )

    def must(self, *words: str, timeout: float = 120.0) -> str:
        """Run a verb that has to succeed; what it printed.

        :raises ReplicatorError: it did not
        """
        done = self.run(*words, timeout=timeout)
        if done.returncode != 0:
            raise ReplicatorError(
                f"`replicator {' '.join(words)}` on {self.name} ended with {done.returncode}: {done.stderr.strip()}",
                hint=f"see {self.log}",
            )
        return done.stdout

    def control(self) -> DaemonClient:
        """The running daemon."""
        return DaemonClient(self.state_dir / "replicator.sock")

    def start(self) -> None:
        """Start the daemon and wait until it answers. :raises DaemonUnreachable: it does not"""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv("serve"), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(ReplicatorError):
                self.control().status()
                return
            time.sleep(0.1)
        raise DaemonUnreachable(f"the daemon of {self.name} did not start", hint=self.tail())

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> int:
        """End the daemon as a service manager would; its exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            code = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -9
        self.process = None
        return code

    def kill(self) -> None:
        """Power cut, as far as a process can have one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT)
            self.process = None


def join(first: DemoNode, second: DemoNode) -> None:
    """Make a cluster of two nodes; the first one's daemon runs afterwards."""
    first.must("cluster", "create")
    first.start()
    token = first.must("cluster", "invite", second.name).strip().splitlines()[-1].strip()
    second.must("cluster", "join", token)
