"""One volume's private directory: its snapshots, holds, lineage, key and partial state.

A snapshot exists when a directory with its name is in ``snapshots/`` and its record and image agree; everything in
preparation or on its way out has a name that begins with a dot. Listing takes no lock. What changes the listing does
so under two locks, always in this order:

- ``writing()``: for as long as a snapshot or a receive takes; one writer of a volume among all processes
- ``changing()``: for moments; holds, destroying, and the renames by which a writer publishes
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends.fields import BadRecord
from backends.image.durable import SNAPSHOT_MODE, Files
from backends.image.records import Meta, encode_lineage, load_lineage
from replicator import names
from replicator.errors import DamagedData, InvalidName, NoSuchSnapshot, SnapshotHeld, VolumeBusy
from replicator.model import Lineage, Version, VersionRef
from replicator.streams import KEY_SIZE

IMAGE = "image"
META = "meta.json"
ASIDE = "aside.json"
DIGESTS = "digests"
HOLDS = "holds"
LOCK_TIMEOUT = 10.0
"""Seconds to wait for another process's operation on a volume before it is called busy."""
_POSITION_STEP = 1024
"""Between the positions of two snapshots, so that one kept aside fits in between."""


LOCKS = ("lock", "names.lock")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot.

    :ivar folder: where its image and digests are
    """

    version: Version
    meta: Meta
    folder: Path

    @property
    def image(self) -> Path:
        """Its bytes; never changed once published."""
        return self.folder / IMAGE

    @property
    def digests(self) -> Path:
        """Its kept digests, if ``meta.digests``."""
        return self.folder / DIGESTS


class Catalog:
    """A volume's private directory, which need not exist.

    :param label: the volume as people write it
    """

    def __init__(self, label: str, folder: Path, files: Files, lock_timeout: float = LOCK_TIMEOUT) -> None:
        self.label = label
        self.folder = folder
        self.files = files
        self._lock_timeout = lock_timeout

    @property
    def snapshots_folder(self) -> Path:
        """Where the snapshots are."""
        return self.folder / "snapshots"

    # -- locks

    @contextmanager
    def _locked(self, name: str, doing: str) -> Iterator[None]:
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + self._lock_timeout
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise VolumeBusy(
                            f"{self.label} is in use by another operation, so {doing} cannot begin",
                            hint="wait until it is done; `replicator status` shows what runs",
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)  # which unlocks: the lock belongs to this open file, so threads exclude each other too

    @contextmanager
    def writing(self, doing: str) -> Iterator[None]:
        """Be the only writer of the volume; what an interrupted one left behind is put in order first.

        :raises VolumeBusy: another one writes
        """
        with self._locked(LOCKS[0], doing):
            with self.changing(doing):
                self.tidy()
            yield

    @contextmanager
    def changing(self, doing: str) -> Iterator[None]:
        """Change the listing. Held for moments only."""
        with self._locked(LOCKS[1], doing):
            yield

    def tidy(self) -> None:
        """Finish or remove what a crash left in preparation. Only under both locks."""
        for folder in (self.folder, self.snapshots_folder):
            for path in _listed(folder):
                if path.name.startswith(".new-"):
                    self._tidy_new(path)
                elif path.name.startswith((".gone-", ".tmp-", ".partial-")):
                    self.files.remove_tree(path)
        for path in _listed(self.snapshots_folder):
            with contextlib.suppress(BadRecord):
                self._settle_aside(path)

    def _tidy_new(self, path: Path) -> None:
        """Throw a directory in preparation away, unless it is a snapshot that was just replaced: see ``replace``."""
        try:
            aside = Meta.load_aside(path / ASIDE)
        except BadRecord:
            aside = None
        if aside is None:
            self.files.remove_tree(path)
            return
        name = self.free_name(aside[0])
        if name != aside[0]:
            self.files.replace(path / ASIDE, aside[1].encode_aside(name))
        self._rename_aside(path, name)

    def remove(self) -> None:
        """Remove all but the locks, which others may wait for. It is no volume any more once the lineage is gone. Only
        under both locks, of a volume without snapshots and partial state."""
        lineage = self.folder / "lineage.json"
        if lineage.exists():
            self.files.unlink(lineage)
            self.files.sync_directory(self.folder)
        for path in _listed(self.folder):
            if path.name not in LOCKS:
                self.files.remove_tree(path)
        self.files.sync_directory(self.folder)

    # -- small records

    def lineage(self) -> Lineage | None:
        """The stored lineage. :raises DamagedData: it cannot be read"""
        return load_lineage(self.folder / "lineage.json")

    def set_lineage(self, lineage: Lineage) -> None:
        """Store it durably. Only under ``changing``."""
        self.files.replace(self.folder / "lineage.json", encode_lineage(lineage))

    def key(self) -> bytes:
        """The volume's own key for digests that stay here; made the first time. Only under one of the locks."""
        path = self.folder / "key"
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) != KEY_SIZE:  # none, or damaged: what was keyed with it is made anew when it does not verify
            key = secrets.token_bytes(KEY_SIZE)
            self.files.replace(path, key)
        return key

    def known_key(self) -> bytes | None:
        """The same for a reader, which makes none."""
        with contextlib.suppress(FileNotFoundError):
            key = (self.folder / "key").read_bytes()
            return key if len(key) == KEY_SIZE else None
        return None

    # -- reading the listing

    def snapshots(self, warnings: list[str] | None = None) -> tuple[Snapshot, ...]:
        """The complete snapshots, oldest first. One that is not whole is left out and told in ``warnings``."""
        found = []
        for path in _listed(self.snapshots_folder):
            if path.name.startswith("."):
                continue
            try:
                snapshot = self._read(path)
            except (BadRecord, InvalidName) as error:
                if warnings is not None:
                    warnings.append(f"{self.label}: snapshot {path.name!a} is left out: {error}")
                continue
            if snapshot is not None:
                found.append(snapshot)
        return tuple(sorted(found, key=lambda snapshot: (snapshot.meta.position, snapshot.version.name)))

    def _read(self, path: Path) -> Snapshot | None:
        """One snapshot; None if it vanished in the meantime. :raises BadRecord, InvalidName: it is not whole"""
        name = names.check_snapshot(path.name)
        holds: tuple[str, ...] = ()
        aside = Meta.load_aside(path / ASIDE)
        try:
            if aside is not None and aside[0] == name:
                meta = aside[1]  # replaced, and the holds of its old identity stayed with that
            else:
                meta = Meta.load(path / META)
                holds = self._holds(path)
            size = (path / IMAGE).lstat().st_size
        except FileNotFoundError as error:
            if not path.is_dir():
                return None
            raise BadRecord(f"{Path(error.filename).name} is missing") from None
        except NotADirectoryError:
            raise BadRecord("it is a file") from None
        if size != meta.size:
            raise BadRecord(f"its image has {size} bytes instead of {meta.size}")
        return Snapshot(meta.version(name, holds), meta, path)

    @staticmethod
    def _holds(path: Path) -> tuple[str, ...]:
        with contextlib.suppress(FileNotFoundError):
            return tuple(sorted(hold.name for hold in (path / HOLDS).iterdir()))
        return ()

    def find(self, version: VersionRef) -> Snapshot | None:
        """The snapshot of that identity."""
        return next((s for s in self.snapshots() if s.version.guid == version.guid), None)

    def named(self, name: str) -> Snapshot | None:
        """The snapshot of that name."""
        return next((s for s in self.snapshots() if s.version.name == name), None)

    def require(self, version: VersionRef) -> Snapshot:
        """The same. :raises NoSuchSnapshot:"""
        found = self.find(version)
        if found is None:
            raise NoSuchSnapshot(
                f"{self.label} has no snapshot {version.name} (guid {version.guid})",
                hint=f"`replicator snapshots {self.label}` lists what there is",
            )
        return found

    def next_position(self) -> int:
        """After every snapshot that there is."""
        newest = max((s.meta.position for s in self.snapshots()), default=0)
        return (newest // _POSITION_STEP + 1) * _POSITION_STEP

    # -- changing the listing, under ``changing``

    def hold(self, version: VersionRef, tag: str) -> None:
        """:raises NoSuchSnapshot:"""
        self.add_hold(self.require(version).folder, tag)

    def add_hold(self, folder: Path, tag: str) -> None:
        """Hold the snapshot in ``folder``, published or in preparation, durably."""
        holds = folder / HOLDS
        self.files.ensure_directory(holds, folder)
        with contextlib.suppress(FileExistsError):
            os.close(self.files.open_new(holds / names.check_tag(tag)))
        self.files.sync_directory(holds)

    def release(self, version: VersionRef, tag: str) -> None:
        """Nothing happens if there is no such snapshot or hold."""
        found = self.find(version)
        if found is not None and tag in found.version.holds:
            self.files.unlink(found.folder / HOLDS / names.check_tag(tag))
            self.files.sync_directory(found.folder / HOLDS)

    def destroy(self, version: VersionRef) -> Path | None:
        """Take a snapshot out of the listing, durably; what remains to be deleted (without a lock), if anything.

        :raises SnapshotHeld:
        """
        found = self.find(version)
        if found is None:
            return None
        if found.version.holds:
            raise SnapshotHeld(
                f"snapshot {found.version.name} of {self.label} is held by {', '.join(found.version.holds)}",
                hint="the job that holds it releases it once its target has a newer one",
            )
        gone = self.snapshots_folder / f".gone-{uuid.uuid4().hex}"
        self.files.rename_new(found.folder, gone)
        self.files.sync_directory(self.snapshots_folder)
        return gone

    # -- publishing, under both locks

    def new_folder(self) -> Path:
        """A directory in which a snapshot is prepared."""
        self.files.ensure_directory(self.snapshots_folder, self.folder)
        path = self.snapshots_folder / f".new-{uuid.uuid4().hex}"
        self.files.make_directory(path)
        return path

    def seal_image(self, folder: Path, size: int) -> None:
        """Make the image in the directory of a new snapshot durable, and never to be written again."""
        fd = os.open(folder / IMAGE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != size:
                raise DamagedData(f"the new image of {self.label} has not the size it must have", hint="run it again")
            self.files.set_mode(fd, SNAPSHOT_MODE)
            self.files.sync(fd)
        finally:
            os.close(fd)

    def seal(self, folder: Path, meta: Meta, holds: tuple[str, ...] = ()) -> None:
        """Complete the directory of a new snapshot whose image (and digests) are durably in it, durably."""
        self.files.create(folder / META, meta.encode())
        for tag in holds:
            self.add_hold(folder, tag)
        self.files.sync_directory(folder)

    def publish(self, folder: Path, name: str) -> None:
        """Give a sealed directory its name.

        All that is in it was durable before, so whichever side of the rename a power cut leaves us on, the listing
        is true: without it (and the leftover is removed as unfinished), or with all of it.
        """
        self._clear_name(name)
        self.files.rename_new(folder, self.snapshots_folder / name)
        self.files.sync_directory(self.snapshots_folder)

    def _clear_name(self, name: str) -> None:
        """Move what has this name out of the way, if it is no whole snapshot: kept, but never listed."""
        path = self.snapshots_folder / name
        if os.path.lexists(path) and self.named(name) is None:
            self.files.rename_new(path, self.snapshots_folder / f".damaged-{uuid.uuid4().hex}")

    def replace(self, folder: Path, old: Snapshot, aside: str, guid: str) -> str:
        """Put a sealed directory in the place of a snapshot and keep that one as ``aside`` with ``guid``; its name.

        1. ``aside.json`` in the old directory says what it is going to be. It counts only in a directory of the name
           that it says, so nothing has changed yet; a cut here leaves a record that the next attempt overwrites.
        2. The two directories exchange their names. From now on the new one is listed, complete. A cut here leaves the
           old one under the name of one in preparation; its ``aside.json`` tells ``tidy`` that it is none, and
           ``tidy`` goes on with step 3.
        3. The old directory gets its new name: it is listed again, under the identity of ``aside.json``.
        4. ``aside.json`` becomes ``meta.json``. Before and after, the listing is the same.
        """
        aside = self.free_name(aside)
        meta = old.meta.set_aside(guid, self._position_before(old.meta.position))
        self.files.replace(old.folder / ASIDE, meta.encode_aside(aside))
        self.files.exchange(folder, old.folder)
        self.files.sync_directory(self.snapshots_folder)
        self._rename_aside(folder, aside)
        self._settle_aside(self.snapshots_folder / aside)
        return aside

    def _rename_aside(self, folder: Path, name: str) -> None:
        self.files.rename_new(folder, self.snapshots_folder / name)
        self.files.sync_directory(self.snapshots_folder)

    def _settle_aside(self, folder: Path) -> None:
        aside = Meta.load_aside(folder / ASIDE)
        if aside is None or aside[0] != folder.name:
            return
        self.files.remove_tree(folder / HOLDS)  # before the record goes that says they do not count
        self.files.sync_directory(folder)
        self.files.rename(folder / ASIDE, folder / META)
        self.files.sync_directory(folder)

    def rename(self, snapshot: Snapshot, name: str) -> None:
        """Call a snapshot something else. FileExistsError if that is taken."""
        self.files.rename_new(snapshot.folder, self.snapshots_folder / name)
        self.files.sync_directory(self.snapshots_folder)

    def _position_before(self, position: int) -> int:
        taken = {s.meta.position for s in self.snapshots()}
        return next((p for p in range(position - 1, 0, -1) if p not in taken), 0)

    def free_name(self, name: str) -> str:
        """``name``, or with a number behind it where that is taken."""
        taken = {path.name for path in _listed(self.snapshots_folder)}
        candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, 1 << 20))
        return names.check_snapshot(next(candidate for candidate in candidates if candidate not in taken))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
