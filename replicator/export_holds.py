"""What exports hold while they read, and how that ends when an export did not.

An export runs in a process of its own, so nobody else knows whether one is under way. Each notes what it holds in a
file that it has locked; a file that nobody has locked is of an export that was killed, and what it names is released by
the next export, and by the daemon.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from replicator import logs
from replicator.byte_channels import sync_folder, told
from replicator.endpoint import Endpoint
from replicator.errors import ReplicatorError
from replicator.model import SNAPSHOT_PREFIX, VersionRef, VolumeId
from replicator.names import check_tag

LOG = logging.getLogger(__name__)
FOLDER = "exports"
"""Below the state directory."""
_MAX_NOTE = 64 << 10


class ExportHolds:
    """The holds of the exports of this node.

    :param folder: where they are noted
    """

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self._endpoint = endpoint
        self._folder = folder

    @contextmanager
    def held(self, volume: VolumeId, versions: Sequence[VersionRef]) -> Iterator[None]:
        """Protect these snapshots while the block runs. :raises NoSuchSnapshot: one is gone"""
        name = secrets.token_hex(8)
        # Two parts behind the prefix: it is no tag of a job (see `model.HoldTag`), and each export has its own.
        tag = check_tag(f"{SNAPSHOT_PREFIX}:export:{self._endpoint.node}.{name}")
        note: dict[str, object] = {
            "volume": str(volume),
            "tag": tag,
            "versions": [[ref.name, ref.guid] for ref in versions],
        }
        path = self._folder / f"{name}.json"
        fd = self._note(path, json.dumps(note).encode())
        try:
            for ref in versions:
                self._endpoint.hold(volume, ref, tag)
            yield
        finally:
            try:
                self._release(path, note)
            finally:
                os.close(fd)

    def _note(self, path: Path, text: bytes) -> int:
        """Write a note; it is locked before it has its name."""
        hidden = path.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, text)
            os.fsync(fd)
            hidden.rename(path)
            sync_folder(self._folder)
        except OSError as error:
            raise told(error, f"writing {path}") from error
        return fd

    def release_abandoned(self) -> None:
        """Release what exports hold that are not under way any more. What cannot be is tried again the next time."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._release(path, json.loads(os.read(fd, _MAX_NOTE)))
                logs.event(LOG, "info", "holds of an abandoned export released", note=path.name)
            except BlockingIOError:  # it is under way
                continue
            except (ReplicatorError, OSError, ValueError, KeyError, TypeError) as error:
                logs.event(LOG, "warning", "holds of an export not released", note=path, error=error)
            finally:
                os.close(fd)

    def _release(self, path: Path, note: dict[str, object]) -> None:
        volume, tag, versions = note["volume"], note["tag"], note["versions"]
        if not (isinstance(volume, str) and isinstance(tag, str) and isinstance(versions, list)):
            raise ValueError("it is damaged")
        for name, guid in versions:
            self._endpoint.release(VolumeId.parse(volume), VersionRef(str(name), str(guid)), tag)
        with suppress(FileNotFoundError):
            path.unlink()
