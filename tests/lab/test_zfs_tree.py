"""A tree of thirty datasets on three nodes: full, incrementals while it is written to, pruning, equal everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.lab import deploy
from tests.lab.contents import Contents
from tests.lab.fleet import Member, described, make_cluster
from tests.lab.guests import Lab, Node

NODES = 3
JOB = "tree"
KEPT = 3

pytestmark = [pytest.mark.tier("guests"), pytest.mark.long, pytest.mark.timeout(7200)]

SOURCE = f"""
[storage.src]
kind = "zfs"
root = "tank/src"
[job.{JOB}]
source = "src:*"
targets = ["node2:copies", "node3:copies"]
enabled = false
keep = {{source = "last={KEPT}", target = "last={KEPT + 2}"}}
"""
TARGET = """
[storage.copies]
kind = "zfs"
root = "tank/copies"
"""

FILESYSTEMS = [
    "app", "app/db", "app/db/log", "app/cache.v2", "my data", "my data/with spaces", "my data/v1.2.3",
    "home", "home/a:b", "home/c_d-e", "home/deep", "home/deep/er", "home/deep/er/still",
    "www", "www/example.org", "www/example.com", "empty", "mail", "mail/in box", "mail/out.box", "srv",
]  # fmt: skip
VOLUMES = ["vm", "vm/100", "vm/disk 1", "vm/disk.2", "vm/thin", "vm/big blocks", "vm/x"]
ENCRYPTED = "vault"
CLONE = "home/fork"


def make_tree(node: Node) -> None:
    """Thirty datasets with something in each."""
    node.run("zpool", "create", "-O", "mountpoint=none", "-O", "compression=on", "tank", "/dev/ubdb")
    node.run("zfs", "create", "-o", "mountpoint=/src", "tank/src")
    for name in FILESYSTEMS:
        node.run("zfs", "create", f"tank/src/{name}")
    node.run("zfs", "create", f"tank/src/{VOLUMES[0]}")
    for name in VOLUMES[1:]:
        block = "64k" if "big" in name else "16k"
        node.run("zfs", "create", "-s", "-V", "16M", "-b", block, f"tank/src/{name}")
    node.run("sh", "-c", "head -c 32 /dev/urandom > /root/key")
    node.run(
        "zfs", "create", "-o", "encryption=on", "-o", "keyformat=raw", "-o", "keylocation=file:///root/key",
        f"tank/src/{ENCRYPTED}",
    )  # fmt: skip
    node.run("zfs", "snapshot", "tank/src/home@before the fork")
    node.run("zfs", "clone", "tank/src/home@before the fork", f"tank/src/{CLONE}")
    write(node, 0)


WRITE = r"""
import os, random, sys, time
seed, seconds = int(sys.argv[1]), float(sys.argv[2])
r = random.Random(seed)
places = [p for p, _, _ in os.walk("/src")]
devices = [os.path.join(p, f) for p, _, files in os.walk("/dev/zvol/tank/src") for f in files if "@" not in f]
until = time.monotonic() + seconds
while True:
    for place in places:
        path = os.path.join(place, f"file {r.randrange(6)}")
        with open(path, "ab") as f:
            f.seek(r.randrange(1 << 18)); f.write(r.randbytes(r.randrange(1, 20000)))
        if r.random() < 0.2:
            os.truncate(path, r.randrange(1 << 18))
        if r.random() < 0.1:
            os.remove(path)
        elif r.random() < 0.2:
            os.setxattr(path, "user.note", r.randbytes(20))
    for device in devices:
        with open(device, "r+b") as f:
            f.seek(r.randrange(1000) * 4096); f.write(r.randbytes(4096)); f.flush(); os.fsync(f.fileno())
    if time.monotonic() > until:
        break
"""


def write(node: Node, seed: int, seconds: float = 0) -> None:
    """Change a little everywhere, once or for some time."""
    node.run(deploy.PYTHON, "-c", WRITE, str(seed), str(seconds), timeout=seconds + 120)


def contents(node: Node, root: str, only: str = "") -> Contents:
    """What all snapshots below a dataset hold, or those of one name; worked out without the product."""
    said = node.run(deploy.PYTHON, "-m", "tests.lab.contents", root, only, cwd=deploy.SOURCE, timeout=1800).out
    return {name: (guid, digest) for name, (guid, digest) in json.loads(said).items()}


def test_three_nodes_hold_the_same_tree(lab: Lab, count: Callable[[int, int], int]) -> None:
    one, two, three = (
        Member(lab.nodes[0], SOURCE),
        Member(lab.nodes[1], TARGET, 'may_push_to = ["copies"]'),
        Member(lab.nodes[2], TARGET, 'may_push_to = ["copies"]'),
    )
    make_tree(one.node)
    for target in (two, three):
        target.node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/ubdb")
        target.node.run("zfs", "create", "tank/copies")
    make_cluster([one, two, three])
    reports = one.sync(JOB)
    assert {report.outcome for report in reports} == {"ok"}, described(reports)
    for step in range(count(2, 10)):
        writing = one.node.start(deploy.PYTHON, "-c", WRITE, str(step + 1), "3600", log="/root/writing.log")
        try:
            reports = one.sync(JOB)
        finally:
            writing.stop("KILL")
        assert {report.outcome for report in reports} == {"ok"}, described(reports)
    reports = one.sync(JOB)
    assert {report.outcome for report in reports} == {"ok"}, described(reports)

    for target in (two, three):  # the copy of an encrypted dataset is not readable without its key
        target.node.run("sh", "-c", "base64 -d > /root/key", data=one.node.run("base64", "/root/key").out)
        name = f"tank/copies/node1/{ENCRYPTED}"
        assert target.zfs("get", "-Hpo", "value", "keystatus", name).strip() == "unavailable"
        target.node.run("zfs", "load-key", "-L", "file:///root/key", name)
    source = contents(one.node, "tank/src")
    datasets = {name.partition("@")[0] for name in source}
    assert datasets == {*FILESYSTEMS, *VOLUMES, ENCRYPTED, CLONE}
    for target in (two, three):
        copy = contents(target.node, "tank/copies/node1")
        common = {name for name in source if name in copy}
        assert {name: copy[name] for name in common} == {name: source[name] for name in common}
        for dataset in datasets:
            kept = [name for name in common if name.startswith(f"{dataset}@replicator_{JOB}_")]
            assert len(kept) == KEPT, f"{target.name}: {dataset} has {kept} in common"
        origin = target.zfs("get", "-Hpo", "value", "origin", f"tank/copies/node1/{CLONE}").strip()
        assert origin == "tank/copies/node1/home@before the fork"
    with one.client() as client:
        rows = client.status().replicas
    assert {row.state for row in rows} == {"ok"}, rows
