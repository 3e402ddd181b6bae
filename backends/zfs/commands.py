"""Runs the zfs and zpool commands: argv lists, never a shell; a deadline and a cap on everything that comes back."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from replicator.errors import StorageError, StorageUnavailable

LIST_DEADLINE = 300.0
"""Seconds for what only reads."""
CHANGE_DEADLINE = 600.0
"""Seconds for what changes something: it ends with the transaction group, which a busy pool may take its time for."""
MAX_OUTPUT = 256 << 20
"""Bytes of an answer: a million snapshots with long names."""
MAX_ERRORS = 16 << 10
"""Bytes kept of what a command says about its failure."""
_LOOK_AGAIN = 1.0
"""Seconds between two looks at whether there is any point in waiting."""
_LOOK_AGAIN_AT_END = 0.2
"""Seconds between two looks at whether a process has ended whose error output has not."""
_READS = 16
"""Portions of words that are read at once, so that no talkative process keeps us from all else."""
_GONE_DEADLINE = 60.0
"""Seconds that a killed process may take to be gone: on a busy machine, zfs send and receive undo for a while."""
_KILL_DEADLINE = 2.0
"""A process that waits for a suspended pool cannot be killed; it is left behind after so many seconds."""
_ENVIRONMENT = {
    "LC_ALL": "C",
    "PATH": "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin",
    "TZ": "UTC",
}


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command did.

    :ivar errors: what it said on its error output, without the line's end
    """

    argv: tuple[str, ...]
    status: int
    output: str
    errors: str


class Process(Protocol):
    """A running command whose input or output is a pipe.

    :ivar pipe: our end of it, a file descriptor
    """

    @property
    def pipe(self) -> int: ...

    def close_pipe(self) -> None:
        """Close our end; once more does nothing."""

    def finish(self, deadline: float) -> Finished | None:
        """Wait for its end; None if that did not come within ``deadline`` seconds."""

    def kill(self) -> None:
        """End it now, without waiting."""

    def check(self) -> None:
        """Asked while it is waited for. :raises StorageUnavailable: there is no point in that"""


def end(process: Process) -> None:
    """Kill a process and wait until it is gone: until then its datasets are busy. One that waits for a suspended pool
    is left behind."""
    process.kill()
    process.close_pipe()
    until = time.monotonic() + _GONE_DEADLINE
    while process.finish(_LOOK_AGAIN) is None and time.monotonic() < until:
        try:
            process.check()
        except StorageUnavailable:
            return


class Runner(Protocol):
    """Starts commands; tests give one that answers from a record."""

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        """Run to the end. :raises StorageUnavailable: no such command, or no answer within ``deadline`` seconds"""

    def read_from(self, argv: Sequence[str]) -> Process:
        """Start a command whose output is the pipe."""

    def write_to(self, argv: Sequence[str]) -> Process:
        """Start a command whose input is the pipe."""


