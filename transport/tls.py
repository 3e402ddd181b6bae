"""TLS 1.3 between nodes, with a channel that can be read and written at the same time.

OpenSSL does the work, through ``transport/_tls.c``: Python's ``SSLSocket`` takes two system calls for every 16 KiB
record and must not be read and written by two threads at once, and its memory buffers copy every byte three times more
than that. Here a frame is read or written with one call, outside the interpreter's lock; sessions do not wait, so a
heartbeat can go out while data comes in, and every wait, which is here, has a deadline.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum

from replicator.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotAuthenticated,
    ReplicatorError,
    TransportError,
)
from replicator.streams import Buffer
from transport._tls import Context, Session, TlsError

__all__ = ["Context", "Refusal", "Refused", "TlsChannel", "client_context", "refusal_of", "server_context"]

ALPN = "replicator/1"
ALPN_JOIN = "replicator-join/1"
"""A client without a certificate may speak this and nothing else."""

WRITE_PIECE = 1024 * 1024
"""Bytes encrypted at once before they are handed to the socket: most of a frame, so that neither side wakes often."""


class Refusal(StrEnum):
    """Why a connection or a request was refused; the label of the metric that counts them."""

    NO_CERTIFICATE = "no_certificate"
    WRONG_CA = "wrong_ca"
    EXPIRED = "expired"
    REVOKED = "revoked"
    WRONG_NAME = "wrong_name"
    UNLISTED = "unlisted"
    UNAUTHORIZED = "unauthorized"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    TOO_MANY = "too_many_connections"
    JOIN = "join"
    TLS = "tls"
    PROTOCOL = "protocol"


class Refused(Exception):
    """A peer was refused: why, the error that tells it to people, and whether the peer was told already."""

    def __init__(self, reason: Refusal, error: ReplicatorError, *, told: bool = False) -> None:
        super().__init__(str(error))
        self.reason = reason
        self.error = error
        self.told = told


def server_context(file: str, ca_pem: str) -> Context:
    """For accepting: key and certificate from ``file``, clients verified by the cluster's CA only.

    A client without a certificate gets through the handshake, so that it can join; the server's own check right after
    the handshake lets it do that and nothing else.
    """
    return Context(server=True, file=file, ca=ca_pem, protocols=(ALPN.encode(), ALPN_JOIN.encode()))


def client_context(file: str | None, ca_pem: str | None, *, alpn: str = ALPN) -> Context:
    """For dialling. Without ``ca_pem`` nothing is verified: only to fetch a CA that is then checked by fingerprint."""
    return Context(server=False, file=file, ca=ca_pem, protocols=(alpn.encode(),))


# From OpenSSL's x509_vfy.h.
_EXPIRED = {9, 10}
_REVOKED = {23}
_NAME_MISMATCH = {62}


def refusal_of(error: TlsError) -> Refusal:
    """Why a handshake failed, from OpenSSL's error."""
    _, code = error.args
    if not code:
        return Refusal.TLS
    if code in _EXPIRED:
        return Refusal.EXPIRED
    if code in _REVOKED:
        return Refusal.REVOKED
    return Refusal.WRONG_NAME if code in _NAME_MISMATCH else Refusal.WRONG_CA


def _tls_error(error: TlsError) -> TransportError:
    """An error of an established channel, or what the peer's alert says about our certificate."""
    reason = error.args[0].lower()
    if "alert" in reason and any(word in reason for word in ("unknown ca", "certificate", "access denied")):
        return NotAuthenticated(
            f"the peer refused this node's certificate ({reason})",
            hint="see `replicator cluster nodes` on the node that has the CA; join anew if it expired or was revoked",
        )
    return ConnectionLost(f"the encrypted connection failed: {reason}", hint="see the peer's log; it is tried again")


