"""X.509 as this cluster uses it: made and read here, nowhere else.

Keys are EC P-256, signatures ECDSA with SHA-256. A node's identity is the one DNS name in its certificate's subject
alternative name, spelled exactly as the node's name; subject and common name mean nothing (RFC 9525, 2). Certificates
and the revocation list follow RFC 5280 strictly enough for OpenSSL's X509_V_FLAG_X509_STRICT.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replicator import names
from replicator.errors import IdentityError, InvalidName

NODE_LIFETIME = timedelta(days=365)
CA_LIFETIME = timedelta(days=3650)
CRL_LIFETIME = timedelta(days=30)
"""How long a revocation list is called fresh; an older one still counts, with a warning."""
BACKDATING = timedelta(minutes=10)
"""Certificates begin this long before they are made: clocks of nodes differ."""

PrivateKey = ec.EllipticCurvePrivateKey
_USAGES = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when a certificate holds."""

    begins: datetime
    ends: datetime

    @classmethod
    def of(cls, now: datetime, lifetime: timedelta) -> Validity:
        """From a little before ``now``, for ``lifetime``."""
        return cls(now - BACKDATING, now + lifetime)


def new_key() -> PrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(data: bytes, what: str) -> PrivateKey:
    """:raises IdentityError: no P-256 key"""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"{what} cannot be read: {error}", hint="restore it from a backup, or join anew") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{what} is not an EC key", hint="restore it from a backup, or join anew")
    return key


def to_pem(item: x509.Certificate | x509.CertificateSigningRequest | x509.CertificateRevocationList) -> bytes:
    """PEM text."""
    return item.public_bytes(serialization.Encoding.PEM)


def to_der(certificate: x509.Certificate) -> bytes:
    """DER bytes."""
    return certificate.public_bytes(serialization.Encoding.DER)


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the DER, 32 bytes."""
    return hashlib.sha256(to_der(certificate)).digest()


def certificate_from_pem(data: bytes, what: str) -> x509.Certificate:
    """:raises IdentityError: no certificate"""
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise IdentityError(f"{what} cannot be read: {error}", hint="restore it from a backup, or join anew") from None


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def make_ca(key: PrivateKey, validity: Validity) -> x509.Certificate:
    """The cluster's own certificate authority, self-signed; it signs nodes and nothing below them."""
    serial = x509.random_serial_number()
    name = _name(f"replicator cluster {serial:x}"[:64])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(validity.begins)
        .not_valid_after(validity.ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )


def make_request(key: PrivateKey, node: str) -> x509.CertificateSigningRequest:
    """A signing request of ``node``; of its contents only the key is ever used."""
    return x509.CertificateSigningRequestBuilder().subject_name(_name(node)).sign(key, hashes.SHA256())


def request_from_pem(data: bytes) -> x509.CertificateSigningRequest:
    """A signing request with a good signature and a P-256 key.

    :raises IdentityError: anything else
    """
    hint = "both nodes must run the same version of replicator"
    try:
        request = x509.load_pem_x509_csr(data)
        key = request.public_key()
        valid = request.is_signature_valid
    except Exception as error:  # noqa: BLE001 - cryptography raises many kinds on hostile input
        raise IdentityError(f"a signing request cannot be read: {error}", hint=hint) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or not valid:
        raise IdentityError("a signing request is not signed by a P-256 key of its own", hint=hint)
    return request


def issue(
    ca: x509.Certificate, ca_key: PrivateKey, node: str, public_key: ec.EllipticCurvePublicKey, validity: Validity
) -> x509.Certificate:
    """A node's certificate: the name and the key are given by the caller, nothing is copied from a request."""
    names.check_node(node)
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(_name(node))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.begins)
        .not_valid_after(min(validity.ends, ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USAGES), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def request_key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """The P-256 key that :func:`request_from_pem` has checked."""
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - for the type checker
    return key


def node_of(certificate: x509.Certificate) -> str:
    """The node that a certificate names: its only subject alternative name.

    :raises IdentityError: none, several, of another kind, or not a node's name
    """
    hint = "certificates are made by `replicator cluster create` and `cluster join` only"
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = list(san)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise IdentityError("a certificate has no subject alternative name", hint=hint) from None
    if len(found) != 1 or not isinstance(found[0], x509.DNSName):
        raise IdentityError(f"a certificate has {len(found)} names where it must have one DNS name", hint=hint)
    try:
        return names.check_node(found[0].value)
    except InvalidName as error:
        raise IdentityError(f"a certificate names no node: {error}", hint=hint) from None


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether ``ca``'s key signed the certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation list says.

    :ivar number: grows with each list
    :ivar serials: of the revoked certificates
    :ivar fresh_until: when the next list was due
    """

    number: int
    serials: frozenset[int]
    fresh_until: datetime
    pem: bytes

    def is_stale(self, now: datetime) -> bool:
        """Whether a newer list was due; this one still counts."""
        return now > self.fresh_until


def make_crl(
    ca: x509.Certificate, ca_key: PrivateKey, number: int, revoked: dict[int, datetime], now: datetime
) -> x509.CertificateRevocationList:
    """A list of revoked serials (with the time of each), signed by the CA."""
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(now + CRL_LIFETIME)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    for serial, moment in sorted(revoked.items()):
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
        )
    return builder.sign(ca_key, hashes.SHA256())


def read_crl(data: bytes, ca: x509.Certificate) -> Revoked:
    """A revocation list, once its signature is checked.

    :raises IdentityError: not a list, or not signed by ``ca``
    """
    hint = "fetch it anew from the node that has the CA"
    try:
        crl = x509.load_pem_x509_crl(data)
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = frozenset(entry.serial_number for entry in crl)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError(f"the revocation list cannot be read: {error}", hint=hint) from None
    key = ca.public_key()
    if (
        crl.issuer != ca.subject
        or not isinstance(key, ec.EllipticCurvePublicKey)
        or not crl.is_signature_valid(key)
        or crl.next_update_utc is None
    ):
        raise IdentityError("the revocation list is not signed by this cluster's CA", hint=hint)
    return Revoked(number, serials, crl.next_update_utc, data)


def utc_now() -> datetime:
    """Now, to the second, as certificates count."""
    return datetime.now(UTC).replace(microsecond=0)
