"""The power goes at every single change that the image backend makes on the disk, one after the other.

After each cut: every snapshot that is listed is whole and equal, all that was confirmed is there, and doing the same
again comes to the same end.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backends.image import ImageBackend
from backends.image.durable import Files
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import ConnectionLost, VolumeBusy
from replicator.model import Lineage, Role, Version, VolumeId
from replicator.streams import BLOCK_SIZE
from tests.support.blocks import KEY, changed, make_chunk, make_stream, pattern
from tests.support.power_cut import PowerCut, PowerCutFiles
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
SIZE = 6 * BLOCK_SIZE + 512
ONE = changed(pattern(SIZE), [(BLOCK_SIZE, BLOCK_SIZE)])
TWO = changed(ONE, [(4096, b"two" * 900), (5 * BLOCK_SIZE, 4096)])
MENDED = changed(ONE, [(3 * BLOCK_SIZE, b"mended")])
LIVE = changed(ONE, [(0, b"written on the replica")])
THREE = changed(MENDED, [(block * BLOCK_SIZE, b"three" * 20) for block in range(6)])
TAG = "replicator:vms:prox2:backup"
REPLICA = "prox1/vm"


def version(name: str) -> Version:
    return Version(name, uuid.uuid5(uuid.NAMESPACE_URL, name).hex, datetime(2026, 11, 20, tzinfo=UTC), 1, size=SIZE)


V1, V2, V3 = version("one"), version("two"), version("three")


class Story:
    """Everything that is done with an image storage, in an order; can be told again from any point."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "vm").write_bytes(ONE)
        self.confirmed: list[str] = []
        self.wrote = False
        self.acts: list[tuple[str, Callable[[ImageBackend], None]]] = [
            ("primary", lambda backend: backend.set_lineage("vm", PRIMARY)),
            ("snapshot", lambda backend: self._snapshot(backend, "s1")),
            ("full", lambda backend: self._receive(backend, V1, None, ONE)),
            ("incremental", lambda backend: self._receive(backend, V2, V1, TWO)),
            ("rebuild", self._rebuild),
            ("hold", lambda backend: backend.hold(REPLICA, V2.ref, "other")),
            ("release", lambda backend: backend.release(REPLICA, V1.ref, TAG)),
            ("interrupted", self._interrupted),
            ("resumed", lambda backend: self._receive(backend, V3, V2, THREE, before=MENDED)),
            ("destroy", lambda backend: backend.destroy(REPLICA, V1.ref)),
            ("aside", self._set_aside),
            ("restore", self._restore),
            ("abort", self._abort),
        ]

    def tell(self, backend: ImageBackend) -> None:
        for name, act in self.acts:
            if name not in self.confirmed:
                act(backend)
                self.confirmed.append(name)

    @staticmethod
    def _snapshot(backend: ImageBackend, name: str) -> None:
        backend.snapshot(("vm",), name)

    @staticmethod
    def _receive(
        backend: ImageBackend,
        to: Version,
        base: Version | None,
        data: bytes,
        before: bytes | None = None,
        **more: object,
    ) -> None:
        state = backend.state(REPLICA)
        resume = state.resume if state is not None else None
        if resume is not None and (resume.to_guid != to.guid or "mode" in more):
            resume = None
        request = ReceiveRequest(
            VolumeId("store", REPLICA), PRIMARY, base.ref if base else None, to, KEY, hold=TAG, resume=resume
        )
        before = before or (ONE if base else bytes(SIZE))
        start = resume.offset if resume is not None else 0
        pieces = [
            (offset, data[offset : min(offset + BLOCK_SIZE, SIZE)])
            for offset in range(start, SIZE, BLOCK_SIZE)
            if data[offset : offset + BLOCK_SIZE] != before[offset : offset + BLOCK_SIZE]
        ]
        stream = make_stream(*(make_chunk((at, piece if any(piece) else len(piece))) for at, piece in pieces))
        backend.receive(replace(request, **more), stream, Cancellation())  # type: ignore[arg-type]

    @staticmethod
    def _interrupted(backend: ImageBackend) -> None:
        """Half of a stream; what it says is durable, ``resumed`` does not send again."""
        state = backend.state(REPLICA)
        if state is not None and state.by_guid(V3.guid):
            return
        request = ReceiveRequest(VolumeId("store", REPLICA), PRIMARY, V2.ref, V3, KEY)
        half = [make_chunk((block * BLOCK_SIZE, THREE[block * BLOCK_SIZE :][:BLOCK_SIZE])) for block in range(4)]
        with pytest.raises(ConnectionLost):
            backend.receive(request, make_stream(*half, then=ConnectionLost("cut")), Cancellation())

    def _rebuild(self, backend: ImageBackend) -> None:
        self._receive(backend, V2, V1, MENDED, mode=ReceiveMode.REBUILD, aside="diverged-old")

    def _set_aside(self, backend: ImageBackend) -> None:
        live = self.root / REPLICA
        if not self.wrote:
            live.parent.mkdir(exist_ok=True)
            live.write_bytes(LIVE)
            self.wrote = True
        backend.set_aside(REPLICA, "diverged-live")

    @staticmethod
    def _restore(backend: ImageBackend) -> None:
        request = ReceiveRequest(VolumeId("store", "back/vm"), None, None, V1, KEY, mode=ReceiveMode.RESTORE)
        try:
            backend.receive(request, make_stream(make_chunk((0, ONE))), Cancellation())
        except VolumeBusy:  # it came to its end just before the cut: nothing tells the two apart but the data
            state = backend.state("back/vm")
            assert state is not None and state.size == SIZE

    @staticmethod
    def _abort(backend: ImageBackend) -> None:
        to = version("four")
        request = ReceiveRequest(VolumeId("store", REPLICA), PRIMARY, V3.ref, to, KEY)
        with pytest.raises(ConnectionLost):
            backend.receive(request, make_stream(make_chunk((0, b"x")), then=ConnectionLost("cut")), Cancellation())
        backend.abort_receive(REPLICA)

    # -- what must hold at any time

    def _image(self, volume: str, name: str) -> bytes:
        *parents, last = volume.split("/")
        folder = self.root.joinpath(".replicator", "volumes", *("+" + part for part in parents), "=" + last)
        return (folder / "snapshots" / name / "image").read_bytes()

    def check(self, backend: ImageBackend) -> None:
        done = set(self.confirmed)
        allowed = {
            "s1": [ONE],
            "one": [ONE],
            "two": [TWO, MENDED],
            "diverged-old": [TWO, MENDED],
            "diverged-live": [LIVE],
            "three": [THREE],
        }
        if "rebuild" in done:
            allowed["two"] = [MENDED]
        found: dict[str, Version] = {}
        for volume in backend.volumes():
            state = backend.state(volume.id.name)
            assert state is not None
            guids = [v.guid for v in state.versions]
            assert len(set(guids)) == len(guids)
            positions = [v.position for v in state.versions]
            assert sorted(set(positions)) == positions
            for item in state.versions:
                stem = "diverged-old" if item.name.startswith("diverged-old") else item.name
                assert self._image(volume.id.name, item.name) in allowed[stem], item
                found[item.name] = item
        self._check_confirmed(backend, found, done)
        assert backend.info().warnings in ((), backend.info().warnings[:1])  # nothing is half there
        assert not any("left out" in warning for warning in backend.info().warnings)

    def _check_confirmed(self, backend: ImageBackend, found: dict[str, Version], done: set[str]) -> None:
        if "primary" in done:
            state = backend.state("vm")
            assert state is not None and state.lineage == PRIMARY
        assert "snapshot" not in done or "s1" in found
        if "full" in done and "release" not in self._begun(done):
            assert found["one"].holds == (TAG,)
        if "incremental" in done:
            assert found["two"].guid == V2.guid and TAG in found["two"].holds
        if "rebuild" in done:
            assert found["diverged-old"].guid != V2.guid and found["diverged-old"].holds == ()
        assert "resumed" not in done or "three" in found
        assert "hold" not in done or "other" in found["two"].holds
        assert "destroy" not in done or "one" not in found
        if "aside" in done:
            assert "diverged-live" in found and not (self.root / REPLICA).exists()
        if "restore" in done:
            assert (self.root / "back/vm").read_bytes() == ONE
        state = backend.state(REPLICA)
        if "full" in done:
            assert state is not None and state.lineage == Lineage(PRIMARY.uuid, Role.REPLICA, PRIMARY.epoch)

    def _begun(self, done: set[str]) -> set[str]:
        """Acts that were done, and the one that the power cut."""
        names = [name for name, _ in self.acts]
        return set(itertools.islice(names, len(done) + 1))


