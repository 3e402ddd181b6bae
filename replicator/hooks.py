"""Commands of the configuration that run around a snapshot.

A hook is a list of arguments, never a shell's line. It runs in a process group of its own, with nothing on its standard
input, in the environment of the daemon and with these variables:

======================  ==========================================================
``REPLICATOR_HOOK``     ``before`` or ``after``
``REPLICATOR_JOB``      the job's name
``REPLICATOR_VOLUMES``  the volumes, STORAGE:NAME, one a line (where they are known)
======================  ==========================================================

A hook must come to its end within its timeout; then the whole group is told to end, and killed if it does not.
"""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from replicator import logs
from replicator.errors import HookFailed
from replicator.units import format_duration

LOG = logging.getLogger(__name__)

MAX_OUTPUT = 64 * 1024
"""Bytes of output kept, the last ones; more is read and thrown away, so that a talkative hook is never blocked."""
GRACE = timedelta(seconds=2)
"""Between SIGTERM and SIGKILL."""


def run(
    argv: Sequence[str],
    timeout: timedelta,
    *,
    name: str,
    environment: Mapping[str, str] | None = None,
    text: str = "",
) -> str:
    """Run a hook to its end; what it wrote to standard output and error, the last ``MAX_OUTPUT`` bytes.

    :param name: what messages call it, for example ``hook "before" of job vms``
    :param environment: set beside the daemon's own
    :param text: on its standard input
    :raises HookFailed: it could not be started, took longer than ``timeout``, or ended with another status than 0
    """
    if not text:
        return _finish(_start(argv, name, environment or {}), argv, timeout, name)
    with tempfile.TemporaryFile() as file:  # a hook that does not read it blocks nobody, as it would with a pipe
        file.write(text.encode())
        file.seek(0)
        return _finish(_start(argv, name, environment or {}, file.fileno()), argv, timeout, name)


def _start(
    argv: Sequence[str], name: str, environment: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    try:
        # Its own session: a group that can be signalled as a whole, and no terminal to ask anybody anything.
        return subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HookFailed(
            f"{name} cannot be started: {shlex.join(argv)}: {reason}", hint="correct the command in replicator.toml"
        ) from None


def _finish(process: subprocess.Popen[bytes], argv: Sequence[str], timeout: timedelta, name: str) -> str:
    command = shlex.join(argv)
    with process:
        try:
            output, ended = _read(process, timeout)
        except BaseException:
            _end_group(process)
            raise
        if not ended:
            _end_group(process)
            raise HookFailed(
                f"{name} took longer than {format_duration(timeout)} and was ended: {command}",
                hint="find out what it waits for, or raise quiesce.timeout",
            )
    text = output.decode("utf-8", "replace").strip()
    status = process.returncode
    if status != 0:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        said = f": {text.splitlines()[-1][:500]}" if text else ""
        raise HookFailed(f"{name} {how}: {command}{said}", hint="run the command by hand to see what it lacks")
    return text


def _read(process: subprocess.Popen[bytes], timeout: timedelta) -> tuple[bytes, bool]:
    """The output until the process ends or its time is over, and whether it ended.

    Waits for the process, not for the end of its output: a child that it left behind may keep that open for ever.
    """
    if process.stdout is None:
        raise AssertionError("the hook was started without a pipe")
    deadline = time.monotonic() + timeout.total_seconds()
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    output = bytearray()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    ending = os.pidfd_open(process.pid)
    try:
        poll.register(ending, select.POLLIN)
        while True:
            rest = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, rest) * 1000))
            if pipe in ready and not _take(pipe, output):
                poll.unregister(pipe)
            if ending in ready:
                while _take(pipe, output) and time.monotonic() < deadline:
                    pass
                process.wait()
                return bytes(output), True
            if rest <= 0:
                return bytes(output), False
    finally:
        os.close(ending)


def _take(pipe: int, output: bytearray) -> bool:
    """Read what is there; whether there may be more."""
    try:
        data = os.read(pipe, MAX_OUTPUT)
    except BlockingIOError:
        return False
    output += data
    del output[:-MAX_OUTPUT]
    return bool(data)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything it started in its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        # Reaped only after the last signal: until then the group's number cannot be another's.
        deadline = time.monotonic() + GRACE.total_seconds()
        while number == signal.SIGTERM and _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    process.wait()


def _group_lives(group: int) -> bool:
    """Whether a process of the group is still running (its unreaped leader does not count)."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError), open(f"/proc/{entry.name}/stat", "rb") as file:  # noqa: PTH123
                # proc(5): after the name in parentheses come state, parent and process group.
                state, _, its_group = file.read().rpartition(b")")[2].split()[:3]
                if int(its_group) == group and state not in (b"Z", b"X"):
                    return True
    return False


@contextmanager
def quiesced(
    before: Sequence[str],
    after: Sequence[str],
    timeout: timedelta,
    *,
    job: str,
    volumes: Sequence[str] = (),
) -> Iterator[None]:
    """Have ``before`` run, then the block, then ``after``, which always runs once ``before`` was started.

    :param timeout: for each of the two
    :raises HookFailed: either failed; the block does not run if ``before`` did. An error of the block goes before one
        of ``after``, which is then logged.
    """
    given = {"REPLICATOR_JOB": job, "REPLICATOR_VOLUMES": "\n".join(volumes)}

    def name(which: str) -> str:
        return f"hook {which!r} of job {job}"

    def run_after() -> None:
        run(after, timeout, name=name("after"), environment={**given, "REPLICATOR_HOOK": "after"})

    # Where this raises, nothing was done that would have to be undone.
    started = _start(before, name("before"), {**given, "REPLICATOR_HOOK": "before"})
    try:
        _finish(started, before, timeout, name("before"))
        yield
    except BaseException:
        try:
            run_after()
        except HookFailed as error:
            logs.event(LOG, "error", "hook failed", job=job, hook="after", error=error)
        raise
    run_after()
