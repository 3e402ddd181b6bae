"""How a node comes into the cluster: an invitation, a token, and one short exchange.

The token is carried by the operator. It holds the CA's fingerprint, so the new node knows the cluster before it says
anything, and a secret, so the cluster knows the new node. Neither side sends the secret: both prove that they have it
by an HMAC over everything that matters.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import socket
from typing import Any

from cryptography import x509

from replicator import names
from replicator.errors import (
    ConnectionLost,
    DeadlineExceeded,
    IdentityError,
    InvalidName,
    ProtocolError,
    ReplicatorError,
)
from replicator.streams import Buffer
from transport import certificates
from transport.frames import SUSPICIOUS, FrameDecoder, FrameType, encode
from transport.identity import (
    FOLDER,
    Identity,
    check_issued,
    make_private_directory,
    refuse_existing,
    store,
    sync_directory,
    write_file,
)
from transport.payloads import decode_error, encode_error
from transport.tls import ALPN_JOIN, Context, Refusal, Refused, TlsChannel, client_context

log = logging.getLogger(__name__)

LIFETIME = timedelta(hours=24)
"""How long an invitation holds, unless said otherwise."""
TIMEOUT = 10.0
"""Seconds for the exchange, connecting included."""
_PREFIX = "rj1-"
_NEW_INVITATION = "make a new one with `replicator cluster invite NODE`"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What an operator carries to the new node.

    :ivar address: where the inviting node listens, ADDRESS:PORT
    :ivar fingerprint: SHA-256 of the CA's certificate, DER
    :ivar secret: 32 random bytes
    """

    node: str
    issuer: str
    address: str
    fingerprint: bytes
    secret: bytes
    expires: datetime

    def encode(self) -> str:
        """URL-safe text with a check sum against typing errors."""
        body = json.dumps(
            [self.node, self.issuer, self.address, int(self.expires.timestamp())], separators=(",", ":")
        ).encode()
        data = self.fingerprint + self.secret + body
        data += zlib.crc32(data).to_bytes(4, "big")
        return _PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """:raises IdentityError: no token, or a mistyped one"""
        refusal = IdentityError("this is not a whole join token", hint=f"copy all of it; or {_NEW_INVITATION}")
        text = text.strip()
        if not text.startswith(_PREFIX) or len(text) > 2000:
            raise refusal
        body = text.removeprefix(_PREFIX)
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            if len(data) < 70 or zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:]:
                raise refusal
            node, issuer, address, expires = json.loads(data[64:-4])
            moment = datetime.fromtimestamp(expires, UTC)
            return cls(names.check_node(node), names.check_node(issuer), str(address), data[:32], data[32:64], moment)
        except (ValueError, TypeError, OverflowError, OSError, binascii.Error, InvalidName):
            raise refusal from None

    @property
    def key(self) -> bytes:
        """What both sides prove to have; the inviting node stores this, not the secret."""
        return join_key(self.secret)


def join_key(secret: bytes) -> bytes:
    """The HMAC key of an invitation."""
    return hashlib.sha256(b"replicator join key\0" + secret).digest()


