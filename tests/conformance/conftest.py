"""The cases that each conformance suite runs through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import mounted
from tests.support.cases import BackendCase, MemoryCase
from tests.support.endpoint_cases import EndpointCase, open_endpoint
from tests.support.image_case import ImageCase

_NUMBERS = itertools.count()

STORAGES = [
    "memory",
    "image-plain",
    pytest.param("image-xfs", marks=pytest.mark.tier("xfs")),
    pytest.param("image-btrfs", marks=pytest.mark.tier("btrfs")),
]


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
    shared = {"image-xfs": "shared_xfs", "image-btrfs": "shared_btrfs"}.get(kind, "tmp_path")
    folder: Path = request.getfixturevalue(shared) / f"store-{next(_NUMBERS)}"
    folder.mkdir()
    return ImageCase(folder)


@pytest.fixture(params=STORAGES)
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    """A fresh, empty storage of each kind."""
    made = make_case(request.param, request)
    yield made
    made.backend.close()


@pytest.fixture(params=["local-memory", "local-image-plain", "remote-memory", "remote-image-plain"])
def near_or_far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EndpointCase]:
    """An endpoint of node ``one``, on this node and over a connection, over storages of two kinds."""
    where, kind = request.param.split("-", 1)
    storage = make_case(kind, request)
    with open_endpoint(storage, where == "remote", tmp_path / "cluster") as case:
        yield case
    storage.backend.close()
