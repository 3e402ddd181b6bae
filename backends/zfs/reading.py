"""Reads snapshots for verification: zvols as digests of their blocks, filesystems as manifests.

What is read comes through ZFS, so each block's own checksum is verified with it, unless it is in ZFS's cache (ARC):
then the disks are not asked again. Reading says whether two snapshots have the same content; a scrub says whether every
copy of every block is still on the disks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from backends import walking
from backends.zfs import clones, devices, mounting
from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.listing import Dataset
from replicator import manifest
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import UNREADABLE_DIGEST, DigestBatch, DigestRequest, ManifestRequest
from replicator.errors import DamagedData, NotReadable, Unsupported
from replicator.model import StreamKind, Version
from replicator.streams import DIGEST_SIZE, ChunkStream, NativeChunk, Stream

WINDOW = 1 << 20
"""Bytes read at a time."""
BATCH = 1024
"""Digests in one batch, about."""
_CONTROL_FOLDER = frozenset((b".zfs",))


def digests(
    context: Context, request: DigestRequest, checksums: Checksums, cancel: Cancellation
) -> Iterator[DigestBatch]:
    """See :meth:`replicator.endpoint.Endpoint.digests`. A block that cannot be read has ``UNREADABLE_DIGEST``."""
    volume = request.volume.name
    dataset = context.require(volume)
    version = context.snapshot(volume, dataset, request.version)
    label = context.names.label(volume)
    if not dataset.is_zvol or version.size is None:
        raise Unsupported(
            f"{label} is a filesystem, which has no blocks to compare", hint="it is compared by its files"
        )
    _require_key(context, dataset)
    check_usable(context, f"{dataset.name}@{version.name}")
    end = version.size if request.length is None else min(version.size, request.offset + request.length)
    with devices.opened(context, dataset.name, version, cancel) as device:
        size = os.lseek(device, 0, os.SEEK_END)
        if size < version.size:
            raise DamagedData(f"the device of {label}@{version.name} has {size} of {version.size} bytes", hint="")
        yield from _batches(device, request, end, checksums, cancel)


def _batches(
    device: int, request: DigestRequest, end: int, checksums: Checksums, cancel: Cancellation
) -> Iterator[DigestBatch]:
    key, block = bytes.fromhex(request.key), request.block_size
    window = memoryview(bytearray(max(WINDOW // block, 1) * block))
    offset = start = request.offset
    found = bytearray()
    while offset < end:
        cancel.check()
        view = window[: min(len(window), end - offset)]
        if _fill(device, view, offset):
            found += checksums.digest_blocks(view, key, block_size=block)
        else:
            for place in range(0, len(view), block):
                piece = view[place : place + block]
                readable = _fill(device, piece, offset + place)
                found += checksums.digest_blocks(piece, key, block_size=block) if readable else UNREADABLE_DIGEST
        offset += len(view)
        if len(found) >= BATCH * DIGEST_SIZE or offset >= end:
            yield DigestBatch(start, block, bytes(found))
            start = offset
            found.clear()


def _fill(device: int, view: memoryview, offset: int) -> bool:
    """Read all of it; whether that was possible."""
    try:
        while view:
            count = os.preadv(device, [view], offset)
            if not count:
                return False
            view, offset = view[count:], offset + count
    except OSError as error:
        if error.errno in walking.UNREADABLE_ERRORS:
            return False
        raise
    return True


def open_manifest(context: Context, request: ManifestRequest, checksums: Checksums, cancel: Cancellation) -> Stream:
    """See :meth:`replicator.endpoint.Endpoint.manifest`."""
    volume = request.volume.name
    dataset = context.require(volume)
    version = context.snapshot(volume, dataset, request.version)
    if dataset.is_zvol:
        raise Unsupported(
            f"{context.names.label(volume)} is a zvol, which has no files", hint="it is compared block by block"
        )
    _require_key(context, dataset)
    snapshot = f"{dataset.name}@{version.name}"
    check_usable(context, snapshot)

    def chunks() -> Iterator[NativeChunk]:
        with _opened(context, dataset.name, version) as root:
            walk = walking.walk(root, bytes.fromhex(request.key), checksums, cancel, skip=_CONTROL_FOLDER)
            yield from manifest.chunks(walk)

    return ChunkStream(StreamKind.NATIVE, chunks(), estimate=_content_size(context, snapshot))


@contextmanager
def _opened(context: Context, dataset: str, version: Version) -> Iterator[int]:
    """The root folder of a filesystem's snapshot; through a clone where that would not show access control lists."""
    with ExitStack() as stack:
        root = stack.enter_context(mounting.opened(f"{dataset}@{version.name}"))
        if not mounting.shows_acls(root):
            stack.close()
            clone = stack.enter_context(clones.temporary(context, dataset, version, clones.FILESYSTEM))
            root = stack.enter_context(mounting.opened(clone))
        yield root


def check_usable(context: Context, snapshot: str) -> None:
    """:raises NotReadable: it was healed, and OpenZFS neither mounts such a snapshot nor a clone of it

    ``zfs receive -c`` leaves the snapshot marked as one that is just being received (``DS_FLAG_INCONSISTENT``; seen
    with OpenZFS 2.3.9). Its data is right, and can be sent.
    """
    done = context.attempt("zfs", "get", "-H", "-p", "-o", "value", "inconsistent", snapshot, deadline=LIST_DEADLINE)
    if done.status == 0 and done.output.strip() == "1":
        raise NotReadable(
            f"{snapshot} was healed, and OpenZFS mounts neither such a snapshot nor a clone of it; it can be sent",
            hint="take the next snapshot: it has the same healed data",
        )


def _content_size(context: Context, snapshot: str) -> int | None:
    done = context.attempt(
        "zfs", "get", "-H", "-p", "-o", "value", "logicalreferenced", snapshot, deadline=LIST_DEADLINE
    )
    said = done.output.strip()
    return int(said) if done.status == 0 and said.isdecimal() else None


def _require_key(context: Context, dataset: Dataset) -> None:
    """:raises NotReadable: it is encrypted, and its key is not loaded here"""
    if not dataset.encrypted:
        return
    done = context.change(
        "zfs", "get", "-H", "-o", "value", "keystatus", dataset.name,
        dataset=dataset.name, doing="looking at the key of", deadline=LIST_DEADLINE,
    )  # fmt: skip
    if done.output.strip() != "available":
        raise NotReadable(
            f"{dataset.name} is encrypted and its key is not loaded in storage {context.storage}, so its content "
            "cannot be read",
            hint=f"zfs load-key {dataset.name} for the time of the verification, or verify it by scrub",
        )
