"""Guests with real OpenZFS, for tests: ``zfs-lab`` with deadlines and typed errors.

::

    with Lab("bookworm") as lab:
        one, two = lab.up(2)
        one.run("zpool", "create", "tank", "/dev/ubdb")
        two.cut("clu")
        one.crash()
        one.boot()
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

SCRIPT = Path(__file__).with_name("zfs-lab")
SUITES = {"bookworm": "2.1", "trixie": "2.3"}
"""Debian's suites, each with the OpenZFS version that it has."""

PUBLIC, CLUSTER = "pub", "clu"
_PREFIX = {PUBLIC: "10.98.0", CLUSTER: "10.99.0"}

BUILD_SECONDS = 1800
BOOT_SECONDS = 300
COPY_SECONDS = 300
COMMAND_SECONDS = 60
_GRACE = 15
_CONSOLE_LINES = 40
_KILLED = 137
_TIMED_OUT = (124, _KILLED)  # timeout(1): after SIGTERM, after SIGKILL
_SSH_FAILED = 255
_GROUP, _TIMES = 2, 11
"""Of the fields of /proc/PID/stat behind the command's name: pgrp; utime, stime, cutime, cstime."""


class LabError(Exception):
    """Something in the lab went wrong; says what, and the end of what the guest or the script said."""

    def __init__(self, what: str, said: str = "") -> None:
        super().__init__(f"{what}\n{said}" if said else what)


class CommandFailed(LabError):
    """A command in a guest, or one of the lab itself, did not exit with 0."""

    def __init__(self, what: str, done: Done) -> None:
        super().__init__(f"{what}: exit status {done.status}", (done.err or done.out)[-4000:])
        self.done = done


class DeadlinePassed(LabError):
    """A command took longer than it may; it was ended, in the guest too."""


class GuestLost(LabError):
    """A guest does not answer (any more); carries the end of its console's log."""


@dataclass(frozen=True)
class Done:
    """What a command did.

    :ivar status: exit status
    :ivar out: what it said on stdout
    :ivar err: what it said on stderr
    """

    status: int
    out: str
    err: str


