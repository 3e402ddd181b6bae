"""What is known of all copies of a volume when the role of one is to change, and finding it out: every node is asked,
and of the silent ones everybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from replicator.endpoint import Copies, Copy, Endpoint, Sighting
from replicator.errors import NoSuchVolume, ReplicatorError
from replicator.model import Role, VolumeId, VolumeState


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node that answers has of the family.

    :ivar node: this node as well
    """

    node: str
    copies: Copies

    @property
    def primary(self) -> Copy | None:
        """Its primary of the newest epoch, if it has one."""
        found = [copy for copy in self.copies.found if copy.lineage.role is Role.PRIMARY]
        return max(found, key=lambda copy: copy.lineage.epoch, default=None)


@dataclass(frozen=True, slots=True)
class Silence:
    """A node that may have a copy, and does not answer.

    :ivar why: as the attempt ended
    :ivar witnesses: what other nodes that answer say of it, by their names
    """

    node: str
    why: str
    witnesses: tuple[tuple[str, Sighting], ...] = ()

    @property
    def is_confirmed(self) -> bool:
        """Whether a third node does not reach it either, and none does."""
        return bool(self.witnesses) and not any(sighting.copies is not None for _, sighting in self.witnesses)

    @property
    def seen(self) -> Iterator[tuple[str, Answer]]:
        """What it answered those who do reach it."""
        for witness, sighting in self.witnesses:
            if sighting.copies is not None:
                yield witness, Answer(self.node, sighting.copies)


@dataclass(frozen=True, slots=True)
class Situation:
    """All that is known of a family of copies when the role of one of them is to change.

    :ivar node: where that one is
    :ivar answers: of other nodes, and of this node's other copies
    """

    node: str
    mine: VolumeState
    answers: tuple[Answer, ...] = ()
    silences: tuple[Silence, ...] = ()

    @property
    def others(self) -> Iterator[tuple[str, Copy]]:
        """Every other copy that is known of, with its node; also those that only a witness reaches."""
        for answer in (*self.answers, *(seen for silence in self.silences for _, seen in silence.seen)):
            for copy in answer.copies.found:
                if (answer.node, copy.volume) != (self.node, self.mine.id):
                    yield answer.node, copy

    @property
    def unsure(self) -> tuple[Silence, ...]:
        """Silent nodes of which no third node says that it does not reach them either; and nodes that answer, but
        cannot look into all of their storages."""
        half = [
            Silence(answer.node, f"it cannot look into {', '.join(answer.copies.unseen)}")
            for answer in self.answers
            if answer.copies.unseen and answer.node != self.node
        ]
        return (*(s for s in self.silences if not s.is_confirmed and not any(s.seen)), *half)


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
