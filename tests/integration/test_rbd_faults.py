"""What happens to either of two Ceph clusters, or to a node, while images go from one to the other: an error that says
what is wrong, nothing complete is lost, and it converges by itself once the cause is gone."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.rbd.binding import load
from replicator.control import RunReport
from replicator.errors import ReplicatorError
from tests.lab.ceph import Cluster, Daemon
from tests.support.rbd_case import purge
from tests.support.sites import JOB, MIB, Site, Sites, Who, sites

# Each waits for what a cluster takes to notice; together a quarter of an hour.
pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(900), pytest.mark.long]
SIDES = ["source", "target"]
SLOW = 'rate_limit = "8MiB/s"\nkeep = {source = "last=8", target = "last=8"}'
VM = "vms:vm"
LOCK_SECONDS = 60
"""After which the lock of a process that died is free."""
DEFAULT_RATIOS = {"nearfull": 0.85, "backfillfull": 0.9, "full": 0.95}


def noise(size: int, seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(size)


@pytest.fixture
def pair(tmp_path: Path, ceph_sites: Mapping[str, Cluster]) -> Iterator[Sites]:
    """Two sites, with a volume that is replicated, and changes of it that are not yet."""
    with sites(tmp_path, ceph_sites, job=SLOW) as made:
        begin(made)
        yield made


def begin(pair: Sites) -> None:
    pair.source.case.create("vm", noise(4 * MIB, 0))
    pair.must_sync()
    change(pair, 1)


def change(pair: Sites, seed: object, size: int = 24 * MIB) -> None:
    """Many bytes of the volume are new."""
    pair.source.case.write("vm", 0, noise(size, seed))


def live(pair: Sites) -> bytes:
    return pair.source.case.read("vm")


def check_complete(pair: Sites, before: list[str]) -> None:
    """What was complete is still there, on both sides, and whole."""
    assert set(before) <= set(pair.common("vm"))
    pair.assert_equal("vm")


def check_error(report: RunReport, *codes: str) -> None:
    """It failed in a way that an administrator can do something with."""
    assert report.outcome == "failed", report
    assert report.code in codes, report
    assert report.message
    assert report.hint


def converge(pair: Sites, *, tidy: bool = True) -> None:
    """Runs go on until one succeeds; then all is there, and nothing is left over."""
    deadline = time.monotonic() + LOCK_SECONDS + 60
    while (report := sync_or_error(pair)).outcome != "ok":
        assert report.code in ("volume_busy", "storage_unavailable", "no_such_snapshot", "peer_unreachable"), report
        assert time.monotonic() < deadline, report
    newest = pair.assert_equal("vm")
    assert pair.target.read("vm", newest) == live(pair)
    if tidy:
        pair.assert_tidy()


# -- the clusters


@pytest.mark.parametrize("daemon", ["osd", "mon"])
@pytest.mark.parametrize("side", SIDES)
def test_a_daemon_of_a_cluster_is_killed_and_started_again(pair: Sites, side: str, daemon: Daemon) -> None:
    before = pair.common("vm")
    cluster = pair.side(side).cluster

    def restart() -> None:
        cluster.crash(daemon)
        cluster.start(daemon)

    report = pair.sync(restart, 4 * MIB)
    if report.outcome != "ok":
        check_error(report, "storage_unavailable", "volume_busy")
    check_complete(pair, before)
    converge(pair)


@pytest.mark.parametrize("daemon", ["osd", "mon"])
@pytest.mark.parametrize("side", SIDES)
def test_a_daemon_of_a_cluster_stays_away(pair: Sites, side: str, daemon: Daemon) -> None:
    before = pair.common("vm")
    cluster = pair.side(side).cluster
    cluster.crash(daemon)
    try:
        report = pair.sync()
        check_error(report, "storage_unavailable")
        assert "ceph -s" in report.hint
    finally:
        cluster.start(daemon)
    check_complete(pair, before)
    converge(pair)


@contextmanager
def full(cluster: Cluster) -> Iterator[None]:
    """The cluster says that it is full, as it holds more than next to nothing."""
    set_ratios(cluster, dict.fromkeys(DEFAULT_RATIOS, 0.0001), full=True)
    try:
        yield
    finally:
        set_ratios(cluster, DEFAULT_RATIOS, full=False)


def set_ratios(cluster: Cluster, ratios: Mapping[str, float], *, full: bool) -> None:
    for name in sorted(ratios, key=ratios.__getitem__, reverse=not full):
        cluster.run("ceph", "osd", f"set-{name}-ratio", str(ratios[name]))
    deadline = time.monotonic() + 100
    while ("full" in flags(cluster)) != full:  # the OSDs report, and the monitors mark the pools
        assert time.monotonic() < deadline, cluster.run("ceph", "health", "detail")
        time.sleep(0.1)


def flags(cluster: Cluster) -> list[str]:
    """Of the pool."""
    pools = json.loads(cluster.run("ceph", "osd", "pool", "ls", "detail", "--format", "json").splitlines()[-1])
    found: str = next(pool["flags_names"] for pool in pools if pool["pool_name"] == "rbd")
    return found.split(",")


def test_a_target_that_is_full_says_so_and_makes_room(pair: Sites) -> None:
    before = pair.common("vm")
    with full(pair.target.cluster):
        report = pair.sync()
        check_error(report, "no_space")
        assert "full" in report.message
        check_complete(pair, before)
        row = json.loads(pair.b.must("check", "--json"))
        assert any("OSD_FULL" in json.dumps(finding) for finding in row)
        with pair.target.case.session() as session:  # what is destroyed makes room, also now
            purge(session, pair.target.case.naming.place("a/vm"))
    assert pair.target.snapshots("vm") == []


def test_a_target_that_becomes_full_in_the_middle_keeps_what_it_has(pair: Sites) -> None:
    before = pair.common("vm")
    set_ratios(pair.target.cluster, DEFAULT_RATIOS, full=False)
    quota = str(16 * MIB)
    pair.target.cluster.run("ceph", "osd", "pool", "set-quota", "rbd", "max_bytes", quota)
    try:
        change(pair, 2, 48 * MIB)
        report = pair.sync()
        deadline = time.monotonic() + 60
        while report.outcome == "ok":  # the monitors notice that the quota is passed a while later
            assert time.monotonic() < deadline
            change(pair, time.monotonic(), 16 * MIB)
            report = pair.sync()
        check_error(report, "no_space")
        assert "quota" in report.message
        check_complete(pair, before)
    finally:
        pair.target.cluster.run("ceph", "osd", "pool", "set-quota", "rbd", "max_bytes", "0")
        deadline = time.monotonic() + 60
        while "full_quota" in flags(pair.target.cluster):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    converge(pair)


def test_a_source_that_is_full_is_replicated_all_the_same(pair: Sites) -> None:
    with full(pair.source.cluster):
        pair.must_sync()
        newest = pair.assert_equal("vm")
    assert pair.target.read("vm", newest) == live(pair)
    converge(pair)


@contextmanager
def unreachable(site: Site) -> Iterator[None]:
    site.unreachable()
    try:
        yield
    finally:
        site.reachable()


@pytest.mark.parametrize("side", SIDES)
def test_a_cluster_that_cannot_be_reached(tmp_path: Path, ceph_sites: Mapping[str, Cluster], side: str) -> None:
    with sites(tmp_path, ceph_sites) as pair:
        begin(pair)
        before = pair.common("vm")
        site = pair.side(side)
        site.node.stop()
        with unreachable(site):
            site.node.start()
            report = sync_or_error(pair)
            assert report.code == "storage_unavailable", report
            assert "cannot be reached" in report.message
            assert "ceph -s" in report.hint
        check_complete(pair, before)
        converge(pair)


def sync_or_error(pair: Sites) -> RunReport:
    """A run, or why there was none, as a report."""
    try:
        return pair.sync()
    except ReplicatorError as error:
        return RunReport(
            JOB, VM, "b:copies", "failed", 0, 0, 0, 0, message=str(error), hint=error.hint, code=error.code
        )


@pytest.mark.parametrize("side", SIDES)
def test_a_cluster_that_stops_answering_in_the_middle(pair: Sites, side: str) -> None:
    before = pair.common("vm")
    site = pair.side(side)
    try:
        report = pair.sync(site.unreachable, 4 * MIB)
    finally:
        site.reachable()
    check_error(report, "storage_unavailable", "deadline_exceeded")
    check_complete(pair, before)
    converge(pair)


@pytest.mark.parametrize("side", SIDES)
def test_a_client_is_blocklisted(pair: Sites, side: str) -> None:
    before = pair.common("vm")
    site = pair.side(side)
    try:
        report = pair.sync(lambda: blocklist(site), 4 * MIB)
        if report.outcome != "ok":
            check_error(report, "storage_unavailable", "volume_busy")
        check_complete(pair, before)
        converge(pair)
    finally:
        site.cluster.run("ceph", "osd", "blocklist", "clear")


def blocklist(site: Site) -> None:
    """All clients of the cluster."""
    sessions = json.loads(site.cluster.run("ceph", "tell", "mon.a", "sessions"))
    for found in sessions:
        if found["name"].startswith("client."):
            address = found["addrs"]["addrvec"][0]
            site.cluster.run("ceph", "osd", "blocklist", "add", f"{address['addr']}/{address['nonce']}", "60")
    site.case.hands.close()  # they make another connection


# -- users


@pytest.mark.parametrize("side", SIDES)
def test_a_user_whose_capabilities_come_late(tmp_path: Path, ceph_sites: Mapping[str, Cluster], side: str) -> None:
    cluster = ceph_sites[side]
    name = f"late-{side}"
    who = Who(name, cluster.user(name, mon="profile rbd"))
    with sites(tmp_path, ceph_sites, users={side: who}) as pair:
        pair.source.case.create("vm", noise(4 * MIB, 0))
        for osd in (None, "profile rbd-read-only pool=rbd"):
            if osd is not None:
                cluster.run("ceph", "auth", "caps", f"client.{name}", "mon", "profile rbd", "osd", osd)
            report = sync_or_error(pair)
            assert report.outcome == "failed", report
            assert f"client.{name}" in report.message, report
            assert "ceph auth caps" in report.hint, report
            checked = pair.side(side).node.run("check")
            assert checked.returncode == 1, checked.stdout
            assert f"ceph auth caps client.{name}" in checked.stdout
        cluster.run("ceph", "auth", "caps", f"client.{name}", "mon", "profile rbd", "osd", "profile rbd pool=rbd")
        deadline = time.monotonic() + 60
        while (report := sync_or_error(pair)).outcome != "ok":  # the first still uses the connection that was refused
            assert report.code == "storage", report
            assert time.monotonic() < deadline, report
        converge(pair)


def test_a_key_of_another_cluster_is_refused(tmp_path: Path, ceph_sites: Mapping[str, Cluster]) -> None:
    wrong = ceph_sites["target"].user("mixed", mon="profile rbd", osd="profile rbd pool=rbd")
    ceph_sites["source"].user("mixed", mon="profile rbd", osd="profile rbd pool=rbd")
    with sites(tmp_path, ceph_sites, users={"source": Who("mixed", wrong)}) as pair:
        report = sync_or_error(pair)
        assert "refuses the user's key" in report.message, report
        assert str(wrong) in report.hint


# -- images and snapshots


def test_the_source_image_is_removed_in_the_middle(pair: Sites) -> None:
    before = pair.target.snapshots("vm")
    contents = {name: pair.target.read("vm", name) for name in before}
    change(pair, 2, 96 * MIB)

    def remove() -> None:
        pair.source.purge("vm")
        pair.source.rbd("rm", "--no-progress", pair.source.spec("vm"))

    report = pair.sync(remove, 4 * MIB)
    check_error(report, "no_such_snapshot", "no_such_volume")
    assert "vms:vm" in report.message
    assert pair.target.snapshots("vm") == before, "what was read of an image that is gone became a version"
    assert {name: pair.target.read("vm", name) for name in before} == contents
    assert pair.a.run("status").returncode != 0
    pair.source.case.create("vm", noise(4 * MIB, 3))  # another one takes its name
    report = pair.sync()
    assert report.outcome == "conflict"
    assert "resync" in report.hint
    pair.a.must("resync", VM, "--yes")
    assert set(before) <= set(pair.target.snapshots("vm"))
    converge(pair)


@pytest.mark.parametrize("side", SIDES)
def test_all_snapshots_are_purged_in_the_middle(pair: Sites, side: str) -> None:
    change(pair, 2, 96 * MIB)
    report = pair.sync(lambda: pair.side(side).purge("vm"), 4 * MIB)
    if side == "source":
        assert report.outcome in ("failed", "conflict"), report
    if report.outcome != "ok":
        assert pair.sync().outcome == "conflict"
        theirs = pair.target.snapshots("vm")
        pair.a.must("resync", VM, "--yes")
        assert set(theirs) <= set(pair.target.snapshots("vm"))
    change(pair, 3)
    converge(pair)


def test_the_target_image_is_removed_between_two_runs(pair: Sites) -> None:
    pair.target.purge("vm")
    pair.target.rbd("rm", "--no-progress", pair.target.spec("vm"))
    report = pair.sync()
    if report.outcome != "ok":
        assert report.outcome == "conflict"
        assert "resync" in report.hint
        pair.a.must("resync", VM, "--yes")
    converge(pair)


def test_the_target_image_cannot_be_removed_in_the_middle(pair: Sites) -> None:
    refused: list[object] = []

    def remove() -> None:
        with pair.target.case.session() as session, session.ioctx(pair.target.case.namespace or "") as ioctx:
            try:
                session.pool.remove(ioctx, pair.target.case.naming.place("a/vm").image)
            except load().rbd.Error as error:
                refused.append(error)

    assert pair.sync(remove, 4 * MIB).outcome == "ok"
    assert refused
    converge(pair)


# -- the nodes


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("side", SIDES)
def test_a_daemon_is_killed_at_any_moment(pair: Sites, side: str, count: Callable[[int, int], int]) -> None:
    seed = random.Random(f"kill {side}")
    node = pair.side(side).node
    for number in range(count(2, 20)):
        change(pair, number, 16 * MIB)
        before = pair.common("vm")[-2:]
        moment = seed.choice(("begin", "middle", "end"))
        kill_during(pair, side, moment, seed)
        check_complete(pair, before)
        node.start()
        converge(pair, tidy=False)
        change(pair, f"small {number}", 4096)  # the next receive puts in order what a cut after the commit has left
        converge(pair)


def kill_during(pair: Sites, side: str, moment: str, seed: random.Random) -> None:
    """A run in which the daemon of one side dies."""
    node = pair.side(side).node
    after = {"begin": 0, "middle": seed.randrange(4 * MIB, 12 * MIB), "end": 16 * MIB - 1}[moment]
    dying = threading.Event()

    def kill() -> None:
        node.kill()
        dying.set()

    try:
        report = pair.sync(kill, after)
    except ReplicatorError:
        assert side == "source"
    except AssertionError:
        if dying.is_set():
            raise
        node.kill()  # it was done before its last progress was told
    else:
        assert report.outcome == "ok" or report.hint, report


# -- what Ceph's own tools say


def test_the_tools_of_ceph_agree(pair: Sites) -> None:
    pair.must_sync()
    with pair.source.case.image("vm") as image:
        image.resize(40 * MIB)
        image.write(noise(4096, "a"), 8192)
        image.write(noise(MIB, "b"), 30 * MIB + 512)
        image.discard(4 * MIB, 8 * MIB)
        image.write(noise(70_000, "c"), 21 * MIB)
    pair.must_sync()
    with pair.source.case.image("vm") as image:
        image.resize(22 * MIB)
        image.write_zeroes(MIB, 2 * MIB)
        image.write(noise(4096, "d"), 0)
    pair.must_sync()
    names = pair.common("vm")
    assert len(names) >= 3
    for number, name in enumerate(names):
        base = ["--from-snap", names[number - 1]] if number else []
        for argv in (["diff", *base], ["export-diff", "--no-progress", *base], ["export", "--no-progress"]):
            said = [
                output(site, [*argv, f"{site.spec('vm')}@{name}", *to(argv)]) for site in (pair.source, pair.target)
            ]
            assert said[0] == said[1], (argv, name)


def to(argv: list[str]) -> list[str]:
    return ["-"] if argv[0].startswith("export") else []


def output(site: Site, argv: list[str]) -> str:
    """What a command of RBD writes: text, or the digest of a stream."""
    done = subprocess.run(
        ["rbd", "-c", str(site.cluster.conf), *argv],
        capture_output=True,
        check=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.decode() if argv[0] == "diff" else hashlib.sha256(done.stdout).hexdigest()
