"""Puts a replica back to one of its snapshots without losing what came after it.

::

    DATASET        s1 ── s2 ── own ── (live)         DATASET                          s1 ── s2
                                              →                                             └─ own ── diverged-T
                                                     DATASET-diverged-T  (a clone of DATASET@s2)

No data is copied. In order: a snapshot of the live data; a clone of ``s2`` under a name of passage, promoted, so that
it has the common snapshots; the datasets below are moved under it, because they are volumes of their own and stay where
they were; then both are renamed. A power cut between two of these leaves what :func:`look` completes: as long as there
is a dataset with the name of passage, the work is not done.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.zfs import placeholders, properties
from backends.zfs.context import Context
from backends.zfs.listing import Dataset
from backends.zfs.naming import MAX_DATASET
from replicator.errors import InvalidName
from replicator.model import DIVERGED_PREFIX, SNAPSHOT_PREFIX, Version

PASSAGE = "replicator-rejoin"
"""What the name of the clone ends with while it is not in its place."""
REPLICA_PROPERTIES = ("readonly=on",)
FILESYSTEM_PROPERTIES = ("canmount=noauto",)


def look(context: Context, volume: str) -> Dataset | None:
    """A volume with its versions, None if there is none; completes first what a power cut interrupted.

    Of a replica that is being received beside its placeholder, what has come so far: its ``name`` says where that is.
    """
    found = context.look(volume)
    if found is None:
        place = context.names.dataset(volume)
        while place != context.names.root:  # it may have been on its way with a dataset above it
            if _complete(context, place):
                found = context.look(volume)
            place = place.rpartition("/")[0]
        if found is None:
            return None
    if found.is_placeholder:
        arriving, moved = placeholders.settle(context, found.name)
        found = arriving or (context.look(volume) if moved else found)
    elif found.is_leaving:
        with context.moving:
            if not finish(context, found.name):
                context.change_if_there(
                    "zfs", "inherit", properties.PLACEHOLDER, found.name, dataset=found.name, doing="putting back"
                )
        found = context.look(volume)
    return found


def _complete(context: Context, dataset: str) -> bool:
    """Whether something was on its way to that name, and is there now."""
    with context.moving:
        return finish(context, dataset) or placeholders.settle(context, dataset)[1]


def detach(context: Context, dataset: Dataset, base: Version | None, name: str) -> str:
    """Have ``dataset`` end with ``base`` (None: have no data), and keep all after it as another dataset.

    :param name: of the snapshot of the live data, and what is added to the dataset's name
    :return: the other dataset's name
    """
    if (dataset.written > 0 or base is None) and dataset.named(name) is None:
        context.library.snapshot([f"{dataset.name}@{name}"])
    with context.moving:
        return _detach(context, dataset, base, name)


def _detach(context: Context, dataset: Dataset, base: Version | None, name: str) -> str:
    kept = f"{dataset.name}-{name}"
    passage = passage_of(dataset.name)
    newer = [v for v in dataset.snapshots if base is None or v.position > base.position]
    if base is None and not dataset.children:
        _release(context, dataset.name, newer)
        placeholders.move(context, dataset.name, kept)
        return kept
    if dataset.lineage is not None:  # from now on look() asks whether the work was done to its end
        setting = f"{properties.PLACEHOLDER}={dataset.name}"
        context.change("zfs", "set", setting, dataset.name, dataset=dataset.name, doing="putting back")
    if base is not None:
        settings = [*REPLICA_PROPERTIES, *(() if dataset.is_zvol else FILESYSTEM_PROPERTIES)]
        if dataset.lineage is not None:
            settings += properties.settings(dataset.lineage, dataset.default_form, base.guid)
        context.change(
            "zfs", "clone", *options(settings), f"{dataset.name}@{base.name}", passage,
            dataset=dataset.name, doing="putting back",
        )  # fmt: skip
        context.change("zfs", "promote", passage, dataset=passage, doing="putting back")
    else:
        placeholders.make_holder(context, passage, dataset.name)
    _swap(context, dataset.name, newer, dataset.children, kept)
    return kept


def finish(context: Context, dataset: str) -> bool:
    """Complete what a power cut interrupted; whether there was anything."""
    with context.moving:
        return _finish(context, dataset)


def _finish(context: Context, dataset: str) -> bool:
    passage = context.listing.dataset(passage_of(dataset))
    if passage is None:
        return False
    there = context.listing.dataset(dataset)
    holder = passage.stands_for == dataset
    if not passage.snapshots and not holder:  # a clone that was not promoted yet: nothing in it is its own
        context.change("zfs", "destroy", passage.name, dataset=passage.name, doing="discarding")
    elif there is None:
        placeholders.move(context, passage.name, dataset)
    else:
        kept = [v.name for v in there.snapshots if v.is_diverged]
        newest = there.snapshots[-1].name if there.snapshots else "unnamed"
        suffix = kept[-1] if kept else DIVERGED_PREFIX + newest
        _swap(context, dataset, there.snapshots, there.children, f"{dataset}-{suffix}")
    return True


def passage_of(dataset: str) -> str:
    """The name of passage of a dataset."""
    name = f"{dataset}.{PASSAGE}"
    if len(name) > MAX_DATASET:
        raise InvalidName(f"{dataset} has too long a name to be put back to a snapshot", hint="rename it")
    return name


def is_passage(volume: str) -> bool:
    """Whether this is a name of passage."""
    return volume.endswith(f".{PASSAGE}")


def options(settings: Iterable[str]) -> tuple[str, ...]:
    """``-o`` before each."""
    return tuple(word for setting in settings for word in ("-o", setting))


def _swap(context: Context, dataset: str, own: Iterable[Version], children: Iterable[str], kept: str) -> None:
    passage = passage_of(dataset)
    _release(context, dataset, own)
    for child in children:
        placeholders.move(context, child, passage + child.removeprefix(dataset))
    placeholders.move(context, dataset, kept)
    placeholders.move(context, passage, dataset)


def _release(context: Context, dataset: str, versions: Iterable[Version]) -> None:
    """Release what jobs of ours hold of a dataset that is kept aside: no run is to continue from it, and whoever
    decides that it is not needed any more could not destroy it."""
    for version in versions:
        for tag in version.holds:
            if tag.partition(":")[0] == SNAPSHOT_PREFIX:
                context.library.release(context.full_name(dataset, version), tag)
