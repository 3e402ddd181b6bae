"""Two whole nodes for tests: real daemons, real certificates, real images; on loopback or in network namespaces."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from replicator.control import ReplicaStatus, State
from replicator.demo.node import DemoNode, join, loopback_network
from replicator.errors import ReplicatorError
from tests.support.netns import Topology

VOLUME = "images:disk.raw"
JOB = "j"
MIB = 1024 * 1024


@dataclass
class Pair:
    """Node ``a`` replicates ``images:disk.raw`` to ``b:replicas``."""

    a: DemoNode
    b: DemoNode
    images: Path
    replicas: Path
    addresses: tuple[str, str]

    @property
    def image(self) -> Path:
        return self.images / "disk.raw"

    def status(self) -> ReplicaStatus | None:
        with self.a.control() as control:
            return next((row for row in control.status().replicas if row.volume == VOLUME), None)

    def until(self, holds: Callable[[ReplicaStatus], bool], timeout: float = 60.0) -> ReplicaStatus:
        """Poll the status until it holds; the last row."""
        deadline = time.monotonic() + timeout
        row = None
        while time.monotonic() < deadline:
            try:
                row = self.status()
            except ReplicatorError:
                row = None
            if row is not None and holds(row):
                return row
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout} s; last status: {row}; {self.a.tail()}; {self.b.tail()}")

    def replica_snapshots(self) -> dict[str, Path]:
        """Snapshot directories of the replica, as a reader of the directory sees them, by name."""
        return _snapshots(self.replicas)

    def source_snapshots(self) -> dict[str, Path]:
        return _snapshots(self.images)

    def common(self) -> list[str]:
        ours, theirs = self.source_snapshots(), self.replica_snapshots()
        return sorted(name for name in ours if name in theirs)

    def assert_equal(self, *, all_common: bool = True) -> str:
        """Every snapshot that both have is the same, byte for byte; the newest one's name."""
        common = self.common()
        assert common, "no common snapshot"
        for name in common if all_common else common[-1:]:
            left, right = self.source_snapshots()[name] / "image", self.replica_snapshots()[name] / "image"
            assert left.read_bytes() == right.read_bytes(), f"{name} differs"
        return common[-1]

    def stop(self) -> None:
        self.a.stop()
        self.b.stop()


def _snapshots(root: Path) -> dict[str, Path]:
    """Names that begin with a dot are not snapshots (yet); they may vanish while this looks."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root / ".replicator"):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "image" in files and Path(folder).parent.name == "snapshots":
            found[Path(folder).name] = Path(folder)
    return found


def fill(image: Path, size: int, *, seed: int = 1, density: float = 1.0) -> None:
    """An image of pseudo-random bytes, some of it holes."""
    random_source = random.Random(seed)
    with image.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, MIB):
            if random_source.random() < density:
                file.seek(offset)
                file.write(random_source.randbytes(min(MIB, size - offset)))
        file.flush()
        os.fsync(file.fileno())


def change(image: Path, *, seed: int, pieces: int = 20, length: int = 4096) -> None:
    """Overwrite some pieces with new bytes."""
    random_source = random.Random(seed)
    size = image.stat().st_size
    with image.open("r+b") as file:
        for _ in range(pieces):
            file.seek(random_source.randrange(0, size // 4096) * 4096)
            file.write(random_source.randbytes(length))
        file.flush()
        os.fsync(file.fileno())
    with image.open("r+b") as file:
        file.truncate(size)


@contextmanager
def cluster(
    folder: Path,
    *,
    topology: Topology | None = None,
    images: Path | None = None,
    replicas: Path | None = None,
    job: str = 'schedule = "1h"\n',
    extra_a: str = "",
    extra_b: str = "",
    rights: str = 'may_push_to = ["replicas"]',
) -> Iterator[Pair]:
    """Two joined nodes with running daemons. ``job`` is more lines of the job's table."""
    images = images or folder / "images"
    replicas = replicas or folder / "replicas"
    images.mkdir(exist_ok=True)
    replicas.mkdir(exist_ok=True)
    prefix = "10.99.0" if topology else loopback_network()
    first = DemoNode("a", folder / "a", runner=topology.runner(1) if topology else ())
    second = DemoNode("b", folder / "b", runner=topology.runner(2) if topology else ())
    http = ("127.0.0.1:9571", "127.0.0.1:9571") if topology else (f"{prefix}.1:9571", f"{prefix}.2:9571")
    first.configure(
        f"{prefix}.1:8571",
        cluster=f"{prefix}.0/24",
        http=http[0],
        rest=f'[storage.images]\nkind = "image"\npath = "{images}"\n\n[peer.b]\naddress = "{prefix}.2:8571"\n\n'
        f'[job.{JOB}]\nsource = "images:disk.raw"\ntargets = ["b:replicas"]\n{job}\n{extra_a}',
    )
    second.configure(
        f"{prefix}.2:8571",
        cluster=f"{prefix}.0/24",
        http=http[1],
        rest=f'[storage.replicas]\nkind = "image"\npath = "{replicas}"\n\n'
        f'[peer.a]\naddress = "{prefix}.1:8571"\n{rights}\n{extra_b}',
    )
    pair = Pair(first, second, images, replicas, (f"{prefix}.1", f"{prefix}.2"))
    try:
        join(first, second)
        second.start()
        yield pair
    finally:
        pair.stop()


def idle(row: ReplicaStatus) -> bool:
    """Nothing is running for it."""
    return row.state is not State.RUNNING
