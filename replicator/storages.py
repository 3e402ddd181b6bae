"""The backends of the configured storages. Part of the roof: it knows the configuration and the backends.

A backend's module is imported only when a storage needs it, because the bindings of Ceph are not everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from backends.base import Backend
from replicator.errors import MissingBinding, ReplicatorError, Unsupported
from replicator.settings import ImageStorage, Storage, ZfsStorage


@dataclass(frozen=True, slots=True)
class _Binding:
    """What a kind of storage needs from the distribution."""

    module: str
    package: str


_BINDINGS = {"rbd": _Binding("rbd", "python3-rbd")}


def build_backend(storage: Storage) -> Backend:
    """The backend of one storage; the storage itself need not be there now.

    :raises MissingBinding: a Python binding that only the distribution has is not installed
    :raises Unsupported: this version has no backend for that kind
    """
    if isinstance(storage, ImageStorage):
        from backends.image import ImageBackend
        from transport import checksum

        return ImageBackend(
            storage.name,
            storage.path,
            devices=storage.devices,
            mount_point=storage.is_mountpoint,
            checksums=checksum,
        )
    if isinstance(storage, ZfsStorage):
        from backends.zfs import ZfsBackend
        from backends.zfs.properties import StreamForm
        from backends.zfs.taking_over import Terms
        from transport import checksum

        accept = None if storage.accept == "any" else StreamForm(storage.accept)
        terms = Terms(accept, MappingProxyType(storage.override), frozenset(storage.exclude))
        return ZfsBackend(storage.name, storage.root, checksums=checksum, terms=terms)
    binding = _BINDINGS[storage.kind]
    needs = f"storage {storage.name!r} is of kind {storage.kind}, which"
    if importlib.util.find_spec(binding.module) is None:
        raise MissingBinding(
            f"{needs} needs {binding.package}",
            hint=f"apt install {binding.package}, and run from a virtual environment made with --system-site-packages",
        )
    raise Unsupported(
        f"{needs} is not supported by this version", hint='use a storage of kind "image", or a newer version'
    )


def build_backends(storages: Mapping[str, Storage]) -> dict[str, Backend]:
    """The backends of all storages, by name.

    :raises MissingBinding, Unsupported: of the first that has none; what was built before it is closed again
    """
    backends: dict[str, Backend] = {}
    try:
        for name, storage in storages.items():
            backends[name] = build_backend(storage)
    except ReplicatorError:
        for backend in backends.values():
            backend.close()
        raise
    return backends
