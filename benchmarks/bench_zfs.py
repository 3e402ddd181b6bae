"""ZFS in guests: a run in which nothing has changed, beside syncoid and bzfs, and the processor time of sending.

Two guests with OpenZFS 2.1, then two with 2.3 (``tests/lab``; as root). 50
datasets with 50 snapshots each are on both nodes. All three are asked to bring node2 up to date, in turns, and find
nothing to do:

- ours: a run of the job by the daemon of node1, with that of node2 over mutual TLS; the first run, in which it looks
  at what is to be pruned as well, is not counted;
- ``syncoid --recursive --skip-parent --no-sync-snap``: without it, it would make and send a snapshot each time;
- ``bzfs --recursive --skip-parent``, with its default number of threads, and on 2.3 with ``--cache-snapshots`` too.

Theirs go over ssh, whose connections they keep. Sending is compared with ``zfs send -L -e -c | ssh -c
aes128-gcm@openssh.com | zfs receive -s -u`` of the same snapshot: all processor time of both guests.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks.report import Result, compare
from benchmarks.zfs_nodes import PEER, SOURCE, TARGET, Cost, Nodes
from tests.lab.guests import SUITES, Lab

DATASETS, SNAPSHOTS, ROUNDS = 50, 50, 3
SEND_MIB, SEND_ROUNDS = 256, 5
SYNCOID_TARGET = 5.0
BZFS_TARGETS = {"2.1": 1 / 0.6, "2.3": 1 / 0.5}
CPU_TARGET = 1 / 1.15
_SNAPSHOT = "replicator_j_20261119T090000.000Z"


def _medians(ways: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, Cost]:
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            costs[name].append(way())
        _say(f"round {number + 1}", {name: found[-1] for name, found in costs.items()})
    return {name: _median(each) for name, each in costs.items()}


def _say(what: str, costs: Mapping[str, Cost]) -> None:
    """Tell it as it comes, as it is half an hour until the table is there."""
    found = ", ".join(f"{name} {cost.seconds:.2f} s ({cost.cpu:.2f} s of processors)" for name, cost in costs.items())
    sys.stderr.write(f"zfs: {what}: {found}\n")


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(c.seconds for c in costs), statistics.median(c.cpu for c in costs))


def _no_change(nodes: Nodes, version: str, quick: bool) -> list[Result]:
    datasets, snapshots = (10, 10) if quick else (DATASETS, SNAPSHOTS)
    nodes.fill(datasets, snapshots)
    nodes.copy_for_peers(datasets, snapshots)
    nodes.run_job()
    nodes.run_job()
    bzfs = ("bzfs", SOURCE, f"root@node2:{PEER}", "--recursive", "--skip-parent", "--quiet")
    syncoid = ("syncoid", "--recursive", "--skip-parent", "--no-sync-snap", "--quiet", SOURCE, f"root@node2:{PEER}")
    ways: dict[str, Callable[[], Cost]] = {
        "ours": nodes.run_job,
        "syncoid": lambda: nodes.command(*syncoid),
        "bzfs": lambda: nodes.command(*bzfs),
    }
    if version != "2.1":  # it needs snapshots_changed
        ways["bzfs --cache-snapshots"] = lambda: nodes.command(*bzfs, "--cache-snapshots")
    found = _medians(ways, 2 if quick else ROUNDS)
    ours = found.pop("ours")
    case = f"OpenZFS {version}: nothing changed, {datasets} datasets, {datasets * snapshots:,} snapshots"
    results = []
    for name, peer in found.items():
        target = SYNCOID_TARGET if name == "syncoid" else BZFS_TARGETS[version] if name == "bzfs" else None
        target = None if quick else target
        result = compare("ZFS", case, ours.seconds, peer.seconds, name, "s", target=target, less_is_better=True)
        note = f"processor time of both guests: ours {ours.cpu:.1f} s, {name} {peer.cpu:.1f} s"
        results.append(replace(result, note=note))
    return results


def _sending(nodes: Nodes, version: str, quick: bool) -> list[Result]:
    size = 64 if quick else SEND_MIB
    pairs: list[tuple[Cost, Cost]] = []
    for number in range(1 if quick else SEND_ROUNDS):
        name = f"big-{number}"
        dataset = f"{SOURCE}/{name}"
        nodes.fill_with_data(name, size, _SNAPSHOT)
        pipe = (
            f"zfs send -L -e -c {dataset}@{_SNAPSHOT} | ssh -c aes128-gcm@openssh.com root@node2 "
            f"zfs receive -s -u {PEER}/{name}"
        )
        # What the first one reads may still be in the cache for the second.
        if number % 2:
            theirs = nodes.command("sh", "-ec", pipe)
            pairs.append((nodes.run_job(f"src:{name}"), theirs))
        else:
            pairs.append((nodes.run_job(f"src:{name}"), nodes.command("sh", "-ec", pipe)))
        _say(f"sending, round {number + 1}", dict(zip(("ours", "ssh"), pairs[-1], strict=True)))
        for node, gone in ((nodes.two, f"{TARGET}/node1/{name}"), (nodes.two, f"{PEER}/{name}"), (nodes.one, dataset)):
            nodes.destroy(node, gone)
    ours, peer = (_median([pair[side] for pair in pairs]) for side in (0, 1))
    case = f"OpenZFS {version}: sending {size} MiB, processor time of both guests"
    result = compare("ZFS", case, ours.cpu, peer.cpu, "ssh aes128-gcm", "s", target=CPU_TARGET, less_is_better=True)
    return [replace(result, note=f"wall clock: ours {ours.seconds:.1f} s, ssh {peer.seconds:.1f} s")]


def measure(nodes: Nodes, version: str, quick: bool) -> list[Result]:
    """The figures of two guests that are prepared."""
    return [*_sending(nodes, version, quick), *_no_change(nodes, version, quick)]


def run(quick: bool) -> list[Result]:
    """The figures; none where guests cannot be booted."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        sys.stderr.write("zfs: left out: it takes root, and what tests/lab/zfs-lab install brings\n")
        return []
    results: list[Result] = []
    for suite, version in SUITES.items():
        with Lab(suite, name="bench") as lab:
            lab.up(2)
            nodes = Nodes(lab)
            nodes.prepare()
            results += measure(nodes, version, quick)
    return results
