"""The tables of replicator.toml as frozen, typed values.

Each class is one table of the file. A field's description is the remedy that is shown when it is missing or wrong.
What one table alone can tell is checked here; what needs several tables is in :mod:`replicator.config_checks`;
reading the file and reporting on it in :mod:`replicator.config`.
"""

from __future__ import annotations

from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, Strict

from replicator.model import VerifyBy
from replicator.planning import Intermediates
from replicator.selection import SnapshotPatterns, included_storages
from replicator.setting_types import (
    DEFAULT_HTTP_PORT,
    AbsolutePath,
    Address,
    Argv,
    ClusterNetwork,
    Dataset,
    Devices,
    Duration,
    HttpAddress,
    KeepText,
    MailAddress,
    MailAddresses,
    MailServer,
    NodeName,
    Overrides,
    Patterns,
    PeerAddress,
    Rate,
    Snapshots,
    StorageNames,
    TakenOver,
    Targets,
    TimeZone,
    Word,
    as_source,
)

DEFAULT_STATE_DIR = Path("/var/lib/replicator")
DEFAULT_SCHEDULE = "*/15"
DEFAULT_KEEP_SOURCE = "last=3"
DEFAULT_KEEP_TARGET = "last=24 hourly=48 daily=14 weekly=8 monthly=12"

_DURATION = 'write a number and its unit, for example "30s" or "1h30min"'
_KEEP = 'write for example "last=24 daily=14"'
_RATE = 'write for example "200MiB/s", or ["mon..fri 08:00-18:00 = 50MiB/s", "200MiB/s"]'
_NAMES = 'write a list of storages of this node, for example ["backup"]'


