"""The listener: accepts connections on the cluster network and lets in whom the configuration lists.

From accept() on every step has a deadline and every peer a cap: so many connections that have not yet proved who they
are, so many of one peer, so many in all. Refusals are logged and counted, each with its reason.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509

from replicator.endpoint import Endpoint
from replicator.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotAuthenticated,
    NotAuthorized,
    ReplicatorError,
)
from transport import certificates
from transport.authorization import Authority, PeerRights
from transport.connection import FROM_CLIENT, Connection, Deadlines
from transport.frames import FrameType, encode
from transport.identity import Identity
from transport.joining import serve_join
from transport.payloads import encode_error
from transport.peers import verify_peer
from transport.session import Observer, Session
from transport.tls import ALPN, ALPN_JOIN, Refusal, Refused, TlsChannel

log = logging.getLogger(__name__)


class Directory(Protocol):
    """What the configuration says about peers; asked for every connection and request, so it may change."""

    def rights(self, peer: str) -> PeerRights | None:
        """What a peer may do; None if it is not listed."""

    def endpoint(self, peer: str) -> Endpoint:
        """This node's storages as the peer is to see them (with this node's minimum retention for it)."""


@dataclass(frozen=True, slots=True)
class Caps:
    """How many connections there may be at once.

    :ivar unauthenticated: before the handshake has proved who it is
    :ivar per_peer: of one node
    :ivar total: of all
    """

    unauthenticated: int = 32
    per_peer: int = 64
    total: int = 256


@dataclass(slots=True, eq=False)
class _Open:
    """An accepted connection; ``peer`` and what belongs to it once it is known."""

    address: str
    abort: Callable[[ReplicatorError], None]
    peer: str = ""
    certificate: x509.Certificate | None = None


def _ignore(reason: Refusal, peer: str) -> None:
    pass


class Server:
    """Serves this node's endpoint to its peers.

    :param listener: a listening socket (:func:`transport.network.listen`); the server closes it
    :param refused: told of every refusal
    """

    def __init__(
        self,
        listener: socket.socket,
        identity: Identity,
        directory: Directory,
        *,
        deadlines: Deadlines | None = None,
        caps: Caps | None = None,
        refused: Observer = _ignore,
    ) -> None:
        self._listener = listener
        self._identity = identity
        self._directory = directory
        self._deadlines = deadlines or Deadlines()
        self._caps = caps or Caps()
        self._refused = refused
        self._lock = threading.Lock()
        self._open: set[_Open] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_all, name="listener", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._acceptor.start()

    # -- accepting

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while not self._closed.is_set():
            poll.poll()
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if self._closed.is_set():
                    return
                # Out of descriptors, say. The connection stays in the backlog; do not spin.
                log.error("cannot accept a connection: %s", error)
                self._closed.wait(0.1)
                continue
            self._admit(sock, str(address[0]))

    def _admit(self, sock: socket.socket, address: str) -> None:
        deadline = time.monotonic() + self._deadlines.handshake
        with self._lock:
            waiting = sum(1 for entry in self._open if not entry.peer)
            full = self._closed.is_set() or waiting >= self._caps.unauthenticated or len(self._open) >= self._caps.total
            entry = _Open(address, lambda _: _shutdown(sock))
            if not full:
                self._open.add(entry)
        if full:
            sock.close()
            self._tell(Refusal.TOO_MANY, "", address, f"{waiting} connections have not proved yet who they are")
            return
        thread = threading.Thread(
            target=self._serve, args=(sock, entry, deadline), name=f"serve-{address}", daemon=True
        )
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: this connection is lost, the listener must not be
            with self._lock:
                self._threads.discard(thread)
                self._open.discard(entry)
            sock.close()
            self._tell(Refusal.TOO_MANY, "", address, str(error))

    def _tell(self, reason: Refusal, peer: str, address: str, why: str) -> None:
        facts = {"reason": str(reason), "peer": peer, "address": address}
        log.warning("connection from %s refused (%s): %s", peer or address, reason, why, extra=facts)
        self._refused(reason, peer)

    # -- one connection

    def _serve(self, sock: socket.socket, entry: _Open, deadline: float) -> None:
        channel: TlsChannel | None = None
        try:
            channel = TlsChannel(sock, self._identity.server_context(), server_side=True)
            entry.abort = channel.abort
            self._serve_channel(channel, entry, deadline)
        except Refused as refused:
            self._tell(refused.reason, entry.peer, entry.address, str(refused))
            if channel is not None and not refused.told:
                _say(channel, refused.error, deadline)
        except DeadlineExceeded as error:
            self._tell(Refusal.HANDSHAKE_TIMEOUT, entry.peer, entry.address, str(error))
        except ConnectionLost as error:
            log.debug("connection from %s ended: %s", entry.address, error)
        except ReplicatorError as error:
            self._tell(Refusal.PROTOCOL, entry.peer, entry.address, str(error))
            if channel is not None:
                _say(channel, error, deadline)
        except Exception:
            log.exception("serving a connection failed", extra={"address": entry.address})
        finally:
            if channel is not None:
                channel.close()
            sock.close()
            with self._lock:
                self._open.discard(entry)
                self._threads.discard(threading.current_thread())

    def _serve_channel(self, channel: TlsChannel, entry: _Open, deadline: float) -> None:
        channel.handshake(deadline)
        if channel.alpn == ALPN_JOIN:
            serve_join(channel, self._identity, deadline, entry.address)
            return
        certificate = verify_peer(channel, self._identity)
        if channel.alpn != ALPN:
            raise Refused(Refusal.PROTOCOL, NotAuthenticated(f"the peer does not speak {ALPN}", hint=""))
        peer = certificates.node_of(certificate)
        rights = self._directory.rights(peer)
        if rights is None:
            entry.peer = peer
            hint = f"to allow it, add [peer.{peer}] to replicator.toml on {self._identity.node}"
            error = NotAuthorized(f"node {peer} is not a listed peer of node {self._identity.node}", hint=hint)
            raise Refused(Refusal.UNLISTED, error)
        connection = Connection(channel, peer, accept=FROM_CLIENT, deadlines=self._deadlines)
        self._greet(connection, channel, deadline)
        with self._registered(entry, peer, certificate, connection):
            endpoint = self._directory.endpoint(peer)
            Session(connection, endpoint, self._identity, lambda: self._authority(peer), self._refused).run()

    def _greet(self, connection: Connection, channel: TlsChannel, deadline: float) -> None:
        try:
            connection.greet(self._identity.node, deadline)
        except (DeadlineExceeded, ConnectionLost):
            raise
        except ReplicatorError as error:
            with contextlib.suppress(ReplicatorError):
                connection.send(FrameType.ERROR, (encode_error(error),))
            _linger(channel, deadline)
            raise Refused(Refusal.PROTOCOL, error, told=True) from None

    @contextmanager
    def _registered(
        self, entry: _Open, peer: str, certificate: x509.Certificate, connection: Connection
    ) -> Iterator[None]:
        """The connection counts as this peer's, and ends when the peer is disconnected."""
        with self._lock:
            count = sum(1 for other in self._open if other.peer == peer)
            entry.peer, entry.certificate, entry.abort = peer, certificate, connection.abort
        try:
            if count >= self._caps.per_peer:
                hint = "wait until some of them are done"
                error = NotAuthorized(f"node {peer} has {count} connections to {self._identity.node}", hint=hint)
                connection.close(error=error)
                raise Refused(Refusal.TOO_MANY, error, told=True)
            if self._identity.is_revoked(certificate):  # revoked since the handshake
                revoked = NotAuthenticated(f"the certificate of node {peer} was revoked", hint="")
                connection.close(error=revoked)
                raise Refused(Refusal.REVOKED, revoked, told=True)
            yield
        finally:
            connection.close()

    def _authority(self, peer: str) -> Authority:
        return Authority(peer, self._identity.node, self._directory.rights(peer) or PeerRights())

    # -- ending connections

    def disconnect_revoked(self) -> int:
        """End the connections whose certificate is revoked by now; how many."""
        with self._lock:
            entries = [e for e in self._open if e.certificate is not None]
        found = [e for e in entries if e.certificate is not None and self._identity.is_revoked(e.certificate)]
        for entry in found:
            self._tell(Refusal.REVOKED, entry.peer, entry.address, "its certificate was revoked")
            entry.abort(NotAuthenticated(f"the certificate of node {entry.peer} was revoked", hint=""))
        return len(found)

    def connections(self) -> dict[str, int]:
        """Open connections by peer."""
        with self._lock:
            peers = [entry.peer for entry in self._open if entry.peer]
        return {peer: peers.count(peer) for peer in sorted(set(peers))}

    def close(self, timeout: float = 10.0) -> None:
        """Stop accepting, end every connection (partial state of transfers stays) and wait for their threads."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")
        if self._acceptor.ident is not None:
            self._acceptor.join(timeout)
        self._listener.close()
        with self._lock:
            entries, threads = list(self._open), list(self._threads)
        for entry in entries:
            entry.abort(ConnectionLost(f"node {self._identity.node} is shutting down", hint="it is tried again"))
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._wake_read.close()
        self._wake_write.close()


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _say(channel: TlsChannel, error: ReplicatorError, deadline: float) -> None:
    """Tell a refused peer why, as the first frame, and let it read that."""
    with contextlib.suppress(ReplicatorError):
        channel.send((encode(FrameType.ERROR, encode_error(error)),), max(0.1, deadline - time.monotonic()))
        _linger(channel, deadline)


def _linger(channel: TlsChannel, deadline: float) -> None:
    """Read and drop what the peer still sends, so that no reset overtakes what was said to it."""
    scratch = memoryview(bytearray(4096))
    until = min(deadline, time.monotonic() + 2.0)
    with contextlib.suppress(ReplicatorError):
        while channel.recv_into(scratch, until - time.monotonic()) and time.monotonic() < until:
            pass
