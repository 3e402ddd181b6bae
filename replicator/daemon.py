"""The daemon: scheduler, listener and HTTP around one engine, from start to an orderly end."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from queue import SimpleQueue

from replicator import logs
from replicator.assembly import SCHEDULE_FILE, Node, assemble
from replicator.cancellation import Cancellation
from replicator.config import Config, load
from replicator.control import RunReport
from replicator.endpoint import Endpoint
from replicator.errors import ReplicatorError, VolumeBusy
from replicator.health import STALLED
from replicator.nodes import deadlines, endpoint_for_peers, rights
from replicator.notifying import Notifier
from replicator.reloading import taken_over, waiting
from replicator.service_manager import ServiceManager, Watchdog
from replicator.settings import Job
from replicator.upkeep import Upkeep
from replicator.version import version
from replicator.web.api import make_api
from replicator.web.messages import SOCKET_NAME, Health
from replicator.web.server import HttpServer
from scheduler.job import Outcome
from scheduler.schedule import parse_schedule
from scheduler.scheduler import Event, EventKind, Scheduler
from scheduler.state import FileStateStore
from transport.authorization import PeerRights
from transport.network import listen
from transport.server import Server
from transport.tls import Refusal

LOG = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""How long transfers have to end at a resumable point; below systemd's default of 90 s before it kills."""
VERIFY_PREFIX = "verify "
"""A job's verification is a job of its own in the scheduler; no job's name has a space."""


