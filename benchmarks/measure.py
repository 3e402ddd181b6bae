"""Timing of several ways to do the same, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(ways: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float = 0.02) -> dict[str, float]:
    """Return the median seconds of one call of each way.

    In each round every way has its turn, and is called as often as fits into ``seconds``. Each is called twice before
    the first round, to warm up and to find out how often that is.
    """
    calls = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        way()
        calls[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                way()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(each) for name, each in times.items()}
