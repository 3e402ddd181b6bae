"""Backends of configured storages."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from backends.image import ImageBackend
from replicator.errors import MissingBinding, Unsupported
from replicator.settings import ImageStorage, RbdStorage, Storage, ZfsStorage
from replicator.storages import build_backends

POOL = RbdStorage.model_validate({"name": "pool", "kind": "rbd", "pool": "rbd"})
TANK = ZfsStorage.model_validate({"name": "tank", "kind": "zfs", "root": "tank/vm"})


@pytest.mark.parametrize(("storage", "package"), [(POOL, "python3-rbd")])
def test_a_missing_binding_is_named(storage: Storage, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingBinding) as caught:
        build_backends({storage.name: storage})
    assert str(caught.value) == f"storage {storage.name!r} is of kind {storage.kind}, which needs {package}"
    assert f"apt install {package}" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("storage", [POOL])
def test_a_kind_of_a_later_version(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(Unsupported, match=f"storage {storage.name!r} .* not supported by this version"):
        build_backends({storage.name: storage})


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


def test_what_was_built_before_a_failure_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(ImageBackend, "close", lambda self: closed.append(self.name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    images = ImageStorage.model_validate({"name": "images", "kind": "image", "path": str(tmp_path)})
    with pytest.raises(MissingBinding):
        build_backends({"images": images, "pool": POOL})
    assert closed == ["images"]
