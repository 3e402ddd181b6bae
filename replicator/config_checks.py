"""What several tables of replicator.toml together must fulfil: names that refer to something, addresses on the cluster
network, storages and jobs that do not get in each other's way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePosixPath
from typing import TypeVar

from replicator.selection import overlap
from replicator.setting_types import Target, key_path, nearest
from replicator.settings import Fence, ImageStorage, Job, Limits, Log, Network, Node, Notify, Peer, RbdStorage, Storage

Report = Callable[[str, str, str], None]
"""Takes key, what is wrong, and what would be right."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tables of a file; None is one that is wrong by itself, so that nothing else is said about it."""

    this_node: str
    node: Node | None
    network: Network | None
    storages: Mapping[str, Storage | None]
    peers: Mapping[str, Peer | None]
    jobs: Mapping[str, Job | None]
    limits: Limits | None
    log: Log | None
    fence: Fence | None = None
    notify: Notify | None = None


def right(tables: Mapping[str, _T | None]) -> dict[str, _T]:
    """The tables that are not None."""
    return {name: table for name, table in tables.items() if table is not None}


def check(parts: Parts, problem: Report, warning: Report) -> None:
    """Report all that is wrong, and all that is legal but unwise."""
    if parts.network is not None:
        _check_network(parts, parts.network, problem, warning)
    _check_storages(right(parts.storages), problem)
    _check_peers(parts, problem)
    for job in right(parts.jobs).values():
        _check_job(parts, job, problem, warning)
    _check_overlaps(right(parts.jobs).values(), problem, warning)
    if parts.notify is not None:
        _check_notify(parts.notify, problem)


def _check_notify(notify: Notify, problem: Report) -> None:
    smtp = notify.smtp
    if smtp is None:
        return
    if (smtp.user is None) != (smtp.password_file is None):
        problem("notify.smtp", "has only one of user and password_file", "write both, or none")
    if smtp.user is not None and smtp.tls == "none":
        problem("notify.smtp.tls", "the password would cross the network in the clear", 'write tls = "starttls"')


def _check_network(parts: Parts, network: Network, problem: Report, warning: Report) -> None:
    if network.listen.host not in network.cluster:
        problem(
            "network.listen",
            f"{network.listen.host} is not on the cluster network {network.cluster}",
            "write this node's address on that network; replication listens nowhere else",
        )
    if network.http is not None:
        if network.http == network.listen:
            problem("network.http", f"{network.http} is where replication listens", "give it a port of its own")
        if not network.http.host.is_loopback:
            warning(
                "network.http",
                f"{network.http} can be reached from other machines, and asks for no password",
                'write "127.0.0.1:9571", or let a firewall admit only your Prometheus server',
            )
    taken = {network.listen: "where this node listens (network.listen)"}
    for name, peer in right(parts.peers).items():
        key = key_path("peer", name, "address")
        if peer.address.host not in network.cluster:
            problem(
                key,
                f"{peer.address.host} is not on the cluster network {network.cluster}",
                "write its address on that network; replication dials nowhere else",
            )
        if peer.address in taken:
            problem(key, f"{peer.address} is {taken[peer.address]}", "each node has an address of its own")
        taken.setdefault(peer.address, f"the address of peer {name!r} too")


def _places(storage: Storage) -> tuple[str, PurePosixPath]:
    """Where a storage's volumes are: what kind of place, and its path there."""
    if isinstance(storage, ImageStorage):
        return "image", PurePosixPath(storage.path)
    if isinstance(storage, RbdStorage):
        return f"rbd {storage.conffile}", PurePosixPath(storage.pool, storage.namespace or ".")
    return "zfs", PurePosixPath(storage.root)


def _check_storages(storages: Mapping[str, Storage], problem: Report) -> None:
    for (first, one), (second, other) in combinations(storages.items(), 2):
        (kind, here), (other_kind, there) = _places(one), _places(other)
        if kind != other_kind:
            continue
        if here.is_relative_to(there) or there.is_relative_to(here):
            problem(
                key_path("storage", second),
                f"{there} {'is also' if here == there else 'overlaps'} {here} of storage {first!r}",
                "give each storage a place of its own",
            )


def _check_peers(parts: Parts, problem: Report) -> None:
    for name, peer in parts.peers.items():
        if name == parts.this_node:
            problem(key_path("peer", name), "is this node itself", "list only the other nodes; [node] name is this one")
        if peer is not None:
            for key, storages in (("may_push_to", peer.may_push_to), ("may_pull_from", peer.may_pull_from)):
                for storage in storages:
                    if storage not in parts.storages:
                        _unknown_storage(parts, key_path("peer", name, key), storage, problem)
            _check_pushed(parts, peer, problem)


def _check_pushed(parts: Parts, peer: Peer, problem: Report) -> None:
    """What is about replicas of a peer is about storages that it may push to. And where its replicas have any name,
    those of other peers could not be told from its own."""
    for setting, storages in (("may_switch", peer.may_switch), ("same_path", peer.same_path)):
        for storage in storages:
            if storage not in peer.may_push_to:
                problem(
                    key_path("peer", peer.name, setting),
                    f"{storage!r} is not in may_push_to",
                    f"name it in peer.{peer.name}.may_push_to too",
                )
    for storage in peer.same_path:
        for other in right(parts.peers).values():
            if other.name != peer.name and storage in other.may_push_to:
                problem(
                    key_path("peer", peer.name, "same_path"),
                    f"peer {other.name!r} may push to {storage!r} too",
                    "give a peer whose replicas have the names of their sources a storage of its own",
                )


