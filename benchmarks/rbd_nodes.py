"""Two Ceph clusters for the benchmarks, an image in the first, and the ways in which it gets into the second.

Ours is a run as the daemons do it: the source's node is this process, the target's one of its own, between them mutual
TLS on loopback. The peer is ``rbd export-diff | rbd import-diff``.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as ProcessPipe
from pathlib import Path
from typing import Any

from backends.rbd import RbdBackend
from backends.rbd.binding import load
from backends.rbd.cluster import Connection, Where
from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint
from replicator.local import LocalEndpoint
from replicator.model import VolumeId, hold_tag
from replicator.planning import SendPolicy
from replicator.replication import Options, Pair, Replication
from tests.lab.ceph import Cluster
from tests.support.transport import HOST, LOOPBACK, Peers, make_cluster, serving
from transport import checksum
from transport.authorization import PeerRights
from transport.connection import Deadlines
from transport.identity import Identity
from transport.pool import Dialer, Pool
from transport.remote import RemoteEndpoint

MIB = 1 << 20
GIB = 1 << 30
POOL = "rbd"
IMAGE = "vm"
"""In the first cluster. Our replicas are images of namespace ``one`` in the second, the pipe's of the default one."""
FEATURES = "layering,exclusive-lock,object-map,fast-diff,deep-flatten"
"""Those that ``rbd create`` gives an image by default."""
LONG = 600.0
_TAG = hold_tag("j", "two", "target")
_PAGE = 4096
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Cost:
    """What something took, seconds.

    :ivar ours: processor time of the processes that did it
    :ivar osds: processor time of both clusters' OSDs meanwhile
    """

    wall: float
    ours: float
    osds: float


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _osd_cpu(cluster: Cluster) -> float:
    (pid,) = (path.read_text().strip() for path in (cluster.conf.parent / "run").glob("osd.*.pid"))
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


# -- images, by hand


@contextmanager
def opened(cluster: Cluster, image: str, pool: str = POOL) -> Iterator[Any]:
    """An image as a guest has it."""
    hands = Connection("hands", Where(pool, cluster.conf, "admin", None), load)
    try:
        with hands.session("by hand") as session, session.ioctx("") as ioctx:
            found: Any = session.binding.open_image(ioctx, image, read_only=False)
            try:
                yield found
            finally:
                found.close()
    finally:
        hands.close()


def create(cluster: Cluster, image: str, size: int) -> None:
    """An empty image."""
    cluster.run("rbd", "create", "--size", f"{size // MIB}M", "--image-feature", FEATURES, image)


def _write(image: Any, pieces: Iterator[tuple[int, bytes]], depth: int = 32) -> int:
    """Write pieces at offsets; the bytes written."""
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    flying = written = 0
    for offset, data in pieces:
        image.aio_write(data, offset, lambda completion: done.put(completion.get_return_value()))
        flying, written = flying + 1, written + len(data)
        if flying == depth:
            assert done.get(timeout=LONG) >= 0
            flying -= 1
    for _ in range(flying):
        assert done.get(timeout=LONG) >= 0
    image.flush()
    return written


def fill(cluster: Cluster, size: int, snapshot: str) -> int:
    """Make the image: random data in runs of 64 KiB to 8 MiB, with holes of such lengths between; the bytes written."""
    create(cluster, IMAGE, size)
    rng = random.Random(1)
    noise = rng.randbytes(32 * MIB)

    def pieces() -> Iterator[tuple[int, bytes]]:
        position = 0
        while position < size:
            length = min(rng.randrange(16, 2048) * _PAGE, size - position)
            start = rng.randrange(len(noise) - length)
            yield position, noise[start : start + length]
            position += length + rng.randrange(16, 2048) * _PAGE

    with opened(cluster, IMAGE) as image:
        written = _write(image, pieces(), depth=8)
        image.create_snap(snapshot)
    return written


