"""Taking snapshots of live images, and turning live data of a replica into one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from backends.image.catalog import DIGESTS, IMAGE, Catalog, Snapshot
from backends.image.context import Context
from backends.image.copying import copy_changes, copy_digesting, try_clone, write_digests
from backends.image.durable import FILE_MODE
from backends.image.kept_digests import DigestWriter
from backends.image.layout import Live, live_of
from backends.image.reading import Image, snapshot_shrunk
from backends.image.records import Meta
from backends.image.usage import users_of
from replicator.cancellation import Cancellation
from replicator.errors import StorageError, Unsupported, VolumeBusy, VolumeChanged
from replicator.model import Lineage, Role, Version, VersionRef


def take_snapshot(context: Context, volume: str, name: str) -> Version:
    """Snapshot the live image; one of that name that exists is returned.

    :raises NoSuchVolume, NoSpace: nothing is left behind
    :raises VolumeChanged: the image was truncated or replaced while it was copied
    """
    catalog = context.catalog(volume)
    existing = catalog.named(name)
    if existing is not None:
        return existing.version
    source = context.layout.open_existing(volume)
    try:
        catalog = context.made_catalog(volume)
        with catalog.writing(f"taking snapshot {name}"):
            existing = catalog.named(name)
            if existing is not None:  # somebody was faster
                return existing.version
            return _publish(context, catalog, name, lambda folder: _copy_live(context, catalog, volume, source, folder))
    finally:
        os.close(source)


def _publish(context: Context, catalog: Catalog, name: str, fill: Callable[[Path], Meta]) -> Version:
    """Prepare a snapshot in a directory of its own, then give it its name; on an error nothing is left."""
    folder = catalog.new_folder()
    try:
        meta = fill(folder)
        catalog.seal_image(folder, meta.size)
        catalog.seal(folder, meta)
        with catalog.changing(f"publishing {name}"):
            catalog.publish(folder, name)
    except BaseException:
        with contextlib.suppress(OSError):
            context.files.remove_tree(folder)
        raise
    return meta.version(name, ())


def _new_meta(context: Context, catalog: Catalog, size: int, *, digests: bool) -> Meta:
    return Meta(uuid.uuid4().hex, context.clock(), catalog.next_position(), size, uuid.uuid4().hex, digests)


def _copy_live(context: Context, catalog: Catalog, volume: str, source: int, folder: Path) -> Meta:
    """Fill a new snapshot from the live image.

    By sharing all its blocks, which is one instant. Else by sharing the newest snapshot's and writing what differs
    (a block device beside a file system with reflink). Else by copying, with digests kept.
    """
    files = context.files
    live = live_of(source)
    cancel = Cancellation()
    target = files.open_new(folder / IMAGE)
    try:
        if not live.device:
            files.sync(source)  # what the guest was told is durable must be so in the snapshot, too
            if try_clone(files, target, source):
                return _new_meta(context, catalog, os.fstat(target).st_size, digests=False)
        image = Image(source, live.size, context.label(volume), _live_shrunk)
        newest = next(iter(reversed(catalog.snapshots())), None)
        if newest is not None and _clone_snapshot(context, target, newest):
            with context.open_image(volume, newest) as base:
                copy_changes(files, target, image, base, cancel)
            meta = _new_meta(context, catalog, live.size, digests=False)
        else:
            meta = _new_meta(context, catalog, live.size, digests=True)
            digester = context.digester(catalog.key())
            with DigestWriter.new(files, folder / DIGESTS, context.checksums, catalog.key(), meta) as kept:
                copy_digesting(files, target, image, digester, kept, cancel)
    finally:
        os.close(target)
    _check_unchanged(context, volume, source, live)
    return meta


def _clone_snapshot(context: Context, target: int, newest: Snapshot) -> bool:
    fd = os.open(newest.image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return try_clone(context.files, target, fd)
    finally:
        os.close(fd)


def _live_shrunk(label: str, offset: int) -> StorageError:
    return VolumeChanged(
        f"{label} was truncated to {offset} bytes while it was being copied, so there is no snapshot of it",
        hint="the next run takes one; a file system with reflink (XFS, btrfs) copies at one instant",
    )


def _check_unchanged(context: Context, volume: str, source: int, before: Live) -> None:
    """A copy of a file that got shorter, or was replaced, in between is no state that it ever had.

    :raises VolumeChanged:
    """
    now = live_of(source)
    if now.size < before.size:
        raise _live_shrunk(context.label(volume), now.size)
    if not before.device and os.fstat(source).st_nlink == 0:
        raise VolumeChanged(
            f"{context.label(volume)} was replaced while it was being copied, so there is no snapshot of it",
            hint="the next run takes one of the new image",
        )


def set_aside(context: Context, volume: str, name: str) -> VersionRef | None:
    """Turn live data into a snapshot, then remove it. See :meth:`replicator.endpoint.Endpoint.set_aside`.

    The snapshot is complete and durable before the live image goes. If a power cut comes in between, the next call
    finds the live image unchanged since, by its recorded identity, and only removes it.
    """
    source = context.layout.open_live(volume)
    if source is None:
        return None
    try:
        if context.layout.is_device(volume):
            raise Unsupported(
                f"{context.label(volume)} is a block device, which cannot be set aside", hint="use another volume name"
            )
        users = users_of(source)
        if users:
            # What they write after this would go into a file that no longer has a name.
            raise VolumeBusy(
                f"{context.label(volume)} is in use by {', '.join(users)}, so it is not removed",
                hint="stop what uses it, then run it again",
            )
        catalog = context.made_catalog(volume)
        with catalog.writing("keeping its own data aside"):
            live = live_of(source)
            kept = next((s.version for s in catalog.snapshots() if _is_kept_as(s, source, live)), None)
            if kept is None:
                name = catalog.free_name(name)
                kept = _publish(
                    context, catalog, name, lambda folder: _move_live(context, catalog, volume, source, folder)
                )
            current = context.layout.live(volume)
            if current is None or current.identity != live.identity:
                raise VolumeBusy(
                    f"{context.label(volume)} is being written to, so it is not removed; {kept.name} has it as it was",
                    hint="stop what writes to it (a guest that still runs?), then run it again",
                )
            context.layout.remove_live(volume)
            with catalog.changing("keeping its own data aside"):
                _demote(catalog)
            return kept.ref
    finally:
        os.close(source)


def _is_kept_as(snapshot: Snapshot, source: int, live: Live) -> bool:
    """Whether a snapshot was made of just this live image: a clone of it as it still is, or another name of it."""
    return snapshot.meta.origin == live.identity or os.path.samestat(snapshot.image.lstat(), os.fstat(source))


def _demote(catalog: Catalog) -> None:
    lineage = catalog.lineage()
    if lineage is not None and lineage.role is not Role.REPLICA:
        catalog.set_lineage(Lineage(lineage.uuid, Role.REPLICA, lineage.epoch))


def _move_live(context: Context, catalog: Catalog, volume: str, source: int, folder: Path) -> Meta:
    """Fill a new snapshot with live data that is going to be removed, needing no room for a second copy.

    A second name of the file would do everywhere, but a program that still has it open could then write into the
    snapshot: so blocks are shared where they can be.
    """
    files = context.files
    live = live_of(source)
    files.sync(source)
    target = files.open_new(folder / IMAGE)
    try:
        shared = try_clone(files, target, source)
    finally:
        os.close(target)
    meta = Meta(
        uuid.uuid4().hex,
        context.clock(),
        catalog.next_position(),
        live.size,
        uuid.uuid4().hex,
        digests=not shared,
        origin=live.identity,
    )
    if not shared:
        files.unlink(folder / IMAGE)
        context.layout.link_live(volume, folder / IMAGE, source)
        image = Image(source, live.size, context.label(volume), snapshot_shrunk)
        with DigestWriter.new(files, folder / DIGESTS, context.checksums, catalog.key(), meta) as kept:
            write_digests(image, context.digester(catalog.key()), kept, Cancellation())
    return meta


def clone_snapshot(context: Context, volume: str, version: VersionRef, new: str) -> int:
    """Make a snapshot a new live image that shares its blocks; its size.

    :raises VolumeBusy: there is an image of that name
    :raises Unsupported: the file system cannot share blocks
    """
    snapshot = context.catalog(volume).require(version)
    if context.layout.live(new) is not None:
        raise _taken(context, new)
    catalog = context.made_catalog(new)
    with catalog.writing("making a clone"), context.open_image(volume, snapshot) as image:
        path = catalog.folder / f".new-{uuid.uuid4().hex}"
        try:
            fd = context.files.open_new(path, FILE_MODE)
            try:
                if not try_clone(context.files, fd, image.fd):
                    raise Unsupported(
                        f"storage {context.storage} cannot share blocks between files, so {new} cannot be a clone",
                        hint="`replicator restore` copies a snapshot instead",
                    )
                context.files.sync(fd)
            finally:
                os.close(fd)
            try:
                context.layout.publish_live(new, path)
            except FileExistsError:
                raise _taken(context, new) from None
        finally:
            context.files.unlink(path)
    return image.size


def _taken(context: Context, volume: str) -> VolumeBusy:
    return VolumeBusy(
        f"{context.label(volume)} exists already", hint="choose another name; nothing is ever written over an image"
    )
