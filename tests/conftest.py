"""Fixtures and options that all tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import tiers
from tests.lab.ceph import Cluster

settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile(
    "soak", deadline=None, max_examples=1500, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)

_MISSING = pytest.StashKey[dict[str, str]]()
_PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the large counts in full instead of a sample")
    parser.addoption("--lab", action="store_true", help="run the tests in guests too (tests/lab)")
    parser.addoption("--part", metavar="K/N", help="one of N parts of the tests, spread over all; the same each time")
    parser.addoption("--done", metavar="FILE", help="leave out the tests that are listed there; list those that pass")
    parser.addoption("--lab-attach", metavar="NAME", help="use the lab of that name that is up, and leave it up")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MISSING] = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell starts what runs in the background. Programs that are tested would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("soak" if config.getoption("--soak") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lab = Path(__file__).with_name("lab")
    with_lab = config.getoption("--lab")
    soak = config.getoption("--soak")
    done = _done(config)
    passed = set(done.read_text().splitlines()) if done is not None and done.exists() else set[str]()
    wanted, parts = map(int, (config.getoption("--part") or "1/1").split("/"))

    def taken(item: pytest.Item) -> bool:
        if item.get_closest_marker("long") and not soak:
            return False
        if item.nodeid in passed:
            return False
        number = zlib.crc32(item.nodeid.encode()) % parts + 1
        return number == wanted and (with_lab or not item.path.is_relative_to(lab))

    left_out = [item for item in items if not taken(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if taken(item)]


def _done(config: pytest.Config) -> Path | None:
    name = config.getoption("--done")
    return Path(name) if name else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    done = _done(item.config)
    if done is not None and report.when == "teardown" and report.passed and item.stash.get(_PASSED, False):
        with done.open("a") as file:
            file.write(f"{item.nodeid}\n")
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("tier"):
        for tier in mark.args:
            reason = tiers.missing(tier)
            if not reason:
                continue
            item.config.stash[_MISSING][tier] = reason
            if os.environ.get("CI") == "true":
                pytest.fail(f"tier {tier} cannot run here: {reason}", pytrace=False)
            pytest.skip(f"tier {tier}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for tier, reason in sorted(config.stash[_MISSING].items()):
        terminalreporter.write_line(f"Tier not run: {tier}: {reason}", yellow=True)


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the large counts run in full."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def count(soak: bool) -> Callable[[int, int], int]:
    """``count(sample, full)``: how often to do something, in this run."""
    return lambda sample, full: full if soak else sample


@pytest.fixture(scope="session")
def ceph() -> Iterator[Cluster]:
    """One cluster for all tests that only need one, with the pool ``rbd``."""
    with Cluster.up(f"test-{os.getpid()}") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def other_ceph() -> Iterator[Cluster]:
    """Another one, for those that replicate between two."""
    with Cluster.up(f"other-{os.getpid()}") as cluster:
        yield cluster


def mounted(folder: Path, *mkfs: str, size: int) -> Iterator[Path]:
    """Make a file system in a sparse file below ``folder`` and mount it until the iterator is resumed."""
    image, mount = folder / "fs.img", folder / "mnt"
    mount.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*mkfs, str(image)], check=True, capture_output=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True, capture_output=True, timeout=60)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True, capture_output=True, timeout=60)
        image.unlink()


@pytest.fixture
def xfs_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty XFS with reflink, 2 GiB, sparse."""
    yield from mounted(tmp_path / "xfs", "mkfs.xfs", "-q", "-m", "reflink=1", size=2 << 30)


@pytest.fixture
def btrfs_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty btrfs, 2 GiB, sparse."""
    yield from mounted(tmp_path / "btrfs", "mkfs.btrfs", "-q", size=2 << 30)


@pytest.fixture
def ext4_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty ext4 (no reflink), 2 GiB, sparse."""
    yield from mounted(tmp_path / "ext4", "mkfs.ext4", "-q", "-F", size=2 << 30)


@pytest.fixture
def small_ext4_dir(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 64 MiB, to be filled up."""
    yield from mounted(tmp_path / "small-ext4", "mkfs.ext4", "-q", "-F", "-m", "0", size=64 << 20)


@pytest.fixture
def small_xfs_dir(tmp_path: Path) -> Iterator[Path]:
    """An XFS with reflink of 320 MiB (the smallest there is is 300), to be filled up."""
    yield from mounted(tmp_path / "small-xfs", "mkfs.xfs", "-q", "-m", "reflink=1", size=320 << 20)


@pytest.fixture(scope="session")
def ceph_sites() -> Iterator[dict[str, Cluster]]:
    """Two clusters for tests of replication from one to the other, and of what happens to either: ``source`` and
    ``target``, with the pool ``rbd`` each."""
    with Cluster.up(f"source-{os.getpid()}") as source, Cluster.up(f"target-{os.getpid()}") as target:
        yield {"source": source, "target": target}
