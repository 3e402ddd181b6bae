"""OpenZFS: the filesystems and zvols below one dataset, replicated with zfs send and zfs receive.

Volume ``NAME`` of a storage with the root ``tank/vm`` is the dataset ``tank/vm/NAME``; its versions are the dataset's
snapshots and bookmarks, a version's identity is ZFS's own guid, its position ``createtxg``. What replicator must
remember is in user properties of the dataset (``properties.py``) and nowhere else; holds are ZFS's holds; what was half
received is in the resume token that ZFS keeps.

Replicas are ``readonly=on`` and never mounted by us. ``zfs receive`` is never run with ``-F`` where there is data. What
somebody did to a replica is kept before it is put back (``aside.py``).

From the outside in: ``backend.py`` answers; ``sending.py``, ``receiving.py`` and ``replica.py`` move streams;
``listing.py`` reads what is there; ``tokens.py``, ``stream_head.py`` and ``nvlists.py`` read what zfs writes for
itself; ``library.py`` changes snapshots, holds and bookmarks, through libzfs_core where it can (``binding.py``,
``workers.py``); ``commands.py`` runs the commands and ``failures.py`` knows what their words mean.
"""

from backends.zfs.backend import ZfsBackend

__all__ = ["ZfsBackend"]
