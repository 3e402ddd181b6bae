"""Processes that call libzfs_core for this one.

A call of libzfs_core is an ioctl that ends with a transaction group. Where the pool's disks are gone it does not end,
cannot be interrupted, and keeps its whole process from ending, even by SIGKILL: a daemon with such a thread could not
be restarted before the machine is. A binding that does not fit its library may also take its process down. So the calls
are made by ``binding_worker.py``, which costs a pipe each way (0.2 ms), and a few of which are kept running. One that
does not answer in time is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from backends.zfs.pool_state import PoolState
from replicator.errors import StorageError, StorageUnavailable

PROGRAM = Path(__file__).with_name("binding_worker.py")
WORKERS = 4
"""Processes of one storage, at most: so many calls at once; each waits for a transaction group of the same pool."""
IDLE = 60.0
"""Seconds after which one of several that nothing used is ended: each takes 20 MiB."""
START_DEADLINE = 60.0
MAX_ANSWER = 16 << 20
"""Bytes: as many names as fit into a request, each with what is wrong with it."""
_LOOK_AGAIN = 1.0
"""Seconds between two looks at whether the pool is suspended, while a call waits."""
_END_DEADLINE = 2.0


class WorkerLost(Exception):
    """The process that calls libzfs_core ended, or said what it may not."""


class Core(Protocol):
    """Calls libzfs_core; tests give one that answers from a record."""

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """One call: ``{"done": VALUE}`` or ``{"failed": [[NAME, ERRNO, WORDS], ...]}``, see ``binding_worker.py``.

        :raises StorageUnavailable: no answer within ``deadline`` seconds, or the pool is suspended
        :raises WorkerLost: it cannot be called
        """

    def close(self) -> None:
        """End it."""


class Worker:
    """One process that calls libzfs_core."""

    def __init__(self, pool: PoolState, program: Path = PROGRAM) -> None:
        self._pool = pool
        try:
            # Isolated: nothing of the current folder or the environment decides what it imports.
            self._process = subprocess.Popen(
                (sys.executable, "-I", str(program)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd="/", env={"LC_ALL": "C", "PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise WorkerLost(f"it cannot be started: {error.strerror}") from error
        self._input, self._output = _piped(self._process.stdin), _piped(self._process.stdout)
        os.set_blocking(self._output.fileno(), False)
        self._read = bytearray()
        try:
            greeting = self._line(time.monotonic() + START_DEADLINE)
        except StorageUnavailable as error:
            self.close()
            raise WorkerLost("it did not start in time") from error
        if "version" not in greeting:
            self.close()
            raise WorkerLost(str(greeting.get("unusable", "it does not say its version")))
        self.version = str(greeting["version"])

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """See :class:`Core`."""
        data = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._input.fileno(), data) :]
        except OSError as error:
            raise WorkerLost(f"it ended: {error.strerror}") from error
        return self._line(time.monotonic() + deadline)

    def _line(self, until: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._read:
                left = until - time.monotonic()
                if left <= 0:
                    raise StorageUnavailable(
                        "libzfs_core did not answer in time",
                        hint="see `zpool status` and the kernel's log: a failing disk makes ZFS wait",
                    )
                if not selector.select(min(left, _LOOK_AGAIN)):
                    self._pool.check()
                    continue
                piece = os.read(self._output.fileno(), 1 << 20)
                if not piece:
                    raise WorkerLost("it ended without an answer")
                self._read += piece
                if len(self._read) > MAX_ANSWER:
                    raise WorkerLost(f"it answered with more than {MAX_ANSWER >> 20} MiB")
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerLost("its answer cannot be read")
        return answer

    def close(self) -> None:
        """End it; one that waits for a disk is left behind."""
        self._process.kill()
        for stream in (self._input, self._output):
            stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_DEADLINE)


class Workers:
    """Some processes, each used by one call at a time, started when they are needed."""

    def __init__(self, pool: PoolState, limit: int = WORKERS, start: Callable[[PoolState], Worker] = Worker) -> None:
        self._pool = pool
        self._start = start
        self._slots = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Worker]] = []  # since when; what is used often stays at the end
        self._closed = False

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """See :class:`Core`. A worker that was idle may have died since: then a new one is asked."""
        self._pool.check()
        until = time.monotonic() + deadline
        if not self._slots.acquire(timeout=deadline):
            raise StorageUnavailable(
                f"all {WORKERS} calls of libzfs_core are waiting", hint="see `zpool status` and the kernel's log"
            )
        try:
            with self._lock:
                worker = self._idle.pop()[1] if self._idle else None
            if worker is not None:
                try:
                    return self._ask(worker, request, until)
                except WorkerLost:
                    pass
            return self._ask(self._start(self._pool), request, until)
        finally:
            self._slots.release()

    def _ask(self, worker: Worker, request: dict[str, Any], until: float) -> dict[str, Any]:
        try:
            answer = worker.ask(request, max(0.0, until - time.monotonic()))
        except BaseException:
            worker.close()
            raise
        with self._lock:
            now = time.monotonic()
            self._idle.append((now, worker))
            done = [old for since, old in self._idle if self._closed or now - since > IDLE]
            self._idle = [item for item in self._idle if item[1] not in done]
        for old in done:
            old.close()
        return answer

    def close(self) -> None:
        """End them all."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, worker in idle:
            worker.close()


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise StorageError("a process was started without a pipe", hint="")
    return stream