@contextmanager
def opened(root: Path, files: Files | None = None) -> Iterator[ImageBackend]:
    backend = ImageBackend("store", root, checksums=checksum, files=files, workers=2, warnings_age=0)
    yield backend
    backend.close()


def cut_at(step: int, folder: Path) -> int | None:
    """Tell the story with a power cut at ``step``, check, and tell it to its end; its steps if there was no cut."""
    root, backup = folder / f"store-{step}", folder / "backup"
    root.mkdir()
    backup.mkdir(exist_ok=True)
    story = Story(root)
    files = PowerCutFiles(step, backup)
    with opened(root, files) as backend, suppress(PowerCut):
        story.tell(backend)
    files.close()
    with opened(root) as backend:
        story.check(backend)
        if not files.died:
            return files.steps
        story.tell(backend)
        story.check(backend)
        state = backend.state(REPLICA)
        assert state is not None and state.resume is None and not state.head_changed
    return None


def run(folder: Path, count: Callable[[int, int], int]) -> None:
    steps = cut_at(1 << 30, folder)
    assert steps is not None and steps > 150
    chosen = sorted(random.sample(range(steps), min(steps, count(60, steps))))
    for step in chosen:
        try:
            cut_at(step, folder)
        except BaseException as error:
            error.add_note(f"the power was cut before change {step} of {steps}")
            raise


def test_power_cut_at_any_change_with_copies(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    run(tmp_path, count)


@pytest.mark.tier("xfs")
def test_power_cut_at_any_change_with_reflink(xfs_dir: Path, count: Callable[[int, int], int]) -> None:
    run(xfs_dir, count)
