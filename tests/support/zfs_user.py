"""All that replicator does to ZFS as a source and as a target, done by whoever runs this program.

``python -m tests.support.zfs_user PHASE ROOT FOLDER``; streams lie in FOLDER between the phases. Prints a line for each
thing that was refused, and ends with 1 if there was any.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from backends.zfs import ZfsBackend
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import ConnectionLost, ReplicatorError
from replicator.model import Capability, Lineage, Role, StreamKind, Version, VolumeId
from replicator.streams import Chunk, ChunkStream, NativeChunk
from tests.support.blocks import KEY
from transport import checksum

LINEAGE = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)
TAG = "replicator:vms:prox2:backup"
VOLUMES = ("zvol", "fs", "secret")
_SPLIT = 100_000
_EPOCH = datetime(2026, 11, 20, tzinfo=UTC)


class Refusals:
    """What was refused."""

    def __init__(self) -> None:
        self.count = 0

    def run(self, what: str, work: Callable[[], object]) -> None:
        """Do something; print why, if it fails."""
        try:
            work()
        except ReplicatorError as error:
            self.count += 1
            print(f"{what}: {error} [{error.code}]")  # noqa: T201


def source(backend: ZfsBackend, folder: Path, refusals: Refusals) -> None:
    """Snapshots, streams, holds, bookmarks, pruning of the volumes."""
    for volume in VOLUMES:
        refusals.run("lineage", partial(backend.set_lineage, volume, LINEAGE))
    for name in ("one", "two", "three"):
        refusals.run("snapshot", partial(backend.snapshot, VOLUMES, name))
    refusals.run("heads", partial(backend.heads, VOLUMES))
    for volume in VOLUMES:
        state = backend.state(volume)
        assert state is not None
        base: Version | None = None
        for version in state.snapshots:
            refusals.run("hold", partial(backend.hold, volume, version.ref, TAG))
            refusals.run("estimate", partial(backend.estimate, volume, base.ref if base else None, version.ref))
            refusals.run("send", partial(_send, backend, volume, base, version, folder))
            base = version
        for version in state.snapshots[:1]:
            refusals.run("release", partial(backend.release, volume, version.ref, TAG))
            refusals.run("destroy", partial(backend.destroy, volume, version.ref))


def _send(backend: ZfsBackend, volume: str, base: Version | None, to: Version, folder: Path) -> None:
    request = SendRequest(VolumeId("store", volume), base.ref if base else None, to.ref, KEY, lineage=LINEAGE)
    with (folder / f"{volume}-{to.name}").open("wb") as file, backend.send(request, Cancellation()) as stream:
        for chunk in stream:
            file.write(chunk.data)
            chunk.release()
    (folder / f"{volume}-{to.name}.guid").write_text(to.guid)


def _arriving(folder: Path, volume: str, name: str) -> Version:
    guid = (folder / f"{volume}-{name}.guid").read_text()
    return Version(name, guid, _EPOCH, 0)


def _stream(path: Path, *, cut: bool = False) -> ChunkStream:
    data = path.read_bytes()

    def chunks() -> Iterator[Chunk]:
        yield NativeChunk(data[:_SPLIT])
        if cut:
            yield NativeChunk(b"x")
            raise ConnectionLost("cut")
        for start in range(_SPLIT, len(data), _SPLIT):
            yield NativeChunk(data[start : start + _SPLIT])

    return ChunkStream(StreamKind.NATIVE, chunks())


class Target:
    """Receives of one volume."""

    def __init__(self, backend: ZfsBackend, folder: Path, volume: str) -> None:
        self._backend = backend
        self._folder = folder
        self._volume = volume
        self.name = f"prox1/below/{volume}"

    def receive(self, base: str | None, to: str, **request: object) -> Version:
        """One stream."""
        before = _arriving(self._folder, self._volume, base).ref if base else None
        cut = bool(request.pop("cut", False))
        made = ReceiveRequest(
            VolumeId("store", self.name), LINEAGE, before, _arriving(self._folder, self._volume, to), KEY,
            kind=StreamKind.NATIVE,
        )  # fmt: skip
        asked = replace(made, **request)  # type: ignore[arg-type]
        with _stream(self._folder / f"{self._volume}-{to}", cut=cut) as stream:
            return self._backend.receive(asked, stream, Cancellation())

    def interrupted(self, base: str | None, to: str) -> None:
        """One that is cut, and discarded."""
        with contextlib.suppress(ConnectionLost):
            self.receive(base, to, cut=True)
        self._backend.abort_receive(self.name)

    def first(self) -> None:
        """Two snapshots, held and released, one destroyed."""
        self.interrupted(None, "one")
        one = self.receive(None, "one", hold=TAG)
        self.receive("one", "two", hold=TAG)
        self._backend.release(self.name, one.ref, TAG)

    def put_back(self) -> None:
        """What root wrote meanwhile is kept aside."""
        state = self._backend.state(self.name)
        assert state is not None
        self._backend.set_lineage(self.name, replace(LINEAGE, role=Role.PRIMARY))
        self._backend.set_aside(self.name, "diverged-1")
        self.receive("two", "three", mode=ReceiveMode.REBUILD, aside="diverged-1")

    def prune(self) -> None:
        """A snapshot goes."""
        one = _arriving(self._folder, self._volume, "one")
        self._backend.destroy(self.name, one.ref)

    def restore(self) -> None:
        """As a new volume, by copying and by cloning; and sent elsewhere."""
        new = VolumeId("store", f"restored/{self._volume}")
        self.receive(None, "one", volume=new, lineage=None, mode=ReceiveMode.RESTORE)
        three = _arriving(self._folder, self._volume, "three")
        self._backend.clone(self.name, three.ref, f"cloned/{self._volume}")
        request = SendRequest(VolumeId("store", self.name), None, three.ref, KEY)
        with self._backend.send(request, Cancellation()) as stream:
            for chunk in stream:
                chunk.release()


def target(backend: ZfsBackend, folder: Path, refusals: Refusals, *steps: str) -> None:
    """Some steps with each volume that a source has sent."""
    for volume in VOLUMES:
        made = Target(backend, folder, volume)
        for step in steps:
            refusals.run(f"{step} {volume}", getattr(made, step))


def main() -> int:
    phase, root, place = sys.argv[1:]
    folder = Path(place)
    backend = ZfsBackend("store", root, checksums=checksum)
    refusals = Refusals()
    if phase == "lacking":
        for uses in (Capability.SEND, Capability.RECEIVE):
            for lack in backend.lacking(uses):
                print(f"{uses.name}{'' if lack.needed else '?'}: {lack.message} / {lack.remedy}")  # noqa: T201
    elif phase == "source":
        source(backend, folder, refusals)
    elif phase == "target":
        target(backend, folder, refusals, "first")
    else:
        target(backend, folder, refusals, "put_back", "prune", "restore")
    backend.close()
    return 1 if refusals.count else 0


if __name__ == "__main__":
    sys.exit(main())
