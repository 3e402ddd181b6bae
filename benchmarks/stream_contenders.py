"""The ways in which bytes cross loopback that ``bench_stream`` compares, each between two processes.

Every contender is a context manager that sets itself up outside the measured time and gives a function: move so many
bytes, and return the seconds from the first byte until the receiver has confirmed the last.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection as ProcessPipe
from pathlib import Path
from typing import Any, cast

from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint, ReceiveRequest
from replicator.errors import ChecksumMismatch
from replicator.model import Lineage, Role, StreamKind, Version, VolumeId
from replicator.streams import BlockChunk, Chunk, ChunkStream, Extent, NativeChunk, Stream
from tests.support.transport import HOST, LOOPBACK, Cluster, Peers
from transport import checksum, network
from transport.authorization import PeerRights
from transport.connection import Deadlines
from transport.identity import Identity
from transport.pool import Dialer, Pool
from transport.remote import RemoteEndpoint
from transport.server import Server

MIB = 1024 * 1024
DISTINCT = 8
"""MiB of different data, sent again and again."""
SSH_CIPHER = "aes128-gcm@openssh.com"
Move = Callable[[int], float]
_FORK = multiprocessing.get_context("fork")
_PRODUCE = """
import os, sys
data, left = memoryview(os.urandom(1 << 20)), int(sys.argv[1])
while left:
    left -= os.write(1, data[:left])
"""
_CONSUME = """
import os
buffer = memoryview(bytearray(1 << 20))
total = 0
while n := os.readv(0, [buffer]):
    total += n
