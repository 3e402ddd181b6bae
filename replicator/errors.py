"""Everything that can go wrong, as one tree.

Every error names the thing, the cause and the remedy: ``str(error)`` is the thing and the cause, ``error.hint`` the
remedy. ``retryable`` says whether the same request may succeed later without anybody doing anything. ``exit_code``
is what the command line returns for it. ``code`` is the error's stable name: it crosses the wire and stands in logs
and metrics.

::

    ReplicatorError
    ├── UsageError                wrong command line                                   exit 2
    ├── ConfigError               replicator.toml is wrong; carries every problem      exit 2
    │   └── ScheduleError         a schedule that cannot be read
    ├── InvalidName               a name that may not be used (outside, peer, listing)
    ├── ConflictError             storage on both sides cannot be reconciled by itself; carries a planning conflict
    ├── StorageError              a storage of this or of the other node
    │   ├── StorageUnavailable    not there now (unmounted, unreachable)               retryable
    │   ├── MissingBinding        a Python binding of the distribution is missing
    │   ├── NoSuchVolume          a volume that does not exist
    │   ├── NoSuchSnapshot        a snapshot that does not exist (any more)            retryable: plan again
    │   ├── SnapshotExists        a snapshot of that name exists already
    │   ├── SnapshotHeld          cannot be destroyed while it is held
    │   ├── VolumeBusy            another operation has the volume                     retryable
    │   ├── VolumeChanged         the volume changed size or vanished while read       retryable
    │   ├── NoSpace               the storage is full                                  retryable
    │   ├── DamagedData           stored bytes are not what was written
    │   ├── NotReadable           what is stored cannot be read here as it is meant (no key, no permission)
    │   ├── StaleResume           partial state that nothing on the source continues   retryable: plan again
    │   ├── NotAReplica           the target has a volume of that name that is no replica of this one
    │   ├── StaleEpoch            the sender's epoch is older than the receiver's
    │   └── Unsupported           this storage cannot do that
    ├── TransportError            between two nodes
    │   ├── PeerUnreachable       no connection                                        retryable
    │   ├── DeadlineExceeded      a wait that came to its end                          retryable
    │   ├── ConnectionLost        the connection ended in the middle                   retryable
    │   ├── ProtocolError         the peer said what the protocol does not allow
    │   ├── ChecksumMismatch      bytes were damaged between the two storages          retryable
    │   ├── NotAuthenticated      no certificate, or none of this cluster
    │   ├── NotAuthorized         known, but without the right
    │   ├── ClusterNetworkError   no address of this node on the cluster network
    │   └── RemoteError           an error of the peer that this node's version does not know
    ├── BadDiff                   a file of changes is no such file, is cut short, garbled or damaged
    ├── IdentityError             keys, certificates, join tokens
    ├── DaemonUnreachable         no daemon answers on the local socket                retryable
    ├── HookFailed                a hook of the configuration failed                   retryable
    └── Cancelled                 stopped on request, at a resumable point             retryable
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


class ReplicatorError(Exception):
    """Base of all errors of this project.

    :param message: the thing and the cause, one sentence without a full stop
    :param hint: the remedy, one sentence or a command line; empty only where nobody can do anything
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def __str__(self) -> str:
        return self.message


