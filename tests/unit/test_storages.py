"""Backends of configured storages."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.image import ImageBackend
from backends.rbd import binding
from replicator.errors import MissingBinding
from replicator.model import Capability
from replicator.settings import ImageStorage, RbdStorage, ZfsStorage
from replicator.storages import build_backends

POOL = RbdStorage.model_validate({"name": "pool", "kind": "rbd", "pool": "rbd"})
TANK = ZfsStorage.model_validate({"name": "tank", "kind": "zfs", "root": "tank/vm"})


@pytest.fixture
def no_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without the bindings of Ceph."""

    def find(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", find)
    monkeypatch.setattr(binding, "DISTRIBUTION", tmp_path)
    binding.load.cache_clear()
    yield
    binding.load.cache_clear()


@pytest.mark.usefixtures("no_bindings")
def test_a_missing_binding_is_named() -> None:
    with pytest.raises(MissingBinding, match="storages of kind rbd need python3-rados") as caught:
        build_backends({"pool": POOL})
    assert "apt install python3-rados" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.tier("ceph")
def test_bindings_of_the_distribution_are_found_from_any_environment() -> None:
    paths = [path for path in sys.path if "dist-packages" not in path]
    code = "from backends.rbd.binding import load; print(load().pool().version())"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("(")


@pytest.mark.tier("ceph")
def test_rbd() -> None:
    """It is connected when it is first used."""
    backends = build_backends({"pool": POOL})
    assert (backends["pool"].name, backends["pool"].kind) == ("pool", "rbd")
    backends["pool"].close()


def test_no_storages() -> None:
    assert build_backends({}) == {}


def test_images(tmp_path: Path) -> None:
    table = {"name": "images", "kind": "image", "path": str(tmp_path)}
    backends = build_backends({"images": ImageStorage.model_validate(table)})
    assert (backends["images"].name, backends["images"].kind) == ("images", "image")
    assert backends["images"].volumes() == ()
    backends["images"].close()


def test_zfs() -> None:
    """It needs no binding: the zfs command does it all, and is first run when the storage is used."""
    backends = build_backends({"tank": TANK})
    assert (backends["tank"].name, backends["tank"].kind) == ("tank", "zfs")
    backends["tank"].close()


@pytest.mark.usefixtures("no_bindings")
def test_what_was_built_before_a_failure_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(ImageBackend, "close", lambda self: closed.append(self.name))
    images = ImageStorage.model_validate({"name": "images", "kind": "image", "path": str(tmp_path)})
    with pytest.raises(MissingBinding):
        build_backends({"images": images, "pool": POOL})
    assert closed == ["images"]


@pytest.mark.tier("ceph")
def test_rbd_snapshots_together() -> None:
    together = RbdStorage.model_validate({"name": "other", "kind": "rbd", "pool": "rbd", "snapshots": "together"})
    backends = build_backends({"pool": POOL, "other": together})
    assert Capability.ATOMIC_GROUP not in backends["pool"].capabilities
    assert Capability.ATOMIC_GROUP in backends["other"].capabilities
