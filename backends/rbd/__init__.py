"""Images of a Ceph pool (RBD), through librados and librbd.

A volume is an image (``naming.py`` says which). All that is known of it beside its data is in the image's own metadata
(``records.py``) and goes with the image. The head of a replica is where the next version is received; only its
snapshots are anybody's to read. What is a version, and when, is in ``catalog.py`` and at the head of ``replica.py``.

From the outside in: ``backend.py`` answers; ``snapshotting.py`` (of many images at one instant: ``together.py``,
``grouping.py``), ``source.py`` (send, digests), ``exporting.py`` and ``replica.py`` (receive, with ``target.py``) do
the work; ``catalog.py`` keeps the state (``header.py`` where others write), ``locks.py`` the writers apart;
``changes.py``, ``reading.py``, ``receiving.py``, ``writing.py`` and ``objects.py`` move bytes; ``parents.py`` is what
clones began as, ``layout.py`` what replicas take over beside the data; ``cluster.py`` and ``binding.py`` are the
connection; ``health.py`` is what an operator should know.
"""

from backends.rbd.backend import RbdBackend

__all__ = ["RbdBackend"]