def _proof(key: bytes, who: str, *parts: bytes) -> str:
    """HMAC-SHA256 over the lengths and contents of ``parts``."""
    mac = hmac.new(key, b"replicator join 1 " + who.encode(), hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big") + part)
    return mac.hexdigest()


# -- the inviting node


def invite(identity: Identity, node: str, address: str, *, lifetime: timedelta = LIFETIME) -> JoinToken:
    """Open an invitation for ``node``; one that was open for it is replaced.

    :raises IdentityError: not on the node that has the CA, or for this node itself
    :raises InvalidName: a name that no node can have
    """
    names.check_node(node)
    if not identity.has_ca:
        raise IdentityError(
            f"node {identity.node} does not have the cluster's CA key", hint="invite on the node that made the cluster"
        )
    if node == identity.node:
        raise IdentityError(f"{node} is this node", hint="name the node that is to join")
    expires = datetime.now(UTC).replace(microsecond=0) + lifetime
    token = JoinToken(
        node, identity.node, address, certificates.fingerprint(identity.ca), secrets.token_bytes(32), expires
    )
    folder = identity.folder / "invitations"
    make_private_directory(folder)
    facts = {"node": node, "key": token.key.hex(), "expires": int(expires.timestamp())}
    write_file(folder / f"{node}.json", json.dumps(facts).encode())
    return token


def _open_invitation(identity: Identity, node: str) -> tuple[Path, bytes] | None:
    """File and key of the open invitation for a node; expired ones are removed."""
    path = identity.folder / "invitations" / f"{node}.json"
    try:
        facts = json.loads(path.read_bytes())
        key, expires = bytes.fromhex(facts["key"]), int(facts["expires"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if time.time() > expires:
        path.unlink(missing_ok=True)
        return None
    return path, key


def _has_invitations(identity: Identity) -> bool:
    return identity.has_ca and any((identity.folder / "invitations").glob("*.json"))


def serve_join(channel: TlsChannel, identity: Identity, deadline: float, address: str) -> None:
    """Answer a node that joins, all before ``deadline``.

    :raises Refused: no open invitation, or no proof of its secret
    :raises ProtocolError, ConnectionLost, DeadlineExceeded:
    """
    if not _has_invitations(identity):
        raise Refused(Refusal.JOIN, IdentityError(f"node {identity.node} has no open invitation", hint=_NEW_INVITATION))
    exchange = _Exchange(channel, deadline, frozenset({FrameType.JOIN}))
    exchange.send(FrameType.JOIN_OFFER, {"ca": certificates.to_pem(identity.ca).decode()})
    try:
        facts = exchange.receive_or_end(FrameType.JOIN)
        if facts is None:
            return  # the new node checks the CA on a connection of its own and comes again
        node = _admit(exchange, identity, facts)
    except Refused as refused:
        exchange.tell(refused.error)
        raise Refused(refused.reason, refused.error, told=True) from None
    except (ProtocolError, IdentityError) as error:
        exchange.tell(error)
        raise Refused(Refusal.PROTOCOL, error, told=True) from None
    log.info("node %s joined the cluster", node, extra={"peer": node, "address": address})
    exchange.wait_for_end()


def _admit(exchange: _Exchange, identity: Identity, facts: dict[str, Any]) -> str:
    """Check one JOIN, use up its invitation and answer it; the node that joined."""
    node, csr, proof = (_text(facts, name) for name in ("node", "csr", "proof"))
    refusal = Refused(
        Refusal.JOIN,
        IdentityError(
            "this invitation does not exist, has expired, was used, or is for another node", hint=_NEW_INVITATION
        ),
    )
    try:
        names.check_node(node)
    except InvalidName:
        raise refusal from None
    found = _open_invitation(identity, node)
    leaf = certificates.to_der(identity.certificate)
    key = found[1] if found else secrets.token_bytes(32)  # no difference in time between unknown and wrong
    expected = _proof(key, "client", node.encode(), csr.encode(), leaf)
    if not hmac.compare_digest(expected.encode(), proof.encode()) or found is None:
        raise refusal
    certificates.request_from_pem(csr.encode())
    try:
        found[0].unlink()  # of two at the same moment, one succeeds
    except FileNotFoundError:
        raise refusal from None
    sync_directory(found[0].parent)
    certificate = identity.sign(node, csr.encode())
    revoked = identity.revoked
    crl = revoked.pem if revoked is not None else b""
    answer = {
        "certificate": certificate.decode(),
        "crl": crl.decode(),
        "proof": _proof(key, "server", node.encode(), csr.encode(), certificate, crl),
    }
    exchange.send(FrameType.JOINED, answer)
    return node


# -- the new node


def join(
    state_dir: Path,
    token: JoinToken,
    dial: Callable[[], socket],
    *,
    clock: Callable[[], datetime] = certificates.utc_now,
) -> Identity:
    """Join with an invitation: make a key here, have it certified, store all.

    :param dial: opens a TCP connection to the inviting node
    :raises IdentityError: in a cluster already; expired, used or wrong invitation; or not the cluster that invited
    :raises PeerUnreachable, ConnectionLost, DeadlineExceeded, ProtocolError:
    """
    folder = state_dir / FOLDER
    refuse_existing(folder)
    if clock() > token.expires:
        raise IdentityError(f"the invitation expired at {token.expires:%Y-%m-%d %H:%M} UTC", hint=_NEW_INVITATION)
    ca = _fetch_ca(token, dial)
    key = certificates.new_key()
    csr = certificates.to_pem(certificates.make_request(key, token.node))
    # A second connection, which OpenSSL itself verifies against that CA and nothing else.
    context = client_context(None, certificates.to_pem(ca).decode(), alpn=ALPN_JOIN)
    with _Joining(token, dial, context) as exchange:
        exchange.receive(FrameType.JOIN_OFFER)
        leaf = exchange.channel.peer_certificate() or b""
        proof = _proof(token.key, "client", token.node.encode(), csr, leaf)
        exchange.send(FrameType.JOIN, {"node": token.node, "csr": csr.decode(), "proof": proof})
        facts = exchange.receive(FrameType.JOINED)
    certificate, crl, proof = (_text(facts, name) for name in ("certificate", "crl", "proof"))
    expected = _proof(token.key, "server", token.node.encode(), csr, certificate.encode(), crl.encode())
    if not hmac.compare_digest(expected.encode(), proof.encode()):
        raise IdentityError("the inviting node did not prove that it made this invitation", hint=_NEW_INVITATION)
    issued = certificates.certificate_from_pem(certificate.encode(), "the new certificate")
    key_pem = certificates.key_to_pem(key)
    check_issued(issued, ca, token.node, key_pem)
    store(folder, key_pem, certificate.encode(), certificates.to_pem(ca))
    identity = Identity(state_dir, clock=clock)
    if crl:
        identity.take_crl(crl.encode())
    return identity


def _fetch_ca(token: JoinToken, dial: Callable[[], socket]) -> x509.Certificate:
    """The cluster's CA, from a connection that is trusted for nothing but bytes with the right fingerprint."""
    with _Joining(token, dial, client_context(None, None, alpn=ALPN_JOIN)) as exchange:
        offered = _text(exchange.receive(FrameType.JOIN_OFFER), "ca")
    ca = certificates.certificate_from_pem(offered.encode(), "the CA's certificate that came")
    if not hmac.compare_digest(certificates.fingerprint(ca), token.fingerprint):
        raise IdentityError(
            f"the node at {token.address} is not of the cluster that made this token (its CA has another fingerprint)",
            hint="check the address, and who answers there; nothing secret was sent",
        )
    return ca


class _Exchange:
    """A few small frames over a channel, all before one deadline."""

    def __init__(self, channel: TlsChannel, deadline: float, accept: frozenset[FrameType]) -> None:
        self.channel = channel
        self._deadline = deadline
        self._decoder = FrameDecoder(accept | {FrameType.ERROR})
        self._sequence = 0

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("joining took too long", hint="check the network between the two nodes")
        return left

    def tell(self, error: ReplicatorError) -> None:
        """Tell the other side why it is refused, and let it read that."""
        with suppress(ReplicatorError):
            self._send(FrameType.ERROR, encode_error(error))
            self.wait_for_end()

    def send(self, kind: FrameType, facts: dict[str, str]) -> None:
        """Send one JSON frame."""
        self._send(kind, json.dumps(facts).encode())

    def _send(self, kind: FrameType, payload: bytes) -> None:
        frame = encode(kind, payload, sequence=self._sequence)
        self._sequence += 1
        self.channel.send((frame,), self._left())

    def receive_or_end(self, kind: FrameType) -> dict[str, Any] | None:
        """The next frame's facts, None at the end of the connection."""
        while True:
            count = self.channel.recv_into(self._decoder.wanted(), self._left())
            if not count:
                return None
            frame = self._decoder.advance(count)
            if frame is None:
                continue
            if frame.type is FrameType.ERROR:
                raise decode_error(frame.payload, "that invites")
            if frame.type is not kind:
                raise ProtocolError(f"a {frame.type.name} frame came while joining", hint=SUSPICIOUS)
            return _facts(frame.payload)

    def receive(self, kind: FrameType) -> dict[str, Any]:
        """The next frame's facts."""
        facts = self.receive_or_end(kind)
        if facts is None:
            raise ConnectionLost("the other node closed the connection while joining", hint="see its log")
        return facts

    def wait_for_end(self) -> None:
        """Until the other side closes, so that it has read what was sent."""
        self.receive_or_end(FrameType.JOIN)


class _Joining:
    """The new node's side of a connection to the inviting one."""

    def __init__(self, token: JoinToken, dial: Callable[[], socket], context: Context) -> None:
        self._deadline = time.monotonic() + TIMEOUT
        self._channel = TlsChannel(dial(), context, server_side=False, server_name=token.issuer)

    def __enter__(self) -> _Exchange:
        try:
            self._channel.handshake(self._deadline)
        except Refused as refused:
            self._channel.close()
            raise refused.error from None
        except BaseException:
            self._channel.close()
            raise
        accept = frozenset({FrameType.JOIN_OFFER, FrameType.JOINED})
        return _Exchange(self._channel, self._deadline, accept)

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _facts(payload: Buffer) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(payload))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ProtocolError("a message of a node that joins cannot be read", hint=SUSPICIOUS)
    return facts


def _text(facts: dict[str, Any], name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"a message of a node that joins has no {name}", hint=SUSPICIOUS)
    return value
