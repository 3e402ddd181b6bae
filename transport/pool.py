"""Connections to one peer, kept for the next request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from replicator.errors import ConnectionLost, ReplicatorError
from transport import network
from transport.connection import FROM_SERVER, Connection, Deadlines
from transport.identity import Identity
from transport.payloads import Link
from transport.peers import verify_peer
from transport.tls import ALPN, Context, Refused, TlsChannel

MAX_IDLE = 4
IDLE_SECONDS = 60.0
"""Idle connections are closed after this; shorter than what a server allows them."""


class Dialer:
    """Opens connections to one peer.

    :param address: the peer's, on the cluster network
    :param source: this node's address to dial from, None: its first on the cluster network
    """

    def __init__(
        self,
        identity: Identity,
        peer: str,
        *,
        network: IPv4Network | IPv6Network,
        address: tuple[IPv4Address | IPv6Address, int],
        source: IPv4Address | IPv6Address | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._identity = identity
        self.peer = peer
        self._network = network
        self._address = address
        self._source = source
        self._deadlines = deadlines or Deadlines()

    def __call__(self) -> Connection:
        """:raises ClusterNetworkError, PeerUnreachable, NotAuthenticated, NotAuthorized, ProtocolError:"""
        deadline = time.monotonic() + self._deadlines.handshake
        host, port = self._address
        sock = network.dial(
            self._network, self.peer, host, port, timeout=self._deadlines.handshake, source=self._source
        )
        try:
            context: Context = self._identity.client_context()
            channel = TlsChannel(sock, context, server_side=False, server_name=self.peer)
        except BaseException:
            sock.close()
            raise
        try:
            channel.handshake(deadline)
            verify_peer(channel, self._identity, expected=self.peer)
            if channel.alpn != ALPN:
                raise ConnectionLost(f"node {self.peer} does not speak {ALPN}", hint="see which version runs there")
            connection = Connection(channel, self.peer, accept=FROM_SERVER, deadlines=self._deadlines)
            connection.greet(self._identity.node, deadline)
        except Refused as refused:
            channel.close()
            raise refused.error from None
        except BaseException:
            channel.close()
            raise
        return connection


class Pool:
    """Connections to one peer. Thread-safe; each connection is used by one thread at a time."""

    def __init__(self, dial: Callable[[], Connection], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._dial = dial
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Connection]] = []
        self._used: set[Connection] = set()
        self._link: Link | None = None
        self._closed = False

    def take(self, *, fresh: bool = False) -> tuple[Connection, bool]:
        """A connection, and whether it was used before. Give it back, or close it with :meth:`drop`."""
        self._expire()
        with self._lock:
            if self._closed:
                raise ConnectionLost("the endpoint was closed", hint="")
            while self._idle and not fresh:
                _, connection = self._idle.pop()
                if connection.usable:
                    self._used.add(connection)
                    return connection, True
                threading.Thread(target=connection.close, daemon=True).start()
        connection = self._dial()
        with self._lock:
            self._used.add(connection)
        return connection, False

    def give(self, connection: Connection) -> None:
        """Take a connection back at the clean end of a request."""
        self._link = connection.link or self._link
        connection.rest()
        with self._lock:
            self._used.discard(connection)
            if not self._closed and connection.usable and len(self._idle) < MAX_IDLE:
                self._idle.append((self._clock(), connection))
                return
        connection.close()

    def drop(self, connection: Connection, error: ReplicatorError | None = None) -> None:
        """Close a connection that saw an error; tell the peer which, where it is ours."""
        with self._lock:
            self._used.discard(connection)
        connection.close(error=error)

    @property
    def link(self) -> Link | None:
        """Round trip and clock difference by the newest heartbeats, None before any."""
        with self._lock:
            connections = [*self._used, *(c for _, c in self._idle)]
        known = [c.link for c in connections]
        return next((link for link in known if link is not None), self._link)

    def _expire(self) -> None:
        limit = self._clock() - IDLE_SECONDS
        with self._lock:
            old = [c for since, c in self._idle if since < limit or not c.usable]
            self._idle = [(s, c) for s, c in self._idle if c not in old]
        for connection in old:
            connection.close()

    def reset(self, error: ReplicatorError) -> None:
        """End every connection, those in use with ``error``; the next request opens a new one, checked anew."""
        with self._lock:
            idle, self._idle = [c for _, c in self._idle], []
            used = list(self._used)
        for connection in idle:
            connection.close()
        for connection in used:
            connection.abort(error)

    def close(self) -> None:
        """End every connection for good."""
        with self._lock:
            self._closed = True
        self.reset(ConnectionLost("the endpoint was closed", hint=""))
