"""Whether what was read of snapshots may be believed.

RBD lets go of a snapshot while somebody reads it, and tells him nothing: objects of it that the OSDs have trimmed read
as zeros, or as what the head has now. A handle that is open for reading only goes on knowing the snapshots that there
were. So once all is read, it is looked again. A number of a snapshot is never given twice: one that is still there was
there all the time.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.rbd.catalog import RawSnapshot
from backends.rbd.cluster import Session, is_absent
from backends.rbd.naming import Place
from replicator.errors import NoSuchSnapshot


def require_still_there(
    session: Session, place: Place, identity: str, snapshots: Iterable[RawSnapshot], label: str
) -> None:
    """To be called after the last read of ``snapshots`` of the image with that id, and before anybody believes it.

    :param label: the volume, for messages
    :raises NoSuchSnapshot: one of them was removed, or the image
    """
    hint = (
        "nothing of what was read is kept as a version; the next run sends what there is now. Who removes snapshots of "
        "ours by hand has to take their protection away first: let the job prune them"
    )
    try:
        with session.image(place) as image:
            there = {int(found["id"]) for found in image.list_snaps()} if image.id() == identity else None
    except session.binding.errors as error:
        if not is_absent(error):
            raise
        there = None
    if there is None:
        raise NoSuchSnapshot(f"image {label} was removed or renamed while its snapshots were read", hint=hint)
    for snapshot in snapshots:
        if snapshot.id not in there:
            raise NoSuchSnapshot(f"snapshot {snapshot.name} of {label} was removed while it was read", hint=hint)