def scatter(cluster: Cluster, size: int, part: float, snapshot: str, seed: int) -> int:
    """Write pages all over the image until that part of it was written; the bytes."""
    rng = random.Random(seed)
    pages = rng.sample(range(size // _PAGE), int(size * part / _PAGE))
    with opened(cluster, IMAGE) as image:
        written = _write(image, ((page * _PAGE, rng.randbytes(_PAGE)) for page in pages))
        image.create_snap(snapshot)
    return written


# -- the two ways


def _serve(conf: Path, identity: Identity, pipe: ProcessPipe) -> None:
    """The target's node: tells its port, then its processor time whenever it is asked, until the pipe is closed."""
    backend = RbdBackend("target", Where(POOL, conf, "admin", None), checksums=checksum)
    local = LocalEndpoint("two", {"target": backend})
    peers = Peers(local, {"one": PeerRights(frozenset({"target"}), frozenset())})
    with serving(identity, peers, deadlines=Deadlines()) as server:
        pipe.send(server.address[1])
        while True:
            try:
                pipe.recv()
            except EOFError:
                break
            pipe.send(_own_cpu())
    backend.close()


@contextmanager
def _child(work: Callable[[ProcessPipe], None]) -> Iterator[ProcessPipe]:
    ours, theirs = _FORK.Pipe()

    def body() -> None:
        ours.close()
        work(theirs)

    process = _FORK.Process(target=body, daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            process.kill()


class Sites:
    """Both clusters and both nodes.

    :param source, target: clusters that are up
    """

    def __init__(self, source: Cluster, target: Cluster, local: Endpoint, remote: Endpoint, pipe: ProcessPipe) -> None:
        self.source = source
        self.target = target
        self._endpoints = (local, remote)
        self._pipe = pipe

    def _far_cpu(self) -> float:
        self._pipe.send(None)
        answer = self._pipe.recv()
        assert isinstance(answer, float)
        return answer

    def _measured(self, work: Callable[[], object], cpu: Callable[[], float]) -> Cost:
        osds = _osd_cpu(self.source) + _osd_cpu(self.target)
        used, begun = cpu(), time.perf_counter()
        work()
        wall = time.perf_counter() - begun
        return Cost(wall, cpu() - used, _osd_cpu(self.source) + _osd_cpu(self.target) - osds)

    def ours(self, replica: str) -> Cost:
        """Bring a replica of ours to the newest snapshot: list and plan, hold, transfer, commit, release."""
        local, remote = self._endpoints
        pair = Pair(local, VolumeId("source", IMAGE), remote, VolumeId("target", f"one/{replica}"), _TAG)

        def work() -> None:
            run = Replication(pair, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation())
            assert run.run().steps == 1

        return self._measured(work, lambda: _own_cpu() + self._far_cpu())

    def pipe(self, image: str, base: str | None, to: str) -> Cost:
        """Bring an image of the pipe's to a snapshot."""
        return self._measured(lambda: self._run_pipe(image, base, to), _cpu_of_children)

    def _run_pipe(self, image: str, base: str | None, to: str) -> None:
        since = () if base is None else ("--from-snap", base)
        export = ("rbd", "-c", str(self.source.conf), "export-diff", "--no-progress", *since, f"{IMAGE}@{to}", "-")
        taking = ("rbd", "-c", str(self.target.conf), "import-diff", "--no-progress", "-", image)
        with (
            subprocess.Popen(export, stdout=subprocess.PIPE) as sender,
            subprocess.Popen(taking, stdin=sender.stdout) as receiver,
        ):
            assert sender.stdout is not None
            sender.stdout.close()
            assert receiver.wait(LONG) == 0
            assert sender.wait(LONG) == 0


def digest(where: Cluster, image: str) -> str:
    """sha256 of an image or snapshot, as ``rbd export`` has it."""
    with subprocess.Popen(
        ("rbd", "-c", str(where.conf), "export", "--no-progress", image, "-"), stdout=subprocess.PIPE
    ) as export:
        found = subprocess.run(("sha256sum",), stdin=export.stdout, capture_output=True, check=True, timeout=LONG)
    assert export.returncode == 0
    return found.stdout.decode().split()[0]


@contextmanager
def sites(source: Cluster, target: Cluster, folder: Path) -> Iterator[Sites]:
    """The nodes of two clusters."""
    identities = make_cluster(folder)
    with ExitStack() as stack:
        # Before this process has threads.
        pipe = stack.enter_context(_child(lambda pipe: _serve(target.conf, identities.two, pipe)))
        port = pipe.recv()
        backend = RbdBackend("source", Where(POOL, source.conf, "admin", None), checksums=checksum)
        stack.callback(backend.close)
        dialer = Dialer(identities.one, "two", network=LOOPBACK, address=(HOST, port), deadlines=Deadlines())
        remote = RemoteEndpoint("two", Pool(dialer))
        stack.callback(remote.close)
        yield Sites(source, target, LocalEndpoint("one", {"source": backend}), remote, pipe)
