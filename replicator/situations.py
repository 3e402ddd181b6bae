"""Finds out what is known of the copies of a volume: asks every node, and of the silent ones everybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from replicator.endpoint import Copies, Endpoint, Sighting
from replicator.errors import NoSuchVolume, ReplicatorError
from replicator.model import VolumeId
from replicator.transitions import Answer, Silence, Situation

MAX_ASKED = 16
"""Nodes asked at the same time."""


class Mapper(Protocol):
    """Calls a function with each of some names, at the same time or one after the other; the results in their order."""

    def __call__(
        self, ask: Callable[[str], Answer | Silence], names: Iterable[str], /
    ) -> Iterable[Answer | Silence]: ...


def at_once(ask: Callable[[str], Answer | Silence], names: Iterable[str]) -> Iterable[Answer | Silence]:
    """A thread for each, as a node that is down takes as long as its deadline."""
    asked = list(names)
    if not asked:
        return []
    with ThreadPoolExecutor(min(len(asked), MAX_ASKED), thread_name_prefix="roll-call") as pool:
        return list(pool.map(ask, asked))


def find_out(own: Endpoint, volume: VolumeId, peers: Mapping[str, Endpoint], each: Mapper = at_once) -> Situation:
    """What is known of all copies of a volume of this node.

    :param peers: every other node that may have one, or may be a witness
    :raises NoSuchVolume: this node has no such volume
    """
    mine = own.state(volume)
    if mine is None:
        raise NoSuchVolume(f"node {own.node} has no volume {volume}", hint="`replicator status` lists the copies here")
    if mine.lineage is None:
        return Situation(own.node, mine)
    family = mine.lineage.uuid

    def ask(node: str) -> Answer | Silence:
        try:
            return Answer(node, peers[node].copies(family))
        except ReplicatorError as error:
            return Silence(node, str(error))

    asked = list(each(ask, sorted(peers)))
    answers = tuple(found for found in asked if isinstance(found, Answer))
    silent = [found for found in asked if isinstance(found, Silence)]

    def ask_others(node: str) -> Answer | Silence:
        why = next(silence.why for silence in silent if silence.node == node)
        seen = [(answer.node, _sighting(peers[answer.node], node, family)) for answer in answers]
        return Silence(node, why, tuple((witness, found) for witness, found in seen if found is not None))

    silences = [found for found in each(ask_others, [s.node for s in silent]) if isinstance(found, Silence)]
    here = Answer(own.node, _own_copies(own, family))
    return Situation(own.node, mine, (here, *answers), tuple(silences))


def _sighting(witness: Endpoint, node: str, family: str) -> Sighting | None:
    """What a third node says; None: nothing."""
    try:
        return witness.sight(node, family)
    except ReplicatorError:
        return None


def _own_copies(own: Endpoint, family: str) -> Copies:
    try:
        return own.copies(family)
    except ReplicatorError:
        return Copies(())