class SchedulerTimetable:
    """The :class:`~replicator.engine.Timetable` of a running daemon; a pause holds for the job's verification too."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def next_run(self, job: str) -> datetime | None:
        """See Timetable."""
        return self._scheduler.next_run(job)

    def paused(self, job: str) -> bool:
        """See Timetable."""
        return self._scheduler.paused(job)

    def pause(self, job: str) -> None:
        """See Timetable."""
        for name in self._names(job):
            self._scheduler.pause(name)

    def resume(self, job: str) -> None:
        """See Timetable."""
        for name in self._names(job):
            self._scheduler.resume(name)

    def _names(self, job: str) -> list[str]:
        return [status.name for status in self._scheduler.jobs() if status.name in (job, VERIFY_PREFIX + job)]


class Directory:
    """The :class:`~transport.server.Directory` of the configuration."""

    def __init__(self, config: Config, endpoint: Callable[[str], Endpoint]) -> None:
        self._config = config
        self._endpoint = endpoint

    def rights(self, peer: str) -> PeerRights | None:
        """What a listed peer may do."""
        listed = self._config.peers.get(peer)
        return rights(listed) if listed is not None else None

    def endpoint(self, peer: str) -> Endpoint:
        """What the peer gets to ask."""
        return self._endpoint(peer)


@contextmanager
def _only_one(config: Config) -> Iterator[None]:
    """At most one daemon per state directory. :raises VolumeBusy: another one runs"""
    folder = config.node.state_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "daemon.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VolumeBusy(
                f"a daemon runs already with the state directory {folder}",
                hint="stop it first, or ask it: replicator status",
            ) from None
        yield


def _outcome(reports: tuple[RunReport, ...]) -> Outcome:
    outcomes = {report.outcome for report in reports}
    for outcome in (Outcome.FAILED, Outcome.CONFLICT, Outcome.CANCELLED):
        if outcome.value in outcomes:
            return outcome
    return Outcome.DONE


class _Jobs:
    """What the scheduler calls."""

    def __init__(self, config: Config, cancel: Cancellation) -> None:
        self._config = config
        self._cancel = cancel
        self.node: Node | None = None

    def _engine(self) -> Node:
        assert self.node is not None  # noqa: S101 - the scheduler is started after the node was assembled
        return self.node

    def run(self, job: Job) -> Callable[[], Outcome]:
        """A run of a job."""

        def work() -> Outcome:
            try:
                with self._cancel.child() as cancel:
                    reports = self._engine().engine.sync(job.name, None, None, lambda _: None, cancel)
            except ReplicatorError as error:
                logs.event(LOG, "error", "job failed", job=job.name, error=error)
                self._engine().engine.job_failed(job.name, error)
                raise
            return _outcome(reports)

        return work

    def verify(self, job: Job) -> Callable[[], Outcome]:
        """A verification of a job's replicas."""

        def work() -> Outcome:
            with self._cancel.child() as cancel:
                self._engine().engine.verify_job(job.name, cancel)
            return Outcome.DONE

        return work

    def observe(self, event: Event) -> None:
        """Told of every event of the scheduler."""
        if event.kind is EventKind.STARTED and self.node is not None:
            self.node.metrics.scheduler_late(event.lateness)
        elif event.kind in (EventKind.SKIPPED, EventKind.MISSED):
            logs.event(LOG, "warning", f"run {event.kind}", job=event.job, scheduled=event.scheduled, count=event.count)
            if self.node is not None:
                self.node.recording.event(f"run {event.kind}", event.job)


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT; the exit code. SIGHUP has the configuration read anew.

    :raises ReplicatorError: it cannot start; what and why
    """
    logs.setup(config.log.format, config.log.level)
    manager = ServiceManager(os.environ)
    told: SimpleQueue[int] = SimpleQueue()  # which a handler may put into while the same thread takes
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.put(number))
    daemon = _Daemon(config)
    with _only_one(config), ExitStack() as stack:
        daemon.start(stack, manager)
        logs.event(LOG, "info", "daemon started", node=config.node.name, version=version(), jobs=len(config.jobs))
        status = f"{config.node.name}: {len(config.jobs)} jobs, {len(config.peers)} peers"
        manager.ready(status)
        while told.get() == signal.SIGHUP:
            manager.reloading()
            daemon.reload()
            manager.ready(status)
        manager.stopping()
        logs.event(LOG, "info", "daemon stopping")
    logs.event(LOG, "info", "daemon stopped")
    if daemon.left:
        # Their threads would keep the process from ending; what they wrote is durable or discarded by the next run.
        logging.shutdown()
        os._exit(0)
    return 0


class _Daemon:
    """Starts the parts in an order in which each finds what it needs.

    :ivar left: runs that had not ended when it was time to
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._node: Node | None = None
        self._notifier: Notifier | None = None
        self.left: tuple[str, ...] = ()

    def start(self, stack: ExitStack, manager: ServiceManager) -> None:
        """Start everything, and leave its end to ``stack``. Until then ``manager`` hears that it is alive.

        :raises ReplicatorError: a part cannot start
        """
        config = self._config
        cancel = Cancellation()
        jobs = _Jobs(config, cancel)
        store = FileStateStore(config.node.state_dir / SCHEDULE_FILE)
        scheduler = Scheduler(store, observe=jobs.observe)
        for job in config.jobs.values():
            if job.enabled:
                scheduler.add(job.name, parse_schedule(job.schedule, job.zone), jobs.run(job))
                if job.verify:
                    scheduler.add(VERIFY_PREFIX + job.name, parse_schedule(job.verify, job.zone), jobs.verify(job))
        node = jobs.node = stack.enter_context(assemble(config, SchedulerTimetable(scheduler), daemon=True))
        server = self._listen(node, stack)

        def metrics() -> bytes:
            node.metrics.scheduler_tick(datetime.fromtimestamp(scheduler.last_tick, UTC))
            return node.recording.expose(node.engine.status())

        def health() -> Health:
            seen = datetime.fromtimestamp(scheduler.last_tick, UTC)
            return Health("ok", version(), seen, node.identity.expires if node.identity is not None else None)

        api = make_api(node.engine, metrics=metrics, health=health)
        socket = HttpServer(api, unix=config.node.state_dir / SOCKET_NAME)
        socket.start()
        stack.callback(socket.stop)
        if config.network.http is not None:
            address = (str(config.network.http.host), config.network.http.port)
            http = HttpServer(make_api(node.engine, metrics=metrics, health=health, read_only=True), tcp=address)
            http.start()
            stack.callback(http.stop)
        upkeep = Upkeep(node, server)
        upkeep.start()
        stack.callback(upkeep.stop, STOP_SECONDS)
        scheduler.start()
        stack.callback(self._stop_scheduler, scheduler)
        stack.callback(cancel.cancel)
        self._node = node
        self._notify(config)
        stack.callback(self._notify, None)
        watchdog = Watchdog(manager, lambda: time.time() - scheduler.last_tick < STALLED.total_seconds())
        watchdog.start()
        stack.callback(watchdog.stop)
        node.recording.event("daemon started", config.node.name, version())

    def reload(self) -> None:
        """Read the configuration anew, and take over what can be; one that is wrong changes nothing."""
        assert self._node is not None  # noqa: S101 - it was started
        try:
            new = load(self._config.path, check_schedule=parse_schedule)
        except ReplicatorError as error:
            logs.event(LOG, "error", "configuration not read anew", error=error)
            return
        before, self._config = self._config, taken_over(self._config, new)
        self._node.rates.use(self._config)
        if self._config.log != before.log:
            logs.setup(self._config.log.format, self._config.log.level)
        if self._config.notify != before.notify:
            self._notify(self._config)
        waits = waiting(self._config, new)
        logs.event(
            LOG,
            "warning" if waits else "info",
            "configuration read anew",
            needs_restart=", ".join(waits) or None,
        )
        self._node.recording.event("configuration read anew", self._config.node.name, ", ".join(waits))

    def _notify(self, config: Config | None) -> None:
        """Tell people from now on as this configuration says; None: not any more."""
        if self._notifier is not None:
            self._notifier.stop()
            self._notifier = None
        if config is not None and config.notify is not None and self._node is not None:
            status = self._node.engine.status
            self._notifier = Notifier(config.notify, config.node.name, status, config.node.state_dir)
            self._notifier.start()

    def _stop_scheduler(self, scheduler: Scheduler) -> None:
        self.left = scheduler.stop(STOP_SECONDS)
        if self.left:
            logs.event(LOG, "warning", "runs did not end in time", jobs=", ".join(self.left))

    def _listen(self, node: Node, stack: ExitStack) -> Server | None:
        """The listener for peers. None where there are no peers and no cluster: replication within this node."""
        config = self._config
        if node.identity is None:
            if not config.peers:
                return None
            assert node.identity_problem is not None  # noqa: S101 - one or the other
            raise node.identity_problem
        network = config.network
        listener = listen(network.cluster, network.listen.host, network.listen.port)

        def refused(reason: Refusal, peer: str) -> None:
            node.metrics.refused(str(reason))
            if peer:
                node.recording.event("peer refused", peer, str(reason))

        server = Server(
            listener,
            node.identity,
            Directory(config, endpoint_for_peers(config, node.local, node.network)),
            deadlines=deadlines(config),
            refused=refused,
        )
        server.start()
        stack.callback(server.close)
        return server
