"""Feeds a stream into zfs receive.

The last chunk is held back until the whole stream has come and was verified: what zfs receive has not got, it cannot
commit. So nothing that was cancelled, cut or damaged on its way appears as a snapshot.
"""

from __future__ import annotations

import itertools
import os
import selectors
import time
from collections.abc import Iterable, Iterator

from backends.zfs import commands
from backends.zfs.commands import Finished, Process, Runner
from backends.zfs.failures import Operation, failure
from backends.zfs.sending import enlarge_pipe
from backends.zfs.stream_head import RECORD_SIZE, StreamHead, read_head
from replicator.cancellation import Cancellation
from replicator.errors import ProtocolError, ReplicatorError, StorageUnavailable
from replicator.streams import CHUNK_SIZE, Chunk, NativeChunk

_COMMIT_DEADLINE = 3600.0
"""Seconds between the last byte and the end of the process."""
_CUT_DEADLINE = 120.0
"""Seconds that zfs receive has for keeping what it has got of a stream that was cut."""
_LOOK_AGAIN = 0.2


class IncomingStream:
    """A send stream, whose head can be looked at before anything is done with it."""

    def __init__(self, stream: Iterable[Chunk]) -> None:
        self._chunks = iter(stream)
        self._read: list[NativeChunk] = []

    def head(self) -> StreamHead:
        """Read as much as it takes. :raises ProtocolError: it is no ZFS stream"""
        start = bytearray()
        while len(start) < RECORD_SIZE:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ProtocolError(
                    f"the stream ended after {len(start)} bytes, before its head did",
                    hint="see the log of the other node",
                )
            copy = bytes(checked(chunk).data)  # its buffer is needed for what comes
            chunk.release()
            start += copy
            self._read.append(NativeChunk(copy))
        return read_head(start)

    def __iter__(self) -> Iterator[NativeChunk]:
        return itertools.chain(self._read, map(checked, self._chunks))


def checked(chunk: Chunk) -> NativeChunk:
    """:raises ProtocolError: it is no chunk of a native stream"""
    if not isinstance(chunk, NativeChunk):
        raise ProtocolError("a chunk of blocks came in a native stream", hint="both nodes must run the same version")
    if not 0 < len(chunk.data) <= CHUNK_SIZE:
        raise ProtocolError(
            f"a chunk has {len(chunk.data)} bytes; 1 to {CHUNK_SIZE} are allowed",
            hint="both nodes must run the same version",
        )
    return chunk


def feed(
    runner: Runner, argv: tuple[str, ...], stream: Iterable[NativeChunk], operation: Operation, cancel: Cancellation
) -> None:
    """Run zfs receive on a stream; returns once it has committed.

    :raises ReplicatorError: of zfs receive, or of the stream; what was received stays, to be resumed
    """
    process = runner.write_to(argv)
    enlarge_pipe(process.pipe)
    try:
        with cancel.unblock(process.kill):
            try:
                _write_all(process, stream, cancel)
            except BrokenPipeError:  # it ended before the stream did; its own words say why
                pass
            except BaseException as error:
                done = _finished(process, _CUT_DEADLINE)
                own = _own_failure(done, operation)
                if own is not None and not isinstance(error, ReplicatorError):
                    raise own from error
                raise
            done = _finished(process, _COMMIT_DEADLINE)
            cancel.check()
            if done is None:
                raise StorageUnavailable(
                    f"storage {operation.storage}: zfs receive of {operation.dataset} did not end",
                    hint="see `zpool status`",
                )
            if done.status != 0:
                raise failure(done, operation)
    finally:
        commands.end(process)


def _own_failure(done: Finished | None, operation: Operation) -> ReplicatorError | None:
    """Why zfs receive failed, unless it only says that its input was cut."""
    if done is None or done.status <= 0 or "ncomplete stream" in done.errors:
        return None
    return failure(done, operation)


def _write_all(process: Process, stream: Iterable[NativeChunk], cancel: Cancellation) -> None:
    held: NativeChunk | None = None
    os.set_blocking(process.pipe, False)  # a process that waits for a suspended pool neither reads nor dies
    with selectors.DefaultSelector() as selector:
        selector.register(process.pipe, selectors.EVENT_WRITE)
        for chunk in stream:
            cancel.check()
            if held is not None:
                _write(process, held, selector, cancel)
            held = chunk
        cancel.check()
        if held is not None:
            _write(process, held, selector, cancel)


def _write(process: Process, chunk: NativeChunk, selector: selectors.BaseSelector, cancel: Cancellation) -> None:
    view = memoryview(chunk.data).cast("B")
    while view:
        try:
            view = view[os.write(process.pipe, view) :]
        except BlockingIOError:
            if not selector.select(_LOOK_AGAIN):
                cancel.check()
                process.check()
    chunk.release()


def _finished(process: Process, deadline: float) -> Finished | None:
    """Close its input and wait for its end. :raises StorageUnavailable: there is no point in waiting"""
    process.close_pipe()
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        done = process.finish(_LOOK_AGAIN)
        if done is not None:
            return done
        process.check()
    return None
