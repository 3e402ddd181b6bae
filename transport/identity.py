"""Who this node is, and whom it believes: keys, certificates and the revocation list in its state directory.

::

    STATE_DIR/identity/          0700
        node.pem                       this node's key and its certificate; one file, so that they change together
        ca.pem                         the CA's certificate
        crl.pem                        the newest revocation list seen; signed by the CA, numbered
        ca.key                         only on the node that created the cluster
        issued/SERIAL.json             there as well: every certificate made, and when it was revoked
        invitations/NODE.json          there as well: open invitations

Files are written whole, with fsync, under a temporary name, and renamed; those with keys or secrets are 0600. Keys
never leave the node that made them.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from replicator import names
from replicator.errors import IdentityError
from transport import certificates
from transport.certificates import Revoked, Validity
from transport.tls import Context, client_context, server_context

RENEW_BEFORE = timedelta(days=60)
"""A certificate is renewed when it ends within this time."""
FOLDER = "identity"
_JOIN = "run `replicator cluster create` on the first node, or `replicator cluster join TOKEN` with an invitation of it"


@dataclass(frozen=True, slots=True)
class IssuedNode:
    """A certificate that this CA made."""

    node: str
    serial: int
    issued: datetime
    expires: datetime
    revoked: datetime | None = None


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file whole and durably: a reader, or a power cut, sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_directory(path: Path) -> None:
    """Make a directory that only its owner can enter."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


