"""From a newer OpenZFS to an older one: what both know arrives; what the older one lacks is refused with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import deploy
from tests.lab.guests import Lab, Node

POOL, FOLDER = "versions", "/srv/streams"
_SECONDS = 1800

pytestmark = [pytest.mark.tier("guests"), pytest.mark.long, pytest.mark.timeout(7200)]

MAKE = """
set -e
zpool create -f -O mountpoint=none versions /dev/ubdc
zfs create versions/root
rm -rf /srv/streams; mkdir -p /srv/streams
"""
VOLUMES = """
set -e
head -c 32 /dev/urandom > /root/key
zfs create -s -V 4M versions/root/zvol
for v in fs secret; do
    options="-o mountpoint=/mnt/$v -o compression=zstd -o recordsize=1M"
    [ $v = fs ] || options="$options -o encryption=on -o keyformat=raw -o keylocation=file:///root/key"
    zfs create $options versions/root/$v
    head -c 3000000 /dev/urandom > /mnt/$v/file
done
until [ -e /dev/zvol/versions/root/zvol ]; do sleep 0.1; done
dd if=/dev/urandom of=/dev/zvol/versions/root/zvol bs=1M count=2 conv=fsync 2> /dev/null
"""
LONG_NAME = """
set -e
zfs set longname=on versions/root/fs
touch /mnt/fs/$(head -c 300 /dev/zero | tr '\\0' x)
"""


def shell(node: Node, script: str) -> str:
    return node.run("sh", "-c", script, timeout=_SECONDS).out


def phase(node: Node, name: str) -> str:
    """A phase of tests/support/zfs_user.py; what was refused."""
    argv = (deploy.PYTHON, "-m", "tests.support.zfs_user", name, "versions/root", FOLDER)
    return node.run(*argv, cwd=deploy.SOURCE, timeout=_SECONDS, check=False).out


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    """One guest with OpenZFS 2.3, and one with 2.1."""
    with Lab("trixie", "test-newer") as newer, Lab("bookworm", "test-older") as older:
        made = newer.up(1)[0], older.up(1)[0]
        for node in made:
            deploy.deploy(node)
        yield made


def carry(newer: Node, older: Node, folder: Path) -> None:
    newer.get(FOLDER, folder)
    older.put(folder / Path(FOLDER).name, str(Path(FOLDER).parent))


def test_what_both_know_arrives_and_a_feature_that_one_lacks_is_refused(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    newer, older = nodes
    for node in nodes:
        shell(node, MAKE)
    shell(newer, VOLUMES)
    assert phase(newer, "source") == ""
    carry(newer, older, tmp_path)
    assert phase(older, "target") == ""
    for volume in ("zvol", "fs", "secret"):
        names = (f"versions/root/{volume}@two", f"versions/root/prox1/below/{volume}@two")
        guids = {
            node.run("zfs", "get", "-H", "-o", "value", "guid", name).out
            for node, name in zip(nodes, names, strict=True)
        }
        assert len(guids) == 1
    for node in nodes:
        shell(node, "zpool destroy versions")
        shell(node, MAKE)
    shell(newer, VOLUMES)
    shell(newer, LONG_NAME)
    assert phase(newer, "source") == ""
    carry(newer, older, tmp_path)
    (said,) = [line for line in phase(older, "target").splitlines() if line]
    assert said.startswith("first fs: storage store: receiving versions/root/prox1/below/fs@one failed: ")
    assert "feature" in said
    assert "[unsupported]" in said
    assert "prox1/below/fs" not in shell(older, "zfs list -H -o name -r versions")
