"""Whether a copy may become the primary, or follow another one: what is known of all copies in, what to do or why not
out. Pure; no I/O, no clock, no random numbers.

What is known is what each node has said of its own copies (:class:`Answer`), and which nodes said nothing
(:class:`Silence`, with what third nodes say of them). The rules::

    promotion   of a replica with a complete snapshot, under an epoch that is newer than all that are known
                not while a copy that answers, here or at a witness, is still the primary
                not while another copy that answers is of a newer epoch: that one has the newer data
                not while a node is silent that may have the primary, unless a third node does not reach it either, or
                the operator says that it is down
                all of that gives way to --force, and is told all the same
    switch-over the primary's last snapshot is on the other side before it steps down; who stepped down says so in its
                storage (:func:`~replicator.model.handover_tag`), so whoever comes later can finish it, or undo it
    rejoin      of a copy that another one has superseded, or that is to follow another one than before; what only it
                has is kept aside

A power cut between any two steps leaves a state from which the same question gives the rest of the steps. A node that
lies can say that it has the primary, or a newer epoch, or that it does not reach a third one: it can keep a promotion
from happening without --force, and a witness can allow one; it cannot make a copy lose what it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from replicator.endpoint import Copies, Copy, Sighting
from replicator.errors import ConflictError
from replicator.model import Lineage, Role, Version, VolumeId, VolumeState, handover_tag, rejoin_tag
from replicator.roles import newest_complete, next_epoch


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


class Refusal(ABC):
    """Why a role does not change. Subclasses carry the evidence."""

    kind: ClassVar[str] = "refused"

    @property
    @abstractmethod
    def message(self) -> str:
        """The thing and the cause, one sentence."""

    @property
    @abstractmethod
    def hint(self) -> str:
        """The way out."""

    def to_error(self) -> ConflictError:
        """This refusal as an exception."""
        return ConflictError(self.message, hint=self.hint, kind=self.kind)


@dataclass(frozen=True, slots=True)
class NoCopy(Refusal):
    """The volume was never replicated, so it has no role."""

    kind: ClassVar[str] = "no_copy"
    volume: VolumeId

    @property
    def message(self) -> str:
        return f"{self.volume} is no copy of anything: it was never replicated"

    @property
    def hint(self) -> str:
        return "`replicator status` lists the copies that this node has"


@dataclass(frozen=True, slots=True)
class NothingComplete(Refusal):
    """There is no complete snapshot to go on from.

    :ivar partial: the snapshot that was being received
    """

    kind: ClassVar[str] = "nothing_complete"
    volume: VolumeId
    partial: str

    @property
    def message(self) -> str:
        half = f": only a part of {self.partial} has come" if self.partial else ""
        return f"{self.volume} has no complete snapshot{half}"

    @property
    def hint(self) -> str:
        return "promote another copy; an incomplete one is never made a primary"


@dataclass(frozen=True, slots=True)
class PrimaryAnswers(Refusal):
    """The primary is there, so there is nothing to take over.

    :ivar witness: the node that reaches it, "" where this one does
    """

    kind: ClassVar[str] = "primary_answers"
    volume: VolumeId
    node: str
    primary: Copy
    witness: str = ""

    @property
    def message(self) -> str:
        way = f" (node {self.witness} reaches it)" if self.witness else ""
        return (
            f"{self.volume} has a primary that answers{way}: {self.primary.volume} on {self.node}, "
            f"epoch {self.primary.lineage.epoch}"
        )

    @property
    def hint(self) -> str:
        return (
            f"`replicator switchover` on {self.node} hands over without loss; --force promotes all the same, and what "
            "the primary has beyond this copy is lost until it rejoins"
        )


@dataclass(frozen=True, slots=True)
class Superseded(Refusal):
    """Another copy is of a newer epoch: it was promoted after this one was last brought forward."""

    kind: ClassVar[str] = "superseded"
    volume: VolumeId
    epoch: int
    node: str
    newer: Copy

    @property
    def message(self) -> str:
        return (
            f"{self.volume} is of epoch {self.epoch}, and {self.newer.volume} on {self.node} of epoch "
            f"{self.newer.lineage.epoch}: it was superseded"
        )

    @property
    def hint(self) -> str:
        return f"replicator rejoin {self.volume} --from {self.node} makes it follow; what only it has is kept aside"


@dataclass(frozen=True, slots=True)
class NoWitness(Refusal):
    """A node is silent that may have the primary, and nobody else can say that it is down.

    :ivar silent: those nodes
    """

    kind: ClassVar[str] = "no_witness"
    volume: VolumeId
    silent: tuple[Silence, ...]

    @property
    def message(self) -> str:
        told = "; ".join(f"{silence.node}: {silence.why}" for silence in self.silent)
        return f"whether the primary of {self.volume} is down is not known, as no third node can say so ({told})"

    @property
    def hint(self) -> str:
        nodes = " and ".join(dict.fromkeys(silence.node for silence in self.silent))
        return f"make sure that {nodes} is down or switched off, then give your word for it: --primary-is-down"


@dataclass(frozen=True, slots=True)
class OpenHandover(Refusal):
    """A switch-over from this copy has not come to its end, and both sides are there to finish it.

    :ivar node: the other side
    """

    kind: ClassVar[str] = "open_handover"
    volume: VolumeId
    node: str

    @property
    def message(self) -> str:
        return f"{self.volume} stepped down for {self.node}, which answers: that switch-over is not finished"

    @property
    def hint(self) -> str:
        return f"replicator switchover {self.volume} --to {self.node}, again, finishes it or undoes it"


@dataclass(frozen=True, slots=True)
class NotPrimary(Refusal):
    """Only a primary steps down."""

    kind: ClassVar[str] = "not_primary"
    volume: VolumeId
    lineage: Lineage

    @property
    def message(self) -> str:
        return f"{self.volume} is a {self.lineage.role} already (epoch {self.lineage.epoch})"

    @property
    def hint(self) -> str:
        return "run it on the node that has the primary; `replicator status` says which copies this node has"


@dataclass(frozen=True, slots=True)
class NotACopy(Refusal):
    """Two volumes that are no copies of one another."""

    kind: ClassVar[str] = "not_a_copy"
    volume: VolumeId
    node: str

    @property
    def message(self) -> str:
        return f"{self.node} has no copy of {self.volume}"

    @property
    def hint(self) -> str:
        return "replicate it there first: `replicator sync`"


@dataclass(frozen=True, slots=True)
class NothingToFollow(Refusal):
    """The other side is not a primary that this copy could follow.

    :ivar other: its lineage, with the node
    """

    kind: ClassVar[str] = "nothing_to_follow"
    volume: VolumeId
    lineage: Lineage
    node: str
    other: Lineage

    @property
    def message(self) -> str:
        return (
            f"{self.volume} (epoch {self.lineage.epoch}, {self.lineage.role}) cannot follow the copy on {self.node} "
            f"(epoch {self.other.epoch}, {self.other.role})"
        )

    @property
    def hint(self) -> str:
        if self.other.role is Role.PRIMARY:
            return f"this copy is the newer one: run rejoin on {self.node}"
        return f"promote the copy on {self.node} first, or name the node that has the primary"


@dataclass(frozen=True, slots=True)
class InDoubt(Refusal):
    """A switch-over whose end is not known: the other side may have been told to take over, and does not answer."""

    kind: ClassVar[str] = "handover_in_doubt"
    volume: VolumeId
    node: str
    why: str

    @property
    def message(self) -> str:
        return (
            f"{self.volume} stepped down for {self.node}, which may have taken over or not, and does not answer: "
            f"{self.why}"
        )

    @property
    def hint(self) -> str:
        return (
            f"run it again once {self.node} answers: it is finished then, or undone. If {self.node} is down for good: "
            f"replicator promote {self.volume} --primary-is-down"
        )


def superseded(situation: Situation) -> Superseded | None:
    """Whether another copy that is known of has a newer epoch, and which is the newest."""
    lineage = situation.mine.lineage
    newer = [(node, copy) for node, copy in situation.others if lineage and copy.lineage.epoch > lineage.epoch]
    if lineage is None or not newer:
        return None
    return Superseded(situation.mine.id, lineage.epoch, *max(newer, key=lambda found: found[1].lineage.epoch))


# -- promotion


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a promotion does.

    :ivar expected, lineage: before and after
    :ivar at: the snapshot that it goes on from
    :ivar holds: tags that keep ``at``, and all before it, for copies that have not followed yet
    :ivar partial: a half-received snapshot that is discarded, "" for none
    :ivar aside: it was written to although it is a replica: that is kept aside first
    :ivar fence: the primary may still be writing: it is to be fenced off first, where there is a way
    :ivar reasons: why it may be, a sentence each
    :ivar warnings: what should make one think, a sentence each
    :ivar beyond: what is known that the primary has beyond ``at``, "" where nothing is
    """

    volume: VolumeId
    expected: Lineage
    lineage: Lineage
    at: Version
    holds: tuple[str, ...] = ()
    partial: str = ""
    aside: bool = False
    fence: bool = False
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    beyond: str = ""

    @property
    def done_already(self) -> bool:
        """Whether it is the primary already, and only put in order."""
        return self.expected == self.lineage


