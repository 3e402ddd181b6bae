"""The lab holds what the tests of the ZFS backend need of it, and the program runs on its guests."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import deploy
from tests.lab import pytest as guest_pytest
from tests.lab.guests import CLUSTER, CommandFailed, DeadlinePassed, GuestLost, Lab, LabError, Node
from transport import checksum

POOL = "smoke"
SAMPLED = ("trixie",)

# Building the kernel and a root, and booting: the first test of a suite pays for all.
pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def nodes(lab: Lab) -> Iterator[list[Node]]:
    """Two guests, each with our program and a pool on its second disk."""
    for node in lab.nodes:
        node.run("zpool", "create", POOL, "/dev/ubdc")
        deploy.deploy(node)
    yield lab.nodes
    for node in lab.nodes:
        node.run("zpool", "destroy", POOL)


def _pytest(node: Node, *arguments: str) -> str:
    argv = guest_pytest.command("-q", *arguments)
    return node.run(*argv, cwd=deploy.SOURCE, timeout=guest_pytest.RUN_SECONDS / 2).out


def test_openzfs_is_of_the_suites_version(nodes: list[Node]) -> None:
    said = nodes[0].run("zfs", "version").out
    versions = re.findall(r"^zfs-(?:kmod-)?(\d+\.\d+)", said, re.MULTILINE)
    assert versions == [nodes[0].lab.zfs_version] * 2, said


def test_the_binding_is_seen_by_our_python(nodes: list[Node]) -> None:
    program = "import libzfs_core; print(libzfs_core.lzc_exists(b'smoke'), libzfs_core.lzc_exists(b'nothing'))"
    assert nodes[0].run(deploy.PYTHON, "-c", program).out == "True False\n"


def test_a_stream_crosses_the_cluster_network(nodes: list[Node]) -> None:
    one, two = nodes
    one.run("zfs", "create", "smoke/data")
    one.run("dd", "if=/dev/urandom", "of=/smoke/data/file", "bs=1M", "count=8")
    one.run("zfs", "snapshot", "smoke/data@a")
    one.run("sh", "-c", f"zfs send smoke/data@a | ssh {two.name} zfs receive -u smoke/copy")
    guids = [
        node.run("zfs", "get", "-Hpo", "value", "guid", name).out
        for node, name in ((one, "smoke/data@a"), (two, "smoke/copy@a"))
    ]
    assert guids[0] == guids[1]


def test_a_cable_that_is_cut_carries_nothing(nodes: list[Node]) -> None:
    one, two = nodes
    two.cut(CLUSTER)
    try:
        assert one.run("ping", "-c1", "-W2", two.address(), check=False).status != 0
        two.run("true")  # the other network is whole
    finally:
        two.mend(CLUSTER)
    one.run("ping", "-c1", "-w20", two.address())


def test_a_power_cut_loses_what_was_not_synced_and_nothing_else(nodes: list[Node]) -> None:
    node = nodes[1]
    node.run("zfs", "create", "-o", "recordsize=4k", "smoke/cut")
    node.write("/smoke/cut/synced", "synced")
    node.run("zpool", "sync", POOL)
    node.run("zfs", "set", "sync=disabled", "smoke/cut")
    node.run("sh", "-c", "echo 3600 > /sys/module/zfs/parameters/zfs_txg_timeout")
    node.write("/smoke/cut/unsynced", "unsynced")
    assert node.run("ls", "/smoke/cut").out.split() == ["synced", "unsynced"]
    lost: list[LabError] = []

    def wait() -> None:
        try:
            node.run("sleep", "300", timeout=400)
        except LabError as error:
            lost.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    node.crash()
    waiting.join(60)
    node.boot()
    assert not waiting.is_alive()
    assert [type(error) for error in lost] == [GuestLost]
    assert node.read("/smoke/cut/synced") == "synced"
    assert node.run("ls", "/smoke/cut").out.split() == ["synced"]


def test_commands_end_at_their_deadline(nodes: list[Node]) -> None:
    with pytest.raises(DeadlinePassed, match="sleep 60"):
        nodes[0].run("sleep", "60", timeout=2)
    assert nodes[0].run("pgrep", "-x", "sleep", "-a").out.split("\n").count("sleep 60") == 0


def test_a_command_that_fails_says_so_in_its_own_words(nodes: list[Node]) -> None:
    with pytest.raises(CommandFailed, match="dataset does not exist"):
        nodes[0].run("zfs", "list", "smoke/no such dataset")


def test_a_command_that_is_killed_is_not_a_lost_guest(nodes: list[Node]) -> None:
    assert nodes[0].run("sh", "-c", "kill -KILL $$", check=False).status == 137


def test_background_processes_are_ended_and_heard(nodes: list[Node]) -> None:
    process = nodes[0].start("sh", "-c", "echo begun; exec sleep 600", log="/root/background.log")
    assert process.running()
    process.stop()
    assert not process.running()
    assert process.said() == "begun\n"


def test_files_go_there_and_back(nodes: list[Node], tmp_path: Path) -> None:
    source = tmp_path / "some folder"
    source.mkdir()
    (source / "é.bin").write_bytes(bytes(range(256)))
    nodes[0].put(source, "/root/taken")
    (tmp_path / "back").mkdir()
    nodes[0].get("/root/taken/some folder", tmp_path / "back")
    assert (tmp_path / "back" / "some folder" / "é.bin").read_bytes() == bytes(range(256))


def test_the_c_extension_finds_what_this_processor_has(nodes: list[Node]) -> None:
    # A guest's processes run on this host's processor.
    program = "from transport import checksum as c; print(*sorted(c.cpu_features())); print(*c.implementations())"
    said = nodes[0].run(deploy.PYTHON, "-c", program, cwd=deploy.SOURCE).out
    assert said.splitlines() == [" ".join(sorted(checksum.cpu_features())), " ".join(checksum.implementations())]


def test_checksums_are_right_on_this_processor(nodes: list[Node]) -> None:
    assert " passed" in _pytest(nodes[0], "tests/unit/test_checksum.py")


@pytest.mark.long
def test_the_image_storage_keeps_its_contract_here(nodes: list[Node]) -> None:
    # The backend alone: with the endpoints, and on XFS and btrfs, it is tested where that takes seconds.
    assert " passed" in _pytest(nodes[0], "tests/conformance", "-k", "test_backend and image-plain")


@pytest.mark.long
def test_the_demo_holds_here(nodes: list[Node]) -> None:
    if nodes[0].lab.suite == "bookworm":
        pytest.skip("four minutes, and its Python is the host's")
    assert "compared byte by byte: equal" in nodes[0].run("replicator", "demo", timeout=900).out
