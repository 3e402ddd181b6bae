"""Gives a replica the name that its source has now."""

from __future__ import annotations

from backends.zfs import aside, placeholders
from backends.zfs.context import Context
from replicator.errors import NoSuchVolume


def rename(context: Context, volume: str, new: str) -> None:
    """Rename a replica with all that is below it; a placeholder of the new name gives way.

    What was half received stays, to be continued.
    """
    target = context.names.dataset(new)
    found = aside.look(context, volume)
    if found is None or found.is_placeholder:
        raise NoSuchVolume(f"there is no volume {context.names.label(volume)}", hint="plan again")
    taken = context.listing.dataset(target)
    if taken is None:
        placeholders.make_parents(context, target)
        placeholders.move(context, found.name, target)
        return
    with context.moving:
        arrival = placeholders.arrival_of(target)
        placeholders.move(context, found.name, arrival)  # from here on look() completes it
        placeholders.settle(context, target)
