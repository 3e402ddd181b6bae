"""What systemd hears of a real daemon, and whether what it forbids the daemon is what the daemon does not need."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replicator.demo.node import DemoNode, loopback_network
from replicator.service_manager import ServiceManager, Watchdog
from tests.support.cluster import JOB, MIB, change, cluster, fill, idle

pytestmark = pytest.mark.timeout(400)

PACKAGING = Path(__file__).parents[2] / "packaging"
PATIENCE = 90.0


class Manager:
    """The socket of a service manager."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(PATIENCE)

    def hears(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


def test_it_hears_that_the_daemon_is_ready_alive_and_stopping(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = loopback_network()
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "copies").mkdir()
    fill(images / "disk.raw", MIB)
    node = DemoNode("a", tmp_path / "a")
    seen = tmp_path / "environment"
    node.configure(
        f"{prefix}.1:8571", cluster=f"{prefix}.0/24", http="",
        rest=f'[storage.images]\nkind = "image"\npath = "{images}"\n[storage.copies]\nkind = "image"\n'
        f'path = "{tmp_path}/copies"\n[job.{JOB}]\nsource = "images:*"\ntargets = ["copies"]\nschedule = "1h"\n'
        f'quiesce = {{before = ["cp", "/proc/self/environ", "{seen}"], after = ["true"]}}\n',
    )  # fmt: skip
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    try:
        node.start()
        assert manager.hears() in (["READY=1", "STATUS=a: 1 jobs, 0 peers"], ["WATCHDOG=1"])
        for _ in range(3):
            assert manager.hears()[0] in ("WATCHDOG=1", "READY=1")
        node.must("sync", JOB)
        assert b"REPLICATOR_HOOK=before" in seen.read_bytes()
        assert b"NOTIFY_SOCKET" not in seen.read_bytes(), "hooks could speak for the daemon"
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        told = manager.hears()
        while told == ["WATCHDOG=1"]:
            told = manager.hears()
        assert told[0] == "STOPPING=1"
        assert node.process.wait(30) == 0
    finally:
        node.stop()


def test_the_configuration_is_read_anew_while_a_transfer_goes_on(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first rate the transfer would take a quarter of an hour; it is one transfer from beginning to end."""
    with cluster(tmp_path, job='schedule = "1h"\nrate_limit = "32KiB/s"') as pair:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        pair.a.stop()
        pair.a.start()
        monkeypatch.delenv("NOTIFY_SOCKET")
        assert manager.hears()[0] == "READY=1"
        fill(pair.image, 32 * MIB)
        running = subprocess.Popen(
            pair.a.argv("sync", JOB, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            pair.until(lambda row: row.progress is not None and row.progress.done > 0)
            assert pair.a.process is not None
            text = pair.a.config.read_text()

            def reload(changed: str) -> str:
                """What the log says then."""
                assert pair.a.process is not None
                before = len(pair.a.log.read_text())
                pair.a.config.write_text(changed)
                pair.a.process.send_signal(signal.SIGHUP)
                told = manager.hears()
                assert told[0] == "RELOADING=1"
                assert re.fullmatch(r"MONOTONIC_USEC=[0-9]+", told[1])
                assert manager.hears()[0] == "READY=1"
                return pair.a.log.read_text()[before:]

            wrong = reload(text.replace('"32KiB/s"', '"fast"'))
            assert 'event="configuration not read anew"' in wrong
            assert "job.j.rate_limit" in wrong
            assert running.poll() is None
            well = reload(text.replace('"32KiB/s"', '"500MiB/s"').replace('"1h"', '"2h"'))
            assert 'event="configuration read anew" needs_restart=job.j' in well
            output, _ = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
            running.wait()
        (report,) = json.loads(output)
        assert (report["outcome"], report["attempts"]) == ("ok", 1)
        pair.assert_equal()


def test_who_does_not_come_round_is_not_alive(tmp_path: Path, manager: Manager) -> None:
    """It is told as often as it was so, and never when it was not."""
    answers = iter([True, False, False, False, True])
    asked = threading.Event()

    def alive() -> bool:
        answer = next(answers, None)
        if answer is None:
            asked.set()
        return bool(answer)

    told = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000"})
    watchdog = Watchdog(told, alive)
    watchdog.start()
    assert asked.wait(PATIENCE)
    watchdog.stop()
    manager.socket.setblocking(False)
    assert [manager.hears() for _ in range(2)] == [["WATCHDOG=1"]] * 2
    with pytest.raises(BlockingIOError):
        manager.hears()


def test_what_the_environment_says() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind(f"\0replicator-test-{os.getpid()}")
        abstract.settimeout(PATIENCE)
        environment = {"NOTIFY_SOCKET": f"@replicator-test-{os.getpid()}", "WATCHDOG_USEC": "5000000", "HOME": "/"}
        told = ServiceManager(environment)
        assert environment == {"HOME": "/"}
        assert told.watchdog == 5.0
        told.ready("well")
        assert abstract.recv(4096) == b"READY=1\nSTATUS=well"
    told.alive()  # nobody listens any more, and that is no problem of ours
    assert ServiceManager({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).watchdog is None
    for nonsense in ("", "0", "soon", "-1"):
        assert ServiceManager({"WATCHDOG_USEC": nonsense}).watchdog is None
    ServiceManager({}).ready("nobody asked")


# -- the unit


def installed(folder: Path, *, root: bool) -> Path:
    """The unit in a directory of its own, with the drop-in for root or without; its command is one that is there."""
    unit = folder / "replicator.service"
    text = (PACKAGING / "replicator.service").read_text()
    assert "\nExecStart=replicator serve\n" in text
    unit.write_text(text.replace("ExecStart=replicator", "ExecStart=/bin/true"))
    if root:
        (folder / "replicator.service.d").mkdir()
        (folder / "replicator.service.d" / "root.conf").write_text((PACKAGING / "root.conf").read_text())
    return unit


@pytest.mark.tier("systemd")
@pytest.mark.parametrize(("root", "exposure"), [(False, 20), (True, 45)], ids=["user", "root"])
def test_the_unit_is_verified_and_exposes_little(tmp_path: Path, root: bool, exposure: int) -> None:
    unit = installed(tmp_path, root=root)
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    words = ["systemd-analyze", "verify", "--man=no", str(unit)]
    verified = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={exposure}", str(unit)]
    secure = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert secure.returncode == 0, secure.stdout[-400:]
    has_root = "✗ User=/DynamicUser=" in secure.stdout
    assert has_root is root, "the drop-in is read"


@pytest.mark.tier("systemd")
def test_sysusers_makes_the_user_of_the_unit(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    words = ["systemd-sysusers", f"--root={tmp_path}", str(PACKAGING / "replicator.sysusers")]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    user = next(
        line for line in (tmp_path / "etc" / "passwd").read_text().splitlines() if line.startswith("replicator:")
    )
    assert user.endswith(":/var/lib/replicator:/usr/sbin/nologin")
    assert "\nUser=replicator\n" in (PACKAGING / "replicator.service").read_text()


def system_calls() -> tuple[set[str], set[str]]:
    """All that systemd knows, and those that the unit allows with the drop-in for root, as whom the tests run (SQLite,
    for one, calls fchown only as root)."""
    shown = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    groups: dict[str, set[str]] = {}
    for line in shown.splitlines():
        if line.startswith("@"):
            group = groups.setdefault(line.strip(), set())
        elif line.startswith("    ") and not line.strip().startswith("#"):
            group.add(line.strip())

    def calls(name: str) -> set[str]:
        return set().union(*(calls(each) if each.startswith("@") else {each} for each in groups[name]))

    allowed: set[str] = set()
    unit = "".join((PACKAGING / name).read_text() for name in ("replicator.service", "root.conf"))
    for line in unit.splitlines():
        if found := re.match(r"SystemCallFilter=(~?)(.*)", line):
            named = set().union(*(calls(name) for name in found[2].split()))
            allowed = allowed - named if found[1] else allowed | named
    return calls("@known"), allowed


@pytest.mark.tier("root", "systemd", "strace")
def test_replication_of_images_makes_no_system_call_that_the_unit_forbids(tmp_path: Path) -> None:
    known, allowed = system_calls()
    assert {"read", "openat", "ioctl", "copy_file_range"} <= allowed
    forbidden = ",".join(f"?{name}" for name in sorted(known - allowed))
    log = tmp_path / "forbidden"
    strace = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", "signal=none", "-o", str(log), "-e", f"trace={forbidden}")
    with cluster(tmp_path) as pair:
        pair.stop()
        try:
            for node in (pair.a, pair.b):
                node.runner = tuple(f"{log}-{node.name}" if word == str(log) else word for word in strace)
                node.start()
                node.runner = ()
            fill(pair.image, 4 * MIB)
            pair.a.must("sync", JOB)
            change(pair.image, seed=3)
            pair.a.must("sync", JOB)
            pair.until(idle)
            pair.assert_equal()
            pair.a.must("verify", "images:disk.raw")
        finally:
            for node in (pair.a, pair.b):
                stop_child(node)
    for name in ("a", "b"):
        assert Path(f"{log}-{name}").read_text() == ""


def stop_child(node: DemoNode) -> None:
    """End the daemon itself, which is a child of strace: that would let go of it."""
    if node.process is None:
        return
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while node.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    node.process = None
