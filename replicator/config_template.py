"""The commented replicator.toml that ``replicator init`` writes.

Lines that begin with ``# `` are for reading; a setting that is not in force begins with ``#`` and no space, so taking
that one character away puts it in force.
"""

from __future__ import annotations

import json
from pathlib import Path

from replicator.settings import (
    DEFAULT_KEEP_SOURCE,
    DEFAULT_KEEP_TARGET,
    DEFAULT_SCHEDULE,
    DEFAULT_STATE_DIR,
)

_TEMPLATE = """\
# replicator.toml: what this node replicates where, when, and what is kept.
# Check it with: replicator check
# Durations and sizes carry units ("30s", "1h30min", "200MiB/s"). A volume is STORAGE:NAME.
# Settings that begin with "#" and no space are not in force; what they show is the default, or an example.
# Files replicator.d/*.toml beside this one are read as well: what stands there need not stand here.

[node]
name = {node}
state_dir = {state_dir}

[network]
# Replication listens and dials on this network only, and never falls back to another.
cluster = {cluster}
listen = {listen}
# Metrics, status page and API; "" for none. They ask for no password: keep them on this machine.
http = {http}

# A storage has a name of your choice, used in volume names and by other nodes.
# Raw disk images in a directory, best on XFS or btrfs (snapshots are then free); devices can be replicated from.
#[storage.images]
#kind = "image"
#path = "/var/lib/images"
#devices = {{"vm-100" = "/dev/vg0/vm-100"}}
# The storage is there only while a file system is mounted on path.
#is_mountpoint = false

# ZFS datasets and zvols (needs zfsutils-linux).
#[storage.tank]
#kind = "zfs"
#root = "tank/vm"
# Which streams replicas are taken in: "raw" (encrypted as at the source), "plain", or "any".
#accept = "any"
# Properties that every replica gets here; and those that it does not take over from its source.
#override = {{compression = "zstd"}}
#exclude = ["recordsize"]

# Images of a Ceph pool (needs python3-rbd).
#[storage.pool]
#kind = "rbd"
#pool = "rbd"
#namespace = "vms"
#data_pool = "ec-data"
#conffile = "/etc/ceph/ceph.conf"
#user = "admin"
#keyring = "/etc/ceph/ceph.client.admin.keyring"
# "together": the snapshots of a run are of one instant, through an RBD group.
#snapshots = "each"

# Another node: one table each. It joins with: replicator cluster invite NODE
#[peer.{peer}]
#address = {peer_address}
# Storages of this node that it may write replicas into (below its own name), and those that it may read.
#may_push_to = ["images"]
#may_pull_from = []
# Those of may_push_to where its replicas may have the names of their sources.
#same_path = []
# Those of may_push_to where it may switch over: make its replicas primaries, and replicas again.
#may_switch = []
# The least that this node keeps of those replicas, whatever the job of the peer says.
#keep = "last=3"

# A job: volumes by pattern ("*" is everything, "/" included; a leading "!" excludes; replicas are never selected),
# or {{node = "{peer}", volumes = "tank:*"}} to pull from another node.
#[job.vms]
#source = ["images:*", "!images:*-swap"]
# NODE:STORAGE; a bare STORAGE is one of this node.
#targets = ["{peer}:images"]
# As in Proxmox ("*/15", "mon..fri 02:00"), or cron, or an interval ("30s").
#schedule = {schedule}
#timezone = "UTC"
# Snapshots kept here and on the targets. Only snapshots of this job are ever destroyed, never the newest common one.
#keep = {{source = {keep_source}, target = {keep_target}}}
# The objective: status and exit codes say when a replica is further behind.
#max_lag = "45min"
# Also by the time of day: ["mon..fri 08:00-18:00 = 50MiB/s", "200MiB/s"]; the first that holds counts.
#rate_limit = "200MiB/s"
# When replicas are read back in full and compared.
#verify = "sun 03:00"
#verify_by = "auto"
# Commands around the snapshot; "after" always runs once "before" was started.
# on_failure = "snapshot": if "before" fails, take one that is only crash-consistent; else ("skip") none.
#quiesce = {{before = ["fsfreeze", "-f", "/srv"], after = ["fsfreeze", "-u", "/srv"], timeout = "10s"}}
# A command after each run, however it ended.
#after_run = {{command = ["logger", "a run ended"], timeout = "1min"}}
# A volume that nobody has written to gets no snapshot ("skip"), or one all the same ("snapshot").
#unchanged = "skip"
# Send only the newest snapshot, or all in between as well.
#intermediates = "newest"
# Snapshots of other programs that are sent as well, every one of them; they are never destroyed.
#foreign_snapshots = ["autosnap_*", "!*_hourly"]
# Replicas are called NODE/VOLUME after the source's node ("node"), or as their sources are ("same").
#replica_path = "node"
# Compress what crosses the network where that gains something ("auto"), or never.
#compress = "auto"
#enabled = true

#[limits]
# Transfers at once: on this node, and with one other node.
#transfers = 4
#transfers_per_target = 2
# ... and reading or writing one pool of this node.
#transfers_per_pool = 4
# A transfer that stands still this long is cancelled and tried again.
#stall_timeout = "2min"
#connect_timeout = "10s"
# Of all transfers together.
#rate_limit = "1Gbit/s"
#keep_history = "90d"

# Tell people when a replica fails, lags, differs, is in conflict, and when it is well again.
#[notify]
#command = ["mail", "-s", "replicator", "root"]
#smtp = {{server = "mail.example.org:587", sender = "us@example.org", to = ["admin@example.org"]}}
# At least so long between two messages.
#every = "15min"
#timeout = "30s"

#[log]
# "text" (key=value) or "json"; debug, info, warning or error.
#format = "text"
#level = "info"
"""


def render_template(
    node: str,
    *,
    cluster: str = "10.99.0.0/24",
    listen: str = "10.99.0.1:8571",
    http: str = "127.0.0.1:9571",
    state_dir: Path = DEFAULT_STATE_DIR,
    peer: str = "prox2",
    peer_address: str = "10.99.0.2:8571",
) -> str:
    """The text of a new configuration file; valid as it is, and with every setting put in force.

    :param peer, peer_address: only the example's
    """
    return _TEMPLATE.format(
        node=_quote(node),
        state_dir=_quote(str(state_dir)),
        cluster=_quote(cluster),
        listen=_quote(listen),
        http=_quote(http),
        peer=peer,
        peer_address=_quote(peer_address),
        schedule=_quote(DEFAULT_SCHEDULE),
        keep_source=_quote(DEFAULT_KEEP_SOURCE),
        keep_target=_quote(DEFAULT_KEEP_TARGET),
    )


def _quote(text: str) -> str:
    """A text as TOML writes it: its basic strings have JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
