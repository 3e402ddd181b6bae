"""Promoting a replica and demoting a primary: a dataset becomes writable, or read-only, with what is said of it.

What is atomic is one ``zfs set`` of one dataset: lineage, epoch, role and ``readonly`` are one task of one transaction
group (``dsl_props_set``), so a power cut leaves all of them or none. Everything else is put in an order in which each
state between two commands is one that the same call, made again, goes on from:

promotion
    What was kept of somebody's writing goes aside (:mod:`backends.zfs.aside` completes that after a cut): still a
    replica. Then the one ``zfs set``: a primary. Then the device of a zvol follows.
demotion
    It is unmounted, and read-only; only then it is looked at. A cut: a primary that cannot be written to, until it is
    promoted or demoted again. Then the one ``zfs set``: a replica.

Should a ``zfs set`` fail (ZFS then tries each property by itself), the epoch comes before the role, and what makes a
dataset writable last. ZFS has no compare-and-set for properties: what is compared is read by the endpoint, under its
lock, just before.

``canmount`` and ``mountpoint`` stay as they are, and nothing is mounted: that is for whoever uses it.
"""

from __future__ import annotations

import logging

from backends.zfs import aside, devices, forms, properties, usage
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, says
from backends.zfs.listing import Dataset
from replicator.errors import ReplicatorError, StorageUnavailable, VolumeBusy, VolumeChanged
from replicator.model import Lineage, Version, VersionRef

_WRITABLE = "readonly=off"

log = logging.getLogger(__name__)


def promote(context: Context, volume: str, lineage: Lineage, at: VersionRef) -> None:
    """See :meth:`backends.base.Backend.promote`.

    :raises VolumeBusy: it is the primary, and a zvol that somebody has read and not let go of stays read-only so far
    """
    dataset = _existing(context, volume)
    base = dataset.find(at.guid)
    if base is None:
        raise context.no_such(volume, at)
    if dataset.lineage == lineage:  # a demotion, or this, was cut off
        _change(context, dataset, _WRITABLE, doing="making writable")
    else:
        dataset = _ending_with(context, volume, dataset, base)
        mark(context, dataset, lineage, doing="promoting", last=(_WRITABLE,))
    if dataset.is_zvol and not devices.settle(dataset.name, read_only=False):
        users = ", ".join(usage.users_of(dataset)) or "somebody"
        raise VolumeBusy(
            f"{context.names.label(volume)} is the primary, but its device stays read-only while {users} has it open",
            hint="stop what reads it; its device is writable for whoever opens it next",
        )


def _ending_with(context: Context, volume: str, dataset: Dataset, base: Version) -> Dataset:
    """Have its live data be that of ``base``: what was kept of what somebody wrote becomes a dataset of its own."""
    newer = [version for version in dataset.snapshots if version.position > base.position]
    if dataset.written > 0 or not all(version.is_diverged for version in newer):
        raise VolumeChanged(
            f"{context.names.label(volume)} has more than {base.name}, which is in no dataset that is kept",
            hint="run it again: that is kept aside first",
        )
    if not newer:
        return dataset
    aside.detach(context, dataset, base, newer[-1].name)
    return _existing(context, volume)


