"""The cases that each conformance suite runs through.

A file whose tests are about one kind of stream says so: ``STREAMS = [StreamKind.BLOCKS]``. The others are run through
by every storage. ZFS takes part where this machine has a pool ``tank`` for it: in a guest of ``tests/lab``, which runs
these suites there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from replicator.model import StreamKind
from tests import tiers
from tests.conftest import mounted
from tests.support.cases import BackendCase, MemoryCase
from tests.support.endpoint_cases import EndpointCase, open_endpoint
from tests.support.image_case import ImageCase
from tests.support.rbd_case import RbdCase
from tests.support.zfs_case import ZfsCase

_NUMBERS = itertools.count()

BLOCK_STORAGES = [
    "memory",
    "image-plain",
    pytest.param("image-xfs", marks=pytest.mark.tier("xfs")),
    pytest.param("image-btrfs", marks=pytest.mark.tier("btrfs")),
    pytest.param("rbd", marks=pytest.mark.tier("ceph")),
]
PLACES = ("local", "remote")
ENDPOINT_STORAGES = [
    pytest.param("memory"),
    pytest.param("image-plain"),
    pytest.param("rbd", marks=pytest.mark.tier("ceph")),
]
"""Of streams of blocks: one of a kind, as what is between a storage and its user is the same for all."""
NATIVE_STORAGES = [pytest.param("zfs", marks=pytest.mark.tier("zfs"))]

# Without a storage of native streams here there is nothing to run them on; `make lab` runs them where there is.
_NATIVE_FILES = [
    "test_backend_native.py",
    "test_backend_trees.py",
    "test_endpoint_native.py",
    "test_zfs_library.py",
    "test_zfs_roles.py",
    "test_zfs_verification.py",
    "test_zfs_volumes.py",
]
collect_ignore = _NATIVE_FILES if tiers.missing("zfs") else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    streams = getattr(metafunc.module, "STREAMS", list(StreamKind))
    native = NATIVE_STORAGES if not tiers.missing("zfs") else []
    if "near_or_far" in metafunc.fixturenames:
        found = [
            *(ENDPOINT_STORAGES if StreamKind.BLOCKS in streams else []),
            *(native if StreamKind.NATIVE in streams else []),
        ]
        metafunc.parametrize("near_or_far", [_at(where, each) for where in PLACES for each in found], indirect=True)
    elif "case" in metafunc.fixturenames:
        storages = [
            *(BLOCK_STORAGES if StreamKind.BLOCKS in streams else []),
            *(native if StreamKind.NATIVE in streams else []),
        ]
        metafunc.parametrize("case", storages, indirect=True)


def _at(where: str, storage: ParameterSet) -> ParameterSet:
    return pytest.param(f"{where}-{storage.values[0]}", marks=storage.marks)


@pytest.fixture(scope="session")
def shared_xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One XFS for all tests, each of which makes its own directory: mounting takes longer than a test."""
    yield from mounted(tmp_path_factory.mktemp("xfs"), "mkfs.xfs", "-q", "-m", "reflink=1", size=2 << 30)


@pytest.fixture(scope="session")
def shared_btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One btrfs for all tests."""
    yield from mounted(tmp_path_factory.mktemp("btrfs"), "mkfs.btrfs", "-q", size=2 << 30)


@pytest.fixture(scope="session")
def shared_ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One ext4, which has no reflink, for all tests."""
    yield from mounted(tmp_path_factory.mktemp("ext4"), "mkfs.ext4", "-q", "-F", size=1 << 30)


def make_case(kind: str, request: pytest.FixtureRequest) -> BackendCase:
    """A fresh, empty storage of that kind."""
    if kind == "memory":
        return MemoryCase()
    if kind == "zfs":
        return ZfsCase()
    if kind == "rbd":
        return RbdCase(request.getfixturevalue("ceph").conf)
    shared = {"image-xfs": "shared_xfs", "image-btrfs": "shared_btrfs"}.get(kind, "tmp_path")
    folder: Path = request.getfixturevalue(shared) / f"store-{next(_NUMBERS)}"
    folder.mkdir()
    return ImageCase(folder)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    """A fresh, empty storage of each kind."""
    made = make_case(request.param, request)
    yield made
    made.close()


@pytest.fixture
def near_or_far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EndpointCase]:
    """An endpoint of node ``one``, on this node and over a connection, over a storage of each kind."""
    where, kind = request.param.split("-", 1)
    storage = make_case(kind, request)
    with open_endpoint(storage, where == "remote", tmp_path / "cluster") as case:
        yield case
    storage.close()
