"""Types of the C extension; what is behind it is told in ``transport/tls.py``."""

from replicator.streams import Buffer

OPENSSL: str

class TlsError(Exception):
    """What OpenSSL refused: ``args`` are its reason and, where a certificate was not accepted, the X509_V_ERR code."""

    args: tuple[str, int]

class Context:
    """How sessions are made.

    :param file: PEM with this side's certificate and key
    :param ca: PEM of the certificates that are trusted, and no others; None: nothing is verified
    :param protocols: ALPN names, the best one first
    :param rekey_after: bytes sent after which the key is renewed
    :raises TlsError: file or ca cannot be used
    """

    def __new__(
        cls,
        *,
        server: bool,
        file: str | None,
        ca: str | None,
        protocols: tuple[bytes, ...],
        rekey_after: int = ...,
    ) -> Context: ...

class Session:
    """One TLS connection over a non-blocking socket. Thread-safe; no method waits for the network.

    :param server_name: client side: whose certificate the server must have
    """

    def __new__(cls, context: Context, descriptor: int, server_name: str | None = None) -> Session: ...
    @property
    def protocol(self) -> str | None: ...
    @property
    def cipher(self) -> str | None: ...
    @property
    def peer_certificate(self) -> bytes | None: ...
    @property
    def received(self) -> int: ...
    @property
    def sent(self) -> int: ...
    def handshake(self) -> bool:
        """Go on with the handshake; whether it is complete. What it has to say is to be flushed, also after an error.

        :raises TlsError, OSError:
        """

    def read_into(self, target: Buffer, /) -> int | None:
        """As many bytes as are there, at most ``len(target)``; 0 at the end, None if nothing is there yet.

        :raises TlsError, OSError: after what came before was given
        """

    def write(self, source: Buffer, /) -> None:
        """Encrypt all of a buffer into what is to be flushed. :raises TlsError, OSError:"""

    def flush(self, more: bool, /) -> bool:
        """Send what the socket takes; whether that was all. ``more`` follows at once: only full segments go out.

        :raises OSError:
        """

    def detach(self) -> None:
        """The socket is no longer ours: nothing is read or sent after this."""
