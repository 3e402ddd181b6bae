"""This node and the ways to its peers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

from replicator.config import Config
from replicator.control import PeerStatus
from replicator.endpoint import Endpoint, Sighting
from replicator.errors import ConnectionLost, IdentityError, ReplicatorError, Unsupported, UsageError
from replicator.local import LocalEndpoint, PeerView
from replicator.rates import Rates
from replicator.settings import Job, Peer, RbdStorage, ZfsStorage
from transport.authorization import PeerRights
from transport.connection import Deadlines
from transport.identity import Identity
from transport.pool import Dialer, Pool
from transport.remote import RemoteEndpoint


def deadlines(config: Config) -> Deadlines:
    """The deadlines of connections, as the configuration bounds them."""

    def seconds(value: timedelta) -> float:
        return value.total_seconds()

    limits = config.limits
    stall = seconds(limits.stall_timeout)
    default = Deadlines()
    return Deadlines(
        handshake=seconds(limits.connect_timeout),
        heartbeat=min(default.heartbeat, stall / 4),
        silence=min(default.silence, stall),
        send=stall,
    )


def rights(peer: Peer) -> PeerRights:
    """What a peer may ask of this node."""
    return PeerRights(
        frozenset(peer.may_push_to),
        frozenset(peer.may_pull_from),
        frozenset(peer.same_path),
        frozenset(peer.may_switch),
    )


class PeerNetwork:
    """The :class:`~replicator.engine.Nodes` of a configuration.

    :param identity: of this node; None with ``problem``: why there is none
    :param rates: that transfers are held to
    """

    def __init__(
        self,
        config: Config,
        local: LocalEndpoint,
        identity: Identity | None,
        problem: ReplicatorError | None,
        rates: Rates,
    ) -> None:
        self._config = config
        self._rates = rates
        self._local = local
        self._identity = identity
        self._problem = problem
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}
        self._seen: dict[str, PeerStatus] = {}

    @property
    def node(self) -> str:
        """This node's name."""
        return self._config.node.name

    def endpoint(self, node: str, job: Job | None = None) -> Endpoint:
        """See :class:`~replicator.tasks.Network`."""
        if self._config.is_local(node):
            return self._local
        peer = self._peer(node)
        return RemoteEndpoint(
            peer.name,
            self._pool(peer),
            rate_limit=lambda: self._rates.of_transfer(job),
            compress=job is None or job.compress != "never",
        )

    def pool(self, node: str, storage: str) -> str | None:
        """See :class:`~replicator.tasks.Network`."""
        if not self._config.is_local(node):
            return None
        match self._config.storages.get(storage):
            case ZfsStorage(root=root):
                return f"zfs {root.partition('/')[0]}"
            case RbdStorage(pool=pool):
                return f"rbd {pool}"
            case _:
                return storage

    def _peer(self, node: str) -> Peer:
        peer = self._config.peers.get(node)
        if peer is None:
            raise UsageError(f"there is no peer {node!r}", hint=f"add [peer.{node}] to {self._config.path}")
        return peer

    def _pool(self, peer: Peer) -> Pool:
        if self._identity is None:
            raise self._problem or IdentityError("this node is in no cluster", hint="replicator cluster join TOKEN")
        with self._lock:
            pool = self._pools.get(peer.name)
            if pool is None:
                dialer = Dialer(
                    self._identity,
                    peer.name,
                    network=self._config.network.cluster,
                    address=(peer.address.host, peer.address.port),
                    source=self._config.network.listen.host,
                    deadlines=deadlines(self._config),
                )
                pool = self._pools[peer.name] = Pool(dialer)
            return pool

    def cluster_endpoint(self, node: str) -> RemoteEndpoint:
        """A peer, for the cluster's own requests (revocations, renewal)."""
        peer = self._peer(node)
        return RemoteEndpoint(peer.name, self._pool(peer))

    @property
    def role_changes(self) -> int:
        """See :class:`~replicator.engine.Nodes`."""
        return self._local.role_changes.count

    # -- peers

    def peers(self, *, probe: bool) -> tuple[PeerStatus, ...]:
        """See :class:`~replicator.engine.Nodes`. Probes ask all peers at the same time."""
        if probe:
            threads = [
                threading.Thread(target=self._probe, args=(peer,), name=f"probe-{peer.name}", daemon=True)
                for peer in self._config.peers.values()
            ]
            for thread in threads:
                thread.start()
            limit = self._config.limits.connect_timeout.total_seconds() * 2 + 5
            for thread in threads:
                thread.join(limit)
        unknown = "not asked yet"
        return tuple(
            self._seen.get(peer.name, PeerStatus(peer.name, str(peer.address), False, message=unknown))
            for peer in self._config.peers.values()
        )

    def _probe(self, peer: Peer) -> None:
        address = str(peer.address)
        try:
            self.cluster_endpoint(peer.name).storages()
        except ReplicatorError as error:
            self._seen[peer.name] = PeerStatus(peer.name, address, False, message=str(error))
            return
        link = self._pool(peer).link
        self._seen[peer.name] = PeerStatus(
            peer.name,
            address,
            True,
            link.round_trip if link else None,
            link.clock_difference if link else None,
        )

    def reset(self) -> None:
        """End all connections that this node has opened, so that peers are checked anew; runs try again."""
        with self._lock:
            pools = list(self._pools.values())
        for pool in pools:
            pool.reset(ConnectionLost("the list of revoked nodes changed", hint="it is tried again at once"))

    def close(self) -> None:
        """End all connections that this node has opened."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()


def endpoint_for_peers(
    config: Config, local: LocalEndpoint, network: PeerNetwork | None = None
) -> Callable[[str], Endpoint]:
    """What each peer gets to ask: this node's endpoint, with the retention that this node insists on for that peer.

    :param network: by which this node looks for a third one where a peer asks whether it is there
    """

    def witness(node: str, lineage: str) -> Sighting:
        if network is None or node not in config.peers:
            raise Unsupported(f"node {config.node.name} does not know a node {node}", hint=f"add [peer.{node}] there")
        try:
            return Sighting(node, network.cluster_endpoint(node).copies(lineage))
        except ReplicatorError as error:
            return Sighting(node, None, str(error))

    def endpoint(name: str) -> Endpoint:
        peer = config.peers.get(name)
        if peer is None:
            return local
        jobs = frozenset(job.name for job in config.jobs.values() if config.is_local(job.source.node))
        pulled = frozenset((*peer.may_pull_from, *peer.may_switch))
        view = PeerView(name, peer.keep or "", frozenset(peer.same_path), pulled, jobs)
        return local.for_peer(view, witness)

    return endpoint
