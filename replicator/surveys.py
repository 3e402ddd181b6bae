"""Looks at both sides of tasks, changes nothing, and remembers what that shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from replicator.cancellation import Cancellation
from replicator.errors import ReplicatorError
from replicator.model import VolumeId
from replicator.planning import Common, Plan, newest_common, protected_guids
from replicator.replication import Listed, Replication, Volumes
from replicator.reporting import Reporter
from replicator.settling import heads_of, places, settled_in, states_of
from replicator.tasks import Task
from replicator.tracker import ReplicaKey


@dataclass(frozen=True, slots=True)
class Survey:
    """What listing both sides of a task showed.

    :ivar backlog: estimated bytes of snapshots that the target does not have yet
    :ivar quiet: nothing was written to the volume since its newest snapshot, so a run takes none
    :ivar protect: guids that no policy may destroy, on either side; None where not both could be listed
    """

    common: Common | None
    plan: Plan | None
    backlog: int
    error: ReplicatorError | None = None
    sizes: tuple[int | None, ...] = ()
    quiet: bool = False
    protect: frozenset[str] | None = None


class Surveys:
    """Makes surveys, and reports what they show."""

    def __init__(self, reporter: Reporter, clock: Callable[[], datetime]) -> None:
        self._reporter = reporter
        self._clock = clock

    def of(self, task: Task, *, sizes: bool = True) -> Survey:
        """List both sides and plan.

        :param sizes: estimate what each step sends, which is a question to the source each
        """
        return self._survey(task, None, None, sizes, Volumes())

    def of_all(self, tasks: Sequence[Task]) -> dict[ReplicaKey, Survey]:
        """:meth:`of` many, with one listing of each storage; only here it is found out which volumes are quiet."""
        asked = self._clock()
        pairs = [task.pair for task in tasks]
        heads, states = heads_of(pairs), states_of(pairs)
        as_of: dict[ReplicaKey, datetime] = {}
        quiet: set[VolumeId] = set()
        for task in tasks:
            if settled_in(heads, task.pair, task.policy) is not None:
                as_of[task.key] = asked
                if task.job.skips_unchanged:
                    quiet.add(task.pair.source_volume)
        found = {}
        volumes = Volumes()
        for task in tasks:
            here, there = (states.get(place) for place in places(task.pair))
            listed = (here, there) if here is not None and there is not None else None
            survey = self._survey(task, listed, as_of.get(task.key), True, volumes)
            found[task.key] = replace(survey, quiet=task.pair.source_volume in quiet)
        return found

    def protected(self, tasks: Sequence[Task]) -> frozenset[str]:
        """What no policy may destroy on the source of these tasks, which is one volume: what every target that answers
        has newest. For the others, their holds protect it."""
        return frozenset[str]().union(*(self.of(task, sizes=False).protect or () for task in tasks))

    def _survey(
        self, task: Task, listed: Listed | None, as_of: datetime | None, sizes: bool, volumes: Volumes
    ) -> Survey:
        replication = Replication(
            task.pair, task.options(), observer=lambda _: None, cancel=Cancellation(), volumes=volumes
        )
        protect: frozenset[str] | None = None
        try:
            found, source, target = replication.plan(listed)
            common = newest_common(source, target)
            protect = protected_guids(source, (target,), task.policy)
            if not isinstance(found, Plan):
                raise found.to_error()
            estimates = _estimates(task, found) if sizes else ()
        except ReplicatorError as error:
            self._reporter.problem(task.key, error)
            return Survey(None, None, 0, error, protect=protect)
        backlog = sum(size or 0 for size in estimates)
        self._reporter.seen(task.key, common.target if common else None, backlog, as_of)
        return Survey(common, found, backlog, sizes=estimates, protect=protect)


def _estimates(task: Task, plan: Plan) -> tuple[int | None, ...]:
    pair = task.pair
    return tuple(
        pair.source.estimate(
            pair.source_volume,
            step.base.ref if step.base else None,
            step.to.ref,
            intermediates=step.intermediates,
        )
        for step in plan.steps
    )
