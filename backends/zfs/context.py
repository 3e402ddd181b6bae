"""What all parts of a ZFS storage work with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from backends.zfs.commands import CHANGE_DEADLINE, Finished, Runner
from backends.zfs.failures import Operation, failure, is_missing
from backends.zfs.library import Library
from backends.zfs.listing import Dataset, Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.properties import UNSET
from replicator.errors import NoSuchSnapshot, NoSuchVolume
from replicator.model import Version, VersionKind, VersionRef

GLANCE = 100
"""Snapshots that are looked at by their names; more are found in the whole listing."""


@dataclass(frozen=True, slots=True)
class Context:
    """One storage: its names, its commands, its listings.

    :ivar choose: says what changes snapshots, holds and bookmarks, see :attr:`library`
    :ivar moving: held while datasets are renamed in several steps, so that nobody completes what is under way
    """

    names: DatasetNames
    runner: Runner
    listing: Listing
    choose: Callable[[], Library]
    moving: threading.RLock = field(default_factory=threading.RLock, compare=False)

    @property
    def library(self) -> Library:
        """What changes snapshots, holds and bookmarks."""
        return self.choose()

    @property
    def storage(self) -> str:
        """The storage's name."""
        return self.names.storage

    def attempt(self, *argv: str, deadline: float = CHANGE_DEADLINE) -> Finished:
        """Run a command, whatever comes of it."""
        return self.runner.run(argv, deadline)

    def change(self, *argv: str, dataset: str, doing: str, deadline: float = CHANGE_DEADLINE) -> Finished:
        """Run a command that must succeed. :raises StorageError: it did not"""
        done = self.runner.run(argv, deadline)
        if done.status != 0:
            raise failure(done, Operation(self.storage, dataset, doing))
        return done

    def change_if_there(self, *argv: str, dataset: str, doing: str) -> bool:
        """Run a command that has nothing to do where its dataset is gone; whether it was there."""
        done = self.runner.run(argv, CHANGE_DEADLINE)
        if is_missing(done):
            return False
        if done.status != 0:
            raise failure(done, Operation(self.storage, dataset, doing))
        return True

    # -- looking things up

    def look(self, volume: str) -> Dataset | None:
        """A volume with its versions; None if there is none of that name.

        :raises StorageUnavailable: the whole storage is not there
        """
        dataset = self.names.dataset(volume)
        found = self.listing.dataset(dataset)
        if found is None:
            self.require_root()
            return None
        return found

    def glance(self, volume: str, refs: Sequence[VersionRef], *, holds: bool = False) -> Dataset | None:
        """A volume with at least those versions that it has of these: one command where they are snapshots, few, and
        called as they were, whatever the number of the others. A version is found by its guid all the same.

        :param holds: whether those of the versions are looked up; else they may seem to have none
        :raises StorageUnavailable: the whole storage is not there
        """
        if len(refs) > GLANCE or any(ref.kind is not VersionKind.SNAPSHOT for ref in refs):
            return self.look(volume)
        found = self.listing.some(
            self.names.dataset(volume), tuple(dict.fromkeys(ref.name for ref in refs)), holds=holds
        )
        if found is None:
            self.require_root()
            return None
        if any(found.find(ref.guid) is None for ref in refs):
            return self.look(volume)
        # Whose lineage it is may be told by a snapshot that was not asked for.
        known = found.lineage is not None or found.of in (UNSET, found.guid)
        return found if known else self.look(volume)

    def require(self, volume: str, only: Sequence[VersionRef] | None = None) -> Dataset:
        """A volume that must exist. :raises NoSuchVolume:

        :param only: the versions that matter, see :meth:`glance`; None: all
        """
        found = self.look(volume) if only is None else self.glance(volume, only)
        if found is None or found.is_placeholder:
            raise NoSuchVolume(
                f"there is no volume {self.names.label(volume)}",
                hint=f"zfs list -r {self.names.root} lists the datasets of the storage",
            )
        return found

    def require_root(self) -> None:
        """:raises StorageUnavailable: the storage's root dataset is not there"""
        if self.listing.quick(self.names.root) is None:
            raise self.listing.absent()

    def full_name(self, dataset: str, version: VersionRef | Version) -> str:
        """``DATASET@SNAPSHOT`` or ``DATASET#BOOKMARK``."""
        return f"{dataset}{'@' if version.kind is VersionKind.SNAPSHOT else '#'}{version.name}"

    def version(self, volume: str, dataset: Dataset, ref: VersionRef) -> Version:
        """The version of that identity: of the kind asked for, or else the other. :raises NoSuchSnapshot:"""
        other = VersionKind.BOOKMARK if ref.kind is VersionKind.SNAPSHOT else VersionKind.SNAPSHOT
        found = dataset.find(ref.guid, ref.kind) or dataset.find(ref.guid, other)
        if found is None:
            raise self.no_such(volume, ref)
        return found

    def snapshot(self, volume: str, dataset: Dataset, ref: VersionRef) -> Version:
        """The snapshot of that identity. :raises NoSuchSnapshot: there is none, or only a bookmark"""
        found = dataset.find(ref.guid)
        if found is None:
            raise self.no_such(volume, ref)
        return found

    def no_such(self, volume: str, ref: VersionRef) -> NoSuchSnapshot:
        """The error for a version that is gone."""
        label = self.names.label(volume)
        return NoSuchSnapshot(
            f"volume {label} has no {ref.kind} {ref.name} (guid {ref.guid})",
            hint=f"`replicator snapshots {label}` lists what there is",
        )
