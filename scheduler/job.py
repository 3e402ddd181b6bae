"""One scheduled job: when it runs next, after everything that can happen to it. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from scheduler.backoff import retry_delay
from scheduler.timeline import Schedule

_MISSED_CAP = 1000  # runs counted after a long sleep; more say no more


class Outcome(StrEnum):
    """How a run ended, as far as it matters for when the next one is."""

    DONE = "done"
    FAILED = "failed"
    """Is tried again after the back-off, or at the schedule if that is sooner."""
    CONFLICT = "conflict"
    """Failed, and an attempt before the next scheduled run would find the same: an operator has to decide."""
    CANCELLED = "cancelled"
    """Stopped on request: no failure, and not done either."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What must survive a restart.

    :ivar paused: an operator paused it
    :ivar served: the moment (aware) up to which its schedule is served: the start of its last run that ended well, or
        when the job was first seen. None: never seen.
    """

    paused: bool = False
    served: datetime | None = None


@dataclass
class Job:
    """A job and what is known of its runs.

    :ivar failures: failed runs in a row, conflicts included
    :ivar begun: when the present run began; None while none is under way
    :ivar asked: an operator wants a run now, whatever the schedule says and even if paused
    """

    name: str
    schedule: Schedule
    function: Callable[[], Outcome]
    state: JobState = field(default_factory=JobState)
    failures: int = 0
    begun: datetime | None = None
    asked: bool = False

    def first_run(self, now: datetime) -> datetime | None:
        """When to run first after the start of the program or the end of a pause.

        ``now`` if at least one run was missed meanwhile, and then once however many were missed. None: not by itself.
        """
        if self.state.paused:
            return None
        if self.state.served is not None:
            due = self.schedule.next_after(self.state.served)
            if due is not None and due <= now:
                return now
        return self.schedule.next_after(now)

    def begin(self, now: datetime) -> bool:
        """A run is about to begin; whether it may: a paused job runs only if it was asked for."""
        if self.begun is not None or (self.state.paused and not self.asked):
            return False
        self.asked = False
        self.begun = now
        return True

    def end(self, outcome: Outcome, now: datetime) -> datetime | None:
        """A run ended; when to run next (not before ``now``), or None: not by itself."""
        if outcome is Outcome.DONE:
            self.failures = 0
            self.state = replace(self.state, served=self.begun)
        elif outcome is not Outcome.CANCELLED:
            self.failures += 1
        self.begun = None
        if self.asked:
            return now
        return self.following(outcome, now)

    def following(self, outcome: Outcome, now: datetime) -> datetime | None:
        """The first run after ``now``, given how the last one ended."""
        if self.state.paused:
            return None
        planned = self.schedule.next_after(now)
        if outcome is not Outcome.FAILED:
            return planned
        retry = now + retry_delay(self.failures, self.schedule.interval_hint(now))
        return retry if planned is None else min(retry, planned)

    def missed(self, scheduled: datetime, now: datetime) -> int:
        """How many further runs lay between the one that begins late now and this moment (at most 1000).

        They are not made up for: the one run serves them all.
        """
        count = 0
        moment = self.schedule.next_after(scheduled)
        while moment is not None and moment <= now and count < _MISSED_CAP:
            count += 1
            moment = self.schedule.next_after(moment)
        return count
