"""Promoting a replica and demoting a primary: the head of an image is its live data, so only what is said of it
changes.

Both are done as the only writer, with nobody else having the image open.
"""

from __future__ import annotations

from backends.rbd import records
from backends.rbd.catalog import mark_head
from backends.rbd.context import Context
from backends.rbd.target import Target, writable
from replicator.cancellation import Cancellation
from replicator.errors import VolumeChanged
from replicator.model import Lineage, Role, VersionRef


def change(context: Context, volume: str, lineage: Lineage, at: VersionRef) -> None:
    """Give an image whose head is that version another role. :raises VolumeBusy, VolumeChanged:"""
    place, label = context.naming.place(volume), context.label(volume)
    doing = "promoting it" if lineage.role is Role.PRIMARY else "demoting it"
    with context.session(f"{doing}: {volume}") as session:
        with context.opened(session, volume) as (_, seen):
            if seen.lineage == lineage:  # it is one step, so nothing is left to do; and it may be in use by now
                seen.require(at)
                return
        with writable(context, session, place, label, doing, Cancellation()) as target:
            _change(target, lineage, at)


def _change(target: Target, lineage: Lineage, at: VersionRef) -> None:
    found = target.catalog.require(at)
    if target.catalog.lineage == lineage:
        return
    if target.catalog.versions[-1].guid != found.version.guid or not target.head_is(found):
        raise VolumeChanged(f"{target.label} was written to since {at.name}", hint="run it again")
    if lineage.role is Role.REPLICA and target.catalog.head is None:
        target.still_ours()
        mark_head(target.image, target.catalog, found.version.guid)
    target.still_ours()
    target.image.metadata_set(records.LINEAGE, records.encode_lineage(lineage, target.catalog.image))