class Table(BaseModel):
    """What all tables have in common: unknown keys are refused, and nothing is converted behind one's back."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Node(Table):
    """``[node]``: this node."""

    name: NodeName = Field(description='write its host name, for example "prox1"')
    state_dir: AbsolutePath = Field(DEFAULT_STATE_DIR, description='write for example "/var/lib/replicator"')


class Network(Table):
    """``[network]``: where this node listens and dials."""

    cluster: ClusterNetwork = Field(description='write the cluster network, for example "10.99.0.0/24"')
    listen: PeerAddress = Field(
        description='write this node\'s address on the cluster network, such as "10.99.0.1:8571"'
    )
    http: HttpAddress = Field(
        Address(ip_address("127.0.0.1"), DEFAULT_HTTP_PORT),
        description='write for example "127.0.0.1:9571", or "" for none',
    )


class ImageStorage(Table):
    """``[storage.X] kind = "image"``: raw disk images in a directory; ``devices`` are sources only.

    :ivar is_mountpoint: as in Proxmox: the storage is there only while a file system is mounted on ``path``
    """

    name: str
    kind: Literal["image"]
    path: AbsolutePath = Field(description='write the directory of the images, for example "/var/lib/images"')
    devices: Devices = Field(default_factory=dict, description='write for example {"vm-100" = "/dev/vg0/vm-100"}')
    is_mountpoint: bool = Field(False, description="write true or false, without quotes")


class ZfsStorage(Table):
    """``[storage.X] kind = "zfs"``: the datasets and zvols below ``root``.

    :ivar accept: the form of streams that replicas are taken in: as they are encrypted (raw), decrypted (plain), or any
    :ivar override: properties that every replica gets here, whatever its source has
    :ivar exclude: of the properties that replicas take over (:mod:`replicator.zfs_properties`), what they do not
    """

    name: str
    kind: Literal["zfs"]
    root: Dataset = Field(description='write the dataset that holds the volumes, for example "tank/vm"')
    accept: Literal["any", "raw", "plain"] = Field("any", description='write "any", "raw" or "plain"')
    override: Overrides = Field(default_factory=dict, description='write for example {compression = "zstd"}')
    exclude: TakenOver = Field((), description='write a list of properties, for example ["recordsize"]')


class RbdStorage(Table):
    """``[storage.X] kind = "rbd"``: the images of a Ceph pool."""

    name: str
    kind: Literal["rbd"]
    pool: Word = Field(description='write the pool, for example "rbd"')
    namespace: Word | None = Field(None, description="write the name of an RBD namespace")
    data_pool: Word | None = Field(None, description="write the name of the pool that new replicas have their data in")
    conffile: AbsolutePath = Field(Path("/etc/ceph/ceph.conf"), description='write for example "/etc/ceph/ceph.conf"')
    user: Word = Field("admin", description='write the user without "client.", for example "admin"')
    keyring: AbsolutePath | None = Field(None, description='write for example "/etc/ceph/ceph.client.admin.keyring"')
    snapshots: Literal["each", "together"] = Field("each", description='write "each" or "together"')


Storage = ImageStorage | ZfsStorage | RbdStorage
STORAGE_KINDS: dict[str, type[ImageStorage | ZfsStorage | RbdStorage]] = {
    "image": ImageStorage,
    "zfs": ZfsStorage,
    "rbd": RbdStorage,
}


class Peer(Table):
    """``[peer.X]``: another node, and what it may do here.

    :ivar may_push_to: storages of ours that it may write replicas into, below its own name
    :ivar may_pull_from: storages of ours that it may read
    :ivar may_switch: of ``may_push_to``: where it may make its replicas primaries, and replicas again (switch-over)
    :ivar same_path: of ``may_push_to``: where its replicas may have the names of their sources, not only below its own
    :ivar keep: the least that this node keeps of what the peer replicates here, whatever the peer's job says
    """

    name: str
    address: PeerAddress = Field(description='write its address on the cluster network, for example "10.99.0.2:8571"')
    may_push_to: StorageNames = Field((), description=_NAMES)
    may_pull_from: StorageNames = Field((), description=_NAMES)
    same_path: StorageNames = Field((), description=_NAMES)
    may_switch: StorageNames = Field((), description=_NAMES)
    keep: KeepText | None = Field(None, description=_KEEP)


class Source(Table):
    """What a job replicates.

    :ivar node: this node, or the one to pull from
    :ivar volumes: patterns, for :func:`replicator.selection.select`
    """

    node: NodeName = Field(description="write the node to pull from")
    volumes: Patterns = Field(description='write STORAGE:GLOB, for example "tank:*" or ["tank:*", "!tank:*-swap"]')

    @property
    def storages(self) -> list[str]:
        """The storages of ``node`` that have included volumes."""
        return included_storages(self.volumes)


class Keep(Table):
    """``keep`` of a job: retention policies, see :mod:`replicator.retention`."""

    source: KeepText = Field(DEFAULT_KEEP_SOURCE, description=_KEEP)
    target: KeepText = Field(DEFAULT_KEEP_TARGET, description=_KEEP)


class Quiesce(Table):
    """``quiesce`` of a job: what makes the data on the volume consistent while the snapshot is taken.

    :ivar timeout: for each of the two commands
    :ivar on_failure: of ``before``: no snapshot is taken, or one that is only crash-consistent
    """

    before: Argv = Field(description='write a command as a list, for example ["fsfreeze", "-f", "/srv"]')
    after: Argv = Field(description='write a command as a list, for example ["fsfreeze", "-u", "/srv"]')
    timeout: Duration = Field(timedelta(seconds=10), description=_DURATION)
    on_failure: Literal["skip", "snapshot"] = Field("skip", description='write "skip" or "snapshot"')


class AfterRun(Table):
    """``after_run`` of a job: a command that runs after each of its runs; see :mod:`replicator.run_hooks`."""

    command: Argv = Field(description='write a command as a list, for example ["/usr/local/bin/told", "vms"]')
    timeout: Duration = Field(timedelta(minutes=1), description=_DURATION)


class Job(Table):
    """``[job.X]``: what is replicated where, when, and what is kept.

    :ivar max_lag: the objective; None: the lag is only reported
    :ivar rate_limit: by the time of day in the job's time zone; None: unlimited
    :ivar verify: schedule of verifications; None: only by hand
    :ivar foreign_snapshots: names of snapshots that replicator did not make and that are sent as well; never destroyed
    :ivar replica_path: replicas are below the source node's name, or have the same name as their sources
    :ivar unchanged: what a volume gets that nobody has written to: nothing, or a snapshot all the same
    :ivar verify_by: of ZFS: whether data is read, or the pools' scrubs are taken
    """

    name: str
    source: Annotated[Source, as_source] = Field(
        description='write for example "tank:*", or {node = "prox2", volumes = "tank:*"} to pull'
    )
    targets: Targets = Field(description='write a list of NODE:STORAGE, for example ["prox2:backup"]')
    schedule: str = Field(DEFAULT_SCHEDULE, description='write for example "*/15", "21:30" or "30s"')
    timezone: TimeZone | None = Field(None, description='write for example "Europe/Vienna"')
    keep: Keep = Field(Keep(source=DEFAULT_KEEP_SOURCE, target=DEFAULT_KEEP_TARGET), description=_KEEP)
    max_lag: Duration | None = Field(None, description=_DURATION)
    rate_limit: Rate | None = Field(None, description=_RATE)
    verify: str | None = Field(None, description='write a schedule, for example "sun 03:00"')
    verify_by: Annotated[VerifyBy, Strict(False)] = Field(
        VerifyBy.AUTO, description='write "auto", "reading" or "scrub"'
    )
    quiesce: Quiesce | None = Field(
        None, description='write for example {before = ["fsfreeze", "-f", "/srv"], after = ["fsfreeze", "-u", "/srv"]}'
    )
    after_run: AfterRun | None = Field(
        None, description='write for example {command = ["/usr/local/bin/told", "vms"], timeout = "1min"}'
    )
    intermediates: Annotated[Intermediates, Strict(False)] = Field(
        Intermediates.NEWEST, description='write "newest" or "all"'
    )
    foreign_snapshots: Snapshots = Field(
        SnapshotPatterns(), description='write a list of patterns, for example ["autosnap_*", "!*_hourly"]'
    )
    replica_path: Literal["node", "same"] = Field("node", description='write "node" or "same"')
    unchanged: Literal["skip", "snapshot"] = Field("skip", description='write "skip" or "snapshot"')
    compress: Literal["auto", "never"] = Field("auto", description='write "auto" or "never"')
    enabled: bool = Field(True, description="write true or false, without quotes")

    @property
    def zone(self) -> ZoneInfo | None:
        """The time zone of the schedules; None for this machine's."""
        return None if self.timezone is None else ZoneInfo(self.timezone)

    @property
    def skips_unchanged(self) -> bool:
        """Whether a volume that nobody wrote to gets no snapshot. Where hooks make the data consistent, nobody knows
        what is on the volume before they have run."""
        return self.quiesce is None and self.unchanged == "skip"