class Identity:
    """This node's place in its cluster, loaded from the state directory.

    Thread-safe. :meth:`reload` takes what another process (or a renewal) has written; connections opened afterwards
    use it.
    """

    def __init__(self, state_dir: Path, *, clock: Callable[[], datetime] = certificates.utc_now) -> None:
        """
        :raises IdentityError: not joined yet, or what is stored does not fit together
        """
        self.folder = state_dir / FOLDER
        self._clock = clock
        self._lock = threading.RLock()
        self.reload()

    # -- what is stored

    def reload(self) -> None:
        """Read the files anew. :raises IdentityError:"""
        with self._lock:
            ca = certificates.certificate_from_pem(self._read("ca.pem"), f"{self.folder}/ca.pem")
            own = self._read("node.pem")
            certificate = certificates.certificate_from_pem(own, f"{self.folder}/node.pem")
            key = certificates.key_from_pem(own, f"{self.folder}/node.pem")
            if key.public_key() != certificate.public_key() or not certificates.is_issued_by(certificate, ca):
                raise IdentityError(
                    f"key, certificate and CA in {self.folder} do not belong together",
                    hint="restore them from a backup, or join anew with a new invitation",
                )
            crl_path = self.folder / "crl.pem"
            self._revoked = certificates.read_crl(crl_path.read_bytes(), ca) if crl_path.exists() else None
            self.ca, self.certificate = ca, certificate
            self.node = certificates.node_of(certificate)
            file, ca_text = str(self.folder / "node.pem"), certificates.to_pem(ca).decode()
            self._server = server_context(file, ca_text)
            self._client = client_context(file, ca_text)

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise IdentityError(
                f"this node is in no cluster: {self.folder / name} does not exist", hint=_JOIN
            ) from None
        except OSError as error:
            raise IdentityError(
                f"{self.folder / name} cannot be read: {error.strerror}", hint="run as the user that owns it"
            ) from None

    def server_context(self) -> Context:
        """For accepting connections."""
        return self._server

    def client_context(self) -> Context:
        """For opening connections."""
        return self._client

    @property
    def has_ca(self) -> bool:
        """Whether this node created the cluster: it invites, renews and revokes."""
        return (self.folder / "ca.key").exists()

    @property
    def expires(self) -> datetime:
        """When this node's certificate ends."""
        return self.certificate.not_valid_after_utc

    def needs_renewal(self) -> bool:
        """Whether this node's certificate ends soon."""
        return self._clock() >= self.expires - RENEW_BEFORE

    # -- renewal

    def renewal_request(self) -> tuple[bytes, bytes]:
        """A fresh key and a signing request with it, both PEM; the key is stored only by :meth:`install`."""
        key = certificates.new_key()
        return certificates.key_to_pem(key), certificates.to_pem(certificates.make_request(key, self.node))

    def install(self, key_pem: bytes, certificate_pem: bytes) -> None:
        """Take a new key and certificate into use.

        :raises IdentityError: not of this CA, another node's, or not for this key; what is stored stays
        """
        certificate = certificates.certificate_from_pem(certificate_pem, "the new certificate")
        check_issued(certificate, self.ca, self.node, key_pem)
        with self._lock:
            write_file(self.folder / "node.pem", key_pem + certificate_pem)
            self.reload()

    # -- revocation

    @property
    def revoked(self) -> Revoked | None:
        """The newest revocation list known here."""
        return self._revoked

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Whether the newest list known here names the certificate."""
        revoked = self._revoked
        return revoked is not None and certificate.serial_number in revoked.serials

    def take_crl(self, pem: bytes) -> bool:
        """Store a revocation list if it is newer than ours; whether it was.

        :raises IdentityError: not signed by this CA
        """
        found = certificates.read_crl(pem, self.ca)
        with self._lock:
            if self._revoked is not None and found.number <= self._revoked.number:
                return False
            write_file(self.folder / "crl.pem", pem, mode=0o644)
            self._revoked = found
            return True

    # -- the CA

    @contextmanager
    def _ca_locked(self) -> Iterator[None]:
        """One process at a time changes what the CA stores (the daemon and the command line both may)."""
        if not self.has_ca:
            raise IdentityError(
                f"node {self.node} does not have the cluster's CA key",
                hint="run this on the node that made the cluster",
            )
        with self._lock, (self.folder / "ca.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def sign(self, node: str, request_pem: bytes) -> bytes:
        """Issue a certificate for ``node`` with the key of a signing request; PEM.

        :raises IdentityError: not the CA node, or a bad request
        """
        request = certificates.request_from_pem(request_pem)
        with self._ca_locked():
            ca_key = certificates.key_from_pem(self._read("ca.key"), f"{self.folder}/ca.key")
            validity = Validity.of(self._clock(), certificates.NODE_LIFETIME)
            certificate = certificates.issue(self.ca, ca_key, node, certificates.request_key(request), validity)
            self._record(IssuedNode(node, certificate.serial_number, self._clock(), certificate.not_valid_after_utc))
        return certificates.to_pem(certificate)

    def _record(self, issued: IssuedNode) -> None:
        folder = self.folder / "issued"
        make_private_directory(folder)
        facts = {
            "node": issued.node,
            "serial": f"{issued.serial:x}",
            "issued": issued.issued.isoformat(),
            "expires": issued.expires.isoformat(),
            "revoked": issued.revoked.isoformat() if issued.revoked else None,
        }
        write_file(folder / f"{issued.serial:x}.json", json.dumps(facts).encode())

    def nodes(self) -> tuple[IssuedNode, ...]:
        """Every certificate that this CA made, oldest first. :raises IdentityError: not the CA node"""
        with self._ca_locked():
            return self._issued()

    def _issued(self) -> tuple[IssuedNode, ...]:
        found = []
        for path in (self.folder / "issued").glob("*.json"):
            try:
                facts = json.loads(path.read_bytes())
                moments = [datetime.fromisoformat(facts[k]).astimezone(UTC) for k in ("issued", "expires")]
                revoked = datetime.fromisoformat(facts["revoked"]).astimezone(UTC) if facts["revoked"] else None
                found.append(IssuedNode(facts["node"], int(facts["serial"], 16), moments[0], moments[1], revoked))
            except (ValueError, KeyError, TypeError) as error:
                raise IdentityError(f"{path} cannot be read: {error}", hint="restore it from a backup") from None
        return tuple(sorted(found, key=lambda n: (n.issued, n.node, n.serial)))

    def revoke(self, node: str) -> tuple[IssuedNode, ...]:
        """Revoke every certificate of ``node``; what was revoked. The list is signed and stored before this returns.

        :raises IdentityError: not the CA node, this node itself, or no such node
        """
        names.check_node(node)
        with self._ca_locked():
            issued = self._issued()
            mine = [n for n in issued if n.node == node and n.revoked is None]
            if node == self.node:
                raise IdentityError(
                    f"{node} is this node, which has the CA", hint="make a new cluster if the CA is no longer safe"
                )
            if not any(n.node == node for n in issued):
                known = ", ".join(sorted({n.node for n in issued}))
                raise IdentityError(f"no certificate was made for a node {node!r}", hint=f"known nodes: {known}")
            now = self._clock()
            done = tuple(IssuedNode(n.node, n.serial, n.issued, n.expires, now) for n in mine)
            revoked = {n.serial: n.revoked for n in (*issued, *done) if n.revoked is not None}
            self._publish(revoked, now)  # the list first: a cut after it leaves the node revoked, not half revoked
            for entry in done:
                self._record(entry)
        return done

    def refresh_crl(self) -> None:
        """Sign the revocation list anew, so that it does not become stale. :raises IdentityError: not the CA node"""
        with self._ca_locked():
            self._publish({n.serial: n.revoked for n in self._issued() if n.revoked is not None}, self._clock())

    def _publish(self, revoked: dict[int, datetime], now: datetime) -> None:
        ca_key = certificates.key_from_pem(self._read("ca.key"), f"{self.folder}/ca.key")
        path = self.folder / "crl.pem"
        current = certificates.read_crl(path.read_bytes(), self.ca) if path.exists() else None
        number = current.number + 1 if current else 1
        pem = certificates.to_pem(certificates.make_crl(self.ca, ca_key, number, revoked, now))
        write_file(path, pem, mode=0o644)
        self._revoked = certificates.read_crl(pem, self.ca)


def check_issued(certificate: x509.Certificate, ca: x509.Certificate, node: str, key_pem: bytes) -> None:
    """Whether a certificate that came over the network is this node's, of this CA and for this key.

    :raises IdentityError:
    """
    key = certificates.key_from_pem(key_pem, "the new key")
    if (
        not certificates.is_issued_by(certificate, ca)
        or certificates.node_of(certificate) != node
        or certificate.public_key() != key.public_key()
    ):
        raise IdentityError(
            f"the certificate that came is not one of this cluster for node {node} and its key", hint="try again"
        )


def create_cluster(state_dir: Path, node: str, *, clock: Callable[[], datetime] = certificates.utc_now) -> Identity:
    """Make a cluster: its CA, and this node's certificate.

    :raises IdentityError: this node is in a cluster already
    """
    names.check_node(node)
    folder = state_dir / FOLDER
    refuse_existing(folder)
    make_private_directory(folder)
    now = clock()
    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.make_ca(ca_key, Validity.of(now, certificates.CA_LIFETIME))
    certificate = certificates.issue(ca, ca_key, node, key.public_key(), Validity.of(now, certificates.NODE_LIFETIME))
    write_file(folder / "ca.key", certificates.key_to_pem(ca_key))
    store(folder, certificates.key_to_pem(key), certificates.to_pem(certificate), certificates.to_pem(ca))
    identity = Identity(state_dir, clock=clock)
    identity._record(IssuedNode(node, certificate.serial_number, now, certificate.not_valid_after_utc))
    identity.refresh_crl()
    return identity


def refuse_existing(folder: Path) -> None:
    """:raises IdentityError: there is a certificate already"""
    if (folder / "node.pem").exists() or (folder / "ca.key").exists():
        raise IdentityError(
            f"this node is in a cluster already ({folder})",
            hint="to leave that cluster, move the directory away; replicas and snapshots are not touched by that",
        )


def store(folder: Path, key_pem: bytes, certificate_pem: bytes, ca_pem: bytes) -> None:
    """Store a node's first key and certificates; ``node.pem`` last, which says that all is there."""
    make_private_directory(folder)
    write_file(folder / "ca.pem", ca_pem, mode=0o644)
    write_file(folder / "node.pem", key_pem + certificate_pem)
