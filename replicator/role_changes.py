"""What an operator can ask about roles: promote, demote, switch over, rejoin; what each would do, and what it did.

Puts together who knows what (:mod:`replicator.situations`), whether it may be (:mod:`replicator.transitions`) and the
doing of it (:mod:`replicator.takeover`). A fencing command gets these in its environment:

============================  ======================================================================
``REPLICATOR_FENCE_NODES``    the nodes that may still be writing, one a line
``REPLICATOR_FENCE_VOLUME``   the volume on this node that is to be promoted, STORAGE:NAME
============================  ======================================================================
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from replicator import hooks, logs, situations, takeover
from replicator.cancellation import Cancellation
from replicator.config import Config
from replicator.control import Listener, Note, RoleOrder, RolePreview, RoleReport, RoleVerb
from replicator.endpoint import Endpoint, SnapshotRequest
from replicator.errors import NoSuchVolume, NotAuthorized, ReplicatorError, UsageError
from replicator.model import HoldTag, Role, Version, VolumeId, VolumeState, hold_tag, snapshot_name
from replicator.planning import Intermediates, SendPolicy
from replicator.replication import Options, Pair, Replication
from replicator.role_refusals import NotPrimary, Refusal
from replicator.roles import EPOCH_STEP
from replicator.runs import Runner
from replicator.settings import Job
from replicator.situations import Situation
from replicator.takeover import Switched
from replicator.tasks import Network, Task
from replicator.transitions import (
    Move,
    Promotion,
    Rejoin,
    Switch,
    plan_promotion,
    plan_rejoin,
    plan_switchover,
    superseded,
)
from replicator.units import format_duration
from replicator.verification import aside_name

LOG = logging.getLogger(__name__)

OWN_JOB = "roles"
"""The job that a snapshot is named after where no job of this node has the volume."""


class Events(Protocol):
    """Who remembers what happened (see ``replicator.history``)."""

    def event(self, kind: str, subject: str, message: str = "") -> None:
        """Something worth remembering."""


class RoleChanger:
    """Changes roles on request; the engine has one.

    :param draw: random numbers, see :func:`~replicator.roles.next_epoch`
    """

    def __init__(
        self,
        config: Config,
        network: Network,
        runner: Runner,
        events: Events,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        draw: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._config = config
        self._network = network
        self._runner = runner
        self._events = events
        self._clock = clock
        self._draw = draw

    # -- what it would do

    def preview(self, order: RoleOrder) -> RolePreview:
        """What an order would change; changes nothing. :raises ConflictError: it may not be"""
        match order.verb:
            case RoleVerb.PROMOTE:
                effects = tuple(self._of_promotion(self._planned(order)))
            case RoleVerb.DEMOTE:
                effects = tuple(self._of_demotion(order))
            case RoleVerb.SWITCHOVER:
                effects = tuple(self._of_switchover(order))
            case RoleVerb.REJOIN:
                effects = tuple(self._of_rejoin(order))
        return RolePreview(order.verb, order.volume, effects)

    def change(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        """Do it. :raises ConflictError: it may not be"""
        match order.verb:
            case RoleVerb.PROMOTE:
                report = self._promote(order, listen)
            case RoleVerb.DEMOTE:
                report = self._demote(order)
            case RoleVerb.SWITCHOVER:
                report = self._switch(order, listen, cancel)
            case RoleVerb.REJOIN:
                report = self._rejoin(order, listen, cancel)
        logs.event(
            LOG, logging.INFO, "role changed", verb=order.verb, volume=report.volume, node=report.node,
            role=report.role, epoch=report.epoch, snapshot=report.snapshot,
        )  # fmt: skip
        self._events.event(
            str(order.verb),
            f"{report.node}/{report.volume}",
            f"{report.role} of epoch {report.epoch}, {report.snapshot}",
        )
        return report

    # -- promote

    def _situation(self, volume: str) -> Situation:
        peers = {name: self._network.endpoint(name) for name in self._config.peers}
        return situations.find_out(self._own, VolumeId.parse(volume), peers)

    def _everybody(self) -> dict[str, Endpoint]:
        return {name: self._network.endpoint(name) for name in (self._network.node, *self._config.peers)}

    @property
    def _own(self) -> Endpoint:
        return self._network.endpoint(self._network.node)

    def _planned(self, order: RoleOrder) -> Promotion:
        found = plan_promotion(
            self._situation(order.volume),
            draw=self._draw(EPOCH_STEP),
            force=order.force,
            primary_is_down=order.primary_is_down,
        )
        return _allowed(found)

    def _of_promotion(self, plan: Promotion) -> Iterator[str]:
        if plan.done_already:
            yield f"{plan.volume} is the primary already (epoch {plan.lineage.epoch}): it is only put in order"
            return
        yield f"{plan.volume} becomes the primary, with what it had at {plan.at.name}: {self._age(plan.at)} ago"
        yield plan.beyond or "how much the primary had beyond that is not known: it does not answer"
        if plan.partial:
            yield f"the half-received {plan.partial} is discarded"
        if plan.aside:
            yield "what somebody wrote to the replica is kept as a snapshot diverged-<time>, and is not in the primary"
        if plan.fence and self._config.fence is not None:
            yield f"first the fencing command runs, and must succeed: {' '.join(self._config.fence.command)}"
        yield from plan.reasons
        yield from (f"WARNING: {warning}" for warning in plan.warnings)

    def _age(self, version: Version) -> str:
        return format_duration(timedelta(seconds=max(0, round((self._clock() - version.created).total_seconds()))))

    def _promote(self, order: RoleOrder, listen: Listener) -> RoleReport:
        plan = self._planned(order)
        for reason in (*plan.reasons, *plan.warnings):
            listen(Note(reason))

        def fence() -> None:
            fencing = self._config.fence
            if fencing is None:
                return
            listen(Note(f"fencing: {' '.join(fencing.command)}"))
            nodes = sorted({tag.rpartition(":")[2] for tag in plan.holds})
            given = {"REPLICATOR_FENCE_NODES": "\n".join(nodes), "REPLICATOR_FENCE_VOLUME": str(plan.volume)}
            hooks.run(fencing.command, fencing.timeout, name="the fencing command", environment=given)

        kept = takeover.promote(self._own, plan, aside_name(self._clock()), fence)
        return RoleReport(
            order.verb,
            str(plan.volume),
            self._network.node,
            str(plan.lineage.role),
            plan.lineage.epoch,
            plan.at.name,
            age=max(0.0, (self._clock() - plan.at.created).total_seconds()),
            beyond=plan.beyond,
            aside=kept,
            reasons=(*plan.reasons, *plan.warnings),
        )

    # -- demote

    def _primary_here(self, order: RoleOrder) -> VolumeState:
        """:raises ConflictError: it is none, or was superseded"""
        situation = self._situation(order.volume)
        newer = superseded(situation)
        if newer is not None:
            raise newer.to_error()
        lineage = situation.mine.lineage
        if lineage is None or lineage.role is not Role.PRIMARY:
            refusal = plan_promotion(situation, draw=0) if lineage is None else NotPrimary(situation.mine.id, lineage)
            raise _refused(refusal)
        return situation.mine

    def _of_demotion(self, order: RoleOrder) -> Iterator[str]:
        state = self._primary_here(order)
        yield f"a last snapshot of {state.id} is taken, and it becomes a replica that nobody can write to"
        yield "no copy is the primary then, until one is promoted; `replicator switchover` does both, without a loss"

    def _demote(self, order: RoleOrder) -> RoleReport:
        state = self._primary_here(order)
        at = self._snapshot(self._own, state.id, self._job_of(state))
        if state.lineage is None:
            raise AssertionError  # _primary_here has looked
        lineage = takeover.step_down(self._own, state.id, state.lineage, at)
        return RoleReport(
            order.verb, str(state.id), self._network.node, str(lineage.role), lineage.epoch, at.name, age=0.0
        )

    def _job_of(self, state: VolumeState) -> str:
        """The job whose snapshots a volume has."""
        return next((v.job for v in reversed(state.snapshots) if v.job is not None), OWN_JOB)

    def _snapshot(self, endpoint: Endpoint, volume: VolumeId, job: str) -> Version:
        name = snapshot_name(job, self._clock())
        return endpoint.snapshot(SnapshotRequest((volume,), name))[0].get()

    # -- switch-over

    def _handover(self, order: RoleOrder) -> tuple[Task, Job]:
        """The way from the primary, wherever it is, to the node that is to have it.

        :raises UsageError: no job of this node replicates the volume there
        """
        found: list[tuple[Task, Job]] = []
        for job in self._config.jobs.values():
            with suppress(NoSuchVolume, UsageError):
                found += [(task, job) for task in self._runner.tasks.anyhow(job, order.volume)]
        for task, job in found:
            pair = task.pair
            if pair.target.node == order.node:
                return self._from_primary(task, found), job
            if pair.source.node == order.node:
                turned = Pair(pair.target, pair.target_volume, pair.source, pair.source_volume, pair.tag)
                return replace(task, pair=turned, reversed=True), job
        raise UsageError(
            f"no job of this node replicates {order.volume} to {order.node}",
            hint="run it on the node that has the job; `replicator status` lists volumes and targets",
        )

    def _from_primary(self, task: Task, found: list[tuple[Task, Job]]) -> Task:
        """The same, from another target that has the primary now."""
        here = task.pair.source.state(task.pair.source_volume)
        if here is not None and here.lineage is not None and here.lineage.role is Role.PRIMARY:
            return task
        for other, _ in found:
            pair = other.pair
            if pair.target.node == task.pair.target.node:
                continue
            with suppress(ReplicatorError):
                there = pair.target.state(pair.target_volume)
                if there is not None and there.lineage is not None and there.lineage.role is Role.PRIMARY:
                    return replace(task, pair=replace(task.pair, source=pair.target, source_volume=pair.target_volume))
        return task

    def _of_switchover(self, order: RoleOrder) -> Iterator[str]:
        task, job = self._handover(order)
        pair = task.pair
        source = pair.source.state(pair.source_volume)
        if source is None:
            raise NoSuchVolume(f"node {pair.source.node} has no volume {pair.source_volume}", hint="")
        switch = plan_switchover(source, pair.target.node, pair.target.state(pair.target_volume))
        if isinstance(switch, Refusal):
            raise switch.to_error()
        takeover.check_not_overtaken(pair, self._everybody())
        yield f"{pair.source.node}/{pair.source_volume} is brought over to {pair.target.node} with its last changes"
        if job.quiesce is not None and not task.reversed:
            yield f"while the last ones are taken, the job's hooks keep it quiet: {' '.join(job.quiesce.before)}"
        yield f"it becomes a replica there, and {pair.target.node}/{pair.target_volume} the primary"
        yield f"from then on job {job.name} replicates from {pair.target.node} to {pair.source.node}"

    def _bringing(
        self, pair: Pair, job: str, options: Options, listen: Listener, cancel: Cancellation
    ) -> Callable[[], Version]:
        """What takes a snapshot of the primary and brings it over."""

        def bring() -> Version:
            at = self._snapshot(pair.source, pair.source_volume, job)
            listen(Note(f"bringing {at.name} over to {pair.target.node}"))
            return Replication(pair, options, observer=listen, cancel=cancel).run().newest or at

        return bring

    def _switch(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        task, job = self._handover(order)
        pair = task.pair
        bring = self._bringing(pair, job.name, self._runner.options(task), listen, cancel)

        def quiesced() -> AbstractContextManager[None]:
            hook = job.quiesce
            if hook is None or task.reversed:
                return nullcontext()
            return hooks.quiesced(
                hook.before, hook.after, hook.timeout, job=job.name, volumes=[str(pair.source_volume)]
            )

        with self._runner.turns.exclusive(task, cancel):
            takeover.check_not_overtaken(pair, self._everybody())
            done = takeover.Switchover(pair, bring, draw=self._draw, cancel=cancel, quiesced=quiesced).run()
        return _switched(order, pair, done)

    # -- rejoin

    def _way_back(self, order: RoleOrder) -> tuple[Pair, VolumeState]:
        """From the primary on the named node to this node's copy. :raises ConflictError: it has none"""
        volume = VolumeId.parse(order.volume)
        mine = self._own.state(volume)
        if mine is None or mine.lineage is None:
            raise NoSuchVolume(f"node {self._network.node} has no copy {volume}", hint="`replicator status` lists them")
        source = self._network.endpoint(order.node)
        copies = source.copies(mine.lineage.uuid).found
        found = max(copies, key=lambda c: (c.lineage.role is Role.PRIMARY, c.lineage.epoch), default=None)
        if found is None:
            raise NoSuchVolume(f"node {order.node} has no copy of {volume}", hint="name the node that was promoted")
        places = {(order.node, found.volume.storage), (self._network.node, volume.storage)}
        tags = [HoldTag.parse(tag) for version in mine.versions for tag in version.tags]
        known = next((tag for tag in tags if tag is not None and (tag.node, tag.storage) in places), None)
        tag = (
            hold_tag(known.job, known.node, known.storage)
            if known is not None
            else hold_tag(OWN_JOB, self._network.node, volume.storage)
        )
        return Pair(source, found.volume, self._own, volume, tag), mine

    def _of_rejoin(self, order: RoleOrder) -> Iterator[str]:
        pair, mine = self._way_back(order)
        there = pair.source.state(pair.source_volume)
        primary = f"{pair.source.node}/{pair.source_volume}"
        if order.fail_back and self._is_failing_back(pair, mine, there):
            yield f"{primary} has stepped down for {mine.id} already: that switch-over is finished, or undone"
            return
        plan = _allowed_rejoin(plan_rejoin(mine, pair.source.node, there))
        yield f"{plan.volume} becomes a replica of {primary} (epoch {plan.lineage.epoch})"
        if plan.aside:
            yield "what is in it and in no snapshot is kept as a snapshot diverged-<time>; it stops being writable"
        if plan.own:
            yield f"{len(plan.own)} snapshots that only it has stay, the newest of them {plan.own[-1].name}"
        if plan.common is not None:
            yield f"only what changed since {plan.common[0].name} is sent, which both have"
        else:
            yield "nothing is common: both sides are compared, or everything is sent"
        yield "no snapshot is destroyed"
        if order.fail_back:
            yield f"once it is in sync, {primary} becomes a replica, and {plan.volume} the primary"

    def _rejoin(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        pair, mine = self._way_back(order)
        primary = pair.source.state(pair.source_volume)
        if order.fail_back and self._is_failing_back(pair, mine, primary):
            return _switched(order, pair, self._fail_back(pair, listen, cancel))
        plan = _allowed_rejoin(plan_rejoin(mine, pair.source.node, primary))
        try:
            self._snapshot(pair.source, pair.source_volume, self._job_of(mine))
        except NotAuthorized as error:
            listen(Note(f"no new snapshot is taken on {pair.source.node}: {error}"))
        options = Options(SendPolicy(Intermediates.NEWEST))
        done = takeover.rejoin(pair, plan, options, aside_name(self._clock()), observer=listen, cancel=cancel)
        report = RoleReport(
            order.verb,
            str(plan.volume),
            self._network.node,
            str(done.lineage.role),
            done.lineage.epoch,
            done.at.name if done.at is not None else "",
            age=max(0.0, (self._clock() - done.at.created).total_seconds()) if done.at is not None else None,
            aside=done.aside,
            done=done.done,
            sent=done.sent,
        )
        if not order.fail_back:
            return report
        listen(Note(f"{plan.volume} has rejoined and is in sync: it is switched back"))
        back = _switched(order, pair, self._fail_back(pair, listen, cancel))
        return replace(back, aside=report.aside, done=report.done, sent=report.sent)

    def _is_failing_back(self, pair: Pair, mine: VolumeState, primary: VolumeState | None) -> bool:
        """Whether the primary has stepped down for this node already: an attempt was cut off, and is finished."""
        if primary is None:
            return False
        found = plan_switchover(primary, pair.target.node, mine)
        return isinstance(found, Switch) and found.move is not Move.REPLICATE

    def _fail_back(self, pair: Pair, listen: Listener, cancel: Cancellation) -> Switched:
        """Switch over from the primary to this node's copy, which follows it."""
        job = HoldTag.parse(pair.tag)
        options = Options(SendPolicy(Intermediates.NEWEST))
        bring = self._bringing(pair, job.job if job is not None else OWN_JOB, options, listen, cancel)
        takeover.check_not_overtaken(pair, self._everybody())
        return takeover.Switchover(pair, bring, draw=self._draw, cancel=cancel).run()


def _switched(order: RoleOrder, pair: Pair, done: Switched) -> RoleReport:
    """Of the new primary, which had all that the old one had."""
    return RoleReport(
        order.verb,
        str(pair.target_volume),
        pair.target.node,
        str(done.lineage.role),
        done.lineage.epoch,
        done.at.name if done.at is not None else "",
        age=0.0,
        without_primary=done.seconds,
    )


def _allowed(found: Promotion | Refusal) -> Promotion:
    if isinstance(found, Refusal):
        raise found.to_error()
    return found


def _allowed_rejoin(found: Rejoin | Refusal) -> Rejoin:
    if isinstance(found, Refusal):
        raise found.to_error()
    return found


def _refused(found: Promotion | Refusal) -> ReplicatorError:
    if isinstance(found, Refusal):
        return found.to_error()
    raise AssertionError  # asked only of what has no lineage
