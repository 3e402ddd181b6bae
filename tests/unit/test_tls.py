"""TLS sessions over real sockets: what they agree on, what they refuse, and what happens at their ends."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicator.errors import ConnectionLost, DeadlineExceeded, NotAuthenticated
from tests.support.transport import Cluster, make_cluster
from transport import certificates
from transport._tls import Context, Session, TlsError
from transport.identity import create_cluster
from transport.tls import ALPN, WRITE_PIECE, Refusal, Refused, TlsChannel, client_context, server_context

DEADLINE = 30.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return make_cluster(tmp_path_factory.mktemp("cluster"))


def sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=DEADLINE)
        return client, listener.accept()[0]


@contextmanager
def channels(client: Context, server: Context, *, name: str = "one") -> Iterator[tuple[TlsChannel, TlsChannel]]:
    """Both ends, before their handshakes."""
    near, far = sockets()
    ends = TlsChannel(near, client, server_side=False, server_name=name), TlsChannel(far, server, server_side=True)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def shake(client: TlsChannel, server: TlsChannel) -> BaseException | None:
    """Both handshakes; the client's error is raised, the server's returned."""
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            server.handshake(time.monotonic() + DEADLINE)
        except Exception as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        client.handshake(time.monotonic() + DEADLINE)
    finally:
        serving.join(DEADLINE)
    return errors[0] if errors else None


@contextmanager
def connected(
    cluster: Cluster, client: Context | None = None, server: Context | None = None
) -> Iterator[tuple[TlsChannel, TlsChannel]]:
    with channels(client or cluster.two.client_context(), server or cluster.one.server_context()) as ends:
        assert shake(*ends) is None
        yield ends


def read(channel: TlsChannel, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    got = 0
    while got < size:
        count = channel.recv_into(view[got:], DEADLINE)
        if not count:
            break
        got += count
    return bytes(buffer[:got])


def ca_text(cluster: Cluster) -> str:
    return certificates.to_pem(cluster.one.ca).decode()


def file_of(cluster: Cluster) -> str:
    return str(cluster.two.folder / "node.pem")


# -- what is agreed on


def test_both_sides_know_each_other(cluster: Cluster) -> None:
    with connected(cluster) as (client, server):
        assert client.alpn == server.alpn == ALPN
        assert client.cipher == server.cipher == "TLS_AES_128_GCM_SHA256"
        for channel, identity in ((client, cluster.one), (server, cluster.two)):
            assert channel.peer_certificate() == certificates.to_der(identity.certificate)


@pytest.mark.parametrize("size", [1, 16384, 16385, 256 * 1024, 256 * 1024 + 1, 3 * MIB + 7])
def test_bytes_arrive_as_they_were_sent(cluster: Cluster, size: int) -> None:
    data = os.urandom(size)
    with connected(cluster) as (client, server):
        sending = threading.Thread(target=lambda: client.send((data[: size // 3], data[size // 3 :]), DEADLINE))
        sending.start()
        assert read(server, size) == data
        sending.join(DEADLINE)
        assert client.sent - client.received > size
        assert server.received == client.sent


def test_both_directions_at_the_same_time(cluster: Cluster) -> None:
    size = 16 * MIB
    data = [os.urandom(size), os.urandom(size)]
    with connected(cluster) as ends:
        got: dict[int, bytes] = {}

        def take(which: int) -> None:
            got[which] = read(ends[which], size)

        threads = [threading.Thread(target=ends[i].send, args=((data[i],), DEADLINE)) for i in (0, 1)]
        threads += [threading.Thread(target=take, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    assert got == {0: data[1], 1: data[0]}


def test_the_key_is_renewed_in_time(cluster: Cluster) -> None:
    """Each renewal is one record: 5 bytes of header, the message of 5, its type and 16 bytes of tag."""
    data, sent = os.urandom(MIB), {}
    for rekey_after in (1 << 40, 200_000):
        context = Context(
            server=False,
            file=file_of(cluster),
            ca=ca_text(cluster),
            protocols=(ALPN.encode(),),
            rekey_after=rekey_after,
        )
        with connected(cluster, context) as (client, server):
            before = client.sent
            for _ in range(4):
                sending = threading.Thread(target=lambda client=client: client.send((data,), DEADLINE))
                sending.start()
                assert read(server, MIB) == data
                sending.join(DEADLINE)
            server.send((b"and back",), DEADLINE)
            assert read(client, 8) == b"and back"
            sent[rekey_after] = client.sent - before
    pieces = 4 * MIB // WRITE_PIECE  # a new key after every one but the last, which has nothing behind it
    assert sent[200_000] - sent[1 << 40] == (pieces - 1) * 27


def test_another_implementation_understands_it(cluster: Cluster) -> None:
    near, far = sockets()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca_text(cluster))
    context.load_cert_chain(file_of(cluster))
    context.set_alpn_protocols([ALPN])
    server = TlsChannel(far, cluster.one.server_context(), server_side=True)
    serving = threading.Thread(target=lambda: server.handshake(time.monotonic() + DEADLINE))
    serving.start()
    with context.wrap_socket(near, server_hostname="one") as peer:
        serving.join(DEADLINE)
        assert peer.version() == "TLSv1.3" and peer.selected_alpn_protocol() == ALPN
        peer.sendall(b"hello")
        assert read(server, 5) == b"hello"
        server.send((b"and", b" back"), DEADLINE)
        assert peer.recv(3) + peer.recv(5) == b"and back"
    assert read(server, 1) == b""
    server.close()


# -- what is refused


def test_a_server_of_another_name(cluster: Cluster) -> None:
    client, server = cluster.two.client_context(), cluster.one.server_context()
    with channels(client, server, name="two") as ends, pytest.raises(Refused) as raised:
        shake(*ends)
    assert raised.value.reason is Refusal.WRONG_NAME


def test_a_server_of_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    stranger = create_cluster(tmp_path, "one")
    with (
        channels(cluster.two.client_context(), stranger.server_context()) as ends,
        pytest.raises(Refused, match="not accepted") as raised,
    ):
        shake(*ends)
    assert raised.value.reason is Refusal.WRONG_CA


def test_a_client_of_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    stranger = create_cluster(tmp_path, "two")
    context = client_context(str(stranger.folder / "node.pem"), ca_text(cluster))
    with channels(context, cluster.one.server_context()) as (client, server):
        error = shake(client, server)  # in TLS 1.3 the client's certificate is judged after its handshake
        assert isinstance(error, Refused) and error.reason is Refusal.WRONG_CA
        with pytest.raises(NotAuthenticated, match="refused this node's certificate"):
            read(client, 1)


def test_a_client_without_a_certificate_is_left_to_the_server(cluster: Cluster) -> None:
    with connected(cluster, client_context(None, ca_text(cluster))) as (_, server):
        assert server.peer_certificate() is None


def test_who_verifies_names_the_server(cluster: Cluster) -> None:
    near, far = sockets()
    with near, far:
        with pytest.raises(ValueError, match="names its server"):
            Session(cluster.two.client_context(), near.fileno())
        with pytest.raises(ValueError, match="names its server"):
            Session(cluster.two.client_context(), near.fileno(), "")
        with pytest.raises(ValueError, match="names nobody"):
            Session(cluster.one.server_context(), far.fileno(), "two")


def test_files_that_are_no_certificates(cluster: Cluster, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    for file in (str(junk), str(tmp_path / "missing.pem")):
        with pytest.raises(TlsError):
            server_context(file, ca_text(cluster))
    with pytest.raises(ValueError, match="no certificate"):
        server_context(file_of(cluster), "nothing")
    with pytest.raises((TlsError, ValueError)):
        server_context(file_of(cluster), ca_text(cluster)[:200])


def test_a_key_with_a_passphrase_is_an_error_and_asks_nobody(cluster: Cluster, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    key = certificates.key_from_pem(Path(file_of(cluster)).read_bytes(), "node.pem")
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    file = tmp_path / "locked.pem"
    file.write_bytes(certificates.to_pem(cluster.two.certificate) + secret)
    with pytest.raises(TlsError):
        client_context(str(file), ca_text(cluster))


def test_only_keywords_that_there_are() -> None:
    with pytest.raises(ValueError, match="protocols are named"):
        Context(server=True, file=None, ca=None)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="1 to 255"):
        Context(server=True, file=None, ca=None, protocols=(b"",))
    with pytest.raises(TypeError):
        Context(server=True, file=None, ca=None, protocols=("text",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least a byte"):
        Context(server=True, file=None, ca=None, protocols=(), rekey_after=0)


# -- ends and damage


def test_the_end_of_the_stream(cluster: Cluster) -> None:
    with connected(cluster) as (client, server):
        client.send((b"last words",), DEADLINE)
        client.close()
        assert read(server, 64) == b"last words"
        assert server.recv_into(memoryview(bytearray(1)), DEADLINE) == 0


def test_what_came_before_damage_is_given_and_the_error_stays(cluster: Cluster) -> None:
    near, far = sockets()
    session = Session(cluster.two.client_context(), near.fileno(), "one")
    server = TlsChannel(far, cluster.one.server_context(), server_side=True)
    near.setblocking(False)
    serving = threading.Thread(target=lambda: server.handshake(time.monotonic() + DEADLINE))
    serving.start()
    while not session.handshake():
        session.flush(False)
    session.flush(False)
    serving.join(DEADLINE)
    session.write(b"right")
    session.flush(False)
    near.setblocking(True)
    near.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that no key made
    assert read(server, 5) == b"right"
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="decryption failed"):
            read(server, 1)
    near.close()
    server.close()


def test_nothing_in_time(cluster: Cluster) -> None:
    with connected(cluster) as (client, _), pytest.raises(DeadlineExceeded):
        client.recv_into(memoryview(bytearray(1)), 0.01)


def test_a_peer_that_takes_nothing(cluster: Cluster) -> None:
    with connected(cluster) as (client, _), pytest.raises(DeadlineExceeded, match="took nothing"):
        client.send((bytes(64 * MIB),), 0.05)


def test_what_is_not_flushed_is_bounded(cluster: Cluster) -> None:
    near, far = sockets()
    session = Session(cluster.two.client_context(), near.fileno(), "one")
    server = TlsChannel(far, cluster.one.server_context(), server_side=True)
    serving = threading.Thread(target=lambda: server.handshake(time.monotonic() + DEADLINE))
    serving.start()
    while not session.handshake():
        session.flush(False)
    session.flush(False)
    serving.join(DEADLINE)
    with pytest.raises(OSError) as raised:
        session.write(bytes(5 * MIB))
    assert raised.value.errno == errno.ENOBUFS
    near.close()
    server.close()


def test_a_socket_that_is_no_longer_ours_is_left_alone(cluster: Cluster) -> None:
    near, far = sockets()
    with near, far:
        session = Session(cluster.two.client_context(), near.fileno(), "one")
        session.handshake()
        session.detach()
        with pytest.raises(OSError) as raised:
            session.flush(False)
        assert raised.value.errno == errno.EBADF


def test_many_sessions_leave_no_memory_behind(cluster: Cluster) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def one() -> None:
        near, far = sockets()
        with near, far:
            session = Session(cluster.two.client_context(), near.fileno(), "one")
            session.handshake()

    for _ in range(200):
        one()
    before = resident()
    for _ in range(1000):
        one()
    assert resident() - before < 8 * MIB  # 1,000 sessions hold over 40 MiB