def plan_promotion(
    situation: Situation, *, draw: int, force: bool = False, primary_is_down: bool = False
) -> Promotion | Refusal:
    """Whether and how a copy is promoted.

    :param draw: random, see :func:`~replicator.roles.next_epoch`
    :param force: whatever is known of the others
    :param primary_is_down: the operator's word that silent nodes are
    """
    mine = situation.mine
    lineage = mine.lineage
    if lineage is None:
        return NoCopy(mine.id)
    others = tuple(situation.others)
    newer = superseded(situation)
    at = newest_complete(mine)
    if at is None:
        return NothingComplete(mine.id, mine.resume.to_name if mine.resume is not None else "")
    if lineage.role is Role.PRIMARY:
        if newer is not None:
            return newer
        return Promotion(mine.id, lineage, lineage, at, reasons=("it is the primary already",))
    refusals = tuple(_against(situation, lineage, newer))
    binding = [refusal for refusal in refusals if not (primary_is_down and isinstance(refusal, NoWitness))]
    if binding and not force:
        return binding[0]
    nodes = dict.fromkeys(
        [*(node for node, _ in others if node != situation.node), *(silence.node for silence in situation.silences)]
    )
    return Promotion(
        mine.id,
        lineage,
        Lineage(lineage.uuid, Role.PRIMARY, next_epoch([lineage.epoch, *(c.lineage.epoch for _, c in others)], draw)),
        at,
        tuple(rejoin_tag(node) for node in nodes),
        mine.resume.to_name if mine.resume is not None else "",
        mine.head_changed,
        bool(refusals) or bool(situation.silences),
        tuple(_reasons(situation, primary_is_down)),
        (*(refusal.message for refusal in refusals), *_fresher(situation, at, lineage)),
        _beyond(situation, at, lineage),
    )


