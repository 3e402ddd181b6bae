"""Cursors: bookmarks beside our holds on a source.

A hold keeps a base from being destroyed by accident. Where somebody releases it and destroys the snapshot all the
same, the bookmark is still a base to send from. It is called ``TAG:GUID`` after the hold, and comes and goes with it.
"""

from __future__ import annotations

from backends.zfs.context import Context
from backends.zfs.listing import Dataset
from backends.zfs.naming import MAX_DATASET
from replicator.model import Role, Version, VersionKind, cursor_name, has_cursor


def make(context: Context, dataset: Dataset, version: Version, tag: str) -> None:
    """Bookmark a held snapshot, unless that is done."""
    name = _name(dataset, version.guid, tag)
    if name is None or any(v.name == name and v.kind is VersionKind.BOOKMARK for v in dataset.versions):
        return
    context.library.bookmark(f"{dataset.name}@{version.name}", f"{dataset.name}#{name}")


def remove(context: Context, dataset: Dataset, guid: str, tag: str) -> None:
    """Destroy the bookmark that goes with a hold, if it is there."""
    name = _name(dataset, guid, tag)
    primary = dataset.lineage is not None and dataset.lineage.role is Role.PRIMARY
    listed = any(v.name == name and v.kind is VersionKind.BOOKMARK for v in dataset.versions)
    if name is None or not (primary or listed):  # a replica has one only if it was a primary before
        return
    for error in context.library.destroy([f"{dataset.name}#{name}"]).values():
        raise error


def _name(dataset: Dataset, guid: str, tag: str) -> str | None:
    """None where there is none: other holds are short-lived."""
    name = cursor_name(tag, guid)
    return name if has_cursor(tag) and len(f"{dataset.name}#{name}") <= MAX_DATASET else None
