"""The image backend under test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.image.backend import ImageBackend
from replicator.model import Version, VersionRef
from tests.support.cases import BackendCase
from transport import checksum


class ImageCase(BackendCase):
    """:class:`~backends.image.backend.ImageBackend` in a directory."""

    def __init__(self, folder: Path, name: str = "store") -> None:
        self.folder = folder
        self.name = name
        self.backend = self._open()

    def _open(self) -> ImageBackend:
        return ImageBackend(self.name, self.folder, checksums=checksum)

    def reopen(self) -> None:
        self.backend.close()
        self.backend = self._open()

    def create(self, volume: str, data: bytes) -> None:
        path = self.folder / volume
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write(self, volume: str, offset: int, data: bytes) -> None:
        with (self.folder / volume).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def resize(self, volume: str, size: int) -> None:
        with (self.folder / volume).open("r+b") as file:
            file.truncate(size)

    def read(self, volume: str) -> bytes:
        return (self.folder / volume).read_bytes()

    @contextmanager
    def in_use(self, volume: str) -> Iterator[None]:
        """A process of its own has it open: the storage leaves its own process out."""
        with (self.folder / volume).open("r+b") as file:
            user = subprocess.Popen(["sleep", "600"], stdin=file)
        try:
            yield
        finally:
            user.kill()
            user.wait()

    def _image(self, volume: str, version: Version | VersionRef) -> Path:
        *parents, last = volume.split("/")
        folder = self.folder.joinpath(".replicator", "volumes", *("+" + part for part in parents), "=" + last)
        state = self.backend.state(volume)
        assert state is not None
        found = state.by_guid(version.guid)
        assert found is not None, f"no {version.guid} in {[v.name for v in state.versions]}"
        return folder / "snapshots" / found.name / "image"

    def read_snapshot(self, volume: str, version: Version | VersionRef) -> bytes:
        return self._image(volume, version).read_bytes()

    def damage(self, volume: str, version: Version | VersionRef, offset: int, data: bytes) -> None:
        path = self._image(volume, version)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