os.write(1, b"%d" % total)
"""


def payloads(kind: str) -> list[bytes]:
    """Random MiBs, or ones with text that packs to about a third."""
    if kind == "random":
        return [os.urandom(MIB) for _ in range(DISTINCT)]
    words = [os.urandom(1 + i % 5).hex().encode() for i in range(256)]
    return [b" ".join(words[byte] for byte in os.urandom(MIB // 4))[:MIB].ljust(MIB) for _ in range(DISTINCT)]


@contextmanager
def _child(target: Callable[[ProcessPipe], None]) -> Iterator[ProcessPipe]:
    """Run ``target`` in a process of its own with a pipe to it; it is to end when the pipe is closed."""
    ours, theirs = _FORK.Pipe()

    def body() -> None:
        ours.close()
        target(theirs)

    process = _FORK.Process(target=body, daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(20)
        if process.is_alive():
            process.kill()


# -- bare TLS, as Python has it


def _python_context(protocol: int, identity: Identity) -> ssl.SSLContext:
    """The interpreter's TLS with this node's certificate, verifying the other's, as it is by default."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.folder / "node.pem")
    context.load_verify_locations(identity.folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def bare_tls(cluster: Cluster) -> Iterator[Move]:
    """``SSLSocket``, memory to memory: ``sendall`` of 1 MiB here, ``recv_into`` a buffer of 1 MiB there."""
    listener = socket.create_server((str(HOST), 0))
    address = listener.getsockname()

    def serve(pipe: ProcessPipe) -> None:
        raw, _ = listener.accept()
        view = memoryview(bytearray(MIB))
        context = _python_context(ssl.PROTOCOL_TLS_SERVER, cluster.one)
        with context.wrap_socket(raw, server_side=True) as sock:
            while left := _receive(pipe):
                while left:
                    left -= sock.recv_into(view)
                sock.sendall(b"k")

    data = [memoryview(piece) for piece in payloads("random")]
    with _child(serve) as pipe, socket.create_connection(address) as raw:
        listener.close()
        context = _python_context(ssl.PROTOCOL_TLS_CLIENT, cluster.two)
        with context.wrap_socket(raw, server_hostname="one") as sock:

            def move(size: int) -> float:
                pipe.send(size)
                begun = time.perf_counter()
                for index in range(size // MIB):
                    sock.sendall(data[index % DISTINCT])
                sock.recv(1)
                return time.perf_counter() - begun

            yield move
            pipe.send(0)


def _receive(pipe: ProcessPipe) -> int:
    try:
        return int(pipe.recv())
    except EOFError:
        return 0


# -- our transport


class _Target:
    """Just enough of an endpoint to take streams: verifies blocks in memory, or writes native bytes to a pipe."""

    node = "one"

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """Take all of it."""
        cancel.check()
        if request.kind is StreamKind.BLOCKS:
            self._verify(stream, bytes.fromhex(request.key))
        else:
            self._pour(stream)
        return request.to

    def _verify(self, stream: Stream, key: bytes) -> None:
        for chunk in stream:
            assert isinstance(chunk, BlockChunk)
            if checksum.digest_blocks(chunk.data, key) != chunk.digests:
                raise ChecksumMismatch("a block differs")
            chunk.release()

    def _pour(self, stream: Stream) -> None:
        with _consumer() as (descriptor, finish):
            for chunk in stream:
                view = memoryview(chunk.data)
                while view:
                    view = view[os.write(descriptor, view) :]
                chunk.release()
            finish()

    def close(self) -> None:
        """Nothing is kept."""


@contextmanager
def _consumer() -> Iterator[tuple[int, Callable[[], None]]]:
    """A process that reads a pipe to its end."""
    argv = [sys.executable, "-c", _CONSUME]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        _widen(process.stdin.fileno())

        def finish() -> None:
            process.communicate(timeout=60)

        yield process.stdin.fileno(), finish


def _widen(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, MIB)


@contextmanager
def _remote(cluster: Cluster, *, compress: bool, rate: float | None = None) -> Iterator[RemoteEndpoint]:
    deadlines = Deadlines()

    def serve(pipe: ProcessPipe) -> None:
        peers = Peers(cast(Endpoint, _Target()), {"two": PeerRights(frozenset({"store"}), frozenset())})
        server = Server(network.listen(LOOPBACK, HOST, 0), cluster.one, peers, deadlines=deadlines)
        server.start()
        pipe.send(server.address[1])
        _receive(pipe)
        server.close()

    with _child(serve) as pipe:
        address = (HOST, int(pipe.recv()))
        dialer = Dialer(cluster.two, "one", network=LOOPBACK, address=address, deadlines=deadlines)
        remote = RemoteEndpoint("one", Pool(dialer), compress=compress, rate_limit=lambda: rate)
        try:
            yield remote
        finally:
            remote.close()


def _request(kind: StreamKind, key: bytes) -> ReceiveRequest:
    lineage = Lineage("6f0c9a52-1111-4222-8333-444455556666", Role.PRIMARY, 1)
    version = Version("bench", "1", datetime.now(UTC), 1)
    return ReceiveRequest(VolumeId("store", "two/vm"), lineage, None, version, key.hex(), kind=kind)


@contextmanager
def ours_blocks(cluster: Cluster, *, data: str = "random", compress: bool = False) -> Iterator[Move]:
    """A block stream, memory to memory: digests made before sending and verified after receiving."""
    pieces = payloads(data)
    with _remote(cluster, compress=compress) as remote:

        def chunks(size: int, key: bytes) -> Iterator[Chunk]:
            for index in range(size // MIB):
                piece = pieces[index % DISTINCT]
                yield BlockChunk((Extent(index * MIB, MIB),), piece, checksum.digest_blocks(piece, key))

        yield lambda size: _timed(remote, StreamKind.BLOCKS, lambda key: chunks(size, key))


def _timed(remote: RemoteEndpoint, kind: StreamKind, chunks: Callable[[bytes], Iterator[Chunk]]) -> float:
    key = secrets.token_bytes(32)
    begun = time.perf_counter()
    remote.receive(_request(kind, key), ChunkStream(kind, chunks(key)), Cancellation())
    return time.perf_counter() - begun


@contextmanager
def ours_pipes(cluster: Cluster) -> Iterator[Move]:
    """A native stream from a pipe to a pipe, as a storage's send and receive commands have them."""
    with _remote(cluster, compress=False) as remote:

        def chunks(size: int) -> Iterator[Chunk]:
            argv = [sys.executable, "-c", _PRODUCE, str(size)]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0) as process:
                assert process.stdout is not None
                descriptor = process.stdout.fileno()
                _widen(descriptor)
                buffer = memoryview(bytearray(MIB))
                while count := _gather(descriptor, buffer):
                    yield NativeChunk(buffer[:count])

        yield lambda size: _timed(remote, StreamKind.NATIVE, lambda _: chunks(size))


def _gather(descriptor: int, buffer: memoryview) -> int:
    """Fill the buffer, less only at the end."""
    filled = 0
    while filled < len(buffer) and (count := os.readv(descriptor, [buffer[filled:]])):
        filled += count
    return filled


# -- ssh


@contextmanager
def ssh_pipes(folder: Path) -> Iterator[Move]:
    """``ssh -c aes128-gcm@openssh.com``, from a pipe to a pipe, against an sshd of our own with throw-away keys."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=30
        )
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    (folder / "authorized").chmod(0o600)
    with socket.create_server((str(HOST), 0)) as free:
        port = free.getsockname()[1]
    options = {
        "ListenAddress": str(HOST),
        "Port": str(port),
        "HostKey": str(folder / "host"),
        "AuthorizedKeysFile": str(folder / "authorized"),
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "Ciphers": SSH_CIPHER,
        "Compression": "no",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with ExitStack() as stack:
        argv = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "config")]
        log = stack.enter_context((folder / "log").open("wb"))
        daemon = stack.enter_context(subprocess.Popen(argv, stderr=log))
        stack.callback(daemon.terminate)
        _wait_listening(port, daemon)
        yield lambda size: _ssh_once(folder, port, size)


def _wait_listening(port: int, daemon: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 20
    while daemon.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection((str(HOST), port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("sshd did not start")


def _ssh_once(folder: Path, port: int, size: int) -> float:
    (folder / "consume.py").write_text(_CONSUME)
    argv = ["ssh", "-F", "none", "-c", SSH_CIPHER, "-p", str(port), "-i", str(folder / "user"), "-o", "BatchMode=yes"]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder / 'known'}", "-o", "LogLevel=ERROR"]
    argv += [str(HOST), sys.executable, str(folder / "consume.py")]
    produce = [sys.executable, "-c", _PRODUCE, str(size)]
    begun = time.perf_counter()
    with subprocess.Popen(produce, stdout=subprocess.PIPE, bufsize=0) as source:
        assert source.stdout is not None
        _widen(source.stdout.fileno())
        done = subprocess.run(argv, stdin=source.stdout, capture_output=True, check=False, timeout=600)
    seconds = time.perf_counter() - begun
    if done.stdout.strip() != str(size).encode():
        raise RuntimeError(f"ssh moved {done.stdout!r} of {size} bytes: {done.stderr.decode(errors='replace')}")
    return seconds