def _call(argv: list[str], lab: str, timeout: float, data: str | None = None) -> Done:
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        env={**os.environ, "LAB": lab},
        start_new_session=True,  # so that the script's children end with it
    )
    try:
        out, err = process.communicate(data, timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise DeadlinePassed(f"{shlex.join(argv)}: not done in {timeout:g} s", (err or out)[-4000:]) from None
        raise
    return Done(process.returncode, out, err)


@dataclass(frozen=True)
class Background:
    """A process in a guest that runs on by itself.

    :ivar log: path in the guest of what it says
    """

    node: Node
    pid: int
    log: str

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.node.run("kill", "-0", str(self.pid), check=False).status == 0

    def stop(self, signal_name: str = "TERM", timeout: float = 30) -> None:
        """Send it a signal and wait until it has ended. :raises DeadlinePassed: it does not"""
        self.node.run("kill", f"-{signal_name}", str(self.pid), check=False)
        self.node.run("tail", "-f", f"--pid={self.pid}", "--sleep-interval=0.1", "/dev/null", timeout=timeout)

    def said(self) -> str:
        """All that it said so far."""
        return self.node.read(self.log)


@dataclass(frozen=True)
class Node:
    """One guest.

    :ivar index: from 1; the guest's name is ``node<index>``
    """

    lab: Lab
    index: int

    @property
    def name(self) -> str:
        return f"node{self.index}"

    def address(self, net: str = CLUSTER) -> str:
        """Its address on one of the two networks."""
        return f"{_PREFIX[net]}.{self.index}"

    def console(self, lines: int = _CONSOLE_LINES) -> str:
        """The last lines on its serial console: where a kernel says why it died."""
        try:
            text = (self.lab.folder / self.name / "console.log").read_text(errors="backslashreplace")
        except OSError as error:
            return f"(no console log: {error})"
        return "\n".join(text.splitlines()[-lines:])

    def processor_seconds(self) -> float:
        """What the guest has used of this host's processors since it booted: its kernel and all its processes.

        :raises GuestLost: it is not running
        """
        try:
            leader = int((self.lab.folder / self.name / "pid").read_text())
        except (OSError, ValueError) as error:
            raise GuestLost(f"{self.name} is not running", str(error)) from None
        ticks, seen = 0, False
        # Those that have ended are counted at the leader, which waits for them. See proc_pid_stat(5).
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, rest = path.parent.name, path.read_text().rpartition(")")[2].split()
                if int(rest[_GROUP]) == leader:
                    ended = int(pid) == leader
                    ticks += sum(map(int, rest[_TIMES : _TIMES + (4 if ended else 2)]))
                    seen = True
        if not seen:
            raise GuestLost(f"{self.name} is not running", self.console())
        return ticks / os.sysconf("SC_CLK_TCK")

    def run(
        self,
        *argv: str,
        timeout: float = COMMAND_SECONDS,
        check: bool = True,
        data: str | None = None,
        cwd: str = "/root",
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a command and wait for it.

        :param timeout: seconds after which it is ended
        :param check: whether another exit status than 0 is an error
        :param data: its standard input
        :raises CommandFailed: it failed, and ``check``
        :raises DeadlinePassed: it was not done in time
        :raises GuestLost: the guest does not answer
        """
        command = ["env", f"--chdir={cwd}", *(f"{name}={value}" for name, value in (environment or {}).items())]
        command += ["timeout", "--kill-after=5", f"{timeout:g}", *argv]
        # Without a shell around it, ssh says of a command that a signal ended what it says of a lost connection.
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
        what = f"{self.name}: {shlex.join(argv)}"
        begun = time.monotonic()
        done = self._script("sh", shlex.join(command), timeout=timeout + _GRACE, data=data)
        if done.status in _TIMED_OUT and time.monotonic() - begun >= timeout:
            raise DeadlinePassed(f"{what}: not done in {timeout:g} s", (done.err or done.out)[-4000:])
        if done.status == _SSH_FAILED:
            raise GuestLost(f"{what}: no answer", f"{done.err}\nconsole:\n{self.console()}")
        if check and done.status != 0:
            killed = f"\nconsole:\n{self.console()}" if done.status == _KILLED else ""  # for want of memory?
            raise CommandFailed(what + killed, done)
        return done

    def start(self, *argv: str, log: str, cwd: str = "/root") -> Background:
        """Start a command that runs on, as a daemon does, and write what it says to ``log`` in the guest."""
        line = 'log=$1; shift; setsid "$@" < /dev/null > "$log" 2>&1 & echo $!'
        return Background(self, int(self.run("sh", "-c", line, "sh", log, *argv, cwd=cwd).out), log)

    def read(self, path: str) -> str:
        """A file's text."""
        return self.run("cat", path).out

    def write(self, path: str, text: str) -> None:
        """Write a file, and the folders it is in."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1"', "sh", path, data=text)

    def put(self, source: Path, folder: str) -> None:
        """Copy a file or folder of this host into a folder of the guest."""
        self._must("put", str(source), folder, timeout=COPY_SECONDS)

    def get(self, source: str, folder: Path) -> None:
        """Copy a file or folder of the guest into a folder of this host."""
        self._must("get", source, str(folder), timeout=COPY_SECONDS)

    def rsync(self, *argv: str) -> None:
        """rsync; ``node:`` is the guest in the arguments."""
        self._must("sync", *argv, timeout=COPY_SECONDS)

    def forward(self, local: Path, remote: str) -> None:
        """Let connections to a Unix socket of this host (a new path) arrive at one of the guest, until it crashes."""
        self._must("forward", str(local), remote, timeout=COMMAND_SECONDS)

    def cut(self, net: str = CLUSTER) -> None:
        """Unplug the cable of a network."""
        self._must("cut", net, timeout=COMMAND_SECONDS)

    def mend(self, net: str = CLUSTER) -> None:
        """Plug it in again."""
        self._must("mend", net, timeout=COMMAND_SECONDS)

    def crash(self) -> None:
        """A power cut: what the guest did not flush to its disks is lost, and what runs there ends with it."""
        self._must("crash", timeout=COMMAND_SECONDS)

    def boot(self) -> None:
        """Power on after :meth:`crash`; pools are imported and ssh answers when this returns."""
        self._must("boot", timeout=BOOT_SECONDS)

    def _must(self, verb: str, *argv: str, timeout: float) -> None:
        done = self._script(verb, *argv, timeout=timeout)
        if done.status == _SSH_FAILED:
            raise GuestLost(f"{self.name}: {verb}: no answer", f"{done.err}\nconsole:\n{self.console()}")
        if done.status != 0:
            raise CommandFailed(f"{self.name}: {verb} {shlex.join(argv)}", done)

    def _script(self, verb: str, *argv: str, timeout: float, data: str | None = None) -> Done:
        return _call([str(SCRIPT), verb, str(self.index), *argv], self.lab.name, timeout, data)


class Lab:
    """Some guests of one suite, with networks of their own; ends them on leaving.

    :param suite: one of :data:`SUITES`
    :param name: labs of different names stand side by side
    """

    def __init__(self, suite: str, name: str = "test") -> None:
        if suite not in SUITES:
            raise LabError(f"no suite {suite!r}: one of {', '.join(SUITES)}")
        self.suite = suite
        self.name = name
        self.nodes: list[Node] = []

    @classmethod
    def attach(cls, name: str = "dev") -> Self:
        """A lab that ``zfs-lab up`` has made. :raises LabError: there is none of that name"""
        try:
            suite = (_folder(name) / "suite").read_text().strip()
        except OSError:
            raise LabError(f"no lab {name!r} is up: {SCRIPT} up COUNT SUITE starts one") from None
        lab = cls(suite, name)
        found = sorted(int(path.name.removeprefix("node")) for path in lab.folder.glob("node*"))
        lab.nodes = [Node(lab, index) for index in found]
        return lab

    @property
    def folder(self) -> Path:
        """Where its guests' disks and console logs are."""
        return _folder(self.name)

    @property
    def root(self) -> Path:
        """The image of the root file system that its guests run on. :raises LabError: it is not up"""
        try:
            return Path((self.folder / "root").read_text().strip())
        except OSError:
            raise LabError(f"no lab {self.name!r} is up") from None

    @property
    def zfs_version(self) -> str:
        """First two numbers of the guests' OpenZFS version."""
        return SUITES[self.suite]

    def node(self, index: int) -> Node:
        """Guest ``index``. :raises LabError: there is none"""
        for node in self.nodes:
            if node.index == index:
                return node
        raise LabError(f"lab {self.name!r} has no node{index}; it has {len(self.nodes)}")

    def up(self, count: int) -> list[Node]:
        """Boot ``count`` guests; builds the suite's root where it is not cached.

        :raises LabError: one did not come up; its console's end is in the message
        """
        self._run("build", self.suite, timeout=BUILD_SECONDS)
        try:
            self._run("up", str(count), self.suite, timeout=BOOT_SECONDS)
        except BaseException:
            self.down()
            raise
        self.nodes = [Node(self, index) for index in range(1, count + 1)]
        return self.nodes

    def down(self) -> None:
        """End all guests and delete their disks."""
        self._run("down", timeout=COMMAND_SECONDS)
        self.nodes = []

    def __enter__(self) -> Self:
        self.down()  # of a run that was killed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _run(self, *argv: str, timeout: float) -> None:
        done = _call([str(SCRIPT), *argv], self.name, timeout)
        if done.status != 0:
            raise CommandFailed(f"{SCRIPT.name} {shlex.join(argv)}", done)


def _folder(name: str) -> Path:
    return Path(os.environ.get("LAB_DIR", "/tmp/replicator-lab"), name)  # noqa: S108 the script's default, root's
