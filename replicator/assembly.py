"""Puts a node together from its configuration: for the daemon, and for a single command where none runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from replicator import checks
from replicator.config import Config
from replicator.control import Finding
from replicator.engine import Engine, Timetable
from replicator.errors import ReplicatorError
from replicator.history import History
from replicator.local import LocalEndpoint
from replicator.metrics import Metrics
from replicator.nodes import PeerNetwork
from replicator.rates import Rates
from replicator.recording import Recording
from replicator.replication import Limits, Pacer
from replicator.runs import Runner
from replicator.settings import Job
from replicator.storages import build_backends
from replicator.tracker import Tracker
from scheduler.job import JobState
from scheduler.limits import Slots
from scheduler.schedule import system_zone
from scheduler.state import FileStateStore
from transport.identity import Identity
from transport.network import cluster_address
from transport.pacing import TimedBucket

SCHEDULE_FILE = "schedule.json"


class Pacers:
    """The token buckets of a configuration: one a job, and one that all share. Their rates are asked for each time."""

    def __init__(self, config: Config, rates: Rates) -> None:
        self._shared = TimedBucket(rates.of_node)
        self._by_job = {name: TimedBucket(partial(rates.of_job, name)) for name in config.jobs}

    def __call__(self, job: Job, peer: str) -> tuple[Pacer, ...]:  # noqa: ARG002 - one bucket for all peers of a job
        """Those that hold back a transfer of ``job``."""
        return (self._by_job[job.name], self._shared)


class IdleTimetable:
    """The :class:`~replicator.engine.Timetable` where no daemon runs: nothing is due; pauses are kept for the next."""

    def __init__(self, store: FileStateStore) -> None:
        self._store = store

    def next_run(self, job: str) -> datetime | None:  # noqa: ARG002 - nothing runs by itself
        """None: nothing runs by itself."""
        return None

    def paused(self, job: str) -> bool:
        """Whether the operator paused it."""
        try:
            return self._store.load().get(job, JobState()).paused
        except ReplicatorError:
            return False  # unreadable: the daemon begins afresh too

    def _set(self, job: str, paused: bool) -> None:
        states = self._store.load()
        states[job] = replace(states.get(job, JobState()), paused=paused)
        self._store.save(states)

    def pause(self, job: str) -> None:
        """See Timetable."""
        self._set(job, True)

    def resume(self, job: str) -> None:
        """See Timetable."""
        self._set(job, False)


@dataclass(frozen=True, slots=True)
class Node:
    """All parts of a running node."""

    config: Config
    local: LocalEndpoint
    network: PeerNetwork
    identity: Identity | None
    identity_problem: ReplicatorError | None
    history: History
    metrics: Metrics
    recording: Recording
    runner: Runner
    engine: Engine
    rates: Rates


def find_identity(config: Config) -> tuple[Identity | None, ReplicatorError | None]:
    """This node's identity, or why there is none."""
    try:
        return Identity(config.node.state_dir), None
    except ReplicatorError as error:
        return None, error


@contextmanager
def assemble(config: Config, timetable: Timetable, *, daemon: bool) -> Iterator[Node]:
    """Build everything, and close it afterwards.

    :raises MissingBinding, Unsupported: a storage of the configuration cannot be used here
    :raises ReplicatorError: the state directory cannot be used
    """
    with ExitStack() as stack:
        config.node.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        backends = build_backends(config.storages)
        local = LocalEndpoint(config.node.name, backends, zone=system_zone())
        stack.callback(local.close)
        identity, problem = find_identity(config)
        rates = Rates(config)
        network = PeerNetwork(config, local, identity, problem, rates)
        stack.callback(network.close)
        history = History(config.node.state_dir / "history.sqlite", keep=config.limits.keep_history, thorough=daemon)
        stack.callback(history.close)
        metrics = Metrics()
        if identity is not None:
            metrics.certificate_expires(identity.expires)
        recording = Recording(config, history, metrics)
        limits = config.limits
        runner = Runner(
            network,
            Tracker(),
            recording,
            Slots(limits.transfers, limits.transfers_per_target, limits.transfers_per_pool),
            limits=Limits(stall=limits.stall_timeout.total_seconds()),
            pacers=Pacers(config, rates),
            zone=system_zone(),
        )

        def check() -> tuple[Finding, ...]:
            return tuple(_findings(config, local, network, identity, problem, runner))

        engine = Engine(config, network, runner, timetable, recording, daemon=daemon, check=check)
        yield Node(config, local, network, identity, problem, history, metrics, recording, runner, engine, rates)


def _findings(
    config: Config,
    local: LocalEndpoint,
    network: PeerNetwork,
    identity: Identity | None,
    problem: ReplicatorError | None,
    runner: Runner,
) -> Iterator[Finding]:
    yield from checks.configuration(config)
    listen = config.network.listen
    yield from checks.network(config, lambda: cluster_address(config.network.cluster, listen.host))
    yield from checks.certificate(
        config, identity.expires if identity else None, str(problem or ""), problem.hint if problem else ""
    )
    yield from checks.storages(local.storages())
    yield from checks.privileges(config, local.lacking)
    yield from checks.peers(network.peers(probe=True))
    yield from checks.jobs(config, runner.tasks, network.endpoint)


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """An engine for one command, where no daemon runs."""
    timetable = IdleTimetable(FileStateStore(config.node.state_dir / SCHEDULE_FILE))
    with assemble(config, timetable, daemon=False) as node:
        yield node.engine
