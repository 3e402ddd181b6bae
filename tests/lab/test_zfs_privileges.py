"""As a user who is not root: the documented rights are enough, each of them is needed, and what is missing is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from backends.zfs.privileges import SOURCE, TARGET
from tests.lab import deploy
from tests.lab.guests import Done, Lab, Node

NODES = 1
SAMPLED = ("trixie",)
POOL, USER, FOLDER = "allowed", "replicator", "/srv/streams"
SRC, DST = f"{POOL}/src", f"{POOL}/dst"
_SECONDS = 1800

pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(7200)]

SETUP = """
set -e
id $USER > /dev/null 2>&1 || useradd --create-home $USER
zpool create -f -O mountpoint=none $POOL /dev/ubdc
install -d -o $USER $FOLDER
"""
MAKE = """
set -e
for d in $SRC $DST; do
    ! zfs list $d > /dev/null 2>&1 || zfs list -H -o name,userrefs -t snapshot -r $d | while read s n; do
        [ "$n" = 0 ] || zfs release replicator:vms:prox2:backup "$s"
    done
    zfs destroy -R $d 2> /dev/null || true
    zfs create $d
done
head -c 32 /dev/urandom > /root/key
zfs create -s -V 4M $SRC/zvol
zfs create -o mountpoint=/mnt/fs $SRC/fs
zfs create -o mountpoint=/mnt/secret -o encryption=on -o keyformat=raw -o keylocation=file:///root/key $SRC/secret
for i in 1 2 3 4 5 6 7 8; do head -c 100000 /dev/urandom | tee /mnt/fs/$i > /mnt/secret/$i; done
until [ -e /dev/zvol/$SRC/zvol ]; do sleep 0.1; done
dd if=/dev/urandom of=/dev/zvol/$SRC/zvol bs=1M count=2 conv=fsync 2> /dev/null
"""

# What zfs is asked to do, in the same way and order, but without a Python to start each time.
AS_SOURCE = """
set -e; s=$SRC/fs
zfs snapshot $s@$R
zfs hold replicator:t $s@$R
zfs bookmark $s@$R $s#$R
zfs send $s@$R > /dev/null
zfs release replicator:t $s@$R
zfs destroy $s#$R
zfs destroy $s@$R
zfs set replicator:x=$R $s
"""
AS_TARGET = """
set -e; p=$DST/$R; r=$p/replica
zfs create -u -o canmount=off -o mountpoint=none -o replicator:placeholder=$p $p
zfs receive -s -u -x mountpoint -o readonly=on -o canmount=noauto -o replicator:x=y $r < $FOLDER/stream
zfs set readonly=on replicator:x=z $r
zfs hold replicator:t $r@stream
zfs release replicator:t $r@stream
zfs snapshot $r@own
zfs clone -o readonly=on -o canmount=noauto -o replicator:x=y $r@stream $p/passage
zfs promote $p/passage
zfs rename $r $p/kept
zfs rename $p/passage $r
zfs send $r@stream > /dev/null
zfs destroy $p/kept@own
head -c 300000 $FOLDER/stream | zfs receive -s -u $p/part 2> /dev/null || true
zfs receive -A $p/part
"""


def shell(node: Node, script: str, *, check: bool = True) -> Done:
    names = {"USER": USER, "POOL": POOL, "FOLDER": FOLDER, "SRC": SRC, "DST": DST}
    return node.run("sh", "-c", script, timeout=_SECONDS, check=check, environment=names)


@pytest.fixture(scope="module")
def node(lab: Lab) -> Iterator[Node]:
    (node,) = lab.nodes[:1]
    deploy.deploy(node)
    shell(node, SETUP)
    yield node
    shell(node, "zpool destroy -f $POOL", check=False)


def phase(node: Node, name: str, root: str) -> Done:
    """A phase of tests/support/zfs_user.py as the user."""
    argv = ("runuser", "-u", USER, "--", deploy.PYTHON, "-m", "tests.support.zfs_user", name, root, FOLDER)
    return node.run(*argv, cwd=deploy.SOURCE, timeout=_SECONDS, check=False)


def allow(node: Node, rights: Iterable[str], root: str) -> None:
    shell(node, f"zfs unallow -r {root}; zfs allow -u $USER {','.join(rights)} {root}")


def both(node: Node, source: Iterable[str], target: Iterable[str]) -> str:
    """Everything with these rights; what was refused."""
    shell(node, MAKE)
    allow(node, source, SRC)
    allow(node, target, DST)
    said = phase(node, "source", SRC).out
    if not said:
        said += phase(node, "target", DST).out
    if not said:
        shell(node, "zfs set readonly=off $DST/prox1/below/zvol")
        shell(node, "dd if=/dev/urandom of=/dev/zvol/$DST/prox1/below/zvol bs=4k count=1 conv=fsync")
        said += phase(node, "afterwards", DST).out
    return said


def test_the_documented_rights_are_enough(node: Node) -> None:
    assert both(node, SOURCE, TARGET) == ""
    lacks = {
        root: [line.partition(":")[0] for line in phase(node, "lacking", root).out.splitlines()] for root in (SRC, DST)
    }
    assert lacks == {SRC: ["RECEIVE", "RECEIVE?"], DST: ["SEND", "RECEIVE?"]}
    mounted = shell(node, "zfs get -H -o value -r mounted $DST").out
    assert "yes" not in mounted


def test_what_is_missing_is_named_and_the_command_that_is_named_grants_it(node: Node) -> None:
    shell(node, MAKE)
    shell(node, "zfs unallow -r $SRC; zfs allow -u $USER send,snapshot $SRC")
    refused = phase(node, "source", SRC)
    assert "permission denied" in refused.out.lower() or "not permitted" in refused.out.lower()
    first = phase(node, "lacking", SRC).out.splitlines()[0]
    missing = sorted(set(SOURCE) - {"send", "snapshot"})
    assert first == (
        f"SEND: user {USER} is not allowed to {', '.join(missing)} on {SRC} / "
        f"zfs allow -u {USER} {','.join(missing)} {SRC}"
    )
    shell(node, first.partition(" / ")[2])
    assert phase(node, "source", SRC).out == ""
    assert not phase(node, "lacking", SRC).out.startswith("SEND")


@pytest.mark.long
@pytest.mark.parametrize(("script", "root", "rights"), [(AS_SOURCE, SRC, SOURCE), (AS_TARGET, DST, TARGET)])
def test_each_right_is_needed(node: Node, script: str, root: str, rights: tuple[str, ...]) -> None:
    shell(node, MAKE)
    shell(node, "zfs snapshot $SRC/fs@stream && zfs send $SRC/fs@stream > $FOLDER/stream")
    node.write(f"{FOLDER}/as-user", f"SRC={SRC} DST={DST} FOLDER={FOLDER}\n{script}")
    needless = []
    for left_out in ("", *rights):
        allow(node, [right for right in rights if right != left_out], root)
        run = f"runuser -u $USER -- env R=without-{left_out} sh $FOLDER/as-user"
        done = shell(node, run, check=False)
        if not left_out:
            assert done.status == 0, done
        elif done.status == 0:
            needless.append(left_out)
        else:
            assert "permission" in done.err, (left_out, done)
    assert needless == []
