"""Raw disk images in a directory, and block devices as sources.

::

    PATH/NAME                          the live image of volume NAME (a source); NAME may have directories
    PATH/.replicator/volumes/+A/=B/    all else about volume A/B, for the user that runs the daemon alone:
        lineage.json                   which family of copies, role, epoch
        key                            32 random bytes that key the digests kept here
        lock, names.lock               one writer; one change of the listing (flock)
        snapshots/NAME/image           the snapshot's bytes, never written again
        snapshots/NAME/meta.json       guid, time, position, size
        snapshots/NAME/digests         digests of its blocks, where copies do not share blocks
        snapshots/NAME/holds/TAG       an empty file for each hold
        partial/                       an interrupted receive, see partial.py

A replica has no live image: its newest snapshot is the truth. A live image at a replica's name means that somebody
wrote there.

What is durable when: a directory is filled under a name that begins with a dot, all in it is synced, and one rename
makes it what it is to be; then the directory around it is synced. So a power cut leaves a thing whole or absent, never
half; what it leaves under a dotted name is finished or removed by the next writer (``Catalog.tidy``).

Snapshots share blocks with the live image where the file system can (reflink: XFS, btrfs): one instant, no space, and
changes are found by where blocks lie on the disk (``extents.py``), reading nothing that is shared. Elsewhere they
are sparse copies with digests kept beside them (``kept_digests.py``), which tell changes, and damage.

From the outside in: ``backend.py`` answers; ``snapshotting.py``, ``source.py`` (send, digests) and ``replica.py``
(receive) do the work; ``catalog.py`` and ``partial.py`` keep the state; ``changes.py``, ``sending.py``,
``receiving.py``, ``copying.py`` move bytes; ``durable.py`` and ``linux.py`` are the system calls.
"""

from backends.image.backend import ImageBackend

__all__ = ["ImageBackend"]
