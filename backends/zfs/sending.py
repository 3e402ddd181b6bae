"""The source side: opening zfs send as a stream."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from backends.zfs import batches, commands
from backends.zfs.commands import Process
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure
from backends.zfs.library import command_space
from backends.zfs.listing import Dataset
from backends.zfs.properties import StreamForm
from backends.zfs.tokens import COMPRESSED, FLAGS, RAW, read_token
from replicator.cancellation import Cancellation
from replicator.endpoint import SendRequest
from replicator.errors import NoSuchSnapshot, StaleResume, StorageUnavailable, Unsupported
from replicator.model import ResumeState, StreamKind, Version, VersionKind, VersionRef
from replicator.streams import CHUNK_SIZE, ChunkStream, NativeChunk, Stream

_GATHER = 0.2
"""Seconds for which a chunk that is not full waits for more: crumbs cost more than they are worth."""
_END_DEADLINE = 30.0
"""Seconds between the end of the output and the end of the process."""
_LOOK_AGAIN = 0.5
"""Seconds between two looks at whether the work was cancelled."""
_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = 1031
_MAX_PIPE = Path("/proc/sys/fs/pipe-max-size")


def enlarge_pipe(fd: int) -> None:
    """Make a pipe as large as a chunk, as far as the system allows (zrepl#424): zfs writes it in small pieces."""
    size = _PIPE_SIZE
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int(_MAX_PIPE.read_text()))
    with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: slower, not wrong
        fcntl.fcntl(fd, _F_SETPIPE_SZ, size)


