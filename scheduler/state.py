"""Pauses and served schedules on disk: ``schedule.json`` in the state directory.

Format: ``{"version": 1, "jobs": {NAME: {"paused": bool, "served": ISO 8601 with offset, or null}}}``. Deleting the file
loses pauses, and catch-up after the downtime in which it was deleted; nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol

from replicator.errors import DamagedData, NoSpace, ReplicatorError, StorageUnavailable
from scheduler.job import JobState

VERSION = 1
MAX_SIZE = 16 << 20  # bytes; 1,000 jobs take some 100 KiB


class ScheduleStateStore(Protocol):
    """Where the scheduler keeps what must survive a restart."""

    def load(self) -> dict[str, JobState]:
        """The state of all jobs, by name; empty if nothing was ever saved.

        :raises ReplicatorError: there is something, but it cannot be read; the scheduler then begins afresh
        """

    def save(self, states: Mapping[str, JobState]) -> None:
        """Replace the state of all jobs, durably and all or nothing.

        :raises ReplicatorError: it could not be saved; what was saved before still is
        """


class FileStateStore:
    """The state of all jobs in one JSON file, replaced as a whole. Thread-safe within one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def load(self) -> dict[str, JobState]:
        """See :class:`ScheduleStateStore`. A damaged file is kept beside as ``….damaged`` when it is replaced."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    raw = file.read(MAX_SIZE + 1)
            except FileNotFoundError:
                return {}
            except OSError as error:
                raise self._unavailable(error, "read") from error
            try:
                return _decode(raw)
            except (ValueError, RecursionError) as error:
                aside = self.path.with_name(self.path.name + ".damaged")
                try:
                    self.path.replace(aside)
                except OSError:
                    aside = self.path
                raise DamagedData(
                    f"the state of the schedules in {self.path} cannot be read: {error}",
                    hint=f"it was kept as {aside}; pause again the jobs that shall be paused",
                ) from error

    def save(self, states: Mapping[str, JobState]) -> None:
        """See :class:`ScheduleStateStore`."""
        raw = _encode(states)
        temporary = self.path.with_name(f".{self.path.name}.new")
        with self._lock:
            try:
                with temporary.open("wb") as file:
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
                directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            except OSError as error:
                raise self._unavailable(error, "write") from error

    def _unavailable(self, error: OSError, verb: str) -> ReplicatorError:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageUnavailable
        return kind(
            f"cannot {verb} the state of the schedules in {self.path}: {error.strerror or error}",
            hint="[node] state_dir must be a directory that this user may write, with some space left",
        )


def _encode(states: Mapping[str, JobState]) -> bytes:
    jobs = {
        name: {"paused": state.paused, "served": None if state.served is None else state.served.isoformat()}
        for name, state in sorted(states.items())
    }
    return json.dumps({"version": VERSION, "jobs": jobs}, indent=1).encode() + b"\n"


def _decode(raw: bytes) -> dict[str, JobState]:
    """Read what ``_encode`` wrote; ValueError for anything else."""
    if len(raw) > MAX_SIZE:
        raise ValueError(f"larger than {MAX_SIZE} bytes")
    document = json.loads(raw)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"not a document of version {VERSION}")
    jobs = document.get("jobs")
    if not isinstance(jobs, dict):
        raise ValueError("no jobs in it")
    return {name: _decode_job(name, job) for name, job in jobs.items()}


def _decode_job(name: str, job: object) -> JobState:
    if not isinstance(job, dict):
        raise ValueError(f"job {name!r} is not an object")
    paused, served = job.get("paused"), job.get("served")
    if not isinstance(paused, bool) or not (served is None or isinstance(served, str)):
        raise ValueError(f"job {name!r} has fields of other types")
    moment = None if served is None else datetime.fromisoformat(served)
    if moment is not None and moment.utcoffset() is None:
        raise ValueError(f"job {name!r} has a moment without offset")
    return JobState(paused, moment)
