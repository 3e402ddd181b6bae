"""What a pool knows of its own health: its last complete scrub, and what is damaged.

Which transaction groups a scrub has read stands only in the pool's history (``zpool history -i``: ``scan setup
func=1 mintxg=0 maxtxg=N``, ``scan done errors=N``; ``dsl_scan.c`` of OpenZFS). A snapshot whose ``createtxg`` is not
above N was there when the scrub began, whatever any clock says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from backends.zfs.commands import LIST_DEADLINE, Finished
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, words
from replicator.endpoint import MAX_DAMAGED, Scrub, ScrubRequest
from replicator.errors import NotReadable

_SETUP = re.compile(r"scan setup func=(\d+) mintxg=(\d+) maxtxg=(\d+)")
_DONE = re.compile(r"^(\d{4}-\d\d-\d\d\.\d\d:\d\d:\d\d) .*scan done errors=(\d+)")
_SCRUB = "1"
"""POOL_SCAN_SCRUB of include/sys/fs/zfs.h."""
_PERCENT = re.compile(r"([0-9.]+)% done")
_UNLISTED = "List of errors unavailable"
"""What zpool status says instead of names: it looks into the datasets for them, which takes their keys."""
_UNNAMED = "something that ZFS cannot name, because a key is not loaded,"
_MAX_SHOWN = 500
_DENIED = "run replicator as root: ZFS lets nobody else read a pool's history and start a scrub"


@dataclass(frozen=True, slots=True)
class LastScrub:
    """The newest scrub of a whole pool that came to its end. :ivar position: the transaction group it began with"""

    finished: datetime
    position: int
    errors: int


def look(context: Context, request: ScrubRequest) -> Scrub:
    """See :meth:`replicator.endpoint.Endpoint.scrub`."""
    pool = context.names.pool
    dataset = context.require(request.volume.name)
    if request.start:
        done = context.attempt("zpool", "scrub", pool)
        if done.status != 0 and "currently scrubbing" not in done.errors:
            raise _error(context, done, "starting a scrub of")
    status = _asked(context, ("zpool", "status", "-v", pool), "looking at")
    last = last_scrub(_asked(context, ("zpool", "history", "-i", pool), "reading the history of").split("\n"))
    allocated = _asked(context, ("zpool", "list", "-H", "-p", "-o", "allocated", pool), "looking at").strip()
    mounted = _asked(context, ("zfs", "get", "-H", "-o", "value", "mountpoint", dataset.name), "looking at").strip()
    running, percent = progress(status)
    total = int(allocated) if allocated.isdecimal() else 0
    names = damaged(status) if _UNLISTED not in status else iter((_UNNAMED,))
    ours, elsewhere = attributed(names, pool, dataset.name, mounted)
    return Scrub(
        pool,
        running,
        int(total * percent / 100),
        total,
        last.finished if last else None,
        last.position if last else None,
        last.errors if last else 0,
        tuple(line[:_MAX_SHOWN] for line in ours[:MAX_DAMAGED]),
        elsewhere,
    )


def _asked(context: Context, argv: tuple[str, ...], doing: str) -> str:
    """What a command says. zpool status tells of names that it cannot list on its error output, and succeeds."""
    done = context.attempt(*argv, deadline=LIST_DEADLINE)
    if done.status != 0:
        raise _error(context, done, doing)
    return f"{done.output}\n{done.errors}" if _UNLISTED in done.errors else done.output


def _error(context: Context, done: Finished, doing: str) -> Exception:
    pool = context.names.pool
    said = f"{done.output} {done.errors}"
    if "permission denied" in said or "must be root" in said:
        return NotReadable(f"storage {context.storage}: {doing} pool {pool} failed: {words(done)}", hint=_DENIED)
    return failure(done, Operation(context.storage, f"pool {pool}", doing))


def last_scrub(history: Iterable[str]) -> LastScrub | None:
    """The last complete scrub in the output of ``zpool history -i``."""
    position: int | None = None
    found: LastScrub | None = None
    for line in history:
        if "scan" not in line:
            continue
        setup = _SETUP.search(line)
        done = _DONE.match(line)
        if setup:
            position = int(setup[3]) if setup[1] == _SCRUB and setup[2] == "0" else None
        elif done and position is not None:
            finished = datetime.strptime(done[1], "%Y-%m-%d.%H:%M:%S").replace(tzinfo=UTC)
            found = LastScrub(finished, position, int(done[2]))
            position = None
    return found


def progress(status: str) -> tuple[bool, float]:
    """Whether a scrub is under way, and how far it is in percent."""
    _, scan, rest = status.partition("  scan: scrub in progress")
    if not scan:
        return False, 0.0
    percent = _PERCENT.search(rest.partition("config:")[0])
    return True, min(100.0, float(percent[1])) if percent else 0.0


def damaged(status: str) -> Iterator[str]:
    """What ``zpool status -v`` lists as damaged, a name each."""
    _, found, rest = status.partition("errors: Permanent errors")
    for line in rest.split("\n")[1:] if found else ():
        if line.startswith("  pool: "):
            return
        if line.strip():
            yield line.strip()


def attributed(lines: Iterable[str], pool: str, dataset: str, mountpoint: str) -> tuple[list[str], int]:
    """Damage of one dataset and of what has no name (pool metadata, destroyed datasets); and how much there is
    elsewhere. A name that could be either counts as the dataset's.

    :param mountpoint: of the dataset: files of a mounted one are listed with their path
    """
    ours: list[str] = []
    elsewhere = 0
    own = [f"{dataset}@", f"{dataset}:"]
    if mountpoint.startswith("/"):
        own.append(mountpoint.rstrip("/") + "/")
    for line in lines:
        named = line.startswith(("/", f"{pool}/", f"{pool}:", f"{pool}@"))
        if not named or line.startswith(tuple(own)):
            ours.append(line)
        else:
            elsewhere += 1
    return ours, elsewhere
