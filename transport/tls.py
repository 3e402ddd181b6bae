"""TLS 1.3 between nodes, with a channel that can be read and written at the same time.

Python's ``SSLSocket`` takes two system calls for every 16 KiB record and must not be read and written by two threads at
once. Here OpenSSL works on memory: the socket is read and written in large pieces outside the lock that guards the TLS
state, so a heartbeat can go out while data comes in, and every wait has a deadline.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
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

ALPN = "replicator/1"
ALPN_JOIN = "replicator-join/1"
"""A client without a certificate may speak this and nothing else."""

RAW_READ = 256 * 1024
"""Bytes asked of the socket at once: sixteen records, and still in the processor's second cache."""
WRITE_PIECE = 256 * 1024
"""Bytes encrypted at once before they are handed to the socket."""


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


def _context(protocol: int, file: str | None, ca_pem: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    # No resumption: every connection proves both certificates anew, so a revocation counts at once.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    if file:
        context.load_cert_chain(file)
    if ca_pem:
        context.load_verify_locations(cadata=ca_pem)  # and no other: the system's authorities mean nothing here
    return context


def server_context(file: str, ca_pem: str) -> ssl.SSLContext:
    """For accepting: key and certificate from ``file``, clients verified by the cluster's CA only.

    A client without a certificate gets through the handshake (CERT_OPTIONAL), so that it can join; the server's own
    check right after the handshake lets it do that and nothing else.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, file, ca_pem)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0
    context.set_alpn_protocols([ALPN, ALPN_JOIN])
    return context


def client_context(file: str | None, ca_pem: str | None, *, alpn: str = ALPN) -> ssl.SSLContext:
    """For dialling. Without ``ca_pem`` nothing is verified: only to fetch a CA that is then checked by fingerprint."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, file, ca_pem)
    context.hostname_checks_common_name = False
    if ca_pem is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    return context


# From OpenSSL's x509_vfy.h.
_EXPIRED = {9, 10}
_REVOKED = {23}
_NAME_MISMATCH = {62}


def refusal_of(error: ssl.SSLError) -> Refusal:
    """Why a handshake failed, from OpenSSL's error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _EXPIRED:
            return Refusal.EXPIRED
        if error.verify_code in _REVOKED:
            return Refusal.REVOKED
        return Refusal.WRONG_NAME if error.verify_code in _NAME_MISMATCH else Refusal.WRONG_CA
    return Refusal.TLS


def _tls_error(error: ssl.SSLError) -> TransportError:
    """An error of an established channel, or what the peer's alert says about our certificate."""
    reason = (error.reason or str(error)).lower().replace("_", " ")
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
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None
    ) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._state = threading.Lock()
        self._raw = bytearray(RAW_READ)
        self._raw_view = memoryview(self._raw)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._aborted: ReplicatorError | None = None
        self._closed = False
        self.received = 0
        self.sent = 0

    # -- handshake

    def handshake(self, deadline: float) -> None:
        """Complete the handshake before ``deadline`` (of time.monotonic).

        :raises Refused: no agreement, or the peer's certificate is not accepted
        :raises DeadlineExceeded, ConnectionLost:
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush(deadline - time.monotonic())
                self._fill(deadline - time.monotonic())
            except ssl.SSLError as error:
                with suppress(ReplicatorError):
                    self._flush(1.0)  # the alert that tells the peer
                refusal = refusal_of(error)
                detail = getattr(error, "verify_message", "") or error.reason or str(error)
                raise Refused(
                    refusal,
                    NotAuthenticated(
                        f"the peer's certificate is not accepted: {detail}"
                        if refusal is not Refusal.TLS
                        else f"no TLS 1.3 connection came about: {detail}",
                        hint="both nodes must be of one cluster: see `replicator cluster nodes`, and both clocks",
                    ),
                ) from None
            else:
                self._flush(deadline - time.monotonic())
                return

    @property
    def alpn(self) -> str | None:
        """The protocol agreed on."""
        return self._tls.selected_alpn_protocol()

    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER; None if it showed none."""
        return self._tls.getpeercert(binary_form=True)

    # -- bytes

    def recv_into(self, view: memoryview, timeout: float) -> int:
        """Read at least one byte and at most ``len(view)``; 0 at the end of the connection.

        :raises DeadlineExceeded: nothing came for ``timeout`` seconds; nothing is lost, call again
        :raises ConnectionLost, NotAuthenticated:
        """
        wanted, got = len(view), 0
        read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]
        while True:
            with self._state:
                try:
                    while got < wanted:
                        count = read(wanted - got, view[got:])
                        if not count:
                            return got
                        got += count
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return got
                except ssl.SSLError as error:
                    raise self._aborted or _tls_error(error) from None
            if got:
                return got
            self._fill(timeout)

    def _fill(self, timeout: float) -> None:
        """Take what the socket has, waiting for it at most ``timeout`` seconds."""
        try:
            count = self._socket.recv_into(self._raw_view)
        except BlockingIOError:
            if not self._readable.poll(max(0.0, timeout) * 1000):
                raise DeadlineExceeded("the peer sent nothing in time", hint="see whether it is overloaded") from None
            try:
                count = self._socket.recv_into(self._raw_view)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from None
        except OSError as error:
            raise self._lost(error) from None
        if self._aborted is not None:
            raise self._aborted
        with self._state:
            if count:
                self.received += count
                self._incoming.write(self._raw_view[:count])
            else:
                self._incoming.write_eof()

    def send(self, buffers: Iterable[Buffer], timeout: float) -> None:
        """Send the buffers one after the other; each begins a TLS record of its own.

        While more is to come, the system is told so (MSG_MORE): it then sends full segments only, a fifth fewer.

        :raises DeadlineExceeded: not a byte could be sent for ``timeout`` seconds; the channel is unusable then
        :raises ConnectionLost:
        """
        write, outgoing = self._tls.write, self._outgoing
        views = [memoryview(buffer) for buffer in buffers]
        left = sum(len(view) for view in views)
        for view in views:
            position, size = 0, len(view)
            while position < size:
                with self._state:
                    try:
                        count = write(view[position : position + WRITE_PIECE])
                    except ssl.SSLError as error:
                        raise self._aborted or _tls_error(error) from None
                position += count
                left -= count
                if outgoing.pending >= WRITE_PIECE or not left:
                    self._flush(timeout, socket.MSG_MORE if left else 0)

    def _flush(self, timeout: float, flags: int = 0) -> None:
        with self._state:
            data = self._outgoing.read()
        view, position = memoryview(data), 0
        while position < len(view):
            try:
                position += self._socket.send(view[position:], flags)
            except BlockingIOError:
                if not self._writable.poll(max(0.0, timeout) * 1000):
                    raise DeadlineExceeded(
                        "the peer took nothing in time", hint="see whether its storage or the network is overloaded"
                    ) from None
            except OSError as error:
                raise self._lost(error) from None
            if self._aborted is not None:
                raise self._aborted
        self.sent += len(view)

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
            self._socket.close()
