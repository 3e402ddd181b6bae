"""Promoting a replica and demoting a primary: a dataset becomes writable, or read-only, with what is said of it.

``zfs set`` sets all properties of one command at once, so a dataset is never writable under the role of a replica
because of a cut in between. ``canmount`` and ``mountpoint`` stay as they are.
"""

from __future__ import annotations

from backends.zfs import aside, forms, properties
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, says
from backends.zfs.listing import Dataset
from replicator.errors import VolumeChanged
from replicator.model import Lineage, VersionKind, VersionRef

_WRITABLE = "readonly=off"


def promote(context: Context, volume: str, lineage: Lineage, at: VersionRef) -> None:
    """See :meth:`backends.base.Backend.promote`."""
    dataset = context.require(volume)
    if dataset.find(at.guid, VersionKind.SNAPSHOT) is None:
        raise context.no_such(volume, at)
    _set(context, dataset, lineage, (_WRITABLE,), "promoting")


def demote(context: Context, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
    """See :meth:`backends.base.Backend.demote`."""
    dataset = context.require(volume)
    if at is not None:
        _make_idle(context, volume, dataset, at)
    _set(context, dataset, lineage, aside.REPLICA_PROPERTIES, "demoting")


def _set(context: Context, dataset: Dataset, lineage: Lineage, more: tuple[str, ...], doing: str) -> None:
    settings = properties.settings(lineage, forms.form_to_pin(context, dataset), dataset.guid)
    context.change("zfs", "set", *more, *settings, dataset.name, dataset=dataset.name, doing=doing)


def _make_idle(context: Context, volume: str, dataset: Dataset, at: VersionRef) -> None:
    """Unmount it and make it read-only first, so that what is then looked at stays as it is.

    :raises VolumeBusy: it is mounted and in use
    :raises VolumeChanged: it is not what that snapshot is; it can be written to as before
    """
    name = dataset.name
    if not dataset.is_zvol:
        done = context.attempt("zfs", "unmount", name)
        if done.status != 0 and not says(done, "not currently mounted"):
            raise failure(done, Operation(context.storage, name, "unmounting"))
    context.change("zfs", "set", *aside.REPLICA_PROPERTIES, name, dataset=name, doing="making read-only")
    context.attempt("zpool", "sync", context.names.pool)  # what was written before counts in what is listed now
    found = context.require(volume)
    newest = found.snapshots[-1] if found.snapshots else None
    if newest is None or newest.guid != at.guid or found.written > 0:
        context.change("zfs", "set", _WRITABLE, name, dataset=name, doing="making writable again")
        raise VolumeChanged(f"{context.names.label(volume)} was written to since {at.name}", hint="run it again")
