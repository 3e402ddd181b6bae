"""The command of a job that runs after each of its runs, however that ended.

It is started as all hooks are (:mod:`replicator.hooks`), with these variables:

=======================  ==============================================================================
``REPLICATOR_HOOK``      ``after_run``
``REPLICATOR_JOB``       the job's name
``REPLICATOR_OUTCOME``   the worst of the run: ``conflict``, ``failed``, ``cancelled``, ``skipped``, ``ok``
``REPLICATOR_REPLICAS``  how many replicas the run was about
``REPLICATOR_SENT``      bytes that crossed the network
``REPLICATOR_FAILED``    those that failed or are in conflict, VOLUME, a space, TARGET, one a line
``REPLICATOR_ERROR``     why the run could not begin, or what the first of these says; empty if all is well
=======================  ==============================================================================

What becomes of it changes nothing about the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replicator import hooks
from replicator.control import RunReport
from replicator.errors import ReplicatorError
from replicator.settings import AfterRun

MAX_LINES = 64 * 1024
"""Characters of a list at most; Linux takes no string of the environment beyond 128 KiB (execve(2))."""
WORST_FIRST = ("conflict", "failed", "cancelled", "skipped", "ok")


def after_run(hook: AfterRun, job: str, reports: Sequence[RunReport], error: ReplicatorError | None = None) -> None:
    """Run it.

    :param error: why the run could not begin
    :raises HookFailed: it failed
    """
    bad = [report for report in reports if report.outcome in ("conflict", "failed")]
    outcomes = {report.outcome for report in reports} if error is None else {"failed"}
    why = str(error) if error is not None else next((report.message for report in bad), "")
    environment = {
        "REPLICATOR_HOOK": "after_run",
        "REPLICATOR_JOB": job,
        "REPLICATOR_OUTCOME": next((word for word in WORST_FIRST if word in outcomes), "ok"),
        "REPLICATOR_REPLICAS": str(len(reports)),
        "REPLICATOR_SENT": str(sum(report.sent for report in reports)),
        "REPLICATOR_FAILED": _lines(f"{report.volume} {report.target}" for report in bad),
        "REPLICATOR_ERROR": why.replace("\0", " ")[:MAX_LINES],
    }
    hooks.run(hook.command, hook.timeout, name=f"hook 'after_run' of job {job}", environment=environment)


def _lines(lines: Iterable[str]) -> str:
    """As many of them as there is room for."""
    text = ""
    for line in lines:
        if len(text) + len(line) >= MAX_LINES:
            break
        text += f"{line}\n"
    return text.rstrip("\n")
