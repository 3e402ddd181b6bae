"""Volumes of a storage are datasets below its root: ``vm-100`` of a storage with the root ``tank/vm`` is the dataset
``tank/vm/vm-100``. The root itself is no volume."""

from __future__ import annotations

import re

from replicator import names
from replicator.errors import InvalidName

MAX_DATASET = 255
"""Bytes of a dataset's name, a snapshot's name after it included (ZFS_MAX_DATASET_NAME_LEN less the final zero)."""

_COMPONENT = re.compile(r"[A-Za-z0-9_.: -]+")
"""valid_char() of OpenZFS, module/zcommon/zfs_namecheck.c: no letter outside ASCII."""
_HINT = "ZFS allows ASCII letters, digits, spaces and the characters '-', '_', '.', ':'; rename it"


class DatasetNames:
    """Translates between volume names and dataset names of one storage."""

    def __init__(self, storage: str, root: str) -> None:
        self.storage = storage
        self.root = root

    @property
    def pool(self) -> str:
        """The pool that the root is in."""
        return self.root.partition("/")[0]

    def dataset(self, volume: str) -> str:
        """The dataset of a volume. :raises InvalidName: it can be no name in ZFS"""
        names.check_volume(volume)
        for component in volume.split("/"):
            if not _COMPONENT.fullmatch(component):
                raise InvalidName(f"volume name {volume!r} cannot be a dataset's name", hint=_HINT)
        dataset = f"{self.root}/{volume}"
        _check_length(dataset)
        return dataset

    def volume(self, dataset: str) -> str:
        """The volume of a dataset below the root.

        :raises InvalidName: the dataset has a name that volumes may not have, or is not below the root
        """
        prefix = self.root + "/"
        if not dataset.startswith(prefix):
            raise InvalidName(f"dataset {dataset!r} is not below {self.root}", hint="")
        return names.check_volume(dataset[len(prefix) :])

    def snapshot(self, volume: str, snapshot: str) -> str:
        """``DATASET@SNAPSHOT``. :raises InvalidName: it can be no name in ZFS"""
        names.check_snapshot(snapshot)
        if not _COMPONENT.fullmatch(snapshot):
            raise InvalidName(f"snapshot name {snapshot!r} cannot be one in ZFS", hint=_HINT)
        name = f"{self.dataset(volume)}@{snapshot}"
        _check_length(name)
        return name

    def label(self, volume: str) -> str:
        """The volume as people name it."""
        return f"{self.storage}:{volume}"


def _check_length(name: str) -> None:
    if len(name) > MAX_DATASET:
        raise InvalidName(
            f"{name[:80]!r}... is {len(name)} characters long; ZFS allows {MAX_DATASET} for dataset and snapshot "
            "together",
            hint="use shorter names, or a root that is nearer to the pool",
        )
