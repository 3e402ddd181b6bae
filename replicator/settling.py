"""Which replicas have everything that their sources have, found out before anything is done.

A volume that nobody has written to since its newest snapshot needs no new one, and a target that has that snapshot
needs nothing sent. Each storage is asked once for all its volumes (:meth:`~replicator.endpoint.Endpoint.heads`), all
nodes at the same time, so that what does not change costs next to nothing.

What is settled here is so as of the moment at which the question was asked: everything written before is on the target.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from replicator.endpoint import Endpoint, Head, VolumeListing
from replicator.errors import ReplicatorError
from replicator.model import Role, VolumeId
from replicator.planning import Common, SendPolicy
from replicator.replication import Listed, Pair, Volumes

LOG = logging.getLogger(__name__)

Place = tuple[str, VolumeId]
"""A node and a volume of it."""
Found = TypeVar("Found")


def places(pair: Pair) -> tuple[Place, Place]:
    """Where a volume and its replica are."""
    return (pair.source.node, pair.source_volume), (pair.target.node, pair.target_volume)


def settled_in(heads: Mapping[Place, Head], pair: Pair, policy: SendPolicy) -> Common | None:
    """:func:`settled`, of a pair in what :func:`heads_of` has found."""
    here, there = places(pair)
    return settled(heads.get(here), heads.get(there), policy, pair.tag)


def settled(source: Head | None, target: Head | None, policy: SendPolicy, tag: str) -> Common | None:
    """The version that both sides have, if with it there is nothing left to do: the source's live data, on a replica
    of the same family that nobody wrote to, held on both sides. None leaves it to a plan to find out more."""
    if source is None or target is None or source.newest is None or target.newest is None:
        return None
    ours, theirs = source.lineage, target.lineage
    if ours is None or theirs is None or (ours.role, theirs.role) != (Role.PRIMARY, Role.REPLICA):
        return None
    equal = source.newest.guid == target.newest.guid and (ours.uuid, ours.epoch) == (theirs.uuid, theirs.epoch)
    quiet = not (source.changed or target.changed or target.partial)
    held = tag in source.newest.holds and tag in target.newest.holds
    if not (equal and quiet and held and policy.selects(source.newest)):
        return None
    return Common(source.newest, target.newest)


def heads_of(pairs: Sequence[Pair]) -> dict[Place, Head]:
    """The heads of both sides of these pairs, of those storages that can tell."""

    def ask(endpoint: Endpoint, volumes: Sequence[VolumeId]) -> Iterable[tuple[Place, Head]]:
        return [((endpoint.node, head.volume), head) for head in heads(endpoint, volumes).values()]

    return _at_once(pairs, ask)


def states_of(pairs: Sequence[Pair]) -> dict[Place, VolumeListing]:
    """The states of both sides of these pairs; what fails has its error."""

    def ask(endpoint: Endpoint, volumes: Sequence[VolumeId]) -> Iterable[tuple[Place, VolumeListing]]:
        try:
            listings: Iterable[VolumeListing] = endpoint.states(volumes)
        except ReplicatorError as error:
            listings = [VolumeListing(volume, None, error) for volume in volumes]
        return [((endpoint.node, listing.volume), listing) for listing in listings]

    return _at_once(pairs, ask)


def heads(endpoint: Endpoint, volumes: Sequence[VolumeId]) -> Mapping[VolumeId, Head]:
    """The heads of volumes of one node; none where it does not answer, which is found out again by what comes next."""
    try:
        return {head.volume: head for head in endpoint.heads(volumes)}
    except ReplicatorError as error:
        LOG.info("node %s cannot tell what is unchanged: %s", endpoint.node, error)
        return {}


def _at_once(
    pairs: Sequence[Pair], ask: Callable[[Endpoint, Sequence[VolumeId]], Iterable[tuple[Place, Found]]]
) -> dict[Place, Found]:
    """Ask each node once for all its volumes of these pairs, all nodes at the same time."""
    asked: dict[str, tuple[Endpoint, dict[VolumeId, None]]] = {}
    for pair in pairs:
        for endpoint, volume in ((pair.source, pair.source_volume), (pair.target, pair.target_volume)):
            asked.setdefault(endpoint.node, (endpoint, {}))[1][volume] = None
    if not asked:
        return {}
    with ThreadPoolExecutor(len(asked), thread_name_prefix="list") as pool:
        answers = pool.map(lambda each: ask(each[0], tuple(each[1])), asked.values())
        return {place: found for answer in answers for place, found in answer}


class RunListing:
    """What a run has listed of both sides of all that it is to bring over, in one listing of each storage. Thread-safe.

    A plan may be made from it as long as it is fresh; what is waited for longer than that is listed again by itself.
    """

    FRESH = 60.0
    """Seconds."""

    def __init__(self, pairs: Sequence[Pair], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + self.FRESH
        self._states = states_of(pairs)
        self.volumes = Volumes()

    def of(self, pair: Pair) -> Listed | None:
        """Both sides as they were listed; None where that is too long ago, or failed."""
        if self._clock() > self._until:
            self._states = {}
        here, there = (self._states.get(place) for place in places(pair))
        if here is None or there is None or here.error is not None or there.error is not None:
            return None
        return here, there
