"""replicator.toml: what is read, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta, tzinfo
from ipaddress import ip_network
from pathlib import Path

import pytest

from replicator import config, config_checks, config_files, selection
from replicator.config import Address, Config, Target
from replicator.config_template import render_template
from replicator.errors import ConfigError, Problem, ScheduleError
from replicator.planning import Intermediates
from replicator.rate_windows import RateLimit
from replicator.selection import Pattern
from replicator.settings import ImageStorage, RbdStorage, ZfsStorage
from scheduler.schedule import parse_schedule

NETWORK = """
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
"""
BASE = (
    NETWORK
    + """
[node]
name = "prox1"
[storage.tank]
kind = "zfs"
root = "tank/vm"
[storage.images]
kind = "image"
path = "/var/lib/images"
[peer.prox2]
address = "10.99.0.2:8571"
"""
)
ZFS = BASE + '[storage.x]\nkind = "zfs"\nroot = "x"\n'
FULL = """
[node]
name = "prox1"
state_dir = "/srv/replicator"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
http = ""
[storage.tank]
kind = "zfs"
root = "tank/vm"
accept = "raw"
override = {compression = "zstd", "com.example:x" = "y"}
exclude = ["atime"]
[storage.pool]
kind = "rbd"
pool = "rbd"
[storage.images]
kind = "image"
path = "/var/lib/images"
devices = {"vm-100" = "/dev/vg0/vm-100"}
[peer.prox2]
address = "10.99.0.2:8571"
may_push_to = ["images"]
may_pull_from = ["tank"]
same_path = ["images"]
may_switch = ["images"]
keep = "last=5"
[peer.prox3]
address = "10.99.0.3"
[job.vms]
source = "tank:*"
targets = ["prox2:backup", "prox3:backup", "images"]
schedule = "*/15"
timezone = "Europe/Vienna"
keep = {source = "last=3", target = "last=24 hourly=48 daily=14 weekly=8 monthly=12"}
max_lag = "45min"
rate_limit = "200MiB/s"
verify = "sun 03:00"
quiesce = {before = ["fsfreeze", "-f", "/srv"], after = ["fsfreeze", "-u", "/srv"], timeout = "5s"}
intermediates = "all"
foreign_snapshots = ["autosnap_*", "!*_hourly"]
replica_path = "same"
compress = "never"
enabled = false
[job.fetch]
source = {node = "prox2", volumes = ["tank:*", "!tank:*-swap"]}
targets = ["images"]
[limits]
transfers = 8
rate_limit = "1Gbit/s"
[log]
format = "json"
[fence]
command = ["fence_ipmilan", "--ip=10.0.0.9"]
timeout = "30s"
"""


def parse(text: str) -> Config:
    return config.parse(text, host_name="prox1.example.org")


def problems(text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    for problem in caught.value.problems:
        assert f"{problem.file}: {problem.key}: {problem.message}" in str(caught.value)
        assert problem.remedy in f"{caught.value} {caught.value.hint}"
        assert problem.file == "replicator.toml"
        assert problem.remedy
    return list(caught.value.problems)


def test_everything() -> None:
    read = parse(FULL)
    assert read.node.state_dir == Path("/srv/replicator")
    assert read.network.cluster == ip_network("10.99.0.0/24")
    assert read.network.http is None
    tank = read.storages["tank"]
    assert isinstance(tank, ZfsStorage)
    assert (tank.accept, tank.override, tank.exclude) == (
        "raw",
        {"compression": "zstd", "com.example:x": "y"},
        ("atime",),
    )
    assert isinstance(read.storages["pool"], RbdStorage)
    images = read.storages["images"]
    assert isinstance(images, ImageStorage)
    assert (images.name, images.devices) == ("images", {"vm-100": Path("/dev/vg0/vm-100")})
    assert read.peers["prox2"].may_push_to == read.peers["prox2"].same_path == ("images",)
    assert read.peers["prox2"].may_switch == ("images",)
    assert read.fence is not None
    assert (read.fence.command, read.fence.timeout) == (("fence_ipmilan", "--ip=10.0.0.9"), timedelta(seconds=30))
    assert [read.jobs["vms"].foreign_snapshots.matches(f"autosnap_1_{n}") for n in ("daily", "hourly")] == [True, False]
    assert (read.jobs["vms"].replica_path, read.jobs["fetch"].replica_path) == ("same", "node")
    assert not read.jobs["fetch"].foreign_snapshots.matches("x")
    assert read.peers["prox3"].address == Address.parse("10.99.0.3:8571")
    assert read.peer_at(Address.parse("10.99.0.3:8571")) is read.peers["prox3"]
    job = read.jobs["vms"]
    assert job.name == "vms"
    assert job.source.node == "prox1"
    assert [str(p) for p in job.source.volumes] == ["tank:*"]
    assert job.targets == (Target("prox2", "backup"), Target("prox3", "backup"), Target("prox1", "images"))
    assert [read.is_local(t.node) for t in job.targets] == [False, False, True]
    assert str(job.zone) == "Europe/Vienna"
    assert job.keep.source == "last=3"
    assert job.max_lag == timedelta(minutes=45)
    assert job.rate_limit == RateLimit(((None, 200 * 1024**2),))
    assert job.quiesce is not None
    assert job.quiesce.before == ("fsfreeze", "-f", "/srv")
    assert job.intermediates is Intermediates.ALL
    assert not job.enabled
    assert read.jobs["fetch"].source.node == "prox2"
    assert read.jobs["fetch"].source.storages == ["tank"]
    assert (read.limits.transfers, read.limits.rate_limit) == (8, RateLimit(((None, 125_000_000),)))
    assert (read.log.format, read.log.level) == ("json", "info")
    assert read.warnings == ()


def test_defaults() -> None:
    read = parse(NETWORK + '[storage.i]\nkind="image"\npath="/i"\n[job.j]\nsource="i:*"\ntargets=["i"]')
    assert read.node.name == "prox1"
    assert str(read.network.http) == "127.0.0.1:9571"
    job = read.jobs["j"]
    assert job.schedule == "*/15"
    assert job.enabled
    assert job.intermediates is Intermediates.NEWEST
    assert job.max_lag is None
    assert job.zone is None
    assert read.limits.stall_timeout == timedelta(minutes=2)


def test_nothing_can_be_changed() -> None:
    read = parse(FULL)
    with pytest.raises(ValueError, match="frozen"):
        read.jobs["vms"].enabled = True
    with pytest.raises(TypeError):
        read.jobs["other"] = read.jobs["vms"]  # type: ignore[index]


JOB = '[job.vms]\nsource = "tank:*"\ntargets = ["prox2:backup"]\n'


@pytest.mark.parametrize(
    ("text", "key", "message", "remedy"),
    [
        # keys and types
        (BASE + "[jobs.vms]", "jobs", "unknown table", "did you mean 'job'?"),
        ("color = 1" + BASE, "color", "unknown key", "known are fence, job, limits"),
        (BASE + JOB + 'schedul = "x"', "job.vms.schedul", "unknown key", "did you mean 'schedule'?"),
        (BASE + JOB + 'name = "x"', "job.vms.name", "unknown key", ""),
        (BASE + JOB + 'keep = {sources = "last=3"}', "job.vms.keep.sources", "unknown key", "'source'"),
        (BASE + JOB + "rate_limit = 100", "job.vms.rate_limit", "is a whole number", "200MiB/s"),
        (BASE + JOB + "schedule = 15", "job.vms.schedule", "is a whole number", "*/15"),
        (BASE + JOB + 'enabled = "yes"', "job.vms.enabled", "is a text", "without quotes"),
        (BASE + JOB + 'compress = "zstd"', "job.vms.compress", "'zstd' is not allowed", '"auto"'),
        (BASE + JOB + 'intermediates = "some"', "job.vms.intermediates", "'some' is not allowed", '"newest"'),
        (BASE + '[job.vms]\nsource = "tank:*"\ntargets = "prox2:backup"', "job.vms.targets", "is a text", "list"),
        (BASE + '[job.vms]\nsource = "tank:*"', "job.vms.targets", "is missing", "prox2:backup"),
        (BASE + '[job.vms]\nsource = "tank:*"\ntargets = []', "job.vms.targets", "empty list", "prox2:backup"),
        (BASE + '[job.vms]\nsource = "tank:*"\ntargets = ["prox2:a", "prox2:a"]', "job.vms.targets", "twice", "once"),
        (BASE + '[job]\nsource = "tank:*"', "job.source", "is a text, but must be a table", "[job.source]"),
        ("job = 3" + BASE, "job", "is a whole number", "[job.NAME]"),
        (BASE + '["job"."two words"]', 'job."two words"', "is not allowed", "letters"),
        (BASE + "[limits]\ntransfers = 0", "limits.transfers", "0 is not allowed", "1 to 64"),
        (BASE + "[limits]\ntransfers = true", "limits.transfers", "is true or false", "1 to 64"),
        (BASE + '[log]\nlevel = "loud"', "log.level", "'loud' is not allowed", '"debug"'),
        # units
        (BASE + JOB + 'max_lag = "45"', "job.vms.max_lag", "no unit", "45min"),
        (BASE + JOB + 'rate_limit = "200M/s"', "job.vms.rate_limit", "'M' is no unit", '"MiB"'),
        (BASE + JOB + 'keep = {target = "last=x"}', "job.vms.keep.target", "retention policy", "last="),
        (BASE + JOB + 'timezone = "Vienna"', "job.vms.timezone", "not a time zone", "Europe/Vienna"),
        (BASE + JOB + 'timezone = "../../etc/passwd"', "job.vms.timezone", "not a time zone", "Europe/Vienna"),
        # network
        (BASE.replace("10.99.0.0/24", "10.99.0.1/24"), "network.cluster", "not a network", '"10.99.0.0/24"'),
        (BASE.replace("10.99.0.0/24", "10.99.0/33"), "network.cluster", "is not a network", "10.99.0.0/24"),
        (BASE.replace("10.99.0.1:", "0.0.0.0:"), "network.listen", "0.0.0.0 is not on the cluster", "nowhere else"),
        (BASE.replace("10.99.0.1:", "prox1:"), "network.listen", "'prox1' is not an IP", "10.99.0.1:8571"),
        (BASE.replace("10.99.0.1:8571", "10.99.0.1:0"), "network.listen", "no port from 1", "8571"),
        (BASE.replace("10.99.0.2:", "192.0.2.2:"), "peer.prox2.address", "192.0.2.2 is not on", "nowhere else"),
        (BASE.replace("10.99.0.2:", "10.99.0.1:"), "peer.prox2.address", "where this node listens", "of its own"),
        (BASE + '[peer.prox3]\naddress = "10.99.0.2"', "peer.prox3.address", "of peer 'prox2' too", "of its own"),
        (BASE + "[peer.prox3]", "peer.prox3.address", "is missing", "10.99.0.2:8571"),
        (BASE + '[peer.prox1]\naddress = "10.99.0.4"', "peer.prox1", "is this node itself", "other nodes"),
        (BASE + '[peer.Prox4]\naddress = "10.99.0.4"', "peer.Prox4", "is not a host name", "lower-case"),
        (BASE.split("[node]")[1].replace("name", "[node]\nname", 1), "network", "is missing", "[network]"),
        # storages
        (BASE + '[storage.x]\npath = "/x"', "storage.x.kind", "is missing", '"image"'),
        (BASE + '[storage.x]\nkind = "lvm"', "storage.x.kind", "'lvm' is no kind", '"image"'),
        (BASE + '[storage.x]\nkind = "image"', "storage.x.path", "is missing", "directory"),
        (BASE + '[storage.x]\nkind = "image"\npath = "x"', "storage.x.path", "not an absolute path", "'/'"),
        (BASE + '[storage.x]\nkind = "image"\npath = "/var/lib/images/x"', "storage.x", "overlaps", "its own"),
        (BASE + '[storage.x]\nkind = "zfs"\nroot = "tank/vm"', "storage.x", "is also tank/vm", "its own"),
        (BASE + '[storage.x]\nkind = "zfs"\nroot = "x"\npool = "x"', "storage.x.pool", "unknown key", "override, root"),
        (
            BASE + '[storage.x]\nkind = "image"\npath = "/x"\ndevices = {a = "/etc/passwd"}',
            "storage.x.devices.a",
            "is not a device",
            "/dev/",
        ),
        (
            BASE + '[storage.x]\nkind = "image"\npath = "/x"\ndevices = {"../a" = "/dev/sda"}',
            'storage.x.devices."../a"',
            "path component '..'",
            "below",
        ),
        (ZFS + 'accept = "some"', "storage.x.accept", "'some' is not allowed", '"raw"'),
        (
            ZFS + "override = {readonly = 'off'}",
            "storage.x.override",
            "a replica is always readonly=on",
            "leave it out",
        ),
        (ZFS + "override = {canmount = 'on'}", "storage.x.override", "always canmount=noauto", "leave it out"),
        (ZFS + "override = {'replicator:role' = 'x'}", "storage.x.override", "not a property to set", "compression"),
        (ZFS + "override = {'-o' = 'x'}", "storage.x.override", "not a property to set", "compression"),
        (ZFS + 'override = {atime = ""}', "storage.x.override", "no value that can be set", "as zfs set takes it"),
        (ZFS + "override = {atime = 5}", "storage.x.override.atime", "is a whole number", "compression"),
        (ZFS + 'exclude = ["recordsiz"]', "storage.x.exclude", "not taken over", "did you mean 'recordsize'?"),
        (ZFS + 'exclude = ["mountpoint"]', "storage.x.exclude", "not taken over", "compression, recordsize"),
        (BASE + JOB + 'foreign_snapshots = ["!x"]', "job.vms.foreign_snapshots", "selects no snapshots", "autosnap"),
        (BASE + JOB + 'foreign_snapshots = "x"', "job.vms.foreign_snapshots", "must be a list", "autosnap"),
        (BASE + JOB + "foreign_snapshots = [5]", "job.vms.foreign_snapshots", "texts in quotes", "autosnap"),
        (BASE + JOB + 'foreign_snapshots = ["a["]', "job.vms.foreign_snapshots", "without ']'", "'[[]'"),
        (BASE + JOB + 'replica_path = "x"', "job.vms.replica_path", "'x' is not allowed", '"same"'),
        (
            BASE + JOB.replace("prox2:backup", "tank") + 'replica_path = "same"',
            "job.vms.replica_path",
            "cannot have the name of its source",
            "another storage",
        ),
        (BASE + 'same_path = ["images"]', "peer.prox2.same_path", "not in may_push_to", "too"),
        (BASE + 'may_switch = ["images"]', "peer.prox2.may_switch", "not in may_push_to", "too"),
        (BASE + '[fence]\ntimeout = "1min"', "fence.command", "is missing", "list"),
        (BASE + '[fence]\ncommand = "fence_ipmilan"', "fence.command", "is a text", "list"),
        (
            BASE
            + 'may_push_to = ["images"]\nsame_path = ["images"]\n'
            + '[peer.prox3]\naddress = "10.99.0.3"\nmay_push_to = ["images"]',
            "peer.prox2.same_path",
            "'prox3' may push to 'images' too",
            "of its own",
        ),
        # references
        (BASE + JOB.replace('"tank:*"', '"tnak:*"'), "job.vms.source", "no storage 'tnak'", "did you mean 'tank'?"),
        (BASE + JOB.replace('"tank:*"', '"tank"'), "job.vms.source", "has no storage", "STORAGE:GLOB"),
        (BASE + JOB.replace('"tank:*"', '["!tank:x"]'), "job.vms.source", "selects no volumes", "first"),
        (BASE + JOB.replace('"tank:*"', "7"), "job.vms.source", "is a whole number", "tank:*"),
        (BASE + JOB.replace("prox2:", "prox9x:"), "job.vms.targets", "no node 'prox9x'", "'prox2'"),
        (BASE + JOB.replace("prox2:backup", "images:vm"), "job.vms.targets", "no node 'images'", "NODE:STORAGE"),
        (BASE + JOB.replace("prox2:backup", "imags"), "job.vms.targets", "no storage 'imags'", "'images'"),
        (BASE + '[peer.p]\naddress="10.99.0.9"\nmay_push_to=["bk"]', "peer.p.may_push_to", "'bk'", "[storage.bk]"),
        (
            BASE + '[job.x]\nsource = {node = "other", volumes = "a:*"}\ntargets = ["images"]',
            "job.x.source.node",
            "no node 'other'",
            "[peer.other]",
        ),
        (
            BASE + '[job.x]\nsource = {node = "prox2", volums = "a:*"}\ntargets = ["images"]',
            "job.x.source.volums",
            "unknown key",
            "'volumes'",
        ),
        (
            BASE + '[job.x]\nsource = {node = "prox2", volumes = "a:*"}\ntargets = ["prox2:b"]',
            "job.x.targets",
            "prox2:b is not on this node",
            "of prox2",
        ),
        (
            BASE + '[job.x]\nsource = {node="prox2", volumes="a:*"}\ntargets=["images"]\n'
            'quiesce = {before=["a"], after=["b"]}',
            "job.x.quiesce",
            "taken on prox2",
            "pushes",
        ),
        (BASE + JOB + 'quiesce = {before = "a", after = ["b"]}', "job.vms.quiesce.before", "is a text", "list"),
        (BASE + JOB + 'quiesce = {before = ["a"]}', "job.vms.quiesce.after", "is missing", "list"),
        # jobs beside each other
        (
            BASE + JOB + '[job.other]\nsource = "tank:vm-1"\ntargets = ["prox2:backup"]',
            "job.other.source",
            "that job 'vms' replicates to prox2:backup too, for example one named 'vm-1'",
            '"!"',
        ),
    ],
)
def test_problems(text: str, key: str, message: str, remedy: str) -> None:
    found = problems(text)
    match = [p for p in found if p.key == key]
    assert match, [str(p) for p in found]
    assert message in match[0].message
    assert remedy in match[0].remedy
    if "unknown key" not in message and key != "network":
        assert len(found) == 1, [str(p) for p in found]


def test_all_problems_at_once() -> None:
    found = problems(
        BASE.replace("10.99.0.2:", "10.98.0.2:")
        + JOB
        + 'max_lag = "45"\nschedul = "x"\nquiesce = {before = []}\n'
        + '[job.other]\nsource = "nowhere:*"\ntargets = ["prox7:backup", "prox2:backup"]\n[log]\nformat = "xml"'
    )
    assert {p.key for p in found} == {
        "job.vms.quiesce.after",
        "job.vms.quiesce.before",
        "job.vms.max_lag",
        "job.vms.schedul",
        "log.format",
        "peer.prox2.address",
        "job.other.source",
        "job.other.targets",
    }


def test_a_table_that_is_wrong_is_still_there() -> None:
    text = BASE.replace('path = "/var/lib/images"', 'path = "x"') + JOB.replace("tank", "images")
    assert [p.key for p in problems(text)] == ["storage.images.path"]


def test_what_is_right_in_a_wrong_table_is_compared_with_the_others() -> None:
    text = BASE + JOB.replace("prox2", "prox8x") + 'schedul = "x"\nmax_lag = 3\n'
    assert [p.key for p in problems(text)] == ["job.vms.max_lag", "job.vms.schedul", "job.vms.targets"]


def test_jobs_that_share_nothing() -> None:
    text = BASE + JOB
    parse(text + '[job.b]\nsource = "tank:*"\ntargets = ["prox2:other"]')
    parse(text + '[job.b]\nsource = "tank:*"\ntargets = ["prox2:backup"]\nenabled = false')
    parse(text.replace('"tank:*"', '["tank:*", "!vm-1"]') + '[job.b]\nsource="tank:vm-1"\ntargets=["prox2:backup"]')


def test_warnings() -> None:
    read = parse(
        BASE.replace("[node]", 'http = "0.0.0.0:9571"\n[node]')
        + '[job.a]\nsource = ["tank:*", "images:*"]\ntargets = ["prox2:backup"]\n'
        + '[job.b]\nsource = "images:*"\ntargets = ["images"]'
    )
    assert [(w.key, bool(w.remedy)) for w in read.warnings] == [
        ("network.http", True),
        ("job.b.targets", True),
        ("job.a.source", True),
    ]
    assert "lost together" in read.warnings[1].message
    assert "named alike in 'tank' and 'images'" in read.warnings[2].message


def test_schedules_are_checked_where_they_stand() -> None:
    asked: list[tuple[str, tzinfo | None]] = []

    def check(text: str, zone: tzinfo | None) -> None:
        asked.append((text, zone))
        if text.startswith("bad"):
            raise ScheduleError(f"schedule {text!r} cannot be used", hint='examples: "*/15"')

    with pytest.raises(ConfigError) as caught:
        config.parse(
            BASE + JOB + 'schedule = "bad one"\nverify = "bad two"\ntimezone = "Europe/Vienna"', check_schedule=check
        )
    assert [p.key for p in caught.value.problems] == ["job.vms.schedule", "job.vms.verify"]
    assert {(text, str(zone)) for text, zone in asked} == {("bad one", "Europe/Vienna"), ("bad two", "Europe/Vienna")}


def test_host_name_that_is_no_node_name() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(NETWORK, host_name="my_host")
    assert [p.key for p in caught.value.problems] == ["node.name"]


@pytest.mark.parametrize(
    ("content", "key", "part"),
    [
        (b"[node]\nname = \n", "line 2", "Invalid value"),
        (b"[node]\nname = 'a'\nname = 'b'\n", "line 3", "overwrite"),
        (b"[node]\nname = 'a\xff'\n", "line 2", "UTF-8"),
        (b"a=" + b"[" * 100_000, "", "nest"),
        (b"#" * (config_files.MAX_BYTES + 1), "", "larger than"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, content: bytes, key: str, part: str) -> None:
    path = tmp_path / "replicator.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    (problem,) = caught.value.problems
    assert problem.file == str(path)
    assert key in problem.key
    assert part in problem.message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        config.load(tmp_path / "replicator.toml")
    assert "replicator init" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


def test_the_template_loads_as_it_is_and_with_all_in_force(tmp_path: Path) -> None:
    text = render_template("prox1", state_dir=tmp_path)
    path = tmp_path / "replicator.toml"
    path.write_text(text)
    read = config.load(path)
    assert read.node.name == "prox1"
    assert read.node.state_dir == tmp_path
    assert not read.jobs

    in_force = "\n".join(line[1:] if line.startswith("#") and line[1:2].strip() else line for line in text.splitlines())
    path.write_text(in_force)
    read = config.load(path, check_schedule=parse_schedule)
    assert set(read.storages) == {"images", "tank", "pool"}
    assert set(read.peers) == {"prox2"}
    assert read.jobs["vms"].quiesce is not None
    assert read.warnings == ()


def test_the_template_has_every_setting() -> None:
    from replicator import settings

    text = render_template("prox1")
    for table in (settings.Node, settings.Network, settings.ImageStorage, settings.ZfsStorage, settings.RbdStorage,
                  settings.Peer, settings.Job, settings.Limits, settings.Log):  # fmt: skip
        for name, field in table.model_fields.items():
            if not (name == "name" and field.description is None):
                assert f"\n{name} = " in text or f"\n#{name} = " in text, (table, name)


def test_jobs_are_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[None] = []
    overlap = selection.overlap

    def counted(first: Sequence[Pattern], of: str, second: Sequence[Pattern], on: str) -> str | None:
        compared.append(None)
        return overlap(first, of, second, on)

    monkeypatch.setattr(config_checks, "overlap", counted)
    jobs = "".join(
        f'[job.j{n}]\nsource = ["tank:vm-{n}-*", "tank:x{n}"]\ntargets = ["prox2:backup"]\n' for n in range(500)
    )
    assert len(parse(BASE + jobs).jobs) == 500
    assert len(compared) < 500 * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [("10.0.0.1", "10.0.0.1:8571"), ("[fd00::1]:99", "[fd00::1]:99"), ("fd00::1", "[fd00::1]:8571")],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown
