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
from collections.abc import Iterator
from dataclasses import dataclass, field

from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure
from backends.zfs.taking_over import Terms
from replicator.model import Capability, Lack
from replicator.zfs_properties import TAKEN_OVER

SOURCE = ("bookmark", "destroy", "hold", "mount", "release", "send", "snapshot", "userprop")
"""What a storage is read and snapshotted with."""
TARGET = (
    "canmount", "clone", "create", "destroy", "hold", "mount", "mountpoint", "promote", "readonly", "receive",
    "release", "rename", "send", "snapshot", "userprop",
)  # fmt: skip
"""What a storage is written replicas into with, and put back, pruned and restored from; and each property that it
overrides. Those of the properties that replicas take over are missed, and not needed."""
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


def lacking(context: Context, uses: Capability, terms: Terms, account: Account | None = None) -> Iterator[Lack]:
    """The rights that the account (this process's) lacks on the storage's root and below it, for these uses.

    :raises StorageError: ZFS does not say
    """
    account = account or Account.own()
    if account.root:
        return
    root = context.names.root
    done = context.attempt("zfs", "allow", root, deadline=LIST_DEADLINE)
    if done.status != 0:
        raise failure(done, Operation(context.storage, root, "listing the permissions on"))
    has = granted(done.output, root, account)
    needed = set(SOURCE if Capability.SEND in uses else ())
    wished: set[str] = set()
    if Capability.RECEIVE in uses:
        needed |= {*TARGET, *terms.override}
        wished = {*TAKEN_OVER} - terms.exclude
    if missing := sorted(needed - has):
        message = f"user {account.user} is not allowed to {', '.join(missing)} on {root}"
        yield Lack(message, f"zfs allow -u {account.user} {','.join(missing)} {root}")
    if missing := sorted(wished - needed - has):
        message = f"user {account.user} may not set {', '.join(missing)} on {root}: replicas do not take them over"
        remedy = f"zfs allow -u {account.user} {','.join(missing)} {root}, or exclude them"
        yield Lack(message, remedy, needed=False)


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
