"""Cursors: bookmarks beside our holds on a source.

A hold keeps a base from being destroyed by accident. Where somebody releases it and destroys the snapshot all the
same, the bookmark is still a base to send from. It is called ``TAG:GUID`` after the hold, and comes and goes with it.
"""

from __future__ import annotations

from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, is_missing
from backends.zfs.listing import Dataset
from backends.zfs.naming import MAX_DATASET
from replicator.model import SNAPSHOT_PREFIX, Version, VersionKind

_PARTS = 4
"""Of the tag of a job and a target: ``replicator:JOB:NODE:STORAGE``; other holds are short-lived."""


def make(context: Context, dataset: Dataset, version: Version, tag: str) -> None:
    """Bookmark a held snapshot, unless that is done."""
    name = _name(dataset, version.guid, tag)
    if name is None or any(v.name == name and v.kind is VersionKind.BOOKMARK for v in dataset.versions):
        return
    full = f"{dataset.name}#{name}"
    done = context.attempt("zfs", "bookmark", f"{dataset.name}@{version.name}", full)
    if done.status != 0 and "exists" not in done.errors:
        raise failure(done, Operation(context.storage, full, "making the bookmark"))


def remove(context: Context, dataset: Dataset, guid: str, tag: str) -> None:
    """Destroy the bookmark that goes with a hold, if it is there."""
    name = _name(dataset, guid, tag)
    if not any(v.name == name and v.kind is VersionKind.BOOKMARK for v in dataset.versions):
        return
    full = f"{dataset.name}#{name}"
    done = context.attempt("zfs", "destroy", full)
    if done.status != 0 and not is_missing(done):
        raise failure(done, Operation(context.storage, full, "destroying the bookmark"))


def _name(dataset: Dataset, guid: str, tag: str) -> str | None:
    parts = tag.split(":")
    if parts[0] != SNAPSHOT_PREFIX or len(parts) != _PARTS:
        return None
    name = f"{tag}:{guid}"
    return name if len(f"{dataset.name}#{name}") <= MAX_DATASET else None