def _unknown_storage(parts: Parts, key: str, storage: str, problem: Report) -> None:
    problem(key, f"there is no storage {storage!r} on this node", _choose(storage, parts.storages, "storage"))


def _choose(word: str, known: Iterable[str], what: str) -> str:
    known = sorted(known)
    if close := nearest(word, known):
        return f"did you mean {close!r}?"
    listed = f"; known are {', '.join(known)}" if known else ""
    return f"add [{key_path(what, word)}]{listed}"


def _check_job(parts: Parts, job: Job, problem: Report, warning: Report) -> None:
    key = key_path("job", job.name)
    if not parts.this_node:
        return  # without this node's name nobody can tell what is here
    pulls = job.source.node != parts.this_node
    if pulls and job.source.node not in parts.peers:
        problem(
            f"{key}.source.node", f"there is no node {job.source.node!r}", _choose(job.source.node, parts.peers, "peer")
        )
    if not pulls:
        for storage in job.source.storages:
            if storage not in parts.storages:
                _unknown_storage(parts, f"{key}.source", storage, problem)
    if pulls and job.quiesce is not None:
        problem(
            f"{key}.quiesce",
            f"the snapshots are taken on {job.source.node}, where this node can run nothing",
            f"leave it out, or make this a job of {job.source.node} that pushes",
        )
    for target in job.targets:
        same = job.replica_path == "same" and job.source.node == target.node
        if same and target.storage in job.source.storages:
            problem(
                f"{key}.replica_path",
                f"in {target} a replica cannot have the name of its source, which is there",
                'write "node", or replicate to another storage',
            )
        _check_target(parts, job, target, pulls, f"{key}.targets", problem, warning)


def _check_target(
    parts: Parts, job: Job, target: Target, pulls: bool, key: str, problem: Report, warning: Report
) -> None:
    if target.node == parts.this_node:
        if target.storage not in parts.storages:
            _unknown_storage(parts, key, target.storage, problem)
        if not pulls and target.storage in job.source.storages:
            warning(
                key,
                f"{target.storage!r} is also the source: such a replica is lost together with it",
                "replicate to another storage, best on another node",
            )
        return
    if pulls:
        problem(
            key,
            f"{target} is not on this node, but this job pulls from {job.source.node}",
            f"name a storage of this node, or make this a job of {job.source.node}",
        )
    elif target.node not in parts.peers:
        remedy = _choose(target.node, parts.peers, "peer")
        if target.node in parts.storages:
            remedy = f"{target.node!r} is a storage of this node: a target is written NODE:STORAGE, or STORAGE"
        problem(key, f"there is no node {target.node!r}", remedy)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A job's volumes of one of its storages."""

    job: Job
    storage: str


def _check_overlaps(jobs: Iterable[Job], problem: Report, warning: Report) -> None:
    """Two jobs must not feed one replica; volumes of two storages with one name would be one replica, too."""
    by_place: dict[tuple[str, Target], list[_Claim]] = defaultdict(list)
    for job in jobs:
        if job.enabled:
            for target in job.targets:
                by_place[job.source.node, target] += [_Claim(job, storage) for storage in job.source.storages]
    for (_, target), claims in by_place.items():
        for one, other in _candidates(claims):
            name = overlap(one.job.source.volumes, one.storage, other.job.source.volumes, other.storage)
            if name is None:
                continue
            if one.storage == other.storage:
                problem(
                    key_path("job", other.job.name, "source"),
                    f"has volumes of {other.storage!r} that job {one.job.name!r} replicates to {target} too, "
                    f"for example one named {name!r}",
                    'exclude them in one of the two jobs with "!"',
                )
            else:
                warning(
                    key_path("job", other.job.name, "source"),
                    f"a volume named alike in {one.storage!r} and {other.storage!r}, such as {name!r}, would have one "
                    f"replica on {target} for both, and the second is refused",
                    "give the two storages targets of their own, or make sure that no names are alike",
                )


def _candidates(claims: list[_Claim]) -> Iterator[tuple[_Claim, _Claim]]:
    """The pairs that can overlap at all, each once and in the file's order.

    Two patterns have a name in common only if what one begins with is the beginning of the other, and in sorted order
    those are neighbours: thousands of jobs are checked in a moment.
    """
    prefixes = sorted(
        (pattern.glob.prefix, number)
        for number, claim in enumerate(claims)
        for pattern in claim.job.source.volumes
        if pattern.storage == claim.storage and not pattern.exclude
    )
    pairs: set[tuple[int, int]] = set()
    open_prefixes: list[tuple[str, int]] = []
    for prefix, number in prefixes:
        while open_prefixes and not prefix.startswith(open_prefixes[-1][0]):
            open_prefixes.pop()
        pairs.update((min(number, other), max(number, other)) for _, other in open_prefixes if other != number)
        open_prefixes.append((prefix, number))
    for one, other in sorted(pairs):
        yield claims[one], claims[other]
