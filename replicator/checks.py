"""What can be found out before the first run: configuration, network, clocks, storages, peers, space.

Each check is one function that yields findings; none of them raises for what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from replicator import units
from replicator.config import Config
from replicator.control import Finding, Level, PeerStatus
from replicator.endpoint import Endpoint
from replicator.errors import ReplicatorError
from replicator.health import EXPIRY_WARNING
from replicator.model import Capability, Lack, StorageInfo, StreamKind
from replicator.tasks import Tasks

MAX_CLOCK_DIFFERENCE = 2.0
"""Seconds; lag is the age of a snapshot by the source's clock, so clocks that differ make it wrong by as much."""
LOW_SPACE = 0.1


def counted(number: int, noun: str) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def configuration(config: Config) -> Iterator[Finding]:
    """What is legal but unwise."""
    for problem in config.warnings:
        yield Finding(f"configuration {problem.key}", Level.WARNING, problem.message, problem.remedy)
    if not config.jobs:
        yield Finding("configuration", Level.WARNING, "there is no job, so nothing is replicated", "add a [job.NAME]")
    else:
        yield Finding(
            "configuration",
            Level.OK,
            f"{config.path}: {counted(len(config.jobs), 'job')}, {counted(len(config.peers), 'peer')}",
        )


def network(config: Config, address: Callable[[], object]) -> Iterator[Finding]:
    """Whether this node is on the cluster network. ``address`` says where, or raises ClusterNetworkError."""
    try:
        found = address()
    except ReplicatorError as error:
        yield Finding("cluster network", Level.FAILED, str(error), error.hint)
    else:
        yield Finding("cluster network", Level.OK, f"{found} on {config.network.cluster}")
    http = config.network.http
    if http is not None and not http.host.is_loopback:
        yield Finding(
            "http",
            Level.WARNING,
            f"metrics and status can be read by everyone who reaches {http}",
            "listen on a loopback address, or let a firewall decide who may connect",
        )


def certificate(config: Config, expires: datetime | None, problem: str = "", hint: str = "") -> Iterator[Finding]:
    """This node's certificate; one is needed only to talk to peers."""
    if expires is None and not config.peers:
        yield Finding("certificate", Level.OK, "none, and none is needed without peers")
        return
    if expires is None:
        yield Finding("certificate", Level.FAILED, problem, hint)
        return
    left = expires - datetime.now(UTC)
    text = f"valid until {expires:%Y-%m-%d}"
    if left < timedelta(0):
        yield Finding("certificate", Level.FAILED, f"expired on {expires:%Y-%m-%d}", "join the cluster again")
    elif left < EXPIRY_WARNING:
        remedy = "the daemon renews it by itself: check that it runs and reaches the node that made the cluster"
        yield Finding("certificate", Level.WARNING, text, remedy)
    else:
        yield Finding("certificate", Level.OK, text)


def peers(statuses: Iterable[PeerStatus]) -> Iterator[Finding]:
    """Whether peers answer, how fast, and whether their clocks agree with ours."""
    for peer in statuses:
        subject = f"peer {peer.node}"
        if not peer.up:
            remedy = "run `replicator serve` there, and check the cluster network between the two"
            yield Finding(subject, Level.FAILED, peer.message or f"does not answer at {peer.address}", remedy)
            continue
        answer = f"answers at {peer.address}"
        if peer.round_trip is not None:
            answer += f" in {peer.round_trip * 1000:.1f} ms"
        yield Finding(subject, Level.OK, answer)
        difference = peer.clock_difference
        if difference is not None and abs(difference) > MAX_CLOCK_DIFFERENCE:
            way = "ahead of" if difference > 0 else "behind"
            yield Finding(
                f"clock of {peer.node}",
                Level.WARNING,
                f"{abs(difference):.1f} s {way} this node's",
                "let both nodes keep time with chrony or systemd-timesyncd",
            )