def _against(situation: Situation, lineage: Lineage, newer: Superseded | None) -> Iterator[Refusal]:
    """All that speaks against a promotion, the weightiest first."""
    mine = situation.mine
    for witness, answer in _all_answers(situation):
        primary = answer.primary
        if primary is not None and primary.lineage.epoch >= lineage.epoch:
            yield PrimaryAnswers(mine.id, answer.node, primary, witness)
    if newer is not None:
        yield newer
    newest = newest_complete(mine)
    for answer in situation.answers:
        if newest is not None and answer.node != situation.node and handover_tag(answer.node) in newest.holds:
            yield OpenHandover(mine.id, answer.node)
    if situation.unsure:
        yield NoWitness(mine.id, situation.unsure)


def _all_answers(situation: Situation) -> Iterator[tuple[str, Answer]]:
    """What every node has said, with the witness through which, "" where directly."""
    for answer in situation.answers:
        yield "", answer
    for silence in situation.silences:
        yield from silence.seen


def _reasons(situation: Situation, primary_is_down: bool) -> Iterator[str]:
    for answer in situation.answers:
        if answer.node != situation.node:
            told = ", ".join(f"{copy.volume} is a {copy.lineage.role}" for copy in answer.copies.found)
            yield f"{answer.node} answers: {told or 'it has no copy'}"
    for silence in situation.silences:
        yield f"{silence.node} does not answer: {silence.why}"
        for witness, sighting in silence.witnesses:
            if sighting.copies is None:
                yield f"{witness} does not reach {silence.node} either: {sighting.message}"
            else:
                yield f"{witness} does reach {silence.node}"
    if primary_is_down and situation.unsure:
        yield f"you say that {' and '.join(dict.fromkeys(s.node for s in situation.unsure))} is down"


def _beyond(situation: Situation, at: Version, lineage: Lineage) -> str:
    """What the primary has beyond that snapshot, as far as it answers."""
    for witness, answer in _all_answers(situation):
        primary = answer.primary
        if primary is None or primary.lineage.epoch < lineage.epoch:
            continue
        through = f" (by way of {witness})" if witness else ""
        if primary.newest is None or primary.newest.guid == at.guid:
            return f"the primary on {answer.node}{through} has no newer snapshot; what was written since is not known"
        seconds = max(0, round((primary.newest.created - at.created).total_seconds()))
        return (
            f"the primary on {answer.node}{through} has a snapshot that is {seconds} s newer, "
            f"{primary.newest.name}, and what was written since"
        )
    return ""


