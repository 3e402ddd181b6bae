"""Ceph RBD: replication between two clusters, beside ``rbd export-diff | rbd import-diff`` and rbd-mirror.

Two real clusters (``tests/lab/ceph-lab``; as root) with one OSD each, all on this machine: what is compared is how much
work there is and how well it is done at the same time. Ours is a run of one volume as the daemons do it, between two
processes over mutual TLS on loopback: list both sides and plan, hold, transfer with every block's digest verified,
flush, commit, release. The peer is the pipe of the two commands. The snapshot is there before either begins. Both are
measured in turns, whoever is first by turns as well; the figures are medians.

- First full copy of an image with random data in half of it, each time into a new image.
- What a hundredth of the image, written in scattered pages of 4 KiB, has changed; the image has an object map.
- From a write to a replicated snapshot, both on their shortest schedules (``rbd_delay.py``).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import rbd_delay
from benchmarks.rbd_nodes import GIB, IMAGE, POOL, Cost, Sites, create, digest, fill, scatter, sites
from benchmarks.report import Result, compare
from tests.lab.ceph import Cluster

SUBJECT = "Ceph RBD"
PIPE = "rbd export-diff | rbd import-diff"
FULL_ROUNDS, INCREMENTAL_ROUNDS, DELAY_ROUNDS = 3, 7, 5
FULL_TARGET, INCREMENTAL_TARGET = 1.5, 3.0
CHANGED = 0.01
COMMANDS = ("ceph-mon", "ceph-osd", "rbd", "rbd-mirror")
_SETTLE = 3.0
"""Seconds for what the OSDs still do after writing, so that it is nobody's."""

Way = Callable[[], Cost]


def _name(number: int) -> str:
    return f"replicator_j_20261119T09{number:02d}00.000Z"


def _turn(number: int, ours: Way, pipe: Way) -> tuple[Cost, Cost]:
    """One round: our cost and the pipe's; told as it comes, as it is minutes until the table is there."""
    found: dict[Way, Cost] = {}
    for way in (pipe, ours) if number % 2 else (ours, pipe):
        time.sleep(_SETTLE)
        found[way] = way()
    sys.stderr.write(f"rbd: round {number + 1}: ours {found[ours].wall:.2f} s, pipe {found[pipe].wall:.2f} s\n")
    return found[ours], found[pipe]


def _result(case: str, rounds: Sequence[tuple[Cost, Cost]], target: float | None) -> Result:
    ours, pipe = ([round_[side] for round_ in rounds] for side in (0, 1))

    def median(costs: Sequence[Cost], figure: Callable[[Cost], float]) -> float:
        return statistics.median(figure(cost) for cost in costs)

    wall = [median(costs, lambda cost: cost.wall) for costs in (ours, pipe)]
    result = compare(SUBJECT, case, wall[0], wall[1], PIPE, "s", target=target, less_is_better=True)
    pairs = sorted(theirs.wall / mine.wall for mine, theirs in rounds)
    used = "; ".join(
        f"{name} {median(costs, lambda cost: cost.ours):.2f} s + {median(costs, lambda cost: cost.osds):.2f} s of OSDs"
        for name, costs in (("ours", ours), ("pipe", pipe))
    )
    note = f"rounds {pairs[0]:.2f} to {pairs[-1]:.2f}; processor time: {used}"
    return replace(result, note=note)


def _transfers(where: Sites, quick: bool) -> list[Result]:
    size = GIB // 2 if quick else 4 * GIB
    written = fill(where.source, size, _name(0))
    full: list[tuple[Cost, Cost]] = []
    for number in range(1 if quick else FULL_ROUNDS):
        # New images each time: what was removed is still being worked on by the OSDs long after.
        replica, peer = f"ours-{number}", f"pipe-{number}"
        create(where.target, peer, size)
        full.append(
            _turn(
                number,
                lambda replica=replica: where.ours(replica),  # type: ignore[misc]
                lambda peer=peer: where.pipe(peer, None, _name(0)),  # type: ignore[misc]
            )
        )
    incremental: list[tuple[Cost, Cost]] = []
    for number in range(2 if quick else INCREMENTAL_ROUNDS):
        base, to = _name(number), _name(number + 1)
        scatter(where.source, size, CHANGED, to, seed=number)
        incremental.append(
            _turn(
                number,
                lambda: where.ours(replica),
                lambda base=base, to=to: where.pipe(peer, base, to),  # type: ignore[misc]
            )
        )
    copies = [(where.source, IMAGE), (where.target, f"{POOL}/one/{replica}"), (where.target, peer)]
    found = {digest(cluster, f"{image}@{to}") for cluster, image in copies}
    assert len(found) == 1, "the copies differ"
    sizes = f"{size / GIB:g} GiB"
    return [
        _result(f"first full copy, {written / GIB:.1f} of {sizes} written", full, None if quick else FULL_TARGET),
        _result(
            f"{CHANGED:.0%} of {sizes} changed, scattered 4 KiB", incremental, None if quick else INCREMENTAL_TARGET
        ),
    ]


def _delay(source: Cluster, target: Cluster, folder: Path, quick: bool) -> Result:
    ours, mirrored = rbd_delay.delays(source, target, folder, 1 if quick else DELAY_ROUNDS)
    result = compare(
        SUBJECT,
        f"write to replicated snapshot, every {rbd_delay.SCHEDULE}",
        statistics.median(ours),
        statistics.median(mirrored),
        f"rbd-mirror, every {rbd_delay.MIRROR_SCHEDULE}",
        "s",
        less_is_better=True,
    )
    note = f"ours {min(ours):.1f} to {max(ours):.1f} s, rbd-mirror {min(mirrored):.1f} to {max(mirrored):.1f} s"
    return replace(result, note=note)


def run(quick: bool) -> list[Result]:
    """The figures; none where there is no Ceph."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if os.geteuid() != 0 or missing:
        sys.stderr.write(f"rbd: left out: it takes root and Ceph (.ci/packages test); missing: {missing}\n")
        return []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rbd-", dir="/var/tmp")))
        (folder / "identities").mkdir()
        source = stack.enter_context(Cluster.up(f"bench-source-{os.getpid()}"))
        target = stack.enter_context(Cluster.up(f"bench-target-{os.getpid()}"))
        with sites(source, target, folder / "identities") as where:
            results = _transfers(where, quick)
        results.append(_delay(source, target, folder, quick))
    return results
