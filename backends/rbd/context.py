"""What every operation of one RBD storage needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime

from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, read_catalog
from backends.rbd.cluster import Connection, Session, is_absent
from backends.rbd.locks import Lease
from backends.rbd.naming import Naming, Place
from replicator.checksums import Checksums
from replicator.errors import NoSuchVolume


@dataclass(frozen=True, slots=True)
class Context:
    """One RBD storage.

    :ivar clock: the time now, with a time zone
    """

    storage: str
    naming: Naming
    connection: Connection
    checksums: Checksums
    lease: Lease
    clock: Callable[[], datetime]

    def label(self, volume: str) -> str:
        """A volume as people write it."""
        return f"{self.storage}:{volume}"

    def session(self, doing: str) -> AbstractContextManager[Session]:
        """Work with the cluster; see :meth:`backends.rbd.cluster.Connection.session`."""
        return self.connection.session(doing)

    @contextmanager
    def opened(self, session: Session, volume: str, *, read_only: bool = True) -> Iterator[tuple[Image, Catalog]]:
        """A volume's image at its head, and what is known of it. :raises NoSuchVolume:"""
        with self.opened_at(session, self.naming.place(volume), self.label(volume), read_only=read_only) as found:
            yield found

    @contextmanager
    def opened_at(
        self, session: Session, place: Place, label: str, *, read_only: bool = True
    ) -> Iterator[tuple[Image, Catalog]]:
        """The same of an image that need not be a volume (yet). :raises NoSuchVolume:"""
        image = session.image(place, read_only=read_only)
        try:
            opened = image.__enter__()
        except session.binding.errors as error:
            if is_absent(error):
                raise self.no_volume(label) from None
            raise
        try:
            yield opened, read_catalog(session, opened, label)
        finally:
            image.__exit__(None, None, None)

    @staticmethod
    def no_volume(label: str) -> NoSuchVolume:
        """The refusal of what needs a volume."""
        return NoSuchVolume(f"there is no volume {label}", hint="correct the volume's name; `rbd ls` lists the images")
