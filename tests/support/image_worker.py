"""A process that replicates an image from one storage into another, round after round, until it is killed.

    python -m tests.support.image_worker FOLDER

It says ``committed NAME`` once a round's snapshot is durable on the target. What a round's image holds can be worked
out from its number.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from backends.image import ImageBackend
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest, SendRequest
from replicator.model import Lineage, Role, Version, VolumeId, VolumeState
from tests.support.blocks import KEY
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)
SIZE = 24 << 20
TAG = "job"


def content(number: int) -> bytes:
    """The image in round ``number``."""
    data = bytearray(random.Random(0).randbytes(SIZE))
    for past in range(1, number + 1):
        rng = random.Random(past)
        for _ in range(40):
            offset = rng.randrange(SIZE - 65536)
            data[offset : offset + 65536] = rng.randbytes(65536)
    return bytes(data)


def open_pair(folder: Path) -> tuple[ImageBackend, ImageBackend]:
    """The source and the target storage."""
    for name in ("source", "target"):
        (folder / name).mkdir(exist_ok=True)
    return (
        ImageBackend("source", folder / "source", checksums=checksum),
        ImageBackend("target", folder / "target", checksums=checksum),
    )


def newest_common(source: VolumeState, target: VolumeState | None) -> Version | None:
    known = {v.guid for v in target.versions} if target is not None else set()
    return next((v for v in reversed(source.versions) if v.guid in known), None)


def replicate(source: ImageBackend, target: ImageBackend, to: Version) -> Version:
    """Bring one snapshot over, continuing what is half there."""
    mine, theirs = source.state("vm"), target.state("n/vm")
    assert mine is not None
    base = newest_common(mine, theirs)
    resume = theirs.resume if theirs is not None else None
    if resume is not None and (resume.to_guid, resume.base_guid) != (to.guid, base.guid if base else None):
        resume = None
    ref = base.ref if base is not None else None
    cancel = Cancellation()
    with source.send(SendRequest(VolumeId("source", "vm"), ref, to.ref, KEY, resume=resume), cancel) as stream:
        request = ReceiveRequest(VolumeId("target", "n/vm"), PRIMARY, ref, to, KEY, hold=TAG, resume=resume)
        done = target.receive(request, stream, cancel)
    if base is not None and base.guid != to.guid:
        for backend, volume in ((source, "vm"), (target, "n/vm")):
            backend.release(volume, base.ref, TAG)
            backend.destroy(volume, base.ref)
    return done


def main() -> None:
    folder = Path(sys.argv[1])
    source, target = open_pair(folder)
    state = source.state("vm")
    number = 1 + max((int(v.name[1:]) for v in state.versions), default=0) if state is not None else 0
    if state is not None and state.versions:
        replicate(source, target, state.versions[-1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        (folder / "source" / "vm").write_bytes(content(number))
        (taken,) = source.snapshot(("vm",), f"s{number}")
        replicate(source, target, taken)
        sys.stdout.write(f"committed {taken.name}\n")
        sys.stdout.flush()
        number += 1


if __name__ == "__main__":
    main()
