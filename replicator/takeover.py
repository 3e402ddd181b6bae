"""Carries out what :mod:`replicator.transitions` has found may be: promotions, switch-overs, rejoins.

Every change of a role is one compare-and-set at the node that has the copy, so whatever is cut off, comes late or comes
twice leaves a state from which the same call finishes or undoes the work. Nothing here decides what may be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from replicator import logs
from replicator.cancellation import Cancellation
from replicator.endpoint import Copy, Endpoint, RoleChange
from replicator.errors import (
    ConflictError,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAuthorized,
    PeerUnreachable,
    ReplicatorError,
    TransportError,
    VolumeChanged,
)
from replicator.model import (
    Lineage,
    Role,
    StreamKind,
    Version,
    VolumeId,
    VolumeState,
    handover_tag,
    kept_tag,
    rejoin_tag,
)
from replicator.planning import Step
from replicator.rejoining import rejoin as rejoin_native
from replicator.replication import Observer, Options, Pair, Replication
from replicator.role_refusals import InDoubt, Refusal, Superseded
from replicator.roles import EPOCH_STEP, followers, newest_complete, next_epoch
from replicator.transitions import Move, Promotion, Rejoin, Switch, plan_switchover
from replicator.verification import resync

LOG = logging.getLogger(__name__)

Found = TypeVar("Found")

STILL_WRITTEN = 3
"""How often a primary that is still written to is asked to step down, each time after another snapshot."""
PATIENCE = 5
"""How often the other side of a switch-over is asked what became of it, before that is left in doubt."""
PAUSE = 0.5
"""Seconds between two of these."""


def promote(endpoint: Endpoint, plan: Promotion, aside: str, fence: Callable[[], None]) -> tuple[str, ...]:
    """Make a copy of this node a primary; the names under which what somebody wrote to the replica is kept.

    1. The primary is fenced off, where that is to be and there is a way. A cut: nothing has changed.
    2. The snapshot is held for the copies that will follow. A cut: it is held, and the next attempt holds it again.
    3. What somebody wrote to the replica is kept aside. A cut: a snapshot more.
    4. Role, epoch and live data change, in one step.

    :param aside: name for what is kept aside
    :param fence: called where the primary may still be writing; raises where it could not be stopped
    """
    kept: tuple[str, ...] = ()
    if plan.fence:
        fence()
    for tag in plan.holds:
        endpoint.hold(plan.volume, plan.at.ref, tag)
    if plan.aside:
        found = endpoint.set_aside(plan.volume, aside)
        kept = (found.name,) if found is not None else ()
    endpoint.change_role(RoleChange(plan.volume, plan.expected, plan.lineage, plan.at.ref))
    return kept


def step_down(endpoint: Endpoint, volume: VolumeId, lineage: Lineage, at: Version | None) -> Lineage:
    """Make a primary a replica whose newest snapshot ``at`` is all that it has.

    :raises VolumeBusy, VolumeChanged: it is in use, or was written to since
    """
    return endpoint.change_role(
        RoleChange(volume, lineage, replace(lineage, role=Role.REPLICA), at.ref if at is not None else None)
    )


def notice_superseded(pair: Pair) -> bool:
    """Mark a primary as a replica that another copy has superseded, so that nothing snapshots or prunes it any more,
    and it is read-only where the storage can; whether it is one. Its live data stays as it is, for :func:`rejoin`.

    :raises ReplicatorError: one of the two sides cannot be looked at, or not be changed
    """
    source = pair.source.state(pair.source_volume)
    target = pair.target.state(pair.target_volume)
    ours, theirs = source.lineage if source else None, target.lineage if target else None
    if ours is None or theirs is None or ours.uuid != theirs.uuid or theirs.epoch <= ours.epoch:
        return False
    if ours.role is Role.PRIMARY:
        step_down(pair.source, pair.source_volume, ours, None)
        logs.event(
            LOG, logging.WARNING, "superseded", volume=pair.source_volume, epoch=ours.epoch, by=pair.target_text,
            newer=theirs.epoch,
        )  # fmt: skip
    return True


# -- switch-over


def check_not_overtaken(pair: Pair, others: Mapping[str, Endpoint]) -> None:
    """Whether a switch-over is still about the newest data: one that was cut off, and is finished after a third copy
    was promoted instead, would make a second primary.

    :param others: all nodes that may have a copy; those that do not answer are passed over
    :raises ConflictError: a copy on another node is of a newer epoch than both sides
    """
    source, target = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
    if source is None or source.lineage is None:
        return
    known = max(state.lineage.epoch for state in (source, target) if state is not None and state.lineage is not None)
    for node in sorted(others.keys() - {pair.source.node, pair.target.node}):
        copies: tuple[Copy, ...] = ()
        with suppress(ReplicatorError):
            copies = others[node].copies(source.lineage.uuid).found
        newest = max(copies, key=lambda copy: copy.lineage.epoch, default=None)
        if newest is not None and newest.lineage.epoch > known:
            raise Superseded(source.id, source.lineage.epoch, node, newest).to_error()


@dataclass(frozen=True, slots=True)
class Switched:
    """What a switch-over did.

    :ivar lineage: of the new primary
    :ivar at: the snapshot that it went on from, None where that is not known any more
    :ivar seconds: for which there was no writable copy, None where an earlier attempt had begun it
    """

    lineage: Lineage
    at: Version | None
    seconds: float | None


class Switchover:
    """Hands a primary over to one of its replicas; see :func:`replicator.transitions.plan_switchover` for the moves.

    :param pair: from the primary to the replica
    :param bring: takes a snapshot of the primary and brings it over; that snapshot
    :param quiesced: what keeps the primary from being written to while the last snapshot is taken and handed over
    :param draw: random numbers, see :func:`~replicator.roles.next_epoch`
    """

    def __init__(
        self,
        pair: Pair,
        bring: Callable[[], Version],
        *,
        draw: Callable[[int], int],
        cancel: Cancellation,
        quiesced: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pair = pair
        self._bring = bring
        self._draw = draw
        self._cancel = cancel
        self._quiesced = quiesced
        self._clock = clock
        self._stopped: float | None = None
        self._epoch: int | None = None
        self._asked = False
        self._refused: ReplicatorError | None = None

    def run(self) -> Switched:
        """Hand over, or finish or undo what an earlier attempt began.

        :raises ConflictError: it may not be, or what became of it cannot be found out now (``handover_in_doubt``)
        :raises ReplicatorError: it failed; the primary is the primary as before
        """
        switch = self._next()
        if switch.move is Move.REPLICATE:
            self._ask_leave()
            self._bring()
            with self._quiesced():
                self._hand_over()
                return self._finish()
        return self._finish()

    def _next(self) -> Switch:
        """What both sides' storages say is to be done next. :raises ConflictError: nothing may be"""
        pair = self._pair
        source = pair.source.state(pair.source_volume)
        if source is None:
            raise NoSuchVolume(f"node {pair.source.node} has no volume {pair.source_volume}", hint="")
        found = plan_switchover(source, pair.target.node, pair.target.state(pair.target_volume))
        if isinstance(found, Refusal):
            raise found.to_error()
        return found

    def _ask_leave(self) -> None:
        """Ask both sides for a change that changes nothing: a right that is missing, or a peer too old to know of
        roles, is better found out now than when there is no primary."""
        pair = self._pair
        for endpoint, volume in ((pair.source, pair.source_volume), (pair.target, pair.target_volume)):
            state = endpoint.state(volume)
            if state is not None and state.lineage is not None:
                endpoint.change_role(RoleChange(volume, state.lineage, state.lineage))

    def _hand_over(self) -> None:
        """Bring the last changes over and have the primary step down; where that fails, it is the primary as before."""
        pair = self._pair
        tag = handover_tag(pair.target.node)
        for attempt in range(1, STILL_WRITTEN + 1):
            self._cancel.check()
            at = self._bring()
            lineage = self._primary()
            pair.source.hold(pair.source_volume, at.ref, tag)
            self._stopped = self._clock()
            try:
                step_down(pair.source, pair.source_volume, lineage, at)
                return
            except TransportError as error:
                self._stay(lineage, error)
                return
            except ReplicatorError as error:
                pair.source.release(pair.source_volume, at.ref, tag)
                if not isinstance(error, VolumeChanged) or attempt == STILL_WRITTEN:
                    raise

    def _primary(self) -> Lineage:
        state = self._pair.source.state(self._pair.source_volume)
        if state is None or state.lineage is None or state.lineage.role is not Role.PRIMARY:
            raise ConflictError(
                f"{self._pair.source_volume} is the primary no more", kind="role_changed", hint="run it again"
            )
        return state.lineage

    def _stay(self, lineage: Lineage, error: ReplicatorError) -> None:
        """The primary was told to step down and did not answer. If it has not, it must not do so later."""
        pair = self._pair
        renewed = Lineage(lineage.uuid, Role.PRIMARY, self._new_epoch(lineage.epoch))
        try:
            self._persistently(
                lambda: pair.source.change_role(RoleChange(pair.source_volume, lineage, renewed)), "the primary"
            )
        except ConflictError as conflict:
            if conflict.kind != "role_changed":
                raise
            return  # it has stepped down
        raise error

    def _finish(self) -> Switched:
        """From when the primary has stepped down on: the other side takes over, or the primary is primary again."""
        pair = self._pair
        for _ in range(PATIENCE):
            switch = self._settled()
            if switch.move is Move.DONE:
                return self._done(switch)
            if switch.at is None:
                raise self._refused or ConflictError(
                    f"{pair.source_volume} is the primary as before", kind="role_changed", hint="run it again"
                )
            if switch.move is Move.TAKE_BACK or self._refused is not None:
                self._take_back(switch.at)
            else:
                self._take_over(switch.at)
        raise self._doubt("it was asked several times")

    def _settled(self) -> Switch:
        return self._persistently(self._next, self._pair.target.node)

    def _take_over(self, at: Version) -> None:
        pair = self._pair
        state, source = pair.target.state(pair.target_volume), pair.source.state(pair.source_volume)
        there = state.by_guid(at.guid) if state is not None else None
        if state is None or state.lineage is None or there is None or source is None:
            return  # it is looked at again
        if self._epoch is None:
            self._epoch = self._new_epoch(state.lineage.epoch)
        lineage = Lineage(state.lineage.uuid, Role.PRIMARY, self._epoch)
        first, self._asked = not self._asked, True
        try:
            for node in sorted({pair.source.node} | followers(source) - {pair.target.node}):
                pair.target.hold(pair.target_volume, there.ref, rejoin_tag(node))
            pair.target.change_role(RoleChange(pair.target_volume, state.lineage, lineage, there.ref))
        except PeerUnreachable as error:
            if first and self._stopped is not None:
                self._refused = error  # it was never asked, so it cannot take over later
                self._take_back(at, unreachable=True)
        except NotAuthorized as error:  # that is an answer
            self._refused = error
        except TransportError as error:
            logs.event(LOG, logging.WARNING, "switch-over not answered", volume=pair.source_volume, error=error)
        except ReplicatorError as error:
            self._refused = error

    def _take_back(self, at: Version, *, unreachable: bool = False) -> None:
        """Have the primary be primary again. :raises ReplicatorError: always; why it was not handed over"""
        pair = self._pair
        known = []
        if not unreachable:
            known.append(self._persistently(self._bar, pair.target.node))
        source = pair.source.state(pair.source_volume)
        if source is None or source.lineage is None:
            raise NoSuchVolume(f"node {pair.source.node} has no volume {pair.source_volume}", hint="")
        if source.lineage.role is Role.REPLICA:
            epoch = self._new_epoch(source.lineage.epoch, *known)
            back = Lineage(source.lineage.uuid, Role.PRIMARY, epoch)
            pair.source.change_role(RoleChange(pair.source_volume, source.lineage, back, at.ref))
        with suppress(ReplicatorError):
            pair.source.release(pair.source_volume, at.ref, handover_tag(pair.target.node))
        raise self._refused or ConflictError(
            f"the copy on {pair.target.node} has not all that {pair.source_volume} had when it stepped down, so that "
            "is the primary again",
            kind="switchover_undone",
            hint="run it again",
        )

    def _bar(self) -> int:
        """Raise the replica's epoch: what it was told before to take over comes too late from then on. The epoch."""
        pair = self._pair
        state = pair.target.state(pair.target_volume)
        if state is None or state.lineage is None:
            return 0
        if state.lineage.role is Role.PRIMARY:
            raise ConflictError(
                f"the copy on {pair.target.node} has taken over meanwhile", kind="role_changed", hint="run it again"
            )
        barred = replace(state.lineage, epoch=self._new_epoch(state.lineage.epoch))
        pair.target.change_role(RoleChange(pair.target_volume, state.lineage, barred))
        return barred.epoch

    def _done(self, switch: Switch) -> Switched:
        pair = self._pair
        seconds = self._clock() - self._stopped if self._stopped is not None else None
        target = pair.target.state(pair.target_volume)
        if target is None or target.lineage is None:
            raise NoSuchVolume(f"node {pair.target.node} has no volume {pair.target_volume}", hint="")
        return Switched(target.lineage, switch.at, seconds)

    def _new_epoch(self, *known: int) -> int:
        return next_epoch(known, self._draw(EPOCH_STEP))

    def _persistently(self, ask: Callable[[], Found], node: str) -> Found:
        """Ask until there is an answer. :raises ConflictError: there is none: what became of it is in doubt"""
        for attempt in range(1, PATIENCE + 1):
            try:
                return ask()
            except TransportError as error:
                if attempt == PATIENCE or not error.retryable or self._cancel.wait(PAUSE):
                    raise self._doubt(f"{node}: {error}") from error
        raise AssertionError  # the loop returns or raises

    def _doubt(self, why: str) -> ConflictError:
        return InDoubt(self._pair.source_volume, self._pair.target.node, why).to_error()