class Buffers:
    """Buffers of one chunk each, used again once they are released."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer of CHUNK_SIZE bytes."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return bytearray(CHUNK_SIZE)

    def chunk(self, buffer: bytearray, size: int) -> NativeChunk:
        """A chunk over the first ``size`` bytes; releasing it, once or more, gives the buffer back."""
        pending = [buffer]

        def release() -> None:
            with self._lock:
                if pending:
                    self._free.append(pending.pop())

        return NativeChunk(memoryview(buffer)[:size], release)


def read_chunks(
    process: Process, operation: Operation, cancel: Cancellation, *, room: int = 0
) -> Iterator[NativeChunk]:
    """The output of a process in chunks, then its success.

    :param room: bytes at the beginning of each chunk that are left free
    :raises StorageError: it failed, and said why
    """
    buffers = Buffers()
    with cancel.unblock(process.kill), selectors.DefaultSelector() as selector:
        selector.register(process.pipe, selectors.EVENT_READ)
        ended = False
        while not ended:
            while not selector.select(_LOOK_AGAIN):  # one that waits for a suspended pool does not even die
                cancel.check()
                process.check()
            buffer = buffers.take()
            size, ended = _fill(process.pipe, memoryview(buffer)[room:], selector)
            cancel.check()
            if size:
                yield buffers.chunk(buffer, room + size)
    process.close_pipe()
    done = process.finish(_END_DEADLINE)
    cancel.check()
    if done is None:
        process.kill()
        raise StorageUnavailable(
            f"storage {operation.storage}: zfs send of {operation.dataset} did not end", hint="see `zpool status`"
        )
    if done.status != 0:
        raise failure(done, operation)


def _fill(fd: int, view: memoryview, selector: selectors.BaseSelector) -> tuple[int, bool]:
    """Read until the buffer is full or what there is has been read for a while; bytes read, and whether it ended."""
    size = os.readv(fd, [view])
    if size == 0:
        return 0, True
    until = time.monotonic() + _GATHER
    while size < len(view):
        left = until - time.monotonic()
        if left <= 0 or not selector.select(left):
            break
        got = os.readv(fd, [view[size:]])
        if got == 0:
            return size, True
        size += got
    return size, False


def argv_of(dataset: Dataset, base: Version | None, to: Version, *, intermediates: bool = False) -> tuple[str, ...]:
    """The arguments of zfs send for one step; a base that the dataset does not have is its origin."""
    name = dataset.name
    source: tuple[str, ...] = ()
    if base is not None:
        source = ("-I" if intermediates else "-i", base_name(dataset, base))
    return (*dataset.default_form.flags, *source, f"{name}@{to.name}")


def base_name(dataset: Dataset, base: Version) -> str:
    """The full name of what a stream begins from; see :func:`base_of`."""
    if base not in dataset.versions:
        return dataset.origin
    return f"{dataset.name}{'@' if base.kind is VersionKind.SNAPSHOT else '#'}{base.name}"


def base_of(context: Context, volume: str, dataset: Dataset, ref: VersionRef | None) -> Version | None:
    """What a stream begins from: a version of the dataset, or the snapshot that it is a clone of.

    :raises NoSuchSnapshot: neither has that identity
    """
    if ref is None:
        return None
    if dataset.origin and dataset.find(ref.guid) is None and dataset.find(ref.guid, VersionKind.BOOKMARK) is None:
        name, _, snapshot = dataset.origin.partition("@")
        begun = context.listing.dataset(name)
        found = begun.named(snapshot) if begun is not None else None
        if found is not None and found.guid == ref.guid:
            return found
    return context.version(volume, dataset, ref)


def size_of(context: Context, dataset: Dataset, base: Version | None, to: Version, intermediates: bool) -> int | None:
    """Bytes that zfs send would write for one step; None where it does not say so in time. From a bookmark it takes as
    long as the send itself, so there is none."""
    if base is not None and base.kind is VersionKind.BOOKMARK:
        return None
    if intermediates:  # the command adds up the steps
        return command_space(context.runner, argv_of(dataset, base, to, intermediates=True))
    source = base_name(dataset, base) if base is not None else None
    return context.library.send_space(f"{dataset.name}@{to.name}", source, dataset.default_form.flags)


def estimate(
    context: Context, volume: str, base: VersionRef | None, to: VersionRef, *, intermediates: bool
) -> int | None:
    """See :meth:`backends.base.Backend.estimate`."""
    dataset = context.require(volume, _only(base, to))
    target = context.snapshot(volume, dataset, to)
    source = base_of(context, volume, dataset, base)
    return size_of(context, dataset, source, target, intermediates and source in dataset.snapshots)


def _only(base: VersionRef | None, to: VersionRef) -> tuple[VersionRef, ...]:
    return (to,) if base is None else (base, to)


def open_stream(context: Context, request: SendRequest, cancel: Cancellation) -> Stream:
    """See :meth:`replicator.endpoint.Endpoint.send`. zfs send is started when the first chunk is asked for."""
    volume = request.volume.name
    if request.ranges is not None:
        raise Unsupported(
            f"storage {context.storage} sends whole differences, not ranges of blocks", hint="resync it as a ZFS volume"
        )
    dataset = context.require(volume, None if request.intermediates else _only(request.base, request.to))
    to = context.snapshot(volume, dataset, request.to)
    base = base_of(context, volume, dataset, request.base)
    if base is not None and base.position >= to.position:
        raise NoSuchSnapshot(
            f"{base.name} is not older than {to.name} in {context.names.label(volume)}", hint="plan again"
        )
    total: int | None
    sender = _Sender(context, dataset, cancel)
    if request.resume is not None:
        arguments = _resumed(request, request.resume, dataset, base, to)
        rest = command_space(context.runner, arguments)
        total = request.resume.offset + rest if rest is not None else None
        chunks = sender.one(arguments, to)
    else:
        total = size_of(context, dataset, base, to, request.intermediates)
        chunks = sender.batch(base, to) if request.intermediates else sender.one(argv_of(dataset, base, to), to)
    return ChunkStream(StreamKind.NATIVE, chunks, estimate=total, on_close=sender.close)


class _Sender:
    """Runs zfs send: for one stream, or one after the other for those of a batch."""

    def __init__(self, context: Context, dataset: Dataset, cancel: Cancellation) -> None:
        self._context = context
        self._dataset = dataset
        self._cancel = cancel
        self._process: Process | None = None

    def one(self, arguments: tuple[str, ...], to: Version, *, room: int = 0) -> Iterator[NativeChunk]:
        process = self._process = self._context.runner.read_from(("zfs", "send", *arguments))
        enlarge_pipe(process.pipe)
        operation = Operation(self._context.storage, f"{self._dataset.name}@{to.name}", "sending")
        yield from read_chunks(process, operation, self._cancel, room=room)

    def batch(self, base: Version | None, to: Version) -> Iterator[NativeChunk]:
        begin = base.position if base is not None else -1
        for snapshot in self._dataset.snapshots:
            if begin < snapshot.position <= to.position:
                arguments = argv_of(self._dataset, base, snapshot)
                yield from batches.pieces(self.one(arguments, snapshot, room=batches.ROOM))
                base = snapshot

    def close(self) -> None:
        if self._process is not None:
            commands.end(self._process)


def _resumed(
    request: SendRequest, resume: ResumeState, dataset: Dataset, base: Version | None, to: Version
) -> tuple[str, ...]:
    """The arguments that continue an interrupted stream.

    The token comes from the receiver, and anybody can make one. zfs send -t sends whatever it names, from whatever
    dataset of the pool it is found in, in whatever form the token says: decrypted, where that does not say "raw". So it
    must name what was asked for, and be of the form that is sent anew too.
    """
    if resume.kind is not StreamKind.NATIVE:
        raise _stale(request, f"it is of a {resume.kind} stream")
    token = read_token(resume.token)
    if token.to_guid != to.guid or resume.to_guid != to.guid:
        raise _stale(request, "it is of another snapshot")
    if token.base_guid != (base.guid if base is not None else None):
        raise _stale(request, "it has another base")
    if token.dataset != dataset.name:
        raise _stale(request, f"it was begun from {token.dataset[:80]!r}, and {dataset.name} is the source now")
    raw = dataset.encrypted and dataset.default_form is StreamForm.RAW
    needed, allowed = ({RAW, COMPRESSED}, FLAGS) if raw else ({COMPRESSED}, FLAGS - {RAW})
    if not needed <= token.flags <= allowed:
        raise _stale(request, f"it was begun in another form than {dataset.default_form}")
    return ("-t", token.text)


def _stale(request: SendRequest, why: str) -> StaleResume:
    return StaleResume(
        f"the half-received {request.to.name} of {request.volume} cannot be continued: {why}",
        hint="the next run discards it and sends the snapshot from the start",
    )