class TlsChannel:
    """An encrypted connection over a connected TCP socket. One thread reads, another may write.

    The socket belongs to the channel from here on. ``abort`` may be called by any thread at any time.

    :param server_name: client side: the node that must be there (its certificate's SAN)
    """

    def __init__(
        self, sock: socket.socket, context: Context, *, server_side: bool, server_name: str | None = None
    ) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._session = Session(context, sock.fileno(), None if server_side else server_name)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._aborted: ReplicatorError | None = None
        self._closed = False

    # -- handshake

    def handshake(self, deadline: float) -> None:
        """Complete the handshake before ``deadline`` (of time.monotonic).

        :raises Refused: no agreement, or the peer's certificate is not accepted
        :raises DeadlineExceeded, ConnectionLost:
        """
        while True:
            try:
                complete = self._session.handshake()
            except TlsError as error:
                with suppress(ReplicatorError):
                    self._flush(1.0)  # the alert that tells the peer
                refusal = refusal_of(error)
                detail = error.args[0]
                raise Refused(
                    refusal,
                    NotAuthenticated(
                        f"the peer's certificate is not accepted: {detail}"
                        if refusal is not Refusal.TLS
                        else f"no TLS 1.3 connection came about: {detail}",
                        hint="both nodes must be of one cluster: see `replicator cluster nodes`, and both clocks",
                    ),
                ) from None
            except OSError as error:
                raise self._lost(error) from None
            self._flush(deadline - time.monotonic())
            if complete:
                return
            self._wait_readable(deadline - time.monotonic())

    @property
    def alpn(self) -> str | None:
        """The protocol agreed on."""
        return self._session.protocol

    @property
    def cipher(self) -> str | None:
        """The cipher agreed on, by OpenSSL's name."""
        return self._session.cipher

    @property
    def received(self) -> int:
        """Bytes taken from the socket so far, TLS included."""
        return self._session.received

    @property
    def sent(self) -> int:
        """Bytes given to the socket so far, TLS included."""
        return self._session.sent

    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER; None if it showed none."""
        return self._session.peer_certificate

    # -- bytes

    def recv_into(self, view: memoryview, timeout: float) -> int:
        """Read at least one byte and at most ``len(view)``; 0 at the end of the connection.

        :raises DeadlineExceeded: nothing came for ``timeout`` seconds; nothing is lost, call again
        :raises ConnectionLost, NotAuthenticated:
        """
        while True:
            try:
                count = self._session.read_into(view)
            except TlsError as error:
                raise self._aborted or _tls_error(error) from None
            except OSError as error:
                raise self._lost(error) from None
            if count:
                return count
            if self._aborted is not None:
                raise self._aborted
            if count is not None:
                return 0
            self._wait_readable(timeout)

    def _wait_readable(self, timeout: float) -> None:
        if not self._readable.poll(max(0.0, timeout) * 1000):
            raise DeadlineExceeded("the peer sent nothing in time", hint="see whether it is overloaded")

    def send(self, buffers: Iterable[Buffer], timeout: float) -> None:
        """Send the buffers one after the other; each begins a TLS record of its own.

        While more is to come, the system is told so (MSG_MORE): it then sends full segments only, a fifth fewer.

        :raises DeadlineExceeded: not a byte could be sent for ``timeout`` seconds; the channel is unusable then
        :raises ConnectionLost:
        """
        views = [memoryview(buffer) for buffer in buffers]
        left = sum(len(view) for view in views)
        room = WRITE_PIECE
        for view in views:
            for position in range(0, len(view), WRITE_PIECE):
                piece = view[position : position + WRITE_PIECE]
                try:
                    self._session.write(piece)
                except TlsError as error:
                    raise self._aborted or _tls_error(error) from None
                except OSError as error:
                    raise self._lost(error) from None
                left -= len(piece)
                room -= len(piece)
                if room <= 0 or not left:
                    self._flush(timeout, more=left > 0)
                    room = WRITE_PIECE

    def _flush(self, timeout: float, *, more: bool = False) -> None:
        while True:
            try:
                if self._session.flush(more):
                    return
            except OSError as error:
                raise self._lost(error) from None
            if not self._writable.poll(max(0.0, timeout) * 1000):
                raise DeadlineExceeded(
                    "the peer took nothing in time", hint="see whether its storage or the network is overloaded"
                )
            if self._aborted is not None:
                raise self._aborted

    def _lost(self, error: OSError) -> ReplicatorError:
        return self._aborted or ConnectionLost(
            f"the connection was lost: {error.strerror or error}", hint="see the peer's log; it is tried again"
        )

    def writable(self) -> bool:
        """Whether a few bytes can be sent without waiting."""
        return bool(self._writable.poll(0))

    # -- the end

    def abort(self, error: ReplicatorError) -> None:
        """End the connection at once from any thread; whoever waits on it gets ``error``."""
        if self._aborted is None:
            self._aborted = error
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; call it when no other thread uses the channel any more. Idempotent."""
        if not self._closed:
            self._closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._session.detach()
            self._socket.close()