# -- rejoin


@dataclass(frozen=True, slots=True)
class Rejoined:
    """What a rejoin did.

    :ivar at: the newest snapshot that both have now
    :ivar aside: names under which what only this copy had is kept
    :ivar done, sent: bytes of changes, bytes over the network
    """

    lineage: Lineage
    at: Version | None
    aside: tuple[str, ...]
    done: int
    sent: int


def rejoin(
    pair: Pair, plan: Rejoin, options: Options, aside: str, *, observer: Observer, cancel: Cancellation
) -> Rejoined:
    """Have a copy follow a primary: what only it has is kept, and the difference is sent.

    1. It steps down; or where it has live data that is in no snapshot, that is kept aside. A cut: it is a replica, or
       as before.
    2. It takes the primary's epoch. A cut: a replica that has snapshots of its own, which no run continues and the next
       rejoin does.
    3. The difference from the newest snapshot that both have is sent.

    :param pair: from the primary to the copy that is to follow
    :param aside: name for what is kept aside
    """
    mine = _existing(pair.target, pair.target_volume)
    kept = _put_aside(pair, mine, plan, aside)
    pair.target.adopt(pair.target_volume, plan.lineage)
    done = sent = 0
    native = pair.target.storage(pair.target_volume.storage).stream is StreamKind.NATIVE
    if plan.own or (native and kept):  # a native stream applies to nothing but the newest snapshot
        pair.target.abort_receive(pair.target_volume)
        to = _newest(pair, plan)
        if native:
            found = rejoin_native(pair, to, options, observer=observer, cancel=cancel)
            kept, done, sent = (*kept, *found.aside), found.changed, found.sent
        elif plan.common is None:
            found = resync(pair, to, options, observer=observer, cancel=cancel)
            kept, done, sent = (*kept, *found.aside), found.changed, found.sent
        else:
            target_base, base = plan.common
            back = Replication(pair, options, observer=observer, cancel=cancel)
            back.put_back(Step(base, target_base, to, to.name), aside, lambda _: None)
            done, sent = back.outcome.done, back.outcome.sent
    replication = Replication(pair, options, observer=observer, cancel=cancel)
    outcome = replication.run()
    lineage = _existing(pair.target, pair.target_volume).lineage or plan.lineage
    return Rejoined(lineage, outcome.newest, kept, done + outcome.done, sent + outcome.sent)


