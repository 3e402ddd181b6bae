"""Brings a snapshot back as a new volume of this node, from whichever copy has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from replicator.cancellation import Cancellation
from replicator.control import Restored
from replicator.endpoint import Endpoint, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import NoSuchSnapshot, ReplicatorError, Unsupported
from replicator.model import Version, VolumeId, restore_tag
from replicator.planning import SendPolicy
from replicator.replication import Meter, ObservedStream, Observer, Options, Outcome, Pair, new_key
from replicator.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Place:
    """A copy of the volume that may have the snapshot."""

    endpoint: Endpoint
    volume: VolumeId


class Restores:
    """The restores that are under way in this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """One is, while the block lasts."""
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1

    @contextmanager
    def idle(self) -> Iterator[bool]:
        """Whether there is none; none begins while the block lasts."""
        with self._lock:
            yield self._count == 0


def restore(
    places: Sequence[Place], snapshot: str, own: Endpoint, new: VolumeId, *, observer: Observer, cancel: Cancellation
) -> Restored:
    """Make ``new`` on ``own`` from the first place that has ``snapshot`` (a name or a guid); near places come first.

    Shares the data with the snapshot where the storage can, else copies it. Nothing that exists is touched.

    :raises NoSuchSnapshot: no place that answers has it; the hint names those that did not answer
    :raises VolumeBusy: ``new`` exists
    """
    # Whether it exists is for the storage to say: it may be what an interrupted restore has left.
    place, version = _find(places, snapshot)
    if place.endpoint is own and place.volume.storage == new.storage:
        try:
            info = own.clone(place.volume, version.ref, new)
        except Unsupported:
            pass  # then it is copied
        else:
            return Restored(str(new), version.name, own.node, info.size, 0)
    tag = restore_tag(own.node)
    place.endpoint.hold(place.volume, version.ref, tag)
    try:
        copied = _copy(place, version, own, new, observer, cancel)
    finally:
        place.endpoint.release(place.volume, version.ref, tag)
    return Restored(str(new), version.name, place.endpoint.node, version.size, copied)


def _find(places: Sequence[Place], snapshot: str) -> tuple[Place, Version]:
    silent = []
    for place in places:
        try:
            state = place.endpoint.state(place.volume)
        except ReplicatorError as error:
            silent.append(f"{place.endpoint.node} did not answer ({error})")
            continue
        version = state.find(snapshot) if state is not None else None
        if state is not None and version in state.snapshots and version is not None:
            return place, version
    looked = ", ".join(f"{place.endpoint.node}/{place.volume}" for place in places) or "nowhere"
    raise NoSuchSnapshot(
        f"snapshot {snapshot!r} was not found; looked in {looked}",
        hint="; ".join(silent) or "`replicator snapshots VOLUME` lists what there is",
    )


def _copy(
    place: Place, version: Version, own: Endpoint, new: VolumeId, observer: Observer, cancel: Cancellation
) -> int:
    pair = Pair(place.endpoint, place.volume, own, new, restore_tag(own.node))
    options = Options(SendPolicy())
    outcome = Outcome()
    key = new_key()
    with cancel.child() as part:
        watchdog = Watchdog(part)
        with (
            watchdog.watching("the source prepared the stream", options.limits.prepare),
            place.endpoint.send(SendRequest(place.volume, None, version.ref, key), part) as stream,
        ):
            meter = Meter(pair, f"restoring {version.name}", total=stream.estimate, observer=observer, outcome=outcome)
            request = ReceiveRequest(
                new, None, None, version, key, mode=ReceiveMode.RESTORE, kind=stream.kind, resume=None
            )
            with ObservedStream(stream, meter, watchdog, options, part) as chunks:
                own.receive(request, chunks, part)
            meter.finish()
    return outcome.done
