"""Whether a copy may become the primary, or follow another one: what is known of all copies in, what to do or why not
out. Pure; no I/O, no clock, no random numbers.

What is known (:class:`~replicator.situations.Situation`) is what each node has said of its own copies, and which nodes
said nothing, with what third nodes say of them. Why not is a :class:`~replicator.role_refusals.Refusal`. The rules::

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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from replicator.endpoint import Copy
from replicator.model import Lineage, Role, Version, VolumeId, VolumeState, handover_tag, rejoin_tag
from replicator.role_refusals import (
    NoCopy,
    NotACopy,
    NothingComplete,
    NothingToFollow,
    NotPrimary,
    NoWitness,
    OpenHandover,
    PrimaryAnswers,
    Refusal,
    Superseded,
)
from replicator.roles import newest_complete, next_epoch
from replicator.situations import Answer, Situation


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
    if theirs.role is Role.PRIMARY and theirs.epoch <= ours.epoch:
        return NothingToFollow(source.id, ours, to_node, theirs)
    if theirs.role is Role.PRIMARY and ours.role is Role.REPLICA:
        return Switch(Move.DONE, newest)
    if ours.role is Role.PRIMARY:
        if theirs.epoch > ours.epoch and (marked is None or theirs.role is Role.PRIMARY):
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