def demote(context: Context, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
    """See :meth:`backends.base.Backend.demote`."""
    dataset = _existing(context, volume)
    if at is not None and dataset.lineage != lineage:
        _make_idle(context, volume, dataset, at)
    mark(context, dataset, lineage, doing="demoting", first=aside.REPLICA_PROPERTIES)


def mark(
    context: Context,
    dataset: Dataset,
    lineage: Lineage,
    *,
    doing: str,
    first: tuple[str, ...] = (),
    last: tuple[str, ...] = (),
) -> None:
    """Say what a dataset is, and set what goes with it, at once. The form of its streams is pinned with it.

    A filesystem in which files are open for writing cannot be remounted, and is read-only all the same: OpenZFS 2.3
    calls that a failure.
    """
    settings = (*first, *properties.settings(lineage, forms.form_to_pin(context, dataset), dataset.guid), *last)
    done = context.attempt("zfs", "set", *settings, dataset.name)
    if done.status == 0:
        return
    if says(done, "unable to remount"):
        found = context.listing.quick(dataset.name)
        if found is not None and found.lineage == lineage:
            return
    raise failure(done, Operation(context.storage, dataset.name, doing))


def _existing(context: Context, volume: str) -> Dataset:
    """A volume; what a cut has left half done of keeping something aside is completed first."""
    found = aside.look(context, volume)
    return found if found is not None and not found.is_placeholder else context.require(volume)


def _change(context: Context, dataset: Dataset, *settings: str, doing: str) -> None:
    context.change("zfs", "set", *settings, dataset.name, dataset=dataset.name, doing=doing)


def _make_idle(context: Context, volume: str, dataset: Dataset, at: VersionRef) -> None:
    """Unmount it and make it read-only, so that what is then looked at stays as it is.

    :raises VolumeBusy, VolumeChanged: it is in use, or not what that snapshot is; it is as before
    """
    label = context.names.label(volume)
    mounted = not dataset.is_zvol and _unmounted(context, label, dataset)
    read_only = False
    try:
        usage.check_idle(context, label, dataset)  # who uses it must not notice that we asked
        read_only = True
        _change(context, dataset, *aside.REPLICA_PROPERTIES, doing="making read-only")
        if dataset.is_zvol and not devices.settle(dataset.name, read_only=True):
            usage.check_idle(context, label, dataset)
            raise StorageUnavailable(f"the device of {label} does not become read-only", hint="see dmesg")
        usage.check_idle(context, label, dataset)
        _check_same(context, volume, at)
    except ReplicatorError:
        _as_before(context, dataset, read_only=read_only, mounted=mounted)
        raise


def _unmounted(context: Context, label: str, dataset: Dataset) -> bool:
    """Unmount a filesystem; whether it was mounted. One that is mounted by other ways than ZFS's own is left so.

    :raises VolumeBusy: it is in use
    """
    below = usage.below(dataset.name)
    if below:
        raise VolumeBusy(
            f"{label} cannot be unmounted: {below} is mounted in a folder of it",
            hint="demote, or unmount, what is below it first",
        )
    done = context.attempt("zfs", "unmount", dataset.name)
    if done.status == 0:
        return True
    if says(done, "not currently mounted") or says(done, "legacy mountpoint"):
        return False
    error = failure(done, Operation(context.storage, dataset.name, "unmounting"))
    users = [user for user in usage.users_of(dataset) if not user.startswith("a mount")]
    if isinstance(error, VolumeBusy) and users:
        raise VolumeBusy(
            f"{label} is in use by {', '.join(users)}, so it cannot become a replica",
            hint="stop what uses it, then run it again",
        ) from error
    raise error


def _check_same(context: Context, volume: str, at: VersionRef) -> None:
    context.attempt("zpool", "sync", context.names.pool)  # what was written before counts in what is listed now
    found = context.require(volume)
    newest = found.snapshots[-1] if found.snapshots else None
    if newest is None or newest.guid != at.guid or found.written > 0:
        raise VolumeChanged(f"{context.names.label(volume)} was written to since {at.name}", hint="run it again")


def _as_before(context: Context, dataset: Dataset, *, read_only: bool, mounted: bool) -> None:
    """Let whoever used it go on."""
    try:
        if read_only:
            _change(context, dataset, _WRITABLE, doing="making writable again")
            if dataset.is_zvol:
                devices.settle(dataset.name, read_only=False)
        if mounted:
            context.change("zfs", "mount", dataset.name, dataset=dataset.name, doing="mounting again")
    except ReplicatorError as error:
        log.error("%s stays read-only, or unmounted: %s; `replicator promote` puts it in order", dataset.name, error)
