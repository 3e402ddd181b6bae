"""What zfs says when it fails, as errors of ours that keep zfs's own words.

The phrases are those of libzfs (``libzfs_util.c``, ``libzfs_sendrecv.c``, ``libzfs_dataset.c``) of OpenZFS 2.1 to 2.3
in the C locale. What is in none of them becomes a plain :class:`~replicator.errors.StorageError`. They are looked for
in what is left of a message without its names: a dataset may be called ``os-upgrade`` or ``not found``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from backends.zfs.commands import Finished
from replicator.errors import (
    ChecksumMismatch,
    DamagedData,
    NoSpace,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    ReplicatorError,
    SnapshotExists,
    SnapshotHeld,
    StaleResume,
    StorageError,
    StorageUnavailable,
    Unsupported,
    VolumeBusy,
    VolumeChanged,
)

MAX_SHOWN = 400
"""Characters of zfs's words in a message."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What was being done, for the message.

    :ivar storage: the storage's name
    :ivar dataset: dataset, snapshot or bookmark that it was done to
    :ivar doing: e.g. "destroying the snapshot"
    """

    storage: str
    dataset: str
    doing: str


@dataclass(frozen=True, slots=True)
class _Rule:
    words: re.Pattern[str]
    error: Callable[..., ReplicatorError]
    hint: str


def _rule(words: str, error: Callable[..., ReplicatorError], hint: str) -> _Rule:
    return _Rule(re.compile(words, re.IGNORECASE), error, hint)


_ALLOW = (
    "give the user that runs replicator the right with `zfs allow`, or run it as root; `replicator check` lists what "
    "is missing"
)
_PLAN_AGAIN = "the next run plans again from what is there now"

_RULES = (
    _rule(
        r"ZFS modules? (are|is|cannot be)|/dev/zfs|Failed to initialize the libzfs",
        StorageUnavailable,
        "load the kernel module: modprobe zfs; see `dmesg` if that fails",
    ),
    _rule(
        r"I/O is currently suspended|pool I/O|pool is suspended",
        StorageUnavailable,
        "see `zpool status`; when the disks are back: zpool clear POOL",
    ),
    _rule(r"no such pool", StorageUnavailable, "import the pool: zpool import POOL"),
    _rule(r"permission denied|must be run as root|operation not permitted", StorageError, _ALLOW),
    _rule(
        r"out of space|no space left|quota exceeded|exceed.*quota|space quota",
        NoSpace,
        "make room in the pool, raise the dataset's quota, or keep fewer snapshots (keep = …, `replicator prune`); "
        "what was received so far is kept",
    ),
    _rule(
        r"used in the initial send no longer exists|no longer the same snapshot used|"
        r"resume token is corrupt|cannot resume send|incompatible with already received|"
        r"does not match the partial|kernel modules must be upgraded to resume|"
        # Of a resumed clone: 2.1 takes the first snapshot of the pool that has the base's GUID, such as its replica.
        r"invalid cross-device link",
        StaleResume,
        "the next run discards what was received and sends the snapshot from the start",
    ),
    _rule(
        r"contains partially-complete state",
        StaleResume,
        "the next run continues or discards it",
    ),
    _rule(
        r"key (must be|is not|not) loaded|encryption key|load-key|key not available",
        StorageError,
        "load the key where the dataset is encrypted: zfs load-key DATASET (raw sends need none)",
    ),
    _rule(
        r"IV set guid|raw (stream|send)|encrypted (stream|dataset|data)|unencrypted|non-encrypted|"
        r"encryption propert|inconsistent with.*encrypt",
        Unsupported,
        "raw and plain streams of one replica cannot be mixed: `replicator resync VOLUME --full` keeps the replica "
        "aside and sends everything anew",
    ),
    _rule(
        r"unsupported (feature|stream)|feature.*not (supported|enabled)|must be upgraded|"
        r"(zfs|zpool) upgrade|unsupported version",
        Unsupported,
        "upgrade OpenZFS on the older node (or the pool: zpool upgrade), or send without that feature",
    ),
    _rule(
        r"has been modified|modified\s+since most recent snapshot",
        VolumeChanged,
        "somebody wrote to the replica; `replicator resync` keeps that aside and continues",
    ),
    _rule(
        r"most recent snapshot of .* does not\s+match|does not exist\b.*incremental|"
        r"incremental source .* (does not exist|is not|not )|not an? earlier snapshot|"
        r"local origin for clone .* does not exist",
        NoSuchSnapshot,
        _PLAN_AGAIN,
    ),
    _rule(
        r"must specify -F|destination .* exists|destination has snapshots",
        NotAReplica,
        "`replicator resync` keeps what is there aside and makes it a replica",
    ),
    _rule(
        r"checksum mismatch|incomplete stream|invalid stream|invalid backup stream|stream truncated",
        ChecksumMismatch,
        "nothing of it was kept as complete; the run is tried again",
    ),
    _rule(
        r"\bheld\b",
        SnapshotHeld,
        "`zfs holds SNAPSHOT` names who holds it; a job releases its hold once its target has a newer snapshot",
    ),
    _rule(
        r"dependent clones|has (dependent )?clones|is cloned",
        SnapshotHeld,
        "a clone needs this snapshot: destroy or promote the clone first (zfs list -o name,origin)",
    ),
    _rule(
        r"is busy|dataset busy|target is busy|currently (in use|mounted|being)|in use",
        VolumeBusy,
        "wait until the other operation is done; a mounted dataset or an open zvol of a replica must be closed",
    ),
    _rule(r"already exists|dataset exists", SnapshotExists, "choose another name, or remove the one that is there"),
    _rule(
        r"input/output error|I/O error|\bEIO\b|invalid exchange|bad (data|checksum)|errors? on a device",
        DamagedData,
        "see `zpool status -v`, and scrub the pool; a damaged replica is made right by `replicator verify VOLUME "
        "--repair` or `replicator resync VOLUME --full`, a damaged source from a replica by `replicator restore`",
    ),
    _rule(
        r"invalid character|name is too long|too long|invalid (dataset |snapshot )?name",
        StorageError,
        "choose a name that ZFS allows",
    ),
)
_SEPARATED = re.compile("[@#]")
_MISSING = re.compile(
    r"does not exist|no such (dataset|snapshot|file)|could not find any snapshots|not found", re.IGNORECASE
)


_QUOTED = re.compile(r"(?<!\w)'(?!(?:zfs|zpool|/sbin/modprobe) )[^']*'")
"""What libzfs puts into quotation marks is a name, except for the commands that it recommends."""
_NAME = "NAME"


def failure(finished: Finished, operation: Operation) -> ReplicatorError:
    """The error for a command that failed."""
    return _error(words(finished), _without_names(finished.errors, (operation.dataset, *finished.argv)), operation)


def failure_of(said: str, operation: Operation) -> ReplicatorError:
    """The error for what ZFS said, by whatever way: a command, or libzfs_core."""
    return _error(said, _without_names(said, (operation.dataset,)), operation)


def _error(said: str, plain: str, operation: Operation) -> ReplicatorError:
    message = f"storage {operation.storage}: {operation.doing} {operation.dataset} failed: {said}"
    for rule in _RULES:
        if rule.words.search(plain):
            return rule.error(message, hint=rule.hint)
    if _MISSING.search(plain):
        if any(mark in operation.dataset for mark in "@#"):
            return NoSuchSnapshot(message, hint=_PLAN_AGAIN)
        return NoSuchVolume(message, hint="`replicator status` lists the volumes of each job; zfs list those of ZFS")
    return StorageError(message, hint="see `zpool status`, `zpool history -i` and the kernel's log (dmesg)")


def is_missing(finished: Finished) -> bool:
    """Whether a command failed only because what it was to work on is not there."""
    return finished.status != 0 and bool(_MISSING.search(_without_names(finished.errors, finished.argv)))


def says(finished: Finished, phrase: str) -> bool:
    """Whether this is among the words of a command's error output, names left out."""
    return phrase in _without_names(finished.errors, finished.argv)