def _put_aside(pair: Pair, mine: VolumeState, plan: Rejoin, aside: str) -> tuple[str, ...]:
    """Keep what only this copy has where no policy destroys it; under which names. It is a replica afterwards.

    Of a native storage, snapshots are kept with the dataset that is put aside.
    """
    place, volume = pair.target, pair.target_volume
    if plan.aside and mine.lineage is not None and not plan.own:
        newest = plan.common[0] if plan.common is not None else None
        if mine.lineage.role is Role.PRIMARY and newest is not None:
            with suppress(VolumeChanged):  # then it has something of its own
                step_down(place, volume, mine.lineage, newest)
                return ()
    if plan.aside:
        kept = place.set_aside(volume, aside)
        if kept is not None:
            return (kept.name,)
    if plan.own and place.storage(volume.storage).stream is not StreamKind.NATIVE:
        newest_own = plan.own[-1]
        if not any(v.is_diverged and v.position > newest_own.position for v in mine.snapshots):
            place.hold(volume, newest_own.ref, kept_tag(place.node))
            return (newest_own.name,)
    return ()


def _existing(endpoint: Endpoint, volume: VolumeId) -> VolumeState:
    state = endpoint.state(volume)
    if state is None:
        raise NoSuchVolume(f"node {endpoint.node} has no volume {volume}", hint="")
    return state


def _newest(pair: Pair, plan: Rejoin) -> Version:
    """What the copy is brought to: newer than what both have, as it has newer snapshots of its own."""
    source = _existing(pair.source, pair.source_volume)
    newest = newest_complete(source)
    if newest is None or (plan.common is not None and newest.guid == plan.common[1].guid):
        raise NoSuchSnapshot(
            f"{pair.source_volume} on {pair.source.node} has no snapshot since it was promoted, and "
            f"{pair.target_volume} has",
            hint=f"take one on {pair.source.node}: with a job that has it as its source, or by hand",
        )
    return newest
