"""Cluster, certificates, renewal and revocation, without a network."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from replicator.errors import IdentityError, InvalidName
from tests.support.transport import add_node, make_cluster
from transport import certificates
from transport.certificates import Validity
from transport.identity import RENEW_BEFORE, Identity, create_cluster
from transport.joining import JoinToken, invite

NOW = datetime(2026, 11, 20, tzinfo=UTC)


def test_a_new_cluster_has_a_ca_and_this_node(tmp_path: Path) -> None:
    identity = create_cluster(tmp_path, "one", clock=lambda: NOW)
    assert identity.has_ca
    assert certificates.node_of(identity.certificate) == "one"
    assert identity.ca.not_valid_after_utc == NOW + certificates.CA_LIFETIME
    assert identity.expires == NOW + certificates.NODE_LIFETIME
    extensions = identity.certificate.extensions
    usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert [n.node for n in identity.nodes()] == ["one"]
    assert identity.revoked is not None
    assert identity.revoked.number == 1


def test_secrets_are_private_files_in_a_private_directory(tmp_path: Path) -> None:
    identity = create_cluster(tmp_path, "one")
    invite(identity, "two", "10.99.0.1:8571")
    assert stat.S_IMODE(identity.folder.stat().st_mode) == 0o700
    for name in ("node.pem", "ca.key", "invitations/two.json"):
        assert stat.S_IMODE((identity.folder / name).stat().st_mode) == 0o600, name
    assert not list(identity.folder.rglob("*.new"))


def test_a_node_is_in_one_cluster_only(tmp_path: Path) -> None:
    create_cluster(tmp_path, "one")
    with pytest.raises(IdentityError, match="in a cluster already"):
        create_cluster(tmp_path, "one")


def test_without_a_cluster_the_hint_says_how(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="in no cluster") as raised:
        Identity(tmp_path)
    assert "cluster join" in raised.value.hint


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = create_cluster(tmp_path / "a", "one")
    other = create_cluster(tmp_path / "b", "one")
    (one.folder / "ca.pem").write_bytes((other.folder / "ca.pem").read_bytes())
    with pytest.raises(IdentityError, match="do not belong together"):
        one.reload()


def test_renewal(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    later = cluster.two.expires - RENEW_BEFORE + timedelta(seconds=1)
    assert not cluster.two.needs_renewal()
    assert Identity(tmp_path / "two", clock=lambda: later).needs_renewal()
    key, csr = cluster.two.renewal_request()
    before = cluster.two.certificate.serial_number
    cluster.two.install(key, cluster.one.sign("two", csr))
    assert cluster.two.certificate.serial_number != before
    assert Identity(tmp_path / "two").certificate == cluster.two.certificate


def test_install_refuses_what_is_not_ours_and_keeps_what_was(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path / "c")
    stranger = create_cluster(tmp_path / "s", "two")
    key, csr = cluster.two.renewal_request()
    other_key, _ = cluster.two.renewal_request()
    before = cluster.two.certificate
    for bad_key, bad in (
        (key, stranger.sign("two", csr)),
        (key, cluster.one.sign("three", csr)),
        (other_key, cluster.one.sign("two", csr)),
    ):
        with pytest.raises(IdentityError, match="not one of this cluster"):
            cluster.two.install(bad_key, bad)
    assert Identity(tmp_path / "c" / "two").certificate == before


def test_a_signing_request_gives_the_key_and_nothing_else(tmp_path: Path) -> None:
    one = create_cluster(tmp_path, "one")
    key = certificates.new_key()
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(certificates._name("one"))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("one"), x509.DNSName("*")]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        .sign(key, hashes.SHA256())
    )
    issued = x509.load_pem_x509_certificate(one.sign("two", certificates.to_pem(request)))
    assert certificates.node_of(issued) == "two"
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(IdentityError, match="signing request"):
        one.sign("two", b"nonsense")


def test_revocation_list_is_signed_numbered_and_never_goes_back(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    first = cluster.one.revoked
    (gone,) = cluster.one.revoke("two")
    assert gone.serial == cluster.two.certificate.serial_number
    assert cluster.one.is_revoked(cluster.two.certificate)
    second = cluster.one.revoked
    assert first is not None
    assert second is not None
    assert second.number == first.number + 1
    assert cluster.two.take_crl(second.pem)
    assert not cluster.two.take_crl(first.pem)
    assert cluster.two.is_revoked(cluster.two.certificate)
    assert Identity(tmp_path / "two").is_revoked(cluster.two.certificate)
    assert [(n.node, n.revoked is not None) for n in cluster.one.nodes()] == [("one", False), ("two", True)]


def test_a_foreign_revocation_list_is_refused(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path / "c")
    stranger = create_cluster(tmp_path / "s", "one")
    stranger.refresh_crl()
    assert stranger.revoked is not None
    with pytest.raises(IdentityError, match="not signed by this cluster"):
        cluster.two.take_crl(stranger.revoked.pem)
    with pytest.raises(IdentityError, match="cannot be read"):
        cluster.two.take_crl(b"nonsense")
    assert cluster.two.revoked is None


def test_a_stale_list_says_so(tmp_path: Path) -> None:
    identity = create_cluster(tmp_path, "one", clock=lambda: NOW)
    assert identity.revoked is not None
    assert not identity.revoked.is_stale(NOW)
    assert identity.revoked.is_stale(NOW + certificates.CRL_LIFETIME + timedelta(seconds=1))


def test_only_the_ca_node_signs_invites_and_revokes(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    for call in (
        lambda: cluster.two.revoke("one"),
        cluster.two.nodes,
        lambda: invite(cluster.two, "three", "10.99.0.2:8571"),
        lambda: cluster.two.sign("three", cluster.two.renewal_request()[1]),
    ):
        with pytest.raises(IdentityError, match="does not have the cluster's CA key"):
            call()


def test_revoke_names_what_cannot_be_meant(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    with pytest.raises(IdentityError, match="is this node"):
        cluster.one.revoke("one")
    with pytest.raises(IdentityError, match="no certificate was made") as raised:
        cluster.one.revoke("three")
    assert "one, two" in raised.value.hint
    with pytest.raises(InvalidName):
        cluster.one.revoke("../x")


def test_a_node_that_joins_again_after_revocation_is_not_revoked(tmp_path: Path) -> None:
    cluster = make_cluster(tmp_path)
    cluster.one.revoke("two")
    again = add_node(cluster.one, tmp_path / "again", "two")
    assert not cluster.one.is_revoked(again.certificate)
    assert cluster.one.is_revoked(cluster.two.certificate)


@pytest.mark.parametrize(
    "names", [[], [x509.DNSName("two"), x509.DNSName("one")], [x509.DNSName("*.lan")], [x509.RFC822Name("two@one")]]
)
def test_identity_is_exactly_one_dns_name(tmp_path: Path, names: list[x509.GeneralName]) -> None:
    one = create_cluster(tmp_path, "one")
    ca_key = certificates.key_from_pem((one.folder / "ca.key").read_bytes(), "ca.key")
    validity = Validity.of(certificates.utc_now(), timedelta(days=1))
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificates._name("two"))  # a common name means nothing
        .issuer_name(one.ca.subject)
        .public_key(certificates.new_key().public_key())
        .serial_number(5)
        .not_valid_before(validity.begins)
        .not_valid_after(validity.ends)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    with pytest.raises(IdentityError):
        certificates.node_of(builder.sign(ca_key, hashes.SHA256()))


def test_tokens_survive_copying_and_notice_mistakes(tmp_path: Path) -> None:
    token = invite(create_cluster(tmp_path, "one"), "two", "10.99.0.1:8571")
    text = token.encode()
    assert JoinToken.decode(f"  {text}\n") == token
    assert all(c.isalnum() or c in "-_" for c in text)
    for wrong in (text[:-1], text.replace(text[20], "A" if text[20] != "A" else "B"), "", "rj1-", "rj1-!!", "x" * 5000):
        with pytest.raises(IdentityError, match="not a whole join token"):
            JoinToken.decode(wrong)