class UsageError(ReplicatorError):
    """The command line asks for something that cannot be meant."""

    code = "usage"
    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a configuration file."""

    file: str
    key: str
    message: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where}: {self.message}" + (f" ({self.remedy})" if self.remedy else "")


class ConfigError(ReplicatorError):
    """The configuration cannot be used; ``problems`` has all that is wrong with it, not only the first."""

    code = "config"
    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class ScheduleError(ConfigError):
    """A schedule that is neither a calendar event, nor cron, nor an interval."""

    code = "schedule"


class InvalidName(ReplicatorError):
    """A name of a node, storage, volume, snapshot, tag or job that may not be used."""

    code = "invalid_name"


class ConflictError(ReplicatorError):
    """Source and target cannot be reconciled without a decision; see :mod:`replicator.planning`.

    ``kind`` is the conflict's name there (``diverged``, ``no_common_base`` …).
    """

    code = "conflict"

    def __init__(self, message: str, *, hint: str | None = None, kind: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class StorageError(ReplicatorError):
    """A storage refused or failed."""

    code = "storage"


class StorageUnavailable(StorageError):
    """The storage is not there now: directory missing, pool not imported, cluster unreachable."""

    code = "storage_unavailable"
    retryable = True


class MissingBinding(StorageError):
    """A Python binding that only the distribution has is not installed."""

    code = "missing_binding"
    exit_code = 2


class NoSuchVolume(StorageError):
    """The volume does not exist."""

    code = "no_such_volume"


class NoSuchSnapshot(StorageError):
    """The snapshot does not exist, or not any more."""

    code = "no_such_snapshot"
    retryable = True


class SnapshotExists(StorageError):
    """A snapshot of that name exists already."""

    code = "snapshot_exists"


class SnapshotHeld(StorageError):
    """The snapshot is held, so it cannot be destroyed."""

    code = "snapshot_held"


class VolumeBusy(StorageError):
    """Another operation has the volume."""

    code = "volume_busy"
    retryable = True


class VolumeChanged(StorageError):
    """The volume was truncated or replaced while it was being read."""

    code = "volume_changed"
    retryable = True


class NoSpace(StorageError):
    """The storage is full (or over quota)."""

    code = "no_space"
    retryable = True


class DamagedData(StorageError):
    """Bytes on the storage are not those that were written."""

    code = "damaged_data"


class NotReadable(StorageError):
    """What is stored is there, but cannot be read here: its key is not loaded, or this user may not."""

    code = "not_readable"


class StaleResume(StorageError):
    """There is partial state that nothing on the source continues."""

    code = "stale_resume"
    retryable = True


class NotAReplica(StorageError):
    """The target's volume is not a replica of this lineage."""

    code = "not_a_replica"


class StaleEpoch(StorageError):
    """The sender's epoch is older than the receiver's: the sender was superseded."""

    code = "stale_epoch"


class Unsupported(StorageError):
    """The storage cannot do what was asked."""

    code = "unsupported"


class TransportError(ReplicatorError):
    """Something between two nodes."""

    code = "transport"


class PeerUnreachable(TransportError):
    """No connection to the peer."""

    code = "peer_unreachable"
    retryable = True


class DeadlineExceeded(TransportError):
    """A wait came to its end."""

    code = "deadline_exceeded"
    retryable = True


class ConnectionLost(TransportError):
    """The connection ended in the middle of something."""

    code = "connection_lost"
    retryable = True


class ProtocolError(TransportError):
    """The peer said something that the protocol does not allow; the connection is closed."""

    code = "protocol"


class ChecksumMismatch(TransportError):
    """Bytes were damaged between the two storages; nothing of them was kept as complete."""

    code = "checksum_mismatch"
    retryable = True


class NotAuthenticated(TransportError):
    """The peer has no certificate, or none that this cluster accepts."""

    code = "not_authenticated"


class NotAuthorized(TransportError):
    """The peer is known but has no right to what it asked for."""

    code = "not_authorized"


class ClusterNetworkError(TransportError):
    """This node has no address on the cluster network, or a peer's address is not on it."""

    code = "cluster_network"


class RemoteError(TransportError):
    """An error of the peer whose code this version does not know."""

    code = "remote"


class BadDiff(ReplicatorError):
    """A file of changes, or what goes with it, is no such file, is cut short, garbled or damaged."""

    code = "bad_diff"


class IdentityError(ReplicatorError):
    """A key, a certificate or a join token cannot be used."""

    code = "identity"


class DaemonUnreachable(ReplicatorError):
    """No daemon answers on the local socket."""

    code = "daemon_unreachable"
    retryable = True


class HookFailed(ReplicatorError):
    """A hook of the configuration failed or took too long."""

    code = "hook_failed"
    retryable = True


class Cancelled(ReplicatorError):
    """Stopped on request, at a point from which the next run continues."""

    code = "cancelled"
    retryable = True


def error_classes() -> dict[str, type[ReplicatorError]]:
    """All error classes by their ``code``."""
    found: dict[str, type[ReplicatorError]] = {}
    pending: list[type[ReplicatorError]] = [ReplicatorError]
    while pending:
        error = pending.pop()
        found[error.code] = error
        pending.extend(error.__subclasses__())
    return found


def rebuild_error(code: str, message: str, hint: str) -> ReplicatorError:
    """The error that a peer reported; a code of another version becomes :class:`RemoteError`.

    Only the class is taken from the code; nothing that a peer sends is executed or looked up beyond this table.
    """
    error = error_classes().get(code)
    if error is None or error.code == ReplicatorError.code:
        return RemoteError(f"{message} [{code}]", hint=hint)
    return error(message, hint=hint)
