"""The backends of the configured storages. Part of the roof: it knows the configuration and the backends.

A backend's module is imported only when a storage needs it, because the bindings of Ceph are not everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from backends.base import Backend
from replicator.errors import ReplicatorError
from replicator.settings import ImageStorage, Storage, ZfsStorage


def build_backend(storage: Storage) -> Backend:
    """The backend of one storage; the storage itself need not be there now.

    :raises MissingBinding: a Python binding that only the distribution has is not installed
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
    from backends.rbd import RbdBackend
    from backends.rbd.binding import load
    from backends.rbd.cluster import Where
    from transport import checksum

    load()  # what is missing is said when the storage is configured, and not when it is first used
    where = Where(storage.pool, storage.conffile, storage.user, storage.keyring, storage.data_pool)
    grouped = storage.snapshots == "together"
    return RbdBackend(storage.name, where, namespace=storage.namespace, checksums=checksum, grouped=grouped)


def build_backends(storages: Mapping[str, Storage]) -> dict[str, Backend]:
    """The backends of all storages, by name.

    :raises MissingBinding: of the first that has none; what was built before it is closed again
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
