"""What replicator keeps in user properties of a dataset.

::

    replicator:lineage      UUID of the family of copies
    replicator:role         primary | replica
    replicator:epoch        raised by each promotion
    replicator:stream       raw | plain: in which form the copies of this family are sent; never mixed
    replicator:of           whose properties these are, see below
    replicator:placeholder  NAME: a dataset without data that only holds others, made by us

ZFS lets children inherit user properties, so a dataset's own ones must be told from its parent's. ``replicator:of`` is
the dataset's own guid, or that of a snapshot which only it has: one that it has got, or one that it is receiving (a
dataset's guid is not known before it exists, and it must never exist without its lineage). A placeholder names itself.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from replicator.errors import InvalidName
from replicator.model import Lineage, Role

LINEAGE = "replicator:lineage"
ROLE = "replicator:role"
EPOCH = "replicator:epoch"
STREAM = "replicator:stream"
OF = "replicator:of"
PLACEHOLDER = "replicator:placeholder"

READ = (LINEAGE, ROLE, EPOCH, STREAM, OF, PLACEHOLDER)
"""All of them, in the order in which listings ask for them."""
UNSET = "-"
RESTORING = "restore"
"""``replicator:of`` is ``restore:GUID`` on a volume that a restore of that snapshot has not finished."""


class StreamForm(StrEnum):
    """In which form zfs send puts blocks into a stream. A family of copies keeps to one: ZFS cannot receive one into
    what was received as the other (openzfs#16351, #10523, #12594)."""

    RAW = "raw"
    """As they are on the disk, encrypted ones still encrypted; neither side needs the key."""
    PLAIN = "plain"
    """Decrypted; large, embedded and compressed blocks as they are."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Options of zfs send. All of them are always given: a toggled ``-L`` made wrong increments (zfs#6224)."""
        return ("-L", "-e", "-w") if self is StreamForm.RAW else ("-L", "-e", "-c")


def read_lineage(values: dict[str, str], identities: Collection[str]) -> Lineage | None:
    """The lineage that user properties say, if they are the dataset's own.

    :param identities: guids that only this dataset has
    :raises InvalidName: they are its own, and unusable
    """
    if values.get(OF, UNSET) not in identities or values.get(LINEAGE, UNSET) == UNSET:
        return None
    try:
        return Lineage(values[LINEAGE], Role(values[ROLE]), int(values[EPOCH]))
    except (KeyError, ValueError):
        raise InvalidName(
            f"its properties {LINEAGE}, {ROLE} and {EPOCH} are {values[LINEAGE]!r}, {values.get(ROLE)!r} and "
            f"{values.get(EPOCH)!r}, which is no lineage",
            hint=f"set them right, or remove them with: zfs inherit {LINEAGE} DATASET",
        ) from None


def read_form(values: dict[str, str], identities: Collection[str]) -> StreamForm | None:
    """The pinned form of streams, None where none is pinned."""
    value = values.get(STREAM, UNSET)
    if values.get(OF, UNSET) not in identities or value == UNSET:
        return None
    try:
        return StreamForm(value)
    except ValueError:
        raise InvalidName(
            f"its property {STREAM} is {value!r}, and neither {StreamForm.RAW} nor {StreamForm.PLAIN}",
            hint=f"set it to what its copies were sent as: zfs set {STREAM}=raw DATASET",
        ) from None


def restored_from(of: str) -> str | None:
    """The guid of the snapshot that is being restored, by ``replicator:of``; None where none is."""
    mark, _, guid = of.partition(":")
    return guid if mark == RESTORING else None


def settings(lineage: Lineage, form: StreamForm, of: str) -> tuple[str, ...]:
    """``PROPERTY=VALUE`` for zfs set, which sets them all at once; the epoch before the role, should it ever not."""
    return (
        f"{LINEAGE}={lineage.uuid}",
        f"{EPOCH}={lineage.epoch}",
        f"{ROLE}={lineage.role}",
        f"{STREAM}={form}",
        f"{OF}={of}",
    )
