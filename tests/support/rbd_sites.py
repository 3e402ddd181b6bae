"""Two storages on Ceph clusters of their own, and what is replicated from one to the other."""

from __future__ import annotations

import hashlib
import random
import subprocess
from dataclasses import dataclass
from typing import Any

from backends.rbd.binding import load
from replicator.cancellation import Cancellation
from replicator.local import LocalEndpoint
from replicator.model import Version, VolumeId, hold_tag
from replicator.origins import origins_of
from replicator.planning import Intermediates, SendPolicy
from replicator.replication import Limits, Options, Pair, Replication
from tests.support.rbd_case import RbdCase


def take(case: RbdCase, volume: str, name: str) -> Version:
    (version,) = case.backend.snapshot((volume,), name)
    return version


def make_clone(case: RbdCase, volume: str, snapshot: str, new: str, **options: Any) -> None:
    """Clone as people do."""
    rbd = load().rbd
    parent, child = case.naming.place(volume), case.naming.place(new)
    with case.session() as session, session.ioctx(parent.namespace) as above, session.ioctx(child.namespace) as ioctx:
        rbd.RBD().clone(above, parent.image, snapshot, ioctx, child.image, **{"features": 61, **options})


class Writer:
    """Does to images what guests and people do, at random; sizes are small, so that all meets the ends of objects."""

    MOST = 600_000

    def __init__(self, case: RbdCase, seed: int) -> None:
        self.number = random.Random(seed)
        self._case = case

    def work(self, volume: str, resizes: bool = True) -> None:
        number = self.number
        with self._case.image(volume) as image:
            for _ in range(number.randrange(1, 6)):
                size = image.size()
                what = number.choice("wwdzrr" if resizes else "wwdz")
                if what == "r":
                    image.resize(number.choice([number.randrange(self.MOST), 65536 * number.randrange(9)]))
                elif size:
                    offset = (
                        number.randrange(size) // 65536 * 65536 if number.random() < 0.3 else number.randrange(size)
                    )
                    length = min(size - offset, number.choice([1, 100, 4096, 65536, 150_000]))
                    if what == "w":
                        image.write(number.randbytes(length), offset)
                    else:
                        (image.discard if what == "d" else image.write_zeroes)(offset, length)


@dataclass
class Sites:
    """Two storages on clusters of their own, ``store`` of node ``one`` and ``backup`` of node ``two``."""

    source: RbdCase
    target: RbdCase

    def __post_init__(self) -> None:
        self.here = LocalEndpoint("one", {"store": self.source.backend})
        self.there = LocalEndpoint("two", {"backup": self.target.backend})

    def replication(self, volume: str, *volumes: str) -> Replication:
        """Of one volume, by a job that has the others, too."""
        listed = [v for v in self.source.backend.volumes() if v.id.name in (volume, *volumes)]
        origin = next(v.origin for v in listed if v.id.name == volume)
        pair = Pair(self.here, VolumeId("store", volume), self.there, replica(volume), hold_tag("vms", "two", "backup"))
        origins = origins_of(listed).get(VolumeId("store", volume), frozenset())
        first = origin is not None and origin.volume.name in volumes
        policy = SendPolicy(Intermediates.ALL, origins=origins)
        options = Options(policy, limits=Limits(attempts=1), origin_first=first)
        return Replication(pair, options, observer=lambda _: None, cancel=Cancellation())

    def replicate(self, *volumes: str) -> None:
        """Those, in that order, as one job, and see that both sides are equal: as `rbd export` reads them."""
        for volume in volumes:
            self.replication(volume, *volumes).run()
        for volume in volumes:
            self.check_equal(volume)

    def check_equal(self, volume: str) -> int:
        """All snapshots that the target has; how many."""
        theirs = self.target.backend.state(replica(volume).name)
        ours = self.source.backend.state(volume)
        assert theirs is not None
        assert ours is not None
        assert not theirs.head_changed
        common = [(v, ours.by_guid(v.guid)) for v in theirs.versions if ours.by_guid(v.guid)]
        for version, mine in common:
            assert mine is not None
            assert exported(self.target, replica(volume).name, version) == exported(self.source, volume, mine), version
        return len(common)

    def parent(self, volume: str) -> str:
        """What the replica is a clone of: VOLUME@SNAPSHOT, "" for none."""
        state = self.target.backend.state(replica(volume).name)
        return "" if state is None or state.origin is None else f"{state.origin.volume.name}@{state.origin.snapshot}"


def replica(volume: str) -> VolumeId:
    return VolumeId("backup", f"one/{volume}")


def exported(case: RbdCase, volume: str, version: Version) -> str:
    """The sha256 of what `rbd export` reads of a snapshot."""
    place = case.naming.place(volume)
    argv = ["rbd", "-c", str(case.conf), "export", f"{case.pool}/{place.namespace}/{place.image}@{version.name}", "-"]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=60)
    return hashlib.sha256(done.stdout).hexdigest()
