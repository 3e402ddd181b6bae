"""How late 1,000 jobs on one node begin, and what the scheduler costs.

    python -m benchmarks.bench_scheduler [--quick] [--json FILE]

Each case runs in a process of its own. A job does what most runs do most of the time: it waits, 20 ms, for others.
Lateness is from the moment that the schedule names to the first instruction of the job.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apscheduler.events import EVENT_JOB_SUBMITTED, JobSubmissionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from benchmarks.report import Result, compare, print_table, write_json
from scheduler.job import JobState, Outcome
from scheduler.scheduler import DEFAULT_WORKERS, Event, EventKind, Scheduler
from scheduler.timeline import Interval

SUBJECT = "Scheduler, 1,000 jobs on one node"
JOBS = 1000
WORK = 0.02  # seconds
LIMIT_MS = 1000.0  # of the 99th percentile of lateness

SPREAD = tuple(5 + 55 * number / (JOBS - 1) for number in range(JOBS))  # seconds between runs: from 5 to 60
AT_ONCE = (10.0,) * JOBS


@dataclass(frozen=True)
class Figures:
    """What one case gave; lateness in milliseconds."""

    runs: int
    p50: float
    p99: float
    most: float
    rss_mib: float
    cpu_percent: float


class _NoStore:
    """Keeps nothing."""

    def load(self) -> dict[str, JobState]:
        return {}

    def save(self, states: Mapping[str, JobState]) -> None:
        pass


def run(quick: bool) -> list[Result]:
    """Measure everything; ``quick`` means for a shorter time."""
    seconds = 12.0 if quick else 45.0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        spread = pool.submit(_ours, SPREAD, seconds).result()
        plain = pool.submit(_plain_apscheduler, SPREAD, seconds).result()
        at_once = pool.submit(_ours, AT_ONCE, max(seconds, 22.0)).result()
    name = "every 5 to 60 s"
    burst = f"all in the same second, {DEFAULT_WORKERS} at a time"
    return [
        _late(f"{name}: p50 lateness", spread.p50, plain.p50, "plain APScheduler"),
        replace(_limit(f"{name}: p99 lateness", spread.p99), note=f"{spread.runs} runs"),
        _limit(f"{name}: longest lateness", spread.most),
        replace(_limit(f"{burst}: p99 lateness", at_once.p99), note=f"{at_once.runs} runs of {WORK * 1e3:g} ms"),
        _limit(f"{burst}: longest lateness", at_once.most),
        compare(
            SUBJECT, "resident memory", spread.rss_mib, plain.rss_mib, "plain APScheduler", "MiB", less_is_better=True
        ),
        compare(
            SUBJECT,
            "CPU of one core",
            spread.cpu_percent,
            plain.cpu_percent,
            "plain APScheduler",
            "%",
            less_is_better=True,
        ),
    ]


def _late(case: str, ours: float, peer: float, peer_name: str) -> Result:
    return compare(SUBJECT, case, ours, peer, peer_name, "ms", less_is_better=True)


def _limit(case: str, ours: float) -> Result:
    return compare(SUBJECT, case, ours, LIMIT_MS, "limit", "ms", target=1.0, less_is_better=True)


def _ours(intervals: tuple[float, ...], seconds: float) -> Figures:
    lateness: list[float] = []

    def observe(event: Event) -> None:
        if event.kind is EventKind.STARTED:
            lateness.append(event.lateness)

    def work() -> Outcome:
        time.sleep(WORK)
        return Outcome.DONE

    scheduler = Scheduler(_NoStore(), observe=observe)
    for number, every in enumerate(intervals):
        scheduler.add(f"job{number}", Interval(f"{every}s", UTC, timedelta(seconds=every)), work)
    scheduler.start()
    before = time.process_time()
    time.sleep(seconds)
    cpu = (time.process_time() - before) / seconds
    scheduler.stop(10)
    return _figures(lateness, cpu)


def _plain_apscheduler(intervals: tuple[float, ...], seconds: float) -> Figures:
    """The same jobs by APScheduler's own trigger, store and pool."""
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    began: dict[int, list[float]] = {number: [] for number in range(len(intervals))}
    due: dict[int, list[float]] = {number: [] for number in range(len(intervals))}

    def work(number: int) -> None:
        began[number].append(time.time())
        time.sleep(WORK)

    def submitted(event: JobSubmissionEvent) -> None:
        due[int(event.job_id)].append(event.scheduled_run_times[-1].timestamp())

    scheduler = BackgroundScheduler(timezone=UTC, executors={"default": ThreadPoolExecutor(DEFAULT_WORKERS)})
    scheduler.add_listener(submitted, EVENT_JOB_SUBMITTED)
    for number, every in enumerate(intervals):
        # Each begins within its first interval, as jobs that are anchored to the epoch do.
        first = datetime.now(UTC) + timedelta(seconds=every * (number % 97) / 97)
        scheduler.add_job(work, "interval", (number,), seconds=every, id=str(number), start_date=first)
    scheduler.start()
    before = time.process_time()
    time.sleep(seconds)
    cpu = (time.process_time() - before) / seconds
    scheduler.shutdown()
    lateness = [start - when for number in began for start, when in zip(began[number], due[number], strict=False)]
    return _figures(lateness, cpu)


def _figures(lateness: list[float], cpu: float) -> Figures:
    ordered = sorted(1e3 * late for late in lateness)
    runs = len(ordered)
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    rss_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    return Figures(runs, ordered[runs // 2], ordered[runs * 99 // 100], ordered[-1], rss_kib / 1024, 100 * cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="How late 1,000 jobs on one node begin.")
    parser.add_argument("--quick", action="store_true", help="measure for a shorter time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    results = run(options.quick)
    print_table(results)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
