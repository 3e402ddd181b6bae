"""How long to wait before the next attempt after failures."""

from __future__ import annotations

from datetime import timedelta

STEPS = (timedelta(minutes=5), timedelta(minutes=10), timedelta(minutes=15), timedelta(minutes=30))
"""After the first, second, third and every later failure in a row, as Proxmox VE's pvesr waits."""


def retry_delay(failures: int, interval: timedelta | None) -> timedelta:
    """The time from the end of a failed run to the next attempt.

    The wait never exceeds the interval of the schedule: a job of every 30 seconds tries again after 30 seconds, a daily
    one after 5 minutes. All errors are waited out alike; whether one is of a kind that only an operator can mend is
    decided by who knows the error (see :class:`scheduler.job.Outcome`).

    :param failures: failed runs in a row, at least 1
    :param interval: the shortest distance of two runs; None if the schedule has no second run
    """
    if failures < 1:
        raise ValueError("a delay is asked for only after a failure")
    step = STEPS[min(failures, len(STEPS)) - 1]
    return step if interval is None else min(step, interval)
