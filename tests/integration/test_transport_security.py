"""Who gets in and who does not, with real sockets and certificates."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    DigestRequest,
    ManifestRequest,
    PruneRequest,
    ReceiveRequest,
    RoleChange,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
)
from replicator.errors import (
    ConnectionLost,
    IdentityError,
    NotAuthenticated,
    NotAuthorized,
    ReplicatorError,
    TransportError,
)
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, StreamKind, Version, VersionRef, VolumeId
from replicator.streams import ChunkStream
from tests.support.cases import MemoryCase
from tests.support.transport import HOST, SHORT, Cluster, Peers, add_node, make_cluster, pool_to, serving
from transport import certificates
from transport.authorization import PeerRights
from transport.certificates import Validity
from transport.connection import FROM_SERVER, Connection
from transport.frames import FrameDecoder, FrameType, encode
from transport.identity import FOLDER, Identity, create_cluster, store
from transport.joining import JoinToken, invite, join
from transport.payloads import Hello
from transport.remote import RemoteEndpoint
from transport.server import Caps, Server
from transport.tls import ALPN_JOIN, Context, Refusal, TlsChannel, client_context, server_context

QUICK = replace(SHORT, handshake=0.6)
KEY = "0" * 64


class World:
    """Node ``one`` serves storages ``store`` and ``other`` to whom the test lists."""

    def __init__(self, folder: Path) -> None:
        self.cluster: Cluster = make_cluster(folder / "cluster")
        self.store, self.other = MemoryCase("store"), MemoryCase("other")
        self.store.create("vm", b"x" * 100_000)
        self.store.create("two/vm", b"x" * 100_000)
        self.store.create("three/vm", b"x" * 100_000)
        self.other.create("vm", b"x" * 100_000)
        endpoint = LocalEndpoint("one", {"store": self.store.backend, "other": self.other.backend})
        self.peers = Peers(endpoint, {"two": PeerRights(frozenset({"store"}), frozenset())})

    @contextmanager
    def remote(self, server: Server, identity: Identity | None = None) -> Iterator[RemoteEndpoint]:
        remote = RemoteEndpoint("one", pool_to(server, identity or self.cluster.two, "one"))
        try:
            yield remote
        finally:
            remote.close()

    def certified(
        self, folder: Path, node: str, *, days: int = 365, san: list[x509.GeneralName] | None = None
    ) -> Identity:
        """A node with a certificate of this CA, made as the test wants it."""
        identity = add_node(self.cluster.one, folder, node)
        ca_key = certificates.key_from_pem((self.cluster.one.folder / "ca.key").read_bytes(), "ca.key")
        key = certificates.new_key()
        now = certificates.utc_now()
        validity = Validity(now - timedelta(days=400), now + timedelta(days=days))
        if san is None:
            made = certificates.issue(self.cluster.one.ca, ca_key, node, key.public_key(), validity)
        else:
            plain = certificates.issue(self.cluster.one.ca, ca_key, node, key.public_key(), validity)
            builder = x509.CertificateBuilder(
                plain.issuer, plain.subject, plain.public_key(), 77, validity.begins, validity.ends
            )
            for extension in plain.extensions:
                value = extension.value
                if isinstance(value, x509.SubjectAlternativeName):
                    if not san:
                        continue
                    value = x509.SubjectAlternativeName(san)
                builder = builder.add_extension(value, critical=extension.critical)
            made = builder.sign(ca_key, hashes.SHA256())
        store(
            folder / FOLDER, certificates.key_to_pem(key), certificates.to_pem(made), certificates.to_pem(identity.ca)
        )
        ca_text = certificates.to_pem(identity.ca).decode()
        identity._client = client_context(str(folder / FOLDER / "node.pem"), ca_text)
        return identity


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def dial(server: Server) -> socket.socket:
    return socket.create_connection((str(HOST), server.address[1]), timeout=10)


def tls(server: Server, context: Context) -> TlsChannel:
    channel = TlsChannel(dial(server), context, server_side=False, server_name="one")
    channel.handshake(time.monotonic() + 10)
    return channel


def read_error(channel: TlsChannel) -> dict[str, str]:
    """The ERROR frame that a refused peer gets, after any HELLO."""
    decoder = FrameDecoder()
    while True:
        count = channel.recv_into(decoder.wanted(), 10)
        assert count, "closed without a word"
        frame = decoder.advance(count)
        if frame is not None and frame.type is FrameType.ERROR:
            found: dict[str, str] = json.loads(bytes(frame.payload))
            return found


def wait_closed(sock: socket.socket, timeout: float = 10) -> None:
    sock.settimeout(timeout)
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass


# -- certificates


def test_a_listed_peer_gets_in(world: World) -> None:
    with serving(world.cluster.one, world.peers) as server, world.remote(server) as remote:
        assert [s.name for s in remote.storages()] == ["store"]
        assert server.connections() == {"two": 1}
    assert world.peers.refusals == []


def test_no_certificate(world: World) -> None:
    context = client_context(None, certificates.to_pem(world.cluster.one.ca).decode())
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, context)
        assert read_error(channel)["code"] == "not_authenticated"
        channel.close()
        world.peers.wait_for(Refusal.NO_CERTIFICATE)


def test_a_certificate_of_another_cluster(world: World, tmp_path: Path) -> None:
    stranger = create_cluster(tmp_path / "stranger", "two")
    context = client_context(str(stranger.folder / "node.pem"), certificates.to_pem(world.cluster.one.ca).decode())
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, context)  # in TLS 1.3 the client's certificate is judged after its handshake
        with pytest.raises((NotAuthenticated, ConnectionLost)):
            read_error(channel)
        channel.close()
        world.peers.wait_for(Refusal.WRONG_CA)


def test_a_server_of_another_cluster(world: World, tmp_path: Path) -> None:
    stranger = create_cluster(tmp_path / "stranger", "one")
    with (
        serving(stranger, Peers(None)) as server,
        world.remote(server) as remote,
        pytest.raises(NotAuthenticated, match="not accepted"),
    ):
        remote.storages()


def test_an_expired_certificate(world: World, tmp_path: Path) -> None:
    expired = world.certified(tmp_path / "expired", "two", days=-1)
    with serving(world.cluster.one, world.peers) as server, world.remote(server, expired) as remote:
        with pytest.raises(TransportError):
            remote.storages()
        world.peers.wait_for(Refusal.EXPIRED)


def test_a_revoked_certificate_and_its_live_connections(world: World) -> None:
    with serving(world.cluster.one, world.peers) as server, world.remote(server) as remote:
        remote.storages()
        world.cluster.one.revoke("two")
        assert server.disconnect_revoked() >= 1
        with pytest.raises(NotAuthenticated, match="was revoked"):
            remote.storages()
        world.peers.wait_for(Refusal.REVOKED, 2)
        assert server.connections() == {}


def test_a_client_refuses_a_revoked_server(world: World, tmp_path: Path) -> None:
    three = add_node(world.cluster.one, tmp_path / "three", "three")
    world.cluster.one.revoke("three")
    revoked = world.cluster.one.revoked
    assert revoked is not None
    world.cluster.two.take_crl(revoked.pem)
    with serving(three, world.peers) as server:
        remote = RemoteEndpoint("three", pool_to(server, world.cluster.two, "three"))
        with pytest.raises(NotAuthenticated, match="was revoked"):
            remote.storages()


def test_a_valid_but_unlisted_peer(world: World, tmp_path: Path) -> None:
    three = add_node(world.cluster.one, tmp_path / "three", "three")
    with serving(world.cluster.one, world.peers) as server, world.remote(server, three) as remote:
        with pytest.raises(NotAuthorized, match="three is not a listed peer") as raised:
            remote.storages()
        assert "[peer.three]" in raised.value.hint
        world.peers.wait_for(Refusal.UNLISTED)
        assert world.peers.refusals[-1][1] == "three"


def test_a_peer_taken_off_the_list_loses_its_rights_at_once(world: World) -> None:
    with serving(world.cluster.one, world.peers) as server, world.remote(server) as remote:
        remote.volumes("store")
        del world.peers.listed["two"]
        with pytest.raises(NotAuthorized):
            remote.volumes("store")


def test_the_common_name_means_nothing(world: World, tmp_path: Path) -> None:
    spoof = world.certified(tmp_path / "spoof", "two", san=[x509.DNSName("three")])
    assert spoof.node == "two"
    with serving(world.cluster.one, world.peers) as server, world.remote(server, spoof) as remote:
        with pytest.raises(NotAuthorized, match="three is not a listed peer"):
            remote.storages()
        world.peers.wait_for(Refusal.UNLISTED)


@pytest.mark.parametrize("san", [[], [x509.DNSName("two"), x509.DNSName("three")], [x509.DNSName("*")]])
def test_names_that_are_not_exactly_one_node(world: World, tmp_path: Path, san: list[x509.GeneralName]) -> None:
    odd = world.certified(tmp_path / "odd", "two", san=san)
    with serving(world.cluster.one, world.peers) as server, world.remote(server, odd) as remote:
        with pytest.raises(TransportError):
            remote.storages()
        world.peers.wait_for(Refusal.WRONG_NAME)


def test_another_node_at_the_address(world: World) -> None:
    with serving(world.cluster.one, world.peers) as server:
        remote = RemoteEndpoint("three", pool_to(server, world.cluster.two, "three"))
        with pytest.raises(NotAuthenticated):
            remote.storages()


def test_a_wildcard_certificate_is_nobody(world: World, tmp_path: Path) -> None:
    odd = world.certified(tmp_path / "odd", "three", san=[x509.DNSName("*.lan")])
    ca_text = certificates.to_pem(odd.ca).decode()
    odd._server = server_context(str(tmp_path / "odd" / FOLDER / "node.pem"), ca_text)
    with serving(odd, world.peers) as server:
        remote = RemoteEndpoint("x.lan", pool_to(server, world.cluster.two, "x.lan"))
        with pytest.raises(NotAuthenticated):
            remote.storages()


def test_only_tls_1_3(world: World) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with serving(world.cluster.one, world.peers) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)), dial(server) as sock:
            context.wrap_socket(sock)
        world.peers.wait_for(Refusal.TLS)


# -- rights

LINEAGE = Lineage("6f0c9a52-1111-4222-8333-444455556666", Role.PRIMARY, 1)
VERSION = Version("v", "g1", certificates.utc_now(), 1, size=0)
REF = VERSION.ref


def receive(volume: VolumeId, remote: RemoteEndpoint, origin: VolumeId | None = None) -> object:
    stream = ChunkStream(StreamKind.BLOCKS, iter(()))
    return remote.receive(ReceiveRequest(volume, LINEAGE, None, VERSION, KEY, origin=origin), stream, Cancellation())


OWN = VolumeId("store", "two/vm")
READS = {
    "state": lambda r, v: r.state(v),
    "estimate": lambda r, v: r.estimate(v, None, REF),
    "send": lambda r, v: r.send(SendRequest(v, None, REF, KEY), Cancellation()),
    "digests": lambda r, v: list(r.digests(DigestRequest(v, REF, KEY), Cancellation())),
    "manifest": lambda r, v: r.manifest(ManifestRequest(v, REF, KEY), Cancellation()),
    "scrub": lambda r, v: r.scrub(ScrubRequest(v, start=True)),
    "hold": lambda r, v: r.hold(v, REF, "replicator:x"),
    "release": lambda r, v: r.release(v, REF, "replicator:x"),
    "properties": lambda r, v: r.properties(v),
    "prune": lambda r, v: r.prune(PruneRequest(v, "job", "last=1", ())),
}
WRITES = {
    "receive": lambda r, v: receive(v, r),
    "abort_receive": lambda r, v: r.abort_receive(v),
    "set_aside": lambda r, v: r.set_aside(v, "diverged-x"),
    "adopt": lambda r, v: r.adopt(v, LINEAGE),
    "rename": lambda r, v: r.rename(v, VolumeId("store", "two/new")),
    "rename to": lambda r, v: r.rename(OWN, v),
    "receive on an origin": lambda r, v: receive(OWN, r, origin=v),
    "clone": lambda r, v: r.clone(v, REF, VolumeId("store", "two/new")),
    "clone into": lambda r, v: r.clone(OWN, REF, v),
}
SOURCES = {
    "ensure_primary": lambda r, v: r.ensure_primary(v),
    "snapshot": lambda r, v: r.snapshot(SnapshotRequest((v,), "replicator_j_x")),
}
FOREIGN = [
    VolumeId("store", "vm"),
    VolumeId("store", "three/vm"),
    VolumeId("store", "twox"),
    VolumeId("other", "two/vm"),
]


def outcome(world: World, rights: PeerRights, call: object, volume: VolumeId) -> str:
    """What becomes of one request: refused for want of rights, or let through (whatever the storage says)."""
    world.peers.listed["two"] = rights
    with serving(world.cluster.one, world.peers) as server, world.remote(server) as remote:
        try:
            call(remote, volume)  # type: ignore[operator]
        except NotAuthorized:
            world.peers.wait_for(Refusal.UNAUTHORIZED)
            return "refused"
        except ReplicatorError:
            pass
        return "let through"


PUSH = PeerRights(frozenset({"store"}), frozenset())
PULL = PeerRights(frozenset(), frozenset({"store"}))


@pytest.mark.parametrize("volume", FOREIGN, ids=str)
@pytest.mark.parametrize("name", [*READS, *WRITES, *SOURCES])
def test_pushing_reaches_only_what_is_below_its_own_name(world: World, name: str, volume: VolumeId) -> None:
    assert outcome(world, PUSH, {**READS, **WRITES, **SOURCES}[name], volume) == "refused"


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_pushing_below_its_own_name(world: World, name: str) -> None:
    assert outcome(world, PUSH, {**READS, **WRITES}[name], OWN) == "let through"


@pytest.mark.parametrize("name", [*READS, *SOURCES])
def test_pulling_reads_one_storage(world: World, name: str) -> None:
    call = {**READS, **SOURCES}[name]
    assert outcome(world, PULL, call, VolumeId("store", "vm")) == "let through"
    assert outcome(world, PULL, call, VolumeId("other", "vm")) == "refused"


@pytest.mark.parametrize("volume", [VolumeId("store", "vm"), OWN], ids=str)
@pytest.mark.parametrize("name", list(WRITES))
def test_pulling_never_writes(world: World, name: str, volume: VolumeId) -> None:
    assert outcome(world, PULL, WRITES[name], volume) == "refused"


def test_switching_over_needs_a_right_of_its_own(world: World) -> None:
    lineage = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)

    def change(remote: RemoteEndpoint, volume: VolumeId) -> object:
        return remote.change_role(RoleChange(volume, lineage, lineage))

    switching = PeerRights(frozenset({"store"}), frozenset({"store"}), may_switch=frozenset({"store"}))
    assert outcome(world, PUSH, change, OWN) == "refused"
    assert outcome(world, switching, change, OWN) == "let through"
    for volume in FOREIGN:
        assert outcome(world, switching, change, volume) == "refused"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("replicator:job:three:backup", "let through"),
        ("replicator:rejoin:three", "let through"),
        ("replicator:handover:three", "refused"),
        ("replicator:restore:three", "refused"),
        ("keep", "refused"),
    ],
)
def test_who_hands_over_has_third_nodes_follow(world: World, tag: str, expected: str) -> None:
    def hold(remote: RemoteEndpoint, volume: VolumeId) -> None:
        remote.hold(volume, VersionRef("v", "g"), tag)

    switching = PeerRights(frozenset({"store"}), frozenset({"store"}), may_switch=frozenset({"store"}))
    assert outcome(world, switching, hold, OWN) == expected
    assert outcome(world, PUSH, hold, OWN) == "refused"


def test_listings_show_only_what_a_peer_may_see(world: World) -> None:
    with serving(world.cluster.one, world.peers) as server, world.remote(server) as remote:
        assert [v.id for v in remote.volumes("store")] == [OWN]
        for ask in (remote.volumes, remote.storage):
            with pytest.raises(NotAuthorized):
                ask("other")


@pytest.mark.parametrize(
    "tag",
    [
        "keep",
        "replicator:job:three:backup",
        "replicator:job:three:backup:verify",
        "replicator:restore:three",
        "replicator:rejoin:three",
        "replicator:handover:three",
        "replicator:kept:one",
    ],
)
def test_holds_of_others_are_not_a_peers(world: World, tag: str) -> None:
    with (
        serving(world.cluster.one, world.peers) as server,
        world.remote(server) as remote,
        pytest.raises(NotAuthorized),
    ):
        remote.release(OWN, VersionRef("v", "g"), tag)


# -- hostile and stalled peers


def test_silence_before_the_handshake_ends_at_the_deadline(world: World) -> None:
    with serving(world.cluster.one, world.peers, deadlines=QUICK) as server, dial(server) as sock:
        wait_closed(sock)
        world.peers.wait_for(Refusal.HANDSHAKE_TIMEOUT)


def test_a_dribble_within_the_handshake_ends_at_the_deadline(world: World) -> None:
    with serving(world.cluster.one, world.peers, deadlines=QUICK) as server, dial(server) as sock:
        stop = threading.Event()

        def dribble() -> None:
            for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500):
                if stop.wait(0.02):
                    return
                try:
                    sock.send(bytes((byte,)))
                except OSError:
                    return

        thread = threading.Thread(target=dribble)
        thread.start()
        world.peers.wait_for(Refusal.HANDSHAKE_TIMEOUT)
        stop.set()
        thread.join()


def test_silence_after_the_handshake_ends_at_the_deadline(world: World) -> None:
    with serving(world.cluster.one, world.peers, deadlines=QUICK) as server:
        channel = tls(server, world.cluster.two.client_context())
        world.peers.wait_for(Refusal.HANDSHAKE_TIMEOUT)
        channel.close()


def test_a_silent_peer_is_dropped_after_hello(world: World) -> None:
    quick = replace(SHORT, silence=0.5)
    with serving(world.cluster.one, world.peers, deadlines=quick) as server:
        channel = tls(server, world.cluster.two.client_context())
        channel.send((encode(FrameType.HELLO, Hello("two").encode()),), 5)
        error = read_error_or_end(channel)
        assert error in ("", "connection_lost")
        channel.close()


def read_error_or_end(channel: TlsChannel) -> str:
    try:
        return read_error(channel)["code"]
    except (AssertionError, ReplicatorError):
        return ""


@pytest.mark.parametrize(
    ("first", "what"),
    [
        (encode(FrameType.HELLO, Hello("two").encode() + b" " * 5000), "oversized"),
        (encode(FrameType.HELLO, b"nonsense"), "unreadable"),
        (encode(FrameType.HELLO, Hello("two", version=2).encode()), "of another version"),
        (encode(FrameType.HELLO, Hello("three").encode()), "of another name"),
        (encode(FrameType.REQUEST, b"{}"), "left out"),
        (b"GET / HTTP/1.1\r\nHost: one.example.org\r\n\r\n", "something else"),
    ],
    ids=["oversized", "unreadable", "version", "name", "left-out", "http"],
)
def test_bad_hello(world: World, first: bytes, what: str) -> None:
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, world.cluster.two.client_context())
        channel.send((first,), 5)
        assert read_error(channel)["code"] == "protocol", what
        channel.close()
        world.peers.wait_for(Refusal.PROTOCOL)


@pytest.mark.parametrize(
    "frames",
    [
        [(FrameType.REQUEST, b'{"op":"nothing","args":{}}', 1)],
        [(FrameType.REQUEST, b'{"op":"storages","args":{}}', 2)],
        [(FrameType.REQUEST, b'{"op":"state","args":{"volume":{"storage":"store","name":"two/../vm"}}}', 1)],
        [(FrameType.DATA, b"x", 1)],
        [(FrameType.END, bytes(48), 1)],
    ],
    ids=["unknown", "stream", "path", "data", "end"],
)
def test_bad_requests_end_the_connection(world: World, frames: list[tuple[FrameType, bytes, int]]) -> None:
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, world.cluster.two.client_context())
        connection = Connection(channel, "one", accept=FROM_SERVER, deadlines=SHORT)
        connection.greet("two", time.monotonic() + 5)
        for kind, body, stream in frames:
            connection.send(kind, (body,), stream=stream)
        with pytest.raises(ReplicatorError) as raised:
            connection.receive(10)
        assert raised.value.code in ("protocol", "invalid_name")
        connection.close()
        assert server.connections() in ({}, {"two": 1})


def test_connections_without_authentication_are_capped(world: World) -> None:
    caps = Caps(unauthenticated=3, per_peer=2, total=10)
    with serving(world.cluster.one, world.peers, caps=caps) as server:
        silent = [dial(server) for _ in range(3)]
        with dial(server) as extra:
            wait_closed(extra)
        world.peers.wait_for(Refusal.TOO_MANY)
        for sock in silent:
            sock.close()


def test_connections_of_one_peer_are_capped(world: World) -> None:
    caps = Caps(unauthenticated=8, per_peer=2, total=10)
    with serving(world.cluster.one, world.peers, caps=caps) as server, world.remote(server) as remote:
        pool = remote._pool
        used = [pool.take(fresh=True)[0] for _ in range(2)]
        with pytest.raises(ReplicatorError):
            pool.take(fresh=True)[0].receive(10)
        world.peers.wait_for(Refusal.TOO_MANY)
        for connection in used:
            pool.give(connection)
        assert [s.name for s in remote.storages()] == ["store"]


# -- joining


def token_for(world: World, server: Server, node: str = "three") -> JoinToken:
    return invite(world.cluster.one, node, f"{HOST}:{server.address[1]}")


def test_joining_and_then_working(world: World, tmp_path: Path) -> None:
    world.peers.listed["three"] = PeerRights(frozenset({"store"}), frozenset())
    with serving(world.cluster.one, world.peers) as server:
        token = JoinToken.decode(token_for(world, server).encode())
        three = join(tmp_path / "three", token, lambda: dial(server))
        assert three.node == "three"
        assert not three.has_ca
        assert three.revoked is not None
        assert not list((world.cluster.one.folder / "invitations").glob("*.json"))
        with world.remote(server, three) as remote:
            assert [v.id.name for v in remote.volumes("store")] == ["three/vm"]
            key, csr = three.renewal_request()
            three.install(key, remote.renew(csr))
            assert three.take_crl(remote.crl()) is False
        with world.remote(server, Identity(tmp_path / "three")) as remote:
            assert remote.storages()
        assert [n.node for n in world.cluster.one.nodes()].count("three") == 2


def test_an_invitation_works_once(world: World, tmp_path: Path) -> None:
    with serving(world.cluster.one, world.peers) as server:
        token = token_for(world, server)
        invite(world.cluster.one, "four", token.address)  # another one is open
        join(tmp_path / "a", token, lambda: dial(server))
        with pytest.raises(IdentityError, match="does not exist, has expired, was used"):
            join(tmp_path / "b", token, lambda: dial(server))
        world.peers.wait_for(Refusal.JOIN)
        assert not (tmp_path / "b" / FOLDER).exists()


def test_of_many_at_once_one_joins(world: World, tmp_path: Path) -> None:
    with serving(world.cluster.one, world.peers) as server:
        token = token_for(world, server)
        joined: list[str] = []

        def attempt(number: int) -> None:
            try:
                join(tmp_path / str(number), token, lambda: dial(server))
            except ReplicatorError:
                return
            joined.append(str(number))

        threads = [threading.Thread(target=attempt, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(joined) == 1


@pytest.mark.parametrize("change", ["secret", "node"])
def test_an_invitation_is_bound_to_its_secret_and_its_node(world: World, tmp_path: Path, change: str) -> None:
    with serving(world.cluster.one, world.peers) as server:
        token = token_for(world, server)
        wrong = replace(token, secret=bytes(32)) if change == "secret" else replace(token, node="five")
        with pytest.raises(IdentityError, match="does not exist"):
            join(tmp_path / "a", wrong, lambda: dial(server))
        join(tmp_path / "b", token, lambda: dial(server))  # a wrong attempt does not use it up


def test_an_expired_invitation(world: World, tmp_path: Path) -> None:
    with serving(world.cluster.one, world.peers) as server:
        token = invite(world.cluster.one, "three", "x:1", lifetime=timedelta(seconds=-5))
        with pytest.raises(IdentityError, match="expired at"):
            join(tmp_path / "a", token, lambda: dial(server))
        later = replace(token, expires=token.expires + timedelta(days=1))
        with pytest.raises(IdentityError, match="has expired"):
            join(tmp_path / "a", later, lambda: dial(server))


def test_another_clusters_node_cannot_answer_an_invitation(world: World, tmp_path: Path) -> None:
    stranger = create_cluster(tmp_path / "stranger", "one")
    with serving(world.cluster.one, world.peers) as real, serving(stranger, world.peers) as server:
        token = token_for(world, real)
        invite(stranger, "three", token.address)
        with pytest.raises(IdentityError, match="another fingerprint"):
            join(tmp_path / "a", token, lambda: dial(server))
        assert not (tmp_path / "a" / FOLDER).exists()


def test_another_node_of_the_cluster_cannot_answer_an_invitation(world: World, tmp_path: Path) -> None:
    with serving(world.cluster.one, world.peers) as real:
        token = token_for(world, real)
        folder = world.cluster.two.folder
        (folder / "ca.key").write_bytes((tmp_path / "cluster/one/identity/ca.key").read_bytes())
        invite(world.cluster.two, "three", token.address)
        with serving(world.cluster.two, world.peers) as server, pytest.raises((NotAuthenticated, IdentityError)):
            join(tmp_path / "a", token, lambda: dial(server))


def test_joining_gives_no_other_request(world: World) -> None:
    context = client_context(None, certificates.to_pem(world.cluster.one.ca).decode(), alpn=ALPN_JOIN)
    with serving(world.cluster.one, world.peers) as server:
        token_for(world, server)
        channel = tls(server, context)
        channel.send((encode(FrameType.REQUEST, b'{"op":"storages","args":{}}'),), 5)
        decoder = FrameDecoder()
        kinds = []
        while count := channel.recv_into(decoder.wanted(), 10):
            frame = decoder.advance(count)
            if frame is not None:
                kinds.append(frame.type)
        assert kinds == [FrameType.JOIN_OFFER, FrameType.ERROR]
        channel.close()
        world.peers.wait_for(Refusal.PROTOCOL)


def test_without_an_open_invitation_nobody_joins(world: World) -> None:
    context = client_context(None, certificates.to_pem(world.cluster.one.ca).decode(), alpn=ALPN_JOIN)
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, context)
        assert read_error(channel)["code"] == "identity"
        channel.close()
        world.peers.wait_for(Refusal.JOIN)


def test_only_the_ca_renews(world: World) -> None:
    world.peers.listed["one"] = PeerRights()
    with serving(world.cluster.two, world.peers) as server:
        remote = RemoteEndpoint("two", pool_to(server, world.cluster.one, "two"))
        with pytest.raises(IdentityError, match="does not have the cluster's CA key"):
            remote.renew(world.cluster.one.renewal_request()[1])
        assert remote.crl() == b""
        remote.close()


def test_a_client_without_the_replicator_protocol_is_refused(world: World) -> None:
    own = str(world.cluster.two.folder / "node.pem")
    context = client_context(own, certificates.to_pem(world.cluster.one.ca).decode(), alpn="h2")
    with serving(world.cluster.one, world.peers) as server:
        channel = tls(server, context)
        assert read_error(channel)["code"] == "not_authenticated"
        channel.close()
        world.peers.wait_for(Refusal.PROTOCOL)
