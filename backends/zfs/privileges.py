"""Which rights a user who is not root needs in ZFS, and which of them are missing.

The lists were found by taking away one right after the other until something failed, on OpenZFS 2.1 and 2.3
(``tests/lab/test_zfs_privileges.py`` does it again). Some are needed for what does not seem to need them:
``zfs_secpolicy_*`` in ``module/zfs/zfs_ioctl.c`` asks for ``mount`` wherever something is created, destroyed or
renamed, although on Linux only root can mount.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from backends.zfs.commands import LIST_DEADLINE, Runner
from backends.zfs.failures import Operation, failure
from replicator.model import Capability

SOURCE = ("bookmark", "destroy", "hold", "mount", "release", "send", "snapshot", "userprop")
"""What a storage is read and snapshotted with."""
TARGET = (
    "canmount", "clone", "create", "destroy", "hold", "mount", "mountpoint", "promote", "readonly", "receive",
    "release", "rename", "send", "snapshot", "userprop",
)  # fmt: skip
"""What a storage is written replicas into with, and put back, pruned and restored from."""
NEEDED = {Capability.SEND: SOURCE, Capability.RECEIVE: TARGET}

_SECTION = re.compile(r"-+ Permissions on (.+?) -*")
_HEADINGS = {
    "Local permissions:": (True, False),
    "Descendent permissions:": (False, True),
    "Local+Descendent permissions:": (True, True),
}
"""Whether rights below this heading hold for the dataset itself, and for those below it."""


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks ZFS."""

    user: str
    groups: frozenset[str]
    root: bool = False

    @classmethod
    def own(cls) -> Account:
        """That of this process; a user or group without a name is its number, as ``zfs allow`` shows it."""
        groups = {os.getegid(), *os.getgroups()}
        return cls(_user(os.geteuid()), frozenset(_group(number) for number in groups), os.geteuid() == 0)


@dataclass(slots=True)
class _Grants:
    here: set[str] = field(default_factory=set)
    below: set[str] = field(default_factory=set)
    sets: dict[str, set[str]] = field(default_factory=dict)


def granted(said: str, dataset: str, account: Account) -> frozenset[str]:
    """The rights that ``zfs allow DATASET`` shows for an account on ``dataset`` and on all below it."""
    found: dict[str, _Grants] = {}
    place, heading = _Grants(), ""
    for line in said.split("\n"):
        section = _SECTION.fullmatch(line)
        if section is not None:
            place, heading = found.setdefault(section[1], _Grants()), ""
        elif not line.startswith("\t"):
            heading = line.strip()
        elif heading == "Permission sets:":
            name, _, listed = line.strip().partition(" ")
            place.sets.setdefault(name, set()).update(listed.split(","))
        elif heading in _HEADINGS and (rights := _for(line.strip(), account)):
            here, below = _HEADINGS[heading]
            place.here |= rights if here else set()
            place.below |= rights if below else set()
    own = found.get(dataset, _Grants())
    above = {right for name, grants in found.items() if name != dataset for right in grants.below}
    sets: dict[str, set[str]] = {}
    for grants in found.values():
        for name, content in grants.sets.items():
            sets.setdefault(name, set()).update(content)
    return frozenset(_expanded(own.here | above, sets) & _expanded(own.below | above, sets))


def missing(runner: Runner, storage: str, root: str, wanted: Iterable[str], account: Account) -> tuple[str, ...]:
    """Those of ``wanted`` that the account does not have on the root and below it, sorted.

    :raises StorageError: ZFS does not say
    """
    if account.root:
        return ()
    done = runner.run(("zfs", "allow", root), LIST_DEADLINE)
    if done.status != 0:
        raise failure(done, Operation(storage, root, "listing the permissions on"))
    return tuple(sorted(set(wanted) - granted(done.output, root, account)))


def _for(line: str, account: Account) -> set[str]:
    """The rights of one line, if it is about this account: ``user NAME RIGHTS``, ``group NAME RIGHTS``,
    ``everyone RIGHTS``. Names have no spaces where Linux makes the accounts."""
    kind, _, rest = line.partition(" ")
    if kind == "everyone":
        return set(rest.split(","))
    name, _, rights = rest.rpartition(" ")
    mine = name == account.user if kind == "user" else kind == "group" and name in account.groups
    return set(rights.split(",")) if mine else set()


def _expanded(rights: set[str], sets: dict[str, set[str]]) -> set[str]:
    """With permission sets (``@NAME``, possibly in one another) replaced by what is in them."""
    found: set[str] = set()
    pending = list(rights)
    while pending:
        right = pending.pop()
        if right not in found:
            found.add(right)
            pending += sets.get(right, ())
    return found


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
