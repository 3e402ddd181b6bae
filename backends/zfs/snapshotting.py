"""Takes snapshots of many datasets of one pool in one transaction.

ZFS takes all of them or none. So what cannot have one is found out and left out, and the others are taken together all
the same: one dataset that went a moment ago, or is at its limit, must not keep a whole job from being protected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.listing import parse, versions_of
from replicator.endpoint import Taken
from replicator.errors import InvalidName, NoSuchSnapshot, NoSuchVolume, ReplicatorError
from replicator.model import Version, VolumeId

_COLUMNS = ("name", "type", "guid", "createtxg", "creation", "volsize")
Part = tuple[Context, Sequence[str]]
"""A storage, and volumes of it."""


def take_each(parts: Sequence[Part], name: str) -> tuple[Taken, ...]:
    """See :meth:`backends.base.Backend.snapshot_each`.

    :param parts: storages of one pool
    """
    context = parts[0][0]
    wanted: dict[VolumeId, str] = {}
    failed: dict[VolumeId, ReplicatorError] = {}
    for part, volumes in parts:
        for volume in volumes:
            identity = VolumeId(part.storage, volume)
            try:
                wanted[identity] = part.names.snapshot(volume, name)
            except InvalidName as error:
                failed[identity] = error
    there = named(context, wanted.values())
    missing = {volume: snapshot for volume, snapshot in wanted.items() if snapshot not in there}
    if missing:
        failed |= _no_volumes(parts, missing)
        left = list(dict.fromkeys(snapshot for volume, snapshot in missing.items() if volume not in failed))
        refused = _take(context, left)
        there |= named(context, left)
        failed |= {volume: refused[snapshot] for volume, snapshot in missing.items() if snapshot in refused}
    return tuple(
        _taken(VolumeId(part.storage, volume), wanted, there, failed) for part, volumes in parts for volume in volumes
    )


def _taken(
    volume: VolumeId,
    wanted: Mapping[VolumeId, str],
    there: Mapping[str, Version],
    failed: Mapping[VolumeId, ReplicatorError],
) -> Taken:
    version = there.get(wanted.get(volume, ""))
    if version is not None:
        return Taken(volume, version)
    gone = NoSuchSnapshot(f"the snapshot of {volume} was destroyed as soon as it was taken", hint="see `zpool history`")
    return Taken(volume, None, failed.get(volume, gone))


def named(context: Context, snapshots: Iterable[str]) -> dict[str, Version]:
    """Those of these snapshots that exist, by their full names."""
    snapshots = tuple(snapshots)
    if not snapshots:
        return {}
    argv = ("zfs", "list", "-H", "-p", "-t", "snapshot", "-o", ",".join(_COLUMNS), *snapshots)
    rows = list(parse(context.attempt(*argv, deadline=LIST_DEADLINE).output, _COLUMNS))
    return dict(zip((row.name for row in rows), versions_of(rows, {}), strict=True))


def _no_volumes(parts: Sequence[Part], missing: Mapping[VolumeId, str]) -> dict[VolumeId, ReplicatorError]:
    """Those that are no volumes of their storages."""
    failed: dict[VolumeId, ReplicatorError] = {}
    for context, volumes in parts:
        asked = [each for volume in volumes if (each := VolumeId(context.storage, volume)) in missing]
        if not asked:
            continue
        try:
            known = {volume for volume, _ in context.listing.all()[0]}
        except ReplicatorError as error:
            failed |= dict.fromkeys(asked, error)
            continue
        failed |= {each: _no_such(context, each) for each in asked if each.name not in known}
    return failed


def _no_such(context: Context, volume: VolumeId) -> NoSuchVolume:
    return NoSuchVolume(
        f"there is no volume {volume}", hint=f"zfs list -r {context.names.root} lists the datasets of the storage"
    )


def _take(context: Context, left: list[str]) -> dict[str, ReplicatorError]:
    """Take what can be taken of these, in one transaction; the others, and why."""
    failed: dict[str, ReplicatorError] = {}
    while left:
        try:
            told = context.library.try_snapshot(left)
        except ReplicatorError as error:
            return failed | dict.fromkeys(left, error)
        if not told:
            break
        blamed = _blamed(told, left) or _gone(context, left)
        if not blamed:  # it is none of them: the pool is full, or the user may not
            return failed | dict.fromkeys(left, next(iter(told.values())))
        failed |= blamed
        left = [snapshot for snapshot in left if snapshot not in blamed]
    return failed


def _blamed(told: Mapping[str, ReplicatorError], left: Sequence[str]) -> dict[str, ReplicatorError]:
    """Which of the snapshots are meant: by their own names, by their datasets', or by that of one above them."""
    found: dict[str, ReplicatorError] = {}
    for name, error in told.items():
        if name in left:
            meant = [name]
        elif not name or "@" in name:
            continue
        else:
            meant = [each for each in left if each.partition("@")[0] == name]
            meant = meant or [each for each in left if each.startswith(f"{name}/")]
        found |= {each: _of_dataset(error) for each in meant if each not in found}
    return found


def _of_dataset(error: ReplicatorError) -> ReplicatorError:
    """What is missing cannot be the snapshot, which is to be made."""
    if isinstance(error, NoSuchSnapshot):
        return NoSuchVolume(error.message, hint="it went a moment ago; the next run does without it")
    return error


def _gone(context: Context, left: Sequence[str]) -> dict[str, ReplicatorError]:
    """Those whose datasets are not there any more."""
    datasets = {snapshot: snapshot.partition("@")[0] for snapshot in left}
    argv = ("zfs", "list", "-H", "-o", "name", "-t", "filesystem,volume", *dict.fromkeys(datasets.values()))
    there = set(context.attempt(*argv, deadline=LIST_DEADLINE).output.split("\n"))
    if there.isdisjoint(datasets.values()):  # none at all: that has another reason
        return {}
    return {
        snapshot: NoSuchVolume(
            f"storage {context.storage}: there is no dataset {dataset} any more",
            hint="it went a moment ago; the next run does without it",
        )
        for snapshot, dataset in datasets.items()
        if dataset not in there
    }
