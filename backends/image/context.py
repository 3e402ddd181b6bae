"""What every operation of one image storage needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime

from backends.image.catalog import Catalog, Snapshot
from backends.image.copying import Digester
from backends.image.durable import Files
from backends.image.failures import storage_errors
from backends.image.layout import Layout
from backends.image.reading import Image, snapshot_shrunk
from replicator.checksums import Checksums
from replicator.errors import DamagedData


@dataclass(frozen=True, slots=True)
class Context:
    """One image storage.

    :ivar workers: threads that write a received stream
    :ivar clock: the time now, with a time zone
    :ivar reflink: whether files of the storage can share blocks
    """

    storage: str
    layout: Layout
    files: Files
    checksums: Checksums
    workers: int
    clock: Callable[[], datetime]
    reflink: Callable[[], bool]

    def label(self, volume: str) -> str:
        """A volume as people write it."""
        return f"{self.storage}:{volume}"

    def catalog(self, volume: str) -> Catalog:
        """A volume's private directory, which need not exist."""
        return Catalog(self.label(volume), self.layout.private_folder(volume), self.files)

    def made_catalog(self, volume: str) -> Catalog:
        """The same, made durably if it is missing."""
        return Catalog(self.label(volume), self.layout.make_private_folder(volume), self.files)

    def errors(self, doing: str, need: int | None = None) -> AbstractContextManager[None]:
        """Turn OSErrors into StorageErrors; see :func:`backends.image.failures.storage_errors`."""
        return storage_errors(self.storage, self.layout.root, doing, need=need)

    def digester(self, key: bytes) -> Digester:
        """Digests with a volume's own key."""
        return Digester(self.checksums, key)

    @contextmanager
    def open_image(self, volume: str, snapshot: Snapshot) -> Iterator[Image]:
        """A snapshot's image, open for reading. :raises DamagedData: it has not its size (any more)"""
        fd = os.open(snapshot.image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            label = f"{self.label(volume)}@{snapshot.version.name}"
            size = os.fstat(fd).st_size
            if size != snapshot.meta.size:
                raise DamagedData(
                    f"the image of {label} has {size} bytes instead of {snapshot.meta.size}",
                    hint="somebody changed a file below .replicator; destroy that snapshot, then `replicator resync`",
                )
            yield Image(fd, size, label, snapshot_shrunk)
        finally:
            os.close(fd)
