"""Whether the node at the other end of a TLS connection is who it must be."""

from __future__ import annotations

from cryptography import x509

from replicator.errors import IdentityError, NotAuthenticated
from transport import certificates
from transport.identity import Identity
from transport.tls import Refusal, Refused, TlsChannel


def verify_peer(channel: TlsChannel, identity: Identity, *, expected: str | None = None) -> x509.Certificate:
    """The peer's certificate, whose chain OpenSSL has verified, once its name and revocation are checked as well.

    :param expected: client side: the node that was dialled
    :raises Refused: no certificate, another name, or revoked
    """
    der = channel.peer_certificate()
    if der is None:
        raise Refused(
            Refusal.NO_CERTIFICATE,
            NotAuthenticated("the peer shows no certificate", hint="join it: `replicator cluster invite NODE`"),
        )
    certificate = x509.load_der_x509_certificate(der)
    try:
        node = certificates.node_of(certificate)
    except IdentityError as error:
        raise Refused(Refusal.WRONG_NAME, NotAuthenticated(error.message, hint=error.hint)) from None
    # OpenSSL did this already; a second opinion costs little and does not depend on how it was set up.
    if not certificates.is_issued_by(certificate, identity.ca):
        raise Refused(Refusal.WRONG_CA, NotAuthenticated(f"the certificate of {node} is not of this cluster", hint=""))
    if expected is not None and node != expected:
        raise Refused(
            Refusal.WRONG_NAME,
            NotAuthenticated(
                f"node {expected} was dialled, but {node} answered", hint=f"correct the address in [peer.{expected}]"
            ),
        )
    if identity.is_revoked(certificate):
        raise Refused(
            Refusal.REVOKED,
            NotAuthenticated(
                f"the certificate of node {node} was revoked",
                hint=f"if that was a mistake, move its identity directory away and join it anew: cluster invite {node}",
            ),
        )
    return certificate