def _without_names(said: str, known: Iterable[str]) -> str:
    """A message on one line without usage texts, and without the names in it: those that are known, what is quoted, and
    what begins with the pool of one of those.

    :param known: datasets and snapshots, among other words
    """
    text = " ".join(said.partition("usage:")[0].split())
    named = [word for word in known if "/" in word and not word.startswith(("/", "-"))]
    whole = {part for word in named for part in (word, *_SEPARATED.split(word, 1)[:1])}
    for word in sorted(whole, key=len, reverse=True):
        text = text.replace(" ".join(word.split()), _NAME)
    text = _QUOTED.sub(_NAME, text)
    for pool in {word.partition("/")[0] for word in named}:
        text = re.sub(rf"(?<![\w/.:-]){re.escape(pool)}/[\w./:-]*", _NAME, text)
    return re.sub(rf"{_NAME}[\w./:@#-]*", _NAME, text)


def words(finished: Finished) -> str:
    """zfs's own words on one line, without usage texts. Of many the last, as warnings come before what they end in."""
    said = " ".join(finished.errors.split("usage:")[0].split())
    if not said:
        if finished.status < 0:
            return f"the command was ended by signal {-finished.status}"
        return f"exit status {finished.status}, without a word"
    return said if len(said) <= MAX_SHOWN else "..." + said[3 - MAX_SHOWN :]