class Limits(Table):
    """``[limits]``: of this node.

    :ivar transfers: at once, all targets together
    :ivar transfers_per_target: at once to or from one node
    :ivar transfers_per_pool: at once that read or write one pool of this node
    :ivar stall_timeout: a transfer whose byte counter stands still that long is cancelled and retried
    :ivar connect_timeout: for a connection including the TLS handshake
    :ivar rate_limit: of all transfers together, by the time of day on this machine; None: unlimited
    :ivar keep_history: runs and events older than this leave the history
    """

    transfers: int = Field(4, ge=1, le=64, description="write a number from 1 to 64")
    transfers_per_target: int = Field(2, ge=1, le=64, description="write a number from 1 to 64")
    transfers_per_pool: int = Field(4, ge=1, le=64, description="write a number from 1 to 64")
    stall_timeout: Duration = Field(timedelta(minutes=2), description=_DURATION)
    connect_timeout: Duration = Field(timedelta(seconds=10), description=_DURATION)
    rate_limit: Rate | None = Field(None, description=_RATE)
    keep_history: Duration = Field(timedelta(days=90), description=_DURATION)


class Fence(Table):
    """``[fence]``: how a primary that may still be writing is stopped before another copy is promoted.

    :ivar command: must end with 0, or nothing is promoted; see :mod:`replicator.role_changes` for its environment
    """

    command: Argv = Field(description='write a command as a list, for example ["fence_ipmilan", "--ip=10.0.0.9"]')
    timeout: Duration = Field(timedelta(minutes=1), description=_DURATION)


class Smtp(Table):
    """``smtp`` of ``[notify]``: the mail server that takes messages.

    :ivar tls: from the beginning (implicit), by STARTTLS, or not at all
    :ivar password_file: its text without white space around it is the password of ``user``
    """

    server: MailServer = Field(description='write HOST:PORT, for example "mail.example.org:587"')
    sender: MailAddress = Field(description='write for example "replicator@prox1.example.org"')
    to: MailAddresses = Field(description='write a list of addresses, for example ["admin@example.org"]')
    tls: Literal["starttls", "implicit", "none"] = Field(
        "starttls", description='write "starttls", "implicit" or "none"'
    )
    user: str | None = Field(None, description="write the user that the server knows")
    password_file: AbsolutePath | None = Field(None, description='write for example "/etc/replicator/mail-password"')


class Notify(Table):
    """``[notify]``: how people are told when a replica's state changes; see :mod:`replicator.notifying`.

    :ivar every: at least so long between two messages
    :ivar timeout: for the command, and for each answer of the mail server
    """

    command: Argv | None = Field(None, description='write a command as a list, for example ["mail", "-s", "x", "root"]')
    smtp: Smtp | None = Field(
        None, description='write {server = "mail:587", sender = "replicator@prox1", to = ["admin@example.org"]}'
    )
    every: Duration = Field(timedelta(minutes=15), description=_DURATION)
    timeout: Duration = Field(timedelta(seconds=30), description=_DURATION)


class Log(Table):
    """``[log]``: how the daemon logs."""

    format: Literal["text", "json"] = Field("text", description='write "text" (key=value) or "json"')
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description='write "debug", "info", "warning" or "error"'
    )
