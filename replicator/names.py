"""Names that people, peers and storages give, checked once at each border.

Every function returns its argument or raises :class:`~replicator.errors.InvalidName`. The rules are the narrowest
that all storages accept: no control characters, no ``.`` or ``..`` component, no ``@`` or ``#`` (ZFS separates
snapshots and bookmarks with them), lengths capped in bytes of UTF-8 as file systems and ZFS count them.
"""

from __future__ import annotations

import re
import unicodedata

from replicator.errors import InvalidName

MAX_COMPONENT_BYTES = 200
"""One path component of a volume, in bytes of UTF-8: ext4, XFS and btrfs allow 255; the rest is room for suffixes."""
MAX_VOLUME_BYTES = 512
MAX_SNAPSHOT_BYTES = 200
MAX_TAG_BYTES = 200

_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=-]*")


def _refuse(what: str, name: str, why: str, hint: str) -> InvalidName:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return InvalidName(f"{what} {shown!r} {why}", hint=hint)


def _check_length(what: str, name: str, limit: int) -> None:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise _refuse(what, name, "is not valid Unicode", "rename it") from None
    if size > limit:
        raise _refuse(what, name, f"is {size} bytes long; at most {limit} are allowed", "use a shorter name")


def _check_characters(what: str, name: str, forbidden: str) -> None:
    for character in name:
        if character in forbidden or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise _refuse(what, name, f"contains the character {character!r}", "rename it without that character")


def check_node(name: str) -> str:
    """A node's name: as a host name, lower case, 1 to 63 characters."""
    if not _NODE.fullmatch(name) or ".." in name:
        raise _refuse(
            "node name",
            name,
            "is not a host name",
            "use lower-case letters, digits, '-' and '.', at most 63 characters",
        )
    return name


def check_word(what: str, name: str) -> str:
    """The name of a storage or a job (``what`` says which): 1 to 63 of letters, digits, ``.``, ``_``, ``-``."""
    if not _WORD.fullmatch(name):
        raise _refuse(
            what, name, "is not allowed", "use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return name


def check_volume(name: str) -> str:
    """A volume's name within its storage: components separated by ``/``."""
    what = "volume name"
    if not name:
        raise _refuse(what, name, "is empty", "name the volume")
    _check_length(what, name, MAX_VOLUME_BYTES)
    _check_characters(what, name, "@#\\")
    for component in name.split("/"):
        if component in ("", ".", ".."):
            raise _refuse(what, name, f"has the path component {component!r}", "name a volume below the storage's root")
        if component != component.strip():
            raise _refuse(what, name, "has a component that begins or ends with a space", "rename it")
        _check_length(what, component, MAX_COMPONENT_BYTES)
    return name


def check_snapshot(name: str) -> str:
    """A snapshot's or bookmark's name, without its volume."""
    what = "snapshot name"
    if not name or name.startswith(".") or name != name.strip():
        raise _refuse(what, name, "is empty, or begins with '.' or a space", "rename the snapshot")
    _check_length(what, name, MAX_SNAPSHOT_BYTES)
    _check_characters(what, name, "@#/\\")
    return name


def check_tag(name: str) -> str:
    """The tag of a hold."""
    _check_length("hold tag", name, MAX_TAG_BYTES)
    if not _TAG.fullmatch(name):
        raise _refuse("hold tag", name, "is not allowed", "use letters, digits and '._:+=-'")
    return name
