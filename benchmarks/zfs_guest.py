"""What is timed, inside a guest: ``python -m benchmarks.zfs_guest run JOB [VOLUME]`` or ``command WORD…``.

Prints JSON: seconds, and seconds of processor time that this machine used meanwhile. A run is asked of the daemon
through its socket, as the timer of a daemon starts it: what Python takes to start and import is not part of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from replicator.cancellation import Cancellation
from replicator.client import DaemonClient

SOCKET = Path("/var/lib/replicator/replicator.sock")
_TICKS = 100


def busy() -> float:
    """Seconds of processor time of this machine since it booted: user, nice, system and interrupts (proc(5))."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def _run(job: str, volume: str | None) -> str:
    with DaemonClient(SOCKET) as daemon:
        reports = daemon.sync(job, volume, None, lambda _: None, Cancellation())
    failed = [f"{report.volume}: {report.message}" for report in reports if report.outcome != "ok"]
    return "; ".join(failed) if failed or reports else "the job has no volumes"


def _command(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"exit status {done.returncode}: {(done.stderr or done.stdout)[-2000:]}"


def main() -> int:
    """Exit status 1 if it failed, which is said."""
    what, *words = sys.argv[1:]
    cpu, began = busy(), time.monotonic()
    problem = _run(words[0], words[1] if words[1:] else None) if what == "run" else _command(words)
    seconds, used = time.monotonic() - began, busy() - cpu
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu": used}) + "\n")
    if problem:
        sys.stderr.write(problem + "\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
