"""The daemon as a process: its memory idle and with four transfers, and a thousand jobs that fire at once.

Two real daemons on loopback, with certificates, as users run them. Memory is VmRSS of /proc/PID/status, the largest of
samples taken all along, of the sender and of the receiver.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx

from benchmarks.report import Result
from replicator.demo.node import DemoNode, join, loopback_network
from replicator.errors import ReplicatorError

MIB = 1 << 20
IDLE_LIMIT = 120.0
BUSY_LIMIT = 250.0
LATENESS_LIMIT = 1.0
TRANSFERS = 4
JOBS = 1000


def resident(pid: int) -> float:
    """VmRSS of a process, MB (powers of 1000)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


@contextmanager
def largest(nodes: tuple[DemoNode, ...]) -> Iterator[dict[str, float]]:
    """The largest resident memory of each node's daemon while the block runs."""
    found = {node.name: 0.0 for node in nodes}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            for node in nodes:
                if node.process is not None:
                    found[node.name] = max(found[node.name], resident(node.process.pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _image(path: Path, size: int, data: int) -> None:
    """A sparse image of ``size`` bytes, ``data`` of them random, spread over it."""
    with path.open("wb") as file:
        file.truncate(size)
        pieces = data // (4 * MIB)
        for number in range(pieces):
            file.seek(size // pieces * number)
            file.write(os.urandom(4 * MIB))


@contextmanager
def _pair(folder: Path, jobs: str) -> Iterator[tuple[DemoNode, DemoNode, str]]:
    prefix = loopback_network()
    cluster = f"{prefix}.0/24"
    a, b = DemoNode("a", folder / "a"), DemoNode("b", folder / "b")
    for name in ("images", "replicas"):
        (folder / name).mkdir()
    a.configure(
        f"{prefix}.1:8571",
        cluster=cluster,
        http=f"{prefix}.1:9571",
        rest=f'[storage.images]\nkind = "image"\npath = "{folder}/images"\n\n[peer.b]\naddress = "{prefix}.2:8571"\n\n'
        f"[limits]\ntransfers_per_target = {TRANSFERS}\n\n{jobs}",
    )
    b.configure(
        f"{prefix}.2:8571",
        cluster=cluster,
        http="",
        rest=f'[storage.replicas]\nkind = "image"\npath = "{folder}/replicas"\n\n'
        f'[peer.a]\naddress = "{prefix}.1:8571"\nmay_push_to = ["replicas"]\n',
    )
    try:
        join(a, b)
        b.start()
        yield a, b, f"http://{prefix}.1:9571"
    finally:
        a.stop()
        b.stop()


def _limit(case: str, ours: float, limit: float, unit: str, note: str = "") -> Result:
    return Result("Daemon", case, ours, limit, "limit", unit, limit / ours if ours else None, 1.0, note)


def _memory(quick: bool) -> list[Result]:
    data = (256 if quick else 1024) * MIB
    job = '[job.j]\nsource = "images:*"\ntargets = ["b:replicas"]\nschedule = "1h"\n'
    with tempfile.TemporaryDirectory(prefix="replicator-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        with _pair(folder, job) as (a, b, url):
            with largest((a, b)) as idle:
                for _ in range(20):
                    with a.control() as control:
                        control.status()
                    httpx.get(f"{url}/metrics", timeout=10).raise_for_status()
                    time.sleep(0.25)
            for number in range(TRANSFERS):
                _image(folder / "images" / f"{number}.raw", 64 << 30, data)
            with largest((a, b)) as busy:
                began = time.monotonic()
                a.must("sync", "j", timeout=1200)
                seconds = time.monotonic() - began
            time.sleep(20)  # what transfers have freed is given back every 15 s
            with largest((a, b)) as after:
                time.sleep(3)
        rate = TRANSFERS * data / MIB / seconds
        note = f"{TRANSFERS} images of 64 GiB with {data // MIB} MiB of data, {rate:.0f} MiB/s in all"
        return [
            _limit("memory idle, sender", idle["a"], IDLE_LIMIT, "MB", "status and metrics asked 4 times a second"),
            _limit("memory idle, receiver", idle["b"], IDLE_LIMIT, "MB"),
            _limit("memory idle after transfers, sender", after["a"], IDLE_LIMIT, "MB"),
            _limit("memory idle after transfers, receiver", after["b"], IDLE_LIMIT, "MB"),
            _limit("memory with 4 transfers, sender", busy["a"], BUSY_LIMIT, "MB", note),
            _limit("memory with 4 transfers, receiver", busy["b"], BUSY_LIMIT, "MB", note),
        ]


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise ReplicatorError("the daemon did not come to what the benchmark waits for", hint="")
        time.sleep(0.5)


def _lateness(url: str) -> tuple[int, float]:
    """Runs started, and the upper bound of the bucket in which 99% of them are, seconds."""
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    buckets = re.findall(r'replicator_scheduler_lateness_seconds_bucket\{le="([^"]+)"\} (\S+)', text)
    counts = [(float(bound), float(count)) for bound, count in buckets]
    if not counts:
        return 0, 0.0
    total = counts[-1][1]
    return int(total), next(bound for bound, count in counts if count >= 0.99 * total)


def _jobs() -> list[Result]:
    """All jobs due at the same second of a minute, in a real daemon; each lists its storage and finds no volume."""
    jobs = "".join(
        f'[job.j{number}]\nsource = "images:none-{number}"\ntargets = ["b:replicas"]\nschedule = "*/1"\n\n'
        for number in range(JOBS)
    )
    with tempfile.TemporaryDirectory(prefix="replicator-bench-", dir="/var/tmp") as name:
        while datetime.now(UTC).second > 35:
            time.sleep(1)
        with _pair(Path(name), jobs) as (a, _b, url), largest((a,)) as memory:
            _until(lambda: _lateness(url)[0] >= JOBS, 150)
            started, bound = _lateness(url)
        note = f"upper bound of the bucket with 99% of {started} runs; memory {memory['a']:.0f} MB"
        return [_limit(f"lateness p99 of {JOBS} jobs due at once", bound, LATENESS_LIMIT, "s", note)]


def run(quick: bool) -> list[Result]:
    """The figures."""
    return [*_memory(quick), *_jobs()]
