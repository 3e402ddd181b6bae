"""Destroys many versions of a dataset at once.

One snapshot that is held or cloned keeps all that are destroyed with it (znapzend#96). So what is held is left out
before, and :meth:`~backends.zfs.library.Library.destroy` sees to the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.zfs.context import Context
from backends.zfs.listing import Dataset
from replicator.errors import ReplicatorError, SnapshotHeld
from replicator.model import Version, VersionRef


def destroy_all(
    context: Context, volume: str, dataset: Dataset, versions: Sequence[VersionRef]
) -> dict[VersionRef, ReplicatorError]:
    """See :meth:`backends.base.Backend.destroy_all`.

    :param dataset: the volume, as it was listed just now
    """
    failed: dict[VersionRef, ReplicatorError] = {}
    going: dict[str, VersionRef] = {}
    for ref in versions:
        version = dataset.find(ref.guid, ref.kind)
        if version is not None and version.holds:
            failed[ref] = held(context.names.label(volume), version)
        elif version is not None:
            going[context.full_name(dataset.name, version)] = ref
    if going:
        failed |= {going[name]: error for name, error in context.library.destroy(tuple(going)).items()}
    return failed


def held(label: str, version: Version) -> SnapshotHeld:
    """The error for a snapshot that has holds."""
    return SnapshotHeld(
        f"snapshot {version.name} of {label} is held by {', '.join(version.holds)}",
        hint="the job that holds it releases it once its target has a newer one",
    )
