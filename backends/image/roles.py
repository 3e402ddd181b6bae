"""Promoting a replica, which gets a live image, and demoting a primary, whose live image is taken away.

A replica is its snapshots and has no live image. So there is a moment, in both directions, in which a primary has
none: then nobody can write to it, and whichever of the two runs next completes it. The lineage says before a live image
appears that it is a primary's, and until it has gone that it was one.
"""

from __future__ import annotations

import os
import uuid

from backends.image import changes
from backends.image.catalog import Catalog, Snapshot
from backends.image.context import Context
from backends.image.copying import clone_or_copy
from backends.image.durable import FILE_MODE
from backends.image.layout import live_of
from backends.image.reading import Image
from backends.image.source import has_maps
from backends.image.usage import users_of
from replicator.cancellation import Cancellation
from replicator.errors import StorageError, Unsupported, VolumeBusy, VolumeChanged
from replicator.model import Lineage, VersionRef


def promote(context: Context, volume: str, lineage: Lineage, at: VersionRef) -> None:
    """See :meth:`backends.base.Backend.promote`.

    1. The lineage becomes a primary's. A cut: a primary without a live image, which the next call gives it.
    2. A copy of the snapshot is made under a private name, durably. A cut: ``tidy`` removes it.
    3. It gets its name as the live image.
    """
    _refuse_device(context, volume)
    catalog = context.catalog(volume)
    snapshot = catalog.require(at)
    with catalog.writing("promoting it"):
        if catalog.lineage() != lineage:
            with catalog.changing("promoting it"):
                catalog.set_lineage(lineage)
        if context.layout.live(volume) is None:
            _publish(context, catalog, volume, snapshot)


def _publish(context: Context, catalog: Catalog, volume: str, snapshot: Snapshot) -> None:
    path = catalog.folder / f".new-{uuid.uuid4().hex}"
    fd = context.files.open_new(path, FILE_MODE)
    try:
        with context.open_image(volume, snapshot) as image:
            clone_or_copy(context.files, fd, image.fd, image.size, Cancellation())
        context.files.sync(fd)
        context.layout.publish_live(volume, path)
    finally:
        os.close(fd)
        context.files.unlink(path)


def demote(context: Context, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
    """See :meth:`backends.base.Backend.demote`.

    1. The live image gets a private name as well, and loses its own: nobody opens it any more. A cut: a primary without
       a live image, and ``tidy`` removes the private name; the snapshot has the same content.
    2. Only now it is certain that nobody has it open and what is in it. If somebody has, or it is not the snapshot's
       content, it gets its name back.
    3. The lineage becomes a replica's.
    """
    catalog = context.made_catalog(volume)
    if at is not None:
        _refuse_device(context, volume)
        snapshot = catalog.require(at)
        fd = context.layout.open_live(volume)
        if fd is not None:
            try:
                with catalog.writing("demoting it"):
                    _check_idle(context, volume, fd)
                    _check_same(context, volume, fd, snapshot)  # it takes time, so first while it still has its name
                    _take_away(context, catalog, volume, fd, snapshot)
            finally:
                os.close(fd)
    with catalog.changing("demoting it"):
        catalog.set_lineage(lineage)


def _take_away(context: Context, catalog: Catalog, volume: str, fd: int, snapshot: Snapshot) -> None:
    aside = catalog.folder / f".gone-{uuid.uuid4().hex}"
    before = live_of(fd).identity
    context.layout.link_live(volume, aside, fd)
    try:
        context.layout.remove_live(volume)
        try:
            _check_idle(context, volume, fd)
            if live_of(fd).identity != before:
                _check_same(context, volume, fd, snapshot)
        except BaseException:
            context.layout.publish_live(volume, aside)
            raise
    finally:
        context.files.unlink(aside)


def _check_idle(context: Context, volume: str, fd: int) -> None:
    users = users_of(fd)
    if users:
        raise VolumeBusy(
            f"{context.label(volume)} is in use by {', '.join(users)}, so it cannot become a replica",
            hint="stop what uses it, then run it again",
        )


def _check_same(context: Context, volume: str, fd: int, snapshot: Snapshot) -> None:
    """:raises VolumeChanged: the live image has another content than the snapshot"""
    context.files.sync(fd)
    live = Image(fd, live_of(fd).size, context.label(volume), _shrunk)
    with context.open_image(volume, snapshot) as image:
        same = live.size == image.size
        if same:
            found = changes.mapped(live, image, 0) if has_maps(fd) else changes.compared(live, image, 0, live.size)
            same = next(changes.narrowed(found, live, image), None) is None
    if not same:
        raise VolumeChanged(
            f"{context.label(volume)} was written to since {snapshot.version.name}", hint="run it again"
        )


def _shrunk(label: str, offset: int) -> StorageError:
    return VolumeChanged(f"{label} was cut to {offset} bytes just now", hint="stop what writes to it")


def _refuse_device(context: Context, volume: str) -> None:
    if context.layout.is_device(volume):
        raise Unsupported(
            f"{context.label(volume)} is a block device, which the image storage only reads",
            hint="its replica can be promoted; the device itself can only be a source",
        )
