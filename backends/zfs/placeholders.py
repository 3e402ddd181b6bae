"""Datasets without data that only hold others, and how they give way to the replica that they stand for.

A replica may arrive below a place where its parent is not: then the parent is a placeholder. When the parent itself
arrives later, it is received beside the placeholder and takes its place once it is complete::

    prox1/top                        (placeholder)        prox1/top    <- received
    prox1/top/below                                  ->   prox1/top/below
    prox1/top.replicator-arriving    <- being received

A first copy that was begun in its place, and cannot be continued, gives way to a placeholder in the same manner where
datasets are below it: ZFS does not discard it before.

So nothing is ever received with ``-F``, an encrypted parent can follow its children (ZFS does not receive that over an
unencrypted dataset), and the datasets below keep their names meanwhile. The last part is three kinds of commands: each
dataset below is moved under what arrived, the placeholder is destroyed, what arrived gets the name. A power cut between
two of them leaves what :func:`settle` completes.
"""

from __future__ import annotations

from backends.zfs import properties
from backends.zfs.commands import CHANGE_DEADLINE
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, is_missing
from backends.zfs.listing import Dataset
from backends.zfs.naming import MAX_DATASET
from replicator.errors import InvalidName, NotAReplica, SnapshotExists
from replicator.units import format_size

ARRIVING = "replicator-arriving"
"""What the name of a replica ends with while it is received beside its placeholder."""
MAKING = "replicator-making"
"""What the name of a placeholder ends with until it is marked as one."""
MAX_EMPTY = 1 << 20
"""Bytes that a filesystem without files may have (about 100 KiB with three copies of its metadata)."""


def arrival_of(dataset: str) -> str:
    """Where the replica arrives that ``dataset`` stands for. :raises InvalidName: the name is too long for that"""
    name = f"{dataset}.{ARRIVING}"
    if len(name) > MAX_DATASET:
        raise InvalidName(f"{dataset} has too long a name to be received beside its placeholder", hint="rename it")
    return name


def is_arrival(volume: str) -> bool:
    """Whether this is the name of something that arrives, or below one; or of a placeholder that is being made."""
    return any(part.endswith((f".{ARRIVING}", f".{MAKING}")) for part in volume.split("/"))


def make_holder(context: Context, dataset: str, stands_for: str) -> None:
    """A filesystem without data that only holds others."""
    settings = ("canmount=off", "mountpoint=none", f"{properties.PLACEHOLDER}={stands_for}")
    options = [word for setting in settings for word in ("-o", setting)]
    context.change("zfs", "create", "-u", *options, dataset, dataset=dataset, doing="making the placeholder")


def make_placeholder(context: Context, dataset: str) -> None:
    """Have a placeholder of that name; nothing happens if there is something.

    ZFS gives a new dataset its properties a moment after it is there. Under its own name it would be somebody else's
    until then, and for ever after a power cut: so it gets that name last.
    """
    with context.moving:
        if context.listing.quick(dataset) is not None:
            return
        making = f"{dataset}.{MAKING}"
        try:
            make_holder(context, making, dataset)
        except SnapshotExists:  # a power cut came between
            mark = f"{properties.PLACEHOLDER}={dataset}"
            settings = ("canmount=off", "mountpoint=none", mark)
            context.change("zfs", "set", *settings, making, dataset=making, doing="making the placeholder")
        try:
            move(context, making, dataset)
        except SnapshotExists:  # what it was to stand for has begun to arrive, in its place
            context.change_if_there("zfs", "destroy", making, dataset=making, doing="removing the placeholder")


def make_parents(context: Context, dataset: str) -> None:
    """Make the datasets above this one that are missing, as placeholders."""
    root = context.names.root
    place = root
    missing = False
    for part in dataset.removeprefix(root + "/").split("/")[:-1]:
        place = f"{place}/{part}"
        missing = missing or context.listing.quick(place) is None
        if missing:
            make_placeholder(context, place)


def settle(context: Context, dataset: str) -> tuple[Dataset | None, bool]:
    """Put what has arrived completely in its place.

    :return: what is still arriving, None if nothing is; and whether something was moved
    """
    with context.moving:
        arrival = context.listing.dataset(arrival_of(dataset))
        if arrival is None:
            return None, False
        there = context.listing.dataset(dataset)
        if there is not None and not there.is_placeholder:  # somebody has the name: it is for people to see
            return None, False
        if not arrival.snapshots and arrival.children:
            _bring_back(context, arrival, dataset, there)
            return context.listing.dataset(arrival.name), True
        if there is None:
            move(context, arrival.name, dataset)
        elif not arrival.snapshots:
            return arrival, False
        else:
            replace(context, there, arrival.name)
        return None, True


def vacate(context: Context, begun: Dataset) -> str:
    """Have a placeholder in the place of a first copy that was begun there and has datasets below it.

    :return: where the first copy is now
    """
    with context.moving:
        arrival = arrival_of(begun.name)
        move(context, begun.name, arrival)  # from here on settle() completes it
        settle(context, begun.name)
        return arrival


def _bring_back(context: Context, arrival: Dataset, dataset: str, there: Dataset | None) -> None:
    """What has only begun to arrive holds no others: what is below it stays where it was."""
    if there is None:
        make_placeholder(context, dataset)
    for child in arrival.children:
        move(context, child, dataset + child.removeprefix(arrival.name))


def replace(context: Context, placeholder: Dataset, by: str) -> None:
    """Give a placeholder's name, and all that is below it, to another dataset.

    :raises NotAReplica: somebody keeps data in it, or has snapshots of it
    """
    if placeholder.written > MAX_EMPTY or placeholder.snapshots:
        raise NotAReplica(
            f"{placeholder.name} is a placeholder of ours, and somebody uses it: it has "
            f"{format_size(placeholder.written)} of data and {len(placeholder.snapshots)} snapshots",
            hint=f"move that elsewhere, or keep it under another name: zfs rename {placeholder.name} NEW",
        )
    with context.moving:
        for child in placeholder.children:
            move(context, child, by + child.removeprefix(placeholder.name))
        context.change("zfs", "destroy", placeholder.name, dataset=placeholder.name, doing="removing the placeholder")
        move(context, by, placeholder.name)


def move(context: Context, old: str, new: str) -> None:
    """Rename a dataset; nothing happens if that is done already."""
    done = context.runner.run(("zfs", "rename", old, new), CHANGE_DEADLINE)
    if done.status == 0 or (is_missing(done) and context.listing.quick(new) is not None):
        return
    raise failure(done, Operation(context.storage, old, "renaming"))