def _fresher(situation: Situation, at: Version, lineage: Lineage) -> Iterator[str]:
    """Other replicas of the same epoch whose newest snapshot this one never had. Both were taken by the same primary,
    so their times are of one clock."""
    known = {version.guid for version in situation.mine.versions}
    for node, copy in situation.others:
        newest = copy.newest
        if copy.lineage == lineage and newest is not None and newest.guid not in known and newest.created > at.created:
            yield f"{copy.volume} on {node} has a newer snapshot, {newest.name}: promoted there, less would be lost"


# -- switch-over


class Move(StrEnum):
    """What a switch-over does next."""

    REPLICATE = "replicate"
    """Bring the last changes over, then have the primary step down."""
    TAKE_OVER = "take over"
    """The other side has all that the primary had: it becomes the primary."""
    TAKE_BACK = "take back"
    """It has not: it is barred from taking over, and the primary is primary again."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Switch:
    """The next move of a switch-over, and the snapshot that it is about."""

    move: Move
    at: Version | None = None


def plan_switchover(source: VolumeState, to_node: str, target: VolumeState | None) -> Switch | Refusal:
    """What a switch-over from ``source`` to ``target`` on ``to_node`` has to do next; asked again after each move.

    Between the two roles nobody is the primary. So whoever steps down marks the snapshot that the other goes on from,
    and from the mark and the two roles anybody can tell later how far it came.
    """
    ours = source.lineage
    if ours is None:
        return NoCopy(source.id)
    if target is None or target.lineage is None or target.lineage.uuid != ours.uuid:
        return NotACopy(source.id, to_node)
    theirs = target.lineage
    newest = newest_complete(source)
    marked = newest if newest is not None and handover_tag(to_node) in newest.holds else None
    if theirs.role is Role.PRIMARY:
        if theirs.epoch > ours.epoch:
            return Switch(Move.DONE, newest)
        return NothingToFollow(source.id, ours, to_node, theirs)
    if ours.role is Role.PRIMARY:
        if theirs.epoch > ours.epoch and marked is None:
            return Superseded(source.id, ours.epoch, to_node, Copy(target.id, theirs, newest_complete(target)))
        return Switch(Move.REPLICATE)
    if marked is None:
        return NotPrimary(source.id, ours)
    there = newest_complete(target)
    complete = there is not None and there.guid == marked.guid and not target.head_changed
    if complete and theirs.epoch == ours.epoch:
        return Switch(Move.TAKE_OVER, marked)
    return Switch(Move.TAKE_BACK, marked)


# -- rejoin


@dataclass(frozen=True, slots=True)
class Rejoin:
    """How a copy comes to follow another one.

    :ivar common: the newest snapshot that both have, as each side knows it; None: all is compared or sent
    :ivar own: snapshots that only this copy has since then, oldest first: they stay
    :ivar aside: it has live data that may be in no snapshot: that is kept aside first
    """

    volume: VolumeId
    lineage: Lineage
    common: tuple[Version, Version] | None
    own: tuple[Version, ...]
    aside: bool


def plan_rejoin(mine: VolumeState, node: str, primary: VolumeState | None) -> Rejoin | Refusal:
    """Whether and how ``mine`` follows ``primary`` of ``node`` from now on."""
    ours = mine.lineage
    if ours is None:
        return NoCopy(mine.id)
    if primary is None or primary.lineage is None or primary.lineage.uuid != ours.uuid:
        return NotACopy(mine.id, node)
    theirs = primary.lineage
    newer = theirs.epoch > ours.epoch or (theirs.epoch == ours.epoch and ours.role is Role.REPLICA)
    if theirs.role is not Role.PRIMARY or not newer:
        return NothingToFollow(mine.id, ours, node, theirs)
    common = _common(mine, primary)
    since = common[0].position if common is not None else None
    own = tuple(v for v in mine.snapshots if not v.is_diverged and (since is None or v.position > since))
    aside = ours.role is Role.PRIMARY or mine.head_changed
    return Rejoin(mine.id, replace(theirs, role=Role.REPLICA), common, own, aside)


def _common(mine: VolumeState, other: VolumeState) -> tuple[Version, Version] | None:
    """The newest snapshot of ``mine`` that the other knows as well."""
    theirs = {version.guid: version for version in reversed(other.versions) if not version.is_diverged}
    found = (v for v in reversed(mine.snapshots) if not v.is_diverged and v.guid in theirs)
    return next(((version, theirs[version.guid]) for version in found), None)
