"""What is asked of a storage of block streams: checked, before anything is opened, the same way by all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from backends.fields import MAX_GUID
from replicator import names
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import StaleResume, Unsupported, UsageError
from replicator.model import StreamKind
from replicator.prefetch import ahead
from replicator.streams import KEY_SIZE, MAX_VOLUME_SIZE, BlockChunk, ChunkStream, Stream

MAX_BLOCK_SIZE = 16 << 20
MIN_BLOCK_SIZE = 512
"""Bytes, of blocks that are digested."""


def check_receive(request: ReceiveRequest, stream: Stream, storage: str) -> int:
    """The size of what comes. :raises ReplicatorError: something about the request cannot be meant"""
    names.check_snapshot(request.to.name)
    if request.aside:
        names.check_snapshot(request.aside)
    if request.hold:
        names.check_tag(request.hold)
    size = request.to.size
    if size is None or not 0 <= size <= MAX_VOLUME_SIZE:
        raise UsageError(f"a block stream for {request.volume} comes without a usable size ({size})", hint="")
    if not 0 < len(request.to.guid) <= MAX_GUID:
        raise UsageError(
            f"a version of {request.volume} comes with an identity of {len(request.to.guid)} characters", hint=""
        )
    if request.kind is not StreamKind.BLOCKS or stream.kind is not StreamKind.BLOCKS:
        raise Unsupported(
            f"storage {storage} takes block streams, not {stream.kind} streams",
            hint="choose a target storage of the source's kind",
        )
    if request.mode is ReceiveMode.HEAL:
        raise Unsupported(f"storage {storage} cannot heal a snapshot", hint="it can rebuild one")
    if len(bytes.fromhex(request.key)) != KEY_SIZE:
        raise UsageError(f"the key of the stream for {request.volume} has not {KEY_SIZE} bytes", hint="")
    return size


def resume_offset(request: SendRequest) -> int:
    """The offset that a stream begins at. :raises StaleResume: it is to continue what is of something else"""
    resume = request.resume
    if resume is None:
        return 0
    base = request.base.guid if request.base is not None else None
    if resume.kind is not StreamKind.BLOCKS:
        raise stale(request, f"it is of a {resume.kind} stream")
    if resume.to_guid != request.to.guid or resume.base_guid != base:
        raise stale(request, "it is of another snapshot, or has another base")
    return resume.offset


def check_offset(request: SendRequest, start: int, size: int) -> None:
    """:raises StaleResume: what is to be continued is beyond the snapshot's end"""
    if start > size:
        raise stale(request, f"it is at byte {start}, beyond the snapshot's end")


def stale(request: SendRequest, why: str) -> StaleResume:
    """The refusal to continue what a target has."""
    return StaleResume(
        f"the half-received {request.to.name} of {request.volume} cannot be continued: {why}",
        hint="the next run discards it and sends the snapshot from the start",
    )


def opened_stream(
    make: Callable[[], Iterator[BlockChunk]],
    cancel: Cancellation,
    *,
    estimate: int | None,
    on_close: Callable[[], None],
) -> Stream:
    """The stream of the chunks that ``make`` makes, in a thread that is a little ahead of who takes them."""

    def chunks() -> Iterator[BlockChunk]:
        with ahead(make, cancel) as items:
            yield from items

    return ChunkStream(StreamKind.BLOCKS, chunks(), estimate=estimate, on_close=on_close)


def check_digests(request: DigestRequest) -> None:
    """:raises UsageError: blocks of a size, or from an offset, that digests cannot be made of"""
    size = request.block_size
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or request.offset % size or request.offset < 0:
        raise UsageError(f"digests of {size}-byte blocks from byte {request.offset} cannot be made", hint="")
