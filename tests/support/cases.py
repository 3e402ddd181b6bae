"""The storages that the conformance suites hold to their contract, each with hands to do what a guest or a failing disk
does to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from backends.base import Backend
from backends.memory import MemoryBackend
from replicator.model import Version, VersionRef
from transport import checksum


class BackendCase(ABC):
    """A storage under test, named ``store``.

    :ivar backend: use it; ``reopen`` makes it anew from what is durable
    :ivar unit: sizes of its volumes are multiples of so many bytes, and at least that
    :ivar damageable: whether there is a way to change a snapshot's bytes
    """

    backend: Backend
    unit = 1
    damageable = True

    def close(self) -> None:
        """Leave nothing behind."""
        self.backend.close()

    @abstractmethod
    def reopen(self) -> None:
        """As after a restart of the process."""

    @abstractmethod
    def create(self, volume: str, data: bytes) -> None:
        """A new volume with live data; also what somebody does who writes beside a replica's snapshots."""

    @abstractmethod
    def write(self, volume: str, offset: int, data: bytes) -> None:
        """Write live data."""

    @abstractmethod
    def resize(self, volume: str, size: int) -> None:
        """Cut the live data, or grow it with zeros."""

    @abstractmethod
    def read(self, volume: str) -> bytes:
        """The live data."""

    @abstractmethod
    def read_snapshot(self, volume: str, version: Version | VersionRef) -> bytes:
        """A snapshot's bytes, not by way of the backend's own send."""

    @abstractmethod
    def damage(self, volume: str, version: Version | VersionRef, offset: int, data: bytes) -> None:
        """Change a snapshot's bytes behind the backend's back."""

    def in_use(self, volume: str) -> AbstractContextManager[None]:
        """Somebody has the live data open, while the block lasts."""
        raise NotImplementedError(f"nobody can use {volume}: not in its case")

    def bookmark(self, volume: str, version: Version) -> Version:
        """A bookmark of a snapshot, where the storage has such a thing."""
        raise NotImplementedError(f"no bookmark of {volume}@{version.name}: declared, and not in its case")


class MemoryCase(BackendCase):
    """:class:`~backends.memory.MemoryBackend`."""

    def __init__(self, name: str = "store", chunk_size: int = 256 * 1024) -> None:
        self.memory = MemoryBackend(name, checksums=checksum, chunk_size=chunk_size)
        self.backend = self.memory

    def reopen(self) -> None:
        pass

    def create(self, volume: str, data: bytes) -> None:
        self.memory.create(volume, data)

    def write(self, volume: str, offset: int, data: bytes) -> None:
        self.memory.write(volume, offset, data)

    def resize(self, volume: str, size: int) -> None:
        self.memory.resize(volume, size)

    def read(self, volume: str) -> bytes:
        return self.memory.read(volume)

    def read_snapshot(self, volume: str, version: Version | VersionRef) -> bytes:
        return self.memory.read(volume, as_ref(version))

    def damage(self, volume: str, version: Version | VersionRef, offset: int, data: bytes) -> None:
        self.memory.damage(volume, as_ref(version), offset, data)

    @contextmanager
    def in_use(self, volume: str) -> Iterator[None]:
        self.memory.attach(volume, "a guest")
        try:
            yield
        finally:
            self.memory.detach(volume)

    def bookmark(self, volume: str, version: Version) -> Version:
        return self.memory.bookmark(volume, version.ref, "mark")


def as_ref(version: Version | VersionRef) -> VersionRef:
    return version if isinstance(version, VersionRef) else version.ref
