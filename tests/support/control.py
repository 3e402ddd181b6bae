"""A Control that answers what a test tells it to."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from replicator.cancellation import Cancellation
from replicator.control import (
    Finding,
    Happening,
    HistoryEntry,
    Listener,
    OrphanReport,
    PlannedReplica,
    PruneReport,
    Restored,
    ResyncPreview,
    RunReport,
    SideSnapshots,
    Status,
)
from replicator.verification import Resync, Verification


@dataclass
class FakeControl:
    """Implements :class:`replicator.control.Control`.

    :ivar answers: what a method returns, or raises if it is an exception; by the method's name
    :ivar calls: the methods called and their arguments
    :ivar happenings: what long work tells before it answers
    :ivar endless: long work goes on until it is cancelled
    """

    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    happenings: tuple[Happening, ...] = ()
    endless: bool = False
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def _answer(self, name: str, *args: object) -> Any:
        self.calls.append((name, *args))
        answer = self.answers.get(name, ())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _work(self, name: str, listen: Listener, cancel: Cancellation, *args: object) -> Any:
        for happening in self.happenings:
            listen(happening)
        self.started.set()
        if self.endless:
            cancel.wait(30.0)
            self.cancelled.set()
            cancel.check()
        return self._answer(name, *args)

    def status(self) -> Status:
        found: Status = self._answer("status")
        return found

    def plan(self, job: str | None) -> tuple[PlannedReplica, ...]:
        found: tuple[PlannedReplica, ...] = self._answer("plan", job)
        return found

    def sync(
        self, job: str, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        found: tuple[RunReport, ...] = self._work("sync", listen, cancel, job, volume, target)
        return found

    def preview_resync(self, volume: str, target: str | None, full: bool) -> tuple[ResyncPreview, ...]:
        found: tuple[ResyncPreview, ...] = self._answer("preview_resync", volume, target, full)
        return found

    def resync(
        self, volume: str, target: str | None, full: bool, listen: Listener, cancel: Cancellation
    ) -> tuple[Resync, ...]:
        found: tuple[Resync, ...] = self._work("resync", listen, cancel, volume, target, full)
        return found

    def verify(
        self,
        volume: str,
        target: str | None,
        snapshot: str | None,
        repair: bool,
        scrub: bool,
        listen: Listener,
        cancel: Cancellation,
    ) -> tuple[Verification, ...]:
        found: tuple[Verification, ...] = self._work("verify", listen, cancel, volume, target, snapshot, repair, scrub)
        return found

    def snapshots(self, volume: str) -> tuple[SideSnapshots, ...]:
        found: tuple[SideSnapshots, ...] = self._answer("snapshots", volume)
        return found

    def prune(self, job: str, dry_run: bool) -> tuple[PruneReport, ...]:
        found: tuple[PruneReport, ...] = self._answer("prune", job, dry_run)
        return found

    def orphans(self, job: str) -> tuple[OrphanReport, ...]:
        found: tuple[OrphanReport, ...] = self._answer("orphans", job)
        return found

    def remove_orphans(self, job: str, wanted: tuple[OrphanReport, ...]) -> tuple[OrphanReport, ...]:
        found: tuple[OrphanReport, ...] = self._answer("remove_orphans", job, wanted)
        return found

    def restore(self, snapshot: str, to: str, listen: Listener, cancel: Cancellation) -> Restored:
        found: Restored = self._work("restore", listen, cancel, snapshot, to)
        return found

    def history(self, limit: int) -> tuple[HistoryEntry, ...]:
        found: tuple[HistoryEntry, ...] = self._answer("history", limit)
        return found

    def pause(self, job: str) -> None:
        self._answer("pause", job)

    def resume(self, job: str) -> None:
        self._answer("resume", job)

    def check(self) -> tuple[Finding, ...]:
        found: tuple[Finding, ...] = self._answer("check")
        return found