def storages(infos: Iterable[StorageInfo]) -> Iterator[Finding]:
    """This node's storages: there, writable, how they copy, how full they are."""
    for info in infos:
        subject = f"storage {info.name}"
        if info.total == 0:
            remedy = "mount or import it, or correct its table in replicator.toml"
            yield Finding(subject, Level.FAILED, "; ".join(info.warnings) or info.detail, remedy)
            continue
        free = f"{units.format_size(info.free)} of {units.format_size(info.total)} free"
        yield Finding(subject, Level.OK, f"{info.kind}: {info.detail}; {free}")
        for warning in info.warnings:
            yield Finding(subject, Level.WARNING, warning)
        if info.free < info.total * LOW_SPACE:
            yield Finding(subject, Level.WARNING, f"nearly full: {free}", "make room, or keep fewer snapshots")


def privileges(config: Config, lacking: Callable[[str, Capability], tuple[Lack, ...]]) -> Iterator[Finding]:
    """Whether this process may do to each of its storages what jobs and peers use it for."""
    node = config.node.name
    uses: dict[str, Capability] = {}
    wanted = [
        *(
            (name, Capability.SEND)
            for job in config.jobs.values()
            if job.source.node == node
            for name in job.source.storages
        ),
        *((t.storage, Capability.RECEIVE) for job in config.jobs.values() for t in job.targets if t.node == node),
        *((name, Capability.RECEIVE) for peer in config.peers.values() for name in peer.may_push_to),
        *((name, Capability.SEND) for peer in config.peers.values() for name in peer.may_pull_from),
    ]
    for name, use in wanted:
        uses[name] = uses.get(name, Capability.NONE) | use
    for name, use in sorted(uses.items()):
        try:
            found = lacking(name, use)
        except ReplicatorError:  # it is not there, which is told already
            continue
        for lack in found:
            yield Finding(f"storage {name}", Level.FAILED if lack.needed else Level.WARNING, lack.message, lack.remedy)


def jobs(config: Config, tasks: Tasks, endpoint: Callable[[str], Endpoint]) -> Iterator[Finding]:
    """Whether each job's volumes are there, and its targets can take them."""
    for job in config.jobs.values():
        subject = f"job {job.name}"
        try:
            volumes = tasks.volumes(job)
            streams = {(info := endpoint(job.source.node).storage(name)).stream: info for name in job.source.storages}
            size = sum(
                volume.size or 0
                for name in job.source.storages
                for volume in endpoint(job.source.node).volumes(name)
                if volume.id in volumes
            )
        except ReplicatorError as error:
            yield Finding(subject, Level.FAILED, str(error), error.hint)
            continue
        if not volumes:
            yield Finding(
                subject, Level.WARNING, "selects no volume now", "correct its source, or wait for the volumes"
            )
            continue
        yield Finding(subject, Level.OK, f"{counted(len(volumes), 'volume')}, {units.format_size(size)}")
        for target in job.targets:
            try:
                info = endpoint(target.node).storage(target.storage)
            except ReplicatorError as error:
                yield Finding(f"{subject}, target {target}", Level.FAILED, str(error), error.hint)
                continue
            yield from _target(f"{subject}, target {target}", info, streams, size)


def _target(subject: str, info: StorageInfo, streams: dict[StreamKind, StorageInfo], size: int) -> Iterator[Finding]:
    missing = Capability.RECEIVE & ~info.capabilities
    if missing or any(kind is not info.stream for kind in streams):
        yield Finding(
            subject, Level.FAILED, f"a {info.kind} storage cannot take these volumes", "choose another storage"
        )
        return
    if info.free < size:
        text = f"{units.format_size(info.free)} free, a first full copy may need {units.format_size(size)}"
        yield Finding(subject, Level.WARNING, text, "make room, unless the volumes are sparse or replicated already")
        return
    yield Finding(subject, Level.OK, f"{info.detail}; {units.format_size(info.free)} free")
