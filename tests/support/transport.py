"""Two nodes of one cluster on loopback: certificates, a server, and the endpoint that another node sees of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from tempfile import TemporaryDirectory

from replicator.endpoint import Endpoint
from transport import certificates, network
from transport.authorization import PeerRights
from transport.connection import Deadlines
from transport.identity import FOLDER, Identity, create_cluster, store
from transport.pool import Dialer, Pool
from transport.remote import RemoteEndpoint
from transport.server import Caps, Server
from transport.tls import Refusal

LOOPBACK = IPv4Network("127.0.0.0/8")
HOST = IPv4Address("127.0.0.1")
SHORT = Deadlines(handshake=5.0, heartbeat=0.2, silence=10.0, send=20.0, answer=20.0, idle=20.0)
"""Quick heartbeats, and deadlines that a hanging test meets before its own."""


def add_node(ca_identity: Identity, state_dir: Path, node: str) -> Identity:
    """A further node of the cluster, without the exchange of joining."""
    key = certificates.new_key()
    csr = certificates.to_pem(certificates.make_request(key, node))
    store(
        state_dir / FOLDER,
        certificates.key_to_pem(key),
        ca_identity.sign(node, csr),
        certificates.to_pem(ca_identity.ca),
    )
    return Identity(state_dir)


@dataclass
class Peers:
    """A directory of peers that a test fills; listens to refusals as well."""

    served: Endpoint | None
    listed: dict[str, PeerRights] = field(default_factory=dict)
    refusals: list[tuple[Refusal, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def rights(self, peer: str) -> PeerRights | None:
        return self.listed.get(peer)

    def endpoint(self, peer: str) -> Endpoint:  # noqa: ARG002
        assert self.served is not None
        return self.served

    def refused(self, reason: Refusal, peer: str) -> None:
        with self.changed:
            self.refusals.append((reason, peer))
            self.changed.notify_all()

    def wait_for(self, reason: Refusal, count: int = 1, timeout: float = 10.0) -> None:
        """Until the server has refused for ``reason`` so often."""
        with self.changed:
            assert self.changed.wait_for(lambda: [r for r, _ in self.refusals].count(reason) >= count, timeout), (
                f"no refusal {reason}, but {self.refusals}"
            )


@contextmanager
def serving(
    identity: Identity, peers: Peers, *, deadlines: Deadlines = SHORT, caps: Caps | None = None
) -> Iterator[Server]:
    """A server on a free port of loopback."""
    listener = network.listen(LOOPBACK, HOST, 0)
    server = Server(listener, identity, peers, deadlines=deadlines, caps=caps, refused=peers.refused)
    server.start()
    try:
        yield server
    finally:
        server.close()


def pool_to(server: Server, identity: Identity, node: str, *, deadlines: Deadlines = SHORT) -> Pool:
    """Connections of ``identity`` to ``node``, which ``server`` serves."""
    address = (HOST, server.address[1])
    return Pool(Dialer(identity, node, network=LOOPBACK, address=address, deadlines=deadlines))


@dataclass(frozen=True)
class Cluster:
    """Two identities: ``one`` made the cluster, ``two`` is in it."""

    one: Identity
    two: Identity


@cache
def _template() -> tuple[TemporaryDirectory[str], Path]:
    folder = TemporaryDirectory(prefix="replicator-cluster-")
    one = create_cluster(Path(folder.name, "one"), "one")
    add_node(one, Path(folder.name, "two"), "two")
    return folder, Path(folder.name)


def make_cluster(folder: Path) -> Cluster:
    """A cluster of nodes ``one`` (has the CA) and ``two`` below ``folder``; copied, so it is quick."""
    _, template = _template()
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return Cluster(Identity(folder / "one"), Identity(folder / "two"))


@contextmanager
def remote_endpoint(
    folder: Path, served: Endpoint, rights: PeerRights, *, deadlines: Deadlines = SHORT
) -> Iterator[RemoteEndpoint]:
    """``served`` (of node ``one``) as node ``two`` sees it through real connections."""
    cluster = make_cluster(folder)
    peers = Peers(served, {"two": rights})
    with serving(cluster.one, peers, deadlines=deadlines) as server:
        remote = RemoteEndpoint("one", pool_to(server, cluster.two, "one", deadlines=deadlines))
        try:
            yield remote
        finally:
            remote.close()
