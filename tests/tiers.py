"""What tests need of the machine, and whether it is here.

A test says ``@pytest.mark.tier("xfs")``. Where the machine cannot do that, the test is skipped, and the run's last
lines name the tier with its reason; with CI=true in the environment a tier that is missing fails instead.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from backends.rbd import binding
from replicator.errors import MissingBinding


def _run(*argv: str) -> str:
    """Why the command failed, "" when it did not."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"{argv[0]}: {error.strerror}"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"{argv[0]} failed"])[-1]


def _root() -> str:
    return "" if os.geteuid() == 0 else "needs root"


def _command(name: str, package: str) -> Callable[[], str]:
    def probe() -> str:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        return "" if found else f"needs the command {name}: apt install {package}"

    return probe


def _netns() -> str:
    if reason := _root() or _command("ip", "iproute2")():
        return reason
    name = f"rep-probe-{os.getpid()}"
    reason = _run("ip", "netns", "add", name)
    if not reason:
        _run("ip", "netns", "del", name)
    return reason and f"network namespaces cannot be made here: {reason}"


def _guests() -> str:
    """Machines under User-Mode Linux: see tests/lab."""
    source = Path("/usr/src/linux-source-6.1.tar.xz")
    return (
        _netns()
        or ("" if platform.machine() == "x86_64" else "the guests' kernel is built for x86-64")
        or ("" if source.exists() else f"no {source}: apt install linux-source-6.1 (tests/lab/zfs-lab install)")
        or _command("mmdebstrap", "mmdebstrap")()
        or ("" if Path("/dev/net/tun").exists() else "no /dev/net/tun: the guests have no networks")
    )


def _mountable(fs: str, mkfs: str, package: str, size: int) -> Callable[[], str]:
    def probe() -> str:
        if reason := _root() or _command(mkfs, package)():
            return reason
        with tempfile.TemporaryDirectory() as folder:
            image, mount = Path(folder, "image"), Path(folder, "mount")
            mount.mkdir()
            with image.open("wb") as file:
                file.truncate(size)
            options = ["-F"] if fs == "ext4" else ["-f"]
            reason = _run(mkfs, "-q", *options, str(image)) or _run("mount", "-o", "loop", str(image), str(mount))
            if not reason:
                _run("umount", str(mount))
            return reason and f"{fs} on a loop device cannot be mounted here: {reason}"

    return probe


def _zfs() -> str:
    """A pool ``tank`` that tests may fill: nobody's own machine has one by accident that they may use."""
    if reason := _root() or _command("zfs", "zfsutils-linux")():
        return reason
    if not Path("/lab-init").exists():
        return "tests use a pool only in a guest of tests/lab"
    return _run("zpool", "list", "tank")


def _ceph() -> str:
    """Throw-away clusters: see tests/lab/ceph-lab."""
    commands = (("ceph-mon", "ceph-mon"), ("ceph-mgr", "ceph-mgr"), ("ceph-osd", "ceph-osd"), ("rbd", "ceph-common"))
    for name, package in (*commands, ("uuidgen", "uuid-runtime")):
        if reason := _root() or _command(name, package)():
            return reason
    try:
        binding.load()
    except MissingBinding as error:
        return f"{error}: {error.hint}"
    return ""


PROBES: dict[str, Callable[[], str]] = {
    "root": _root,
    "netns": _netns,
    "guests": _guests,
    "xfs": _mountable("xfs", "mkfs.xfs", "xfsprogs", 320 << 20),
    "btrfs": _mountable("btrfs", "mkfs.btrfs", "btrfs-progs", 160 << 20),
    "ext4": _mountable("ext4", "mkfs.ext4", "e2fsprogs", 32 << 20),
    "sshd": _command("sshd", "openssh-server"),
    "systemd": _command("systemd-analyze", "systemd"),
    "strace": _command("strace", "strace"),
    "promtool": _command("promtool", "prometheus"),
    "zfs": _zfs,
    "ceph": _ceph,
    "rsync": _command("rsync", "rsync"),
}


@cache
def missing(tier: str) -> str:
    """Why ``tier`` cannot run here, "" if it can. :raises KeyError: an unknown tier"""
    return PROBES[tier]()
