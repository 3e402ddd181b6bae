"""Looks at many datasets at once: a few commands for all of them, whatever their number.

:func:`heads` tells whether datasets are what their newest snapshot is, without listing their snapshots. ZFS knows of
each dataset which snapshot is its newest (``prevsnap``) and how much was written since (``written``), both read in one
look at the dataset. So its cost does not grow with the number of snapshots.

``written`` counts what has reached the pool. What was written a moment ago is still in memory, so the pool is synced
first; that takes no longer than a snapshot.

:func:`states` lists all versions. Names are given one by one rather than with ``-r``: that is quicker (``-r`` looks at
each dataset once more for its children), and takes only what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from backends.zfs import aside, placeholders, properties
from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, is_missing
from backends.zfs.listing import (
    COLUMNS,
    SNAPSHOT_COLUMNS,
    Dataset,
    Row,
    dataset_of,
    ordered_versions,
    parse,
    versions_of,
)
from replicator.endpoint import Head
from replicator.errors import InvalidName
from replicator.model import Origin, Version, VolumeId, VolumeState
from replicator.names import check_snapshot

_NEWEST = "prevsnap"
HEAD_COLUMNS = (*COLUMNS, _NEWEST)
SYNC_DEADLINE = 60.0
"""Seconds; a pool that takes longer is busy or suspended, and nothing is known of it then."""
_ARGUMENTS = 96 << 10
"""Bytes of names given to one command (a Linux system takes 128 KiB and more)."""


def heads(context: Context, volumes: Sequence[str]) -> tuple[Head, ...]:
    """See :meth:`backends.base.Backend.heads`."""
    places = _places(context, volumes)
    if not places:
        return ()
    synced = context.attempt("zpool", "sync", context.names.pool, deadline=SYNC_DEADLINE)
    if synced.status != 0:
        raise failure(synced, Operation(context.storage, context.names.pool, "syncing"))
    found = {row.name: row for row in _look(context, HEAD_COLUMNS, tuple(places))}  # zfs list sorts
    if not found:
        context.require_root()
    rows = [found[name] for name in places if name in found]
    newest = _snapshots(context, [row[_NEWEST] for row in rows if "@" in row[_NEWEST]])
    return tuple(head for row in rows if (head := _head(context, places[row.name], row, newest)) is not None)


def states(context: Context, volumes: Sequence[str]) -> dict[str, VolumeState | None]:
    """The states of volumes by name, in three commands.

    Left out is what has to be looked at by itself: a name that ZFS cannot have, or a dataset that may be on its way to
    another name (see ``aside.py``).
    """
    places = _places(context, volumes)
    if not places:
        return {}
    names = tuple(places)
    heads_and_marks = list(_look(context, COLUMNS, names, "-d", "1", "-t", "filesystem,volume,bookmark"))
    snapshots = list(_look(context, SNAPSHOT_COLUMNS, names, "-d", "1", "-t", "snapshot"))
    held = context.listing.holds([row.name for row in snapshots if (row.number("userrefs") or 0) > 0])
    datasets = {row.name: row for row in heads_and_marks if row.name in places}
    versions: dict[str, list[Row]] = {name: [] for name in places}
    for row in (*snapshots, *heads_and_marks):
        if row.type in ("snapshot", "bookmark"):
            of = row.name.partition("@" if row.type == "snapshot" else "#")[0]
            versions.get(of, []).append(row)
    found: dict[str, VolumeState | None] = {}
    for name, volume in places.items():
        if name in datasets:
            own = ordered_versions(versions[name], held, [])
            dataset = dataset_of(datasets[name], {v.guid for v in own}, [])
            found[volume] = state_of(context, volume, replace(dataset, versions=tuple(own)))
    missing = [volume for volume in places.values() if volume not in found]
    if missing and not _some_on_their_way(context):
        found.update(dict.fromkeys(missing))
    return found


def state_of(context: Context, volume: str, dataset: Dataset | None) -> VolumeState | None:
    """A dataset as a volume; None for none, and for one that only holds others."""
    if dataset is None or dataset.is_placeholder:
        return None
    return VolumeState(
        VolumeId(context.storage, volume),
        dataset.volsize,
        dataset.versions,
        dataset.lineage,
        dataset.token.resume if dataset.token is not None else None,
        dataset.head_changed,
        origin_of(context, dataset),
        dataset.stream_form,
    )


def origin_of(context: Context, dataset: Dataset) -> Origin | None:
    """What a clone began as, where that is a volume of this storage."""
    name, _, snapshot = dataset.origin.partition("@")
    try:
        return Origin(VolumeId(context.storage, context.names.volume(name)), check_snapshot(snapshot))
    except InvalidName:
        return None


def _some_on_their_way(context: Context) -> bool:
    """Whether any dataset of the storage has a name that it is to have for a while only.

    :raises StorageUnavailable: the storage is not there at all
    """
    root = context.names.root
    command = ("zfs", "list", "-H", "-o", "name", "-t", "filesystem,volume", "-r", root)
    done = context.attempt(*command, deadline=LIST_DEADLINE)
    if is_missing(done):
        raise context.listing.absent()
    if done.status != 0:
        raise failure(done, Operation(context.storage, root, "listing"))
    return any(aside.is_passage(name) or placeholders.is_arrival(name) for name in done.output.split("\n"))


def _places(context: Context, volumes: Sequence[str]) -> dict[str, str]:
    """Volumes by their datasets, without those that can be none."""
    found = {}
    for volume in volumes:
        try:
            found[context.names.dataset(volume)] = volume
        except InvalidName:
            continue
    return found


def _head(context: Context, volume: str, row: Row, snapshots: dict[str, Version]) -> Head | None:
    named = row[_NEWEST]
    if named.partition("@")[0] != row.name:
        named = properties.UNSET  # a clone with no snapshots of its own: it is its origin that ZFS names
    newest = snapshots.get(named)
    if newest is None and "@" in named:
        return None  # gone since, or of a name that cannot be used
    problems: list[str] = []
    dataset: Dataset = dataset_of(row, {newest.guid} if newest else (), problems)
    if problems or dataset.is_placeholder or aside.is_passage(volume) or placeholders.is_arrival(volume):
        return None
    partial = row["receive_resume_token"] != properties.UNSET
    changed = newest is None or row.number("written") != 0
    return Head(VolumeId(context.storage, volume), newest, changed, dataset.lineage, partial)


def _snapshots(context: Context, wanted: Sequence[str]) -> dict[str, Version]:
    """These snapshots with their holds, by their full names."""
    rows = list(_look(context, SNAPSHOT_COLUMNS, wanted, "-t", "snapshot"))
    held = context.listing.holds([row.name for row in rows if (row.number("userrefs") or 0) > 0])
    found = {}
    for row in rows:
        for version in versions_of([row], held):
            found[row.name] = version
    return found


def _look(context: Context, columns: Sequence[str], wanted: Sequence[str], *options: str) -> Iterator[Row]:
    """Rows of these datasets or snapshots; one that is gone has none."""
    for names in _portions(wanted):
        command = ("zfs", "list", "-H", "-p", "-o", ",".join(columns), *options, *names)
        done = context.attempt(*command, deadline=LIST_DEADLINE)
        if done.status != 0 and not is_missing(done):
            raise failure(done, Operation(context.storage, names[0], "looking at"))
        yield from parse(done.output, columns)


def _portions(wanted: Sequence[str]) -> Iterator[list[str]]:
    """Names in portions that fit into the arguments of a command."""
    portion: list[str] = []
    size = 0
    for name in wanted:
        if portion and size + len(name) + 1 > _ARGUMENTS:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += len(name) + 1
    if portion:
        yield portion