class SystemProcess:
    """A process of this machine. Its error output is kept, up to a cap.

    :param check: raises where there is no point in waiting
    """

    def __init__(self, argv: tuple[str, ...], check: Callable[[], None], *, reading: bool) -> None:
        check()
        self._argv = argv
        self._check = check
        self._said = b""
        self._process = _start(
            argv,
            stdin=subprocess.DEVNULL if reading else subprocess.PIPE,
            stdout=subprocess.PIPE if reading else subprocess.DEVNULL,
        )
        self._pipe = _piped(self._process.stdout if reading else self._process.stdin)
        self._errors = _piped(self._process.stderr)
        os.set_blocking(self._errors.fileno(), False)

    @property
    def pipe(self) -> int:
        return self._pipe.fileno()

    def check(self) -> None:
        self._listen()
        self._check()

    def close_pipe(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def finish(self, deadline: float) -> Finished | None:
        until = time.monotonic() + deadline
        while self._process.poll() is None:
            left = until - time.monotonic()
            if left <= 0:
                return None
            if not self._errors.closed:
                self._wait_for_words(min(left, _LOOK_AGAIN_AT_END))
                self._listen()
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(left)
        self._listen()
        self._errors.close()
        self.close_pipe()
        return Finished(self._argv, self._process.returncode, "", _text(self._said).strip())

    def _wait_for_words(self, deadline: float) -> None:
        """Or for their end: that of the process, but for a child that lives on."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._errors, selectors.EVENT_READ)
            selector.select(deadline)

    def _listen(self) -> None:
        """Read what it has said so far: one that nobody listens to stands still once the pipe is full. Of a talkative
        one the end is kept, which says why it failed."""
        for _ in range(_READS):
            if self._errors.closed:
                return
            try:
                piece = os.read(self._errors.fileno(), MAX_ERRORS)
            except BlockingIOError:
                return
            if not piece:
                self._errors.close()
            self._said = (self._said + piece)[-MAX_ERRORS:]


class SystemRunner:
    """Runs the commands of this machine.

    :param check: asked before each command, and again and again while it is waited for; raises where there is no point
        in waiting
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        """See :class:`Runner`."""
        args = tuple(argv)
        self._check()
        process = _start(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            output, errors = _collect(process, args, time.monotonic() + deadline, deadline, self._check)
        finally:
            _dispose(process)
        return Finished(args, process.returncode, _text(output), _text(errors).strip())

    def read_from(self, argv: Sequence[str]) -> Process:
        """See :class:`Runner`."""
        return SystemProcess(tuple(argv), self._check, reading=True)

    def write_to(self, argv: Sequence[str]) -> Process:
        """See :class:`Runner`."""
        return SystemProcess(tuple(argv), self._check, reading=False)


def _start(argv: tuple[str, ...], *, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=_ENVIRONMENT, cwd="/", bufsize=0
        )
    except FileNotFoundError:
        raise StorageUnavailable(
            f"the command {argv[0]} is not installed", hint="apt install zfsutils-linux (Debian: section contrib)"
        ) from None
    except OSError as error:
        raise StorageUnavailable(f"the command {argv[0]} cannot be started: {error.strerror}", hint="") from error


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    """A stream of a process that was started with a pipe for it."""
    if stream is None:
        raise StorageError("a command was started without a pipe", hint="")
    return stream


def _collect(
    process: subprocess.Popen[bytes],
    argv: tuple[str, ...],
    until: float,
    deadline: float,
    check: Callable[[], None],
) -> tuple[bytes, bytes]:
    """Both outputs to their end.

    :raises StorageUnavailable: the deadline passed
    :raises StorageError: there is more than the cap
    """
    stdout, stderr = _piped(process.stdout), _piped(process.stderr)
    gathered: dict[IO[bytes], bytearray] = {stdout: bytearray(), stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in gathered:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                raise _too_late(argv, deadline)
            ready = selector.select(min(left, _LOOK_AGAIN))
            if not ready:
                check()
            for key, _ in ready:
                stream = stdout if key.fileobj is stdout else stderr
                piece = os.read(key.fd, 1 << 20)
                if not piece:
                    selector.unregister(stream)
                elif stream is stdout or len(gathered[stream]) < MAX_ERRORS:
                    gathered[stream] += piece
            if len(gathered[stdout]) > MAX_OUTPUT:
                raise StorageError(f"{_shown(argv)} answered with more than {MAX_OUTPUT >> 20} MiB", hint="")
    try:
        process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _too_late(argv, deadline) from None
    return bytes(gathered[stdout]), bytes(gathered[stderr])


def _too_late(argv: tuple[str, ...], deadline: float) -> StorageUnavailable:
    return StorageUnavailable(
        f"{_shown(argv)} did not end within {deadline:.0f} s",
        hint="see `zpool status` and the kernel's log: a suspended pool or a failing disk makes ZFS wait",
    )


def _dispose(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_DEADLINE)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _shown(argv: Sequence[str]) -> str:
    """The command as far as it helps to recognise it."""
    text = " ".join(argv)
    return text if len(text) <= 120 else text[:117] + "..."


def _text(data: bytes) -> str:
    """ZFS names are ASCII. Anything else (a property's value) is readable at least."""
    return data.decode("utf-8", "replace")
