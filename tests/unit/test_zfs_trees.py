"""What the ZFS backend does to datasets above, below and beside a replica: the commands, in order, from records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from backends.zfs import aside, placeholders, renaming, taking_over
from backends.zfs.commands import Finished, Process, SystemRunner
from backends.zfs.context import Context
from backends.zfs.library import CommandLibrary
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.properties import PLACEHOLDER, StreamForm
from backends.zfs.replica import abort, receive
from backends.zfs.sending import argv_of, base_of
from backends.zfs.stream_head import read_head
from backends.zfs.taking_over import Terms
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest
from replicator.errors import InvalidName, NotAReplica, ProtocolError, ReplicatorError, Unsupported, VolumeBusy
from replicator.model import Lineage, Property, Role, StreamKind, Version, VersionRef, VolumeId
from replicator.streams import Chunk, ChunkStream, NativeChunk
from replicator.zfs_properties import FILESYSTEMS_ONLY, RESERVED, TAKEN_OVER, ZVOLS_ONLY
from tests.support.blocks import make_version
from tests.support.zfs_records import RecordedRunner, failed, make_head, make_token, row, shown

NAMES = DatasetNames("store", "tank/vm")
UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
TOP = "tank/vm/p/top"
ARRIVAL = f"{TOP}.replicator-arriving"


class Pool(RecordedRunner):
    """Datasets with their rows; renames and destroys take effect, so that every state between two commands is seen."""

    def __init__(self, *rows: str) -> None:
        super().__init__({})
        self.rows = {line.split("\t")[0]: line for line in rows}
        self.done: list[tuple[str, ...]] = []
        self.cut_after: int | None = None

    def run(self, argv: Sequence[str], deadline: float) -> Finished:  # noqa: ARG002 - a record has all the time
        args = tuple(argv)
        if args[1] == "list":
            return self._list(args)
        if self.cut_after is not None and len(self.done) == self.cut_after:
            raise InterruptedError("power cut")
        self.done.append(args[1:])
        if args[1] == "rename":
            if args[3] in self.rows:
                return Finished(args, 1, "", f"cannot rename '{args[2]}': dataset already exists")
            self._rename(*args[2:])
        elif args[1] == "destroy":
            del self.rows[args[2]]
        elif args[1] == "create":
            if args[-1] in self.rows:
                return Finished(args, 1, "", f"cannot create '{args[-1]}': dataset already exists")
            placeholder = args[-2].partition("=")[2]
            self.rows[args[-1]] = row(args[-1], "filesystem", replicator__placeholder=placeholder)
        elif args[1:3] == ("receive", "-A"):
            assert not [name for name in self.rows if name.startswith(f"{args[3]}/")], "it has children"
            del self.rows[args[3]]
        elif args[1] == "set":
            for mark in (word.partition("=")[2] for word in args if word.startswith(f"{PLACEHOLDER}=")):
                self.rows[args[-1]] = row(args[-1], "filesystem", replicator__placeholder=mark)
        else:
            raise AssertionError(args)
        return Finished(args, 0, "", "")

    def _rename(self, old: str, new: str) -> None:
        for name in [n for n in self.rows if n == old or n.startswith((f"{old}/", f"{old}@"))]:
            line = self.rows.pop(name)
            self.rows[new + name.removeprefix(old)] = new + line.removeprefix(old)

    def _list(self, args: tuple[str, ...]) -> Finished:
        names = [word for word in args if word.startswith("tank/")]
        found = [self.rows[name] for name in names if name in self.rows]
        if len(found) < len(names):
            return Finished(args, 1, shown(found, args), "cannot open: dataset does not exist")
        if "-d" not in args:
            return Finished(args, 0, shown(found, args), "")
        name = args[-1]
        below = [n for n in self.rows if n.startswith((f"{name}@", f"{name}/")) and "/" not in n.removeprefix(name)[1:]]
        return Finished(args, 0, shown([self.rows[n] for n in (name, *below)], args), "")


def context(pool: RecordedRunner) -> Context:
    return Context(NAMES, pool, Listing(NAMES, pool), lambda: CommandLibrary("store", pool))


def replica(name: str, guid: int, **values: object) -> str:
    return row(
        name, "filesystem", guid=guid, replicator__lineage=UUID, replicator__role="replica", replicator__epoch=1,
        replicator__of=guid, replicator__stream="plain", **values,
    )  # fmt: skip


def waiting() -> Pool:
    """A placeholder with two datasets below, and what it stands for beside it, complete."""
    return Pool(
        row("tank/vm", "filesystem"),
        row("tank/vm/p", "filesystem", replicator__placeholder="tank/vm/p"),
        row(TOP, "filesystem", guid=1, written=98304, replicator__placeholder=TOP),
        replica(f"{TOP}/a", 2),
        replica(f"{TOP}/b", 3),
        replica(ARRIVAL, 4),
        row(f"{ARRIVAL}@one", "snapshot", guid=5, createtxg=6, creation=7),
    )


# -- placeholders


def test_a_placeholder_gives_way_whenever_it_is_cut() -> None:
    whole = waiting()
    found = aside.look(context(whole), "p/top")
    assert found is not None
    assert (found.name, found.guid, sorted(found.children)) == (TOP, "4", [f"{TOP}/a", f"{TOP}/b"])
    assert [command[0] for command in whole.done] == ["rename", "rename", "destroy", "rename"]
    for cut in range(len(whole.done) + 1):
        for asked in ("p/top", "p/top/a", "p/top/b"):
            pool = waiting()
            pool.cut_after = cut
            with_power_cut(lambda pool=pool: aside.look(context(pool), "p/top"))  # type: ignore[misc]
            pool.cut_after = None
            assert aside.look(context(pool), asked) is not None
            assert aside.look(context(pool), "p/top") is not None
            assert set(pool.rows) == set(whole.rows), (cut, asked)


def with_power_cut(work: Callable[[], object]) -> None:
    with contextlib.suppress(InterruptedError):
        work()


def test_a_placeholder_has_its_name_only_once_it_is_marked_whenever_that_is_cut() -> None:
    making = f"{TOP}.{placeholders.MAKING}"
    for cut in range(3):
        pool = Pool(row("tank/vm", "filesystem"), row("tank/vm/p", "filesystem", replicator__placeholder="tank/vm/p"))
        pool.cut_after = cut
        with_power_cut(lambda pool=pool: placeholders.make_parents(context(pool), f"{TOP}/a"))  # type: ignore[misc]
        if making in pool.rows:  # ZFS had not come to its properties
            pool.rows[making] = row(making, "filesystem")
        assert (TOP in pool.rows) == (cut == 2)
        pool.cut_after = None
        placeholders.make_parents(context(pool), f"{TOP}/a")
        made = context(pool).look("p/top")
        assert made is not None
        assert made.is_placeholder
        assert making not in pool.rows
    assert placeholders.is_arrival(f"p/top.{placeholders.MAKING}"), "and is no volume until then"


def test_a_placeholder_is_not_needed_where_the_volume_begins_to_arrive_meanwhile() -> None:
    class Arriving(Pool):
        def run(self, argv: Sequence[str], deadline: float) -> Finished:
            done = super().run(argv, deadline)
            if argv[1] == "create":
                self.rows[TOP] = replica(TOP, 4)
            return done

    pool = Arriving(row("tank/vm", "filesystem"), row("tank/vm/p", "filesystem", replicator__placeholder="tank/vm/p"))
    placeholders.make_parents(context(pool), f"{TOP}/a")
    assert set(pool.rows) == {"tank/vm", "tank/vm/p", TOP}
    assert pool.rows[TOP] == replica(TOP, 4)


def test_what_still_arrives_is_shown_and_moves_nothing() -> None:
    pool = waiting()
    del pool.rows[f"{ARRIVAL}@one"]
    found = aside.look(context(pool), "p/top")
    assert found is not None
    assert (found.name, found.lineage is not None, pool.done) == (ARRIVAL, True, [])


def begun() -> Pool:
    """A first copy that was begun in its place, and datasets that arrived below it since."""
    token = make_token(toguid=5, toname="tank/source@one", bytes=1000)
    return Pool(
        row("tank/vm", "filesystem"),
        row("tank/vm/p", "filesystem", replicator__placeholder="tank/vm/p"),
        replica(TOP, 4, receive_resume_token=token),
        replica(f"{TOP}/a", 2),
        replica(f"{TOP}/b", 3),
    )


def test_what_was_begun_in_its_place_gives_way_before_it_is_discarded_whenever_that_is_cut() -> None:
    def discard(pool: Pool) -> None:
        found = aside.look(context(pool), "p/top")
        if found is not None:
            abort(context(pool), found)

    whole = begun()
    discard(whole)
    assert [command[0] for command in whole.done] == ["rename", "create", "rename", "rename", "rename", "receive"]
    assert set(whole.rows) == {"tank/vm", "tank/vm/p", TOP, f"{TOP}/a", f"{TOP}/b"}
    found = aside.look(context(whole), "p/top")
    assert found is not None
    assert found.is_placeholder
    for cut in range(len(whole.done) + 1):
        for asked in ("p/top", "p/top/a", "p/top/b"):
            pool = begun()
            pool.cut_after = cut
            with_power_cut(lambda pool=pool: discard(pool))  # type: ignore[misc]
            pool.cut_after = None
            there = aside.look(context(pool), asked)
            assert there is not None, (cut, asked)
            assert asked != "p/top" or (there.token is not None or cut == len(whole.done)), "it can be continued"
            discard(pool)
            assert set(pool.rows) == set(whole.rows), (cut, asked)


def test_what_was_begun_and_has_nothing_below_it_is_just_discarded() -> None:
    pool = begun()
    del pool.rows[f"{TOP}/a"], pool.rows[f"{TOP}/b"]
    found = aside.look(context(pool), "p/top")
    assert found is not None
    abort(context(pool), found)
    assert pool.done == [("receive", "-A", TOP)]


class Racing(Pool):
    """While the replica of TOP is about to arrive, another receive makes its placeholder."""

    def __init__(self, *, late: bool) -> None:
        super().__init__(
            row("tank/vm", "filesystem"), row("tank/vm/p", "filesystem", replicator__placeholder="tank/vm/p")
        )
        self._late = late
        self.received: list[str] = []

    def make(self) -> None:
        self.rows[TOP] = row(TOP, "filesystem", guid=1, written=98304, replicator__placeholder=TOP)

    def write_to(self, argv: Sequence[str]) -> Process:
        self.received.append(argv[-1])
        if self._late:
            self.make()
            script = f"echo \"destination '{TOP}' exists\nmust specify -F to overwrite it\" >&2; exit 1"
            return SystemRunner().write_to(("/bin/sh", "-c", script))
        self.rows[ARRIVAL] = replica(ARRIVAL, 4)
        self.rows[f"{ARRIVAL}@one"] = row(f"{ARRIVAL}@one", "snapshot", guid=5, createtxg=6, creation=7)
        return SystemRunner().write_to(("/bin/sh", "-c", "cat > /dev/null"))

    def receive(self) -> Version:
        def chunks() -> Iterator[Chunk]:
            if not self._late:
                self.make()
            yield NativeChunk(make_head(5, zvol=False))

        request = ReceiveRequest(
            VolumeId("store", "p/top"), Lineage(UUID, Role.PRIMARY, 1), None,
            replace(make_version("one", 1 << 20), guid="5"), "00" * 32, kind=StreamKind.NATIVE,
        )  # fmt: skip
        stream = ChunkStream(StreamKind.NATIVE, chunks())
        return receive(context(self), request, stream, Cancellation(), Terms())[0]


def test_a_placeholder_that_is_made_before_the_head_has_come() -> None:
    pool = Racing(late=False)
    assert pool.receive().guid == "5"
    assert pool.received == [f"{ARRIVAL}@one"]
    assert set(pool.rows) == {"tank/vm", "tank/vm/p", TOP, f"{TOP}@one"}


def test_a_placeholder_that_is_made_after_the_head_has_come() -> None:
    with pytest.raises(VolumeBusy) as caught:
        Racing(late=True).receive()
    assert caught.value.retryable


@pytest.mark.parametrize("used", ["data", "snapshot"])
def test_a_placeholder_that_is_used_stays(used: str) -> None:
    pool = waiting()
    if used == "data":
        pool.rows[TOP] = row(TOP, "filesystem", guid=1, written=2 << 20, replicator__placeholder=TOP)
    else:
        pool.rows[f"{TOP}@mine"] = row(f"{TOP}@mine", "snapshot", guid=9, createtxg=9, creation=9)
    with pytest.raises(NotAReplica, match="somebody uses it") as caught:
        aside.look(context(pool), "p/top")
    assert "zfs rename" in caught.value.hint
    assert pool.done == []


def test_nothing_arrives_where_its_name_would_be_too_long() -> None:
    with pytest.raises(InvalidName):
        placeholders.arrival_of("tank/" + "x" * 240)
    assert placeholders.is_arrival("p/top.replicator-arriving/below")
    assert not placeholders.is_arrival("p/top")


def test_a_name_that_somebody_else_has_is_not_taken() -> None:
    pool = waiting()
    pool.rows[TOP] = row(TOP, "filesystem", guid=1)  # no placeholder, nobody's replica
    found = aside.look(context(pool), "p/top")
    assert found is not None
    assert (found.guid, pool.done) == ("1", [])


# -- keeping aside


class HeldPool(Pool):
    """A replica with snapshots one and two, both held by a job, and two by somebody else as well."""

    def __init__(self) -> None:
        super().__init__(
            row("tank/vm", "filesystem"),
            replica(TOP, 1),
            *(
                row(f"{TOP}@{name}", "snapshot", guid=10 + at, createtxg=at, creation=at, userrefs=1)
                for at, name in ((1, "one"), (2, "two"))
            ),
        )
        self.held = {"one": {JOB_HOLD}, "two": {JOB_HOLD, "by-hand", f"{JOB_HOLD}:verify"}}

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        args = tuple(argv)
        if args[1] == "holds":
            lines = [f"{name}\t{tag}\tFri Nov 20" for name in args[3:] for tag in self.held[name.partition("@")[2]]]
            return Finished(args, 0, "\n".join(lines), "")
        if args[1] not in ("snapshot", "clone", "promote", "release"):
            return super().run(argv, deadline)
        if self.cut_after is not None and len(self.done) == self.cut_after:
            raise InterruptedError("power cut")
        self.done.append(args[1:])
        if args[1] == "clone":
            self.rows[args[-1]] = row(args[-1], "filesystem", guid=50)
        elif args[1] == "promote":
            self.rows[f"{args[-1]}@one"] = args[-1] + self.rows.pop(f"{TOP}@one").removeprefix(TOP)
        elif args[1] == "release":
            self.held[args[3].partition("@")[2]].discard(args[2])
        return Finished(args, 0, "", "")


JOB_HOLD = "replicator:vms:b:store"


@pytest.mark.parametrize("common", [True, False])
def test_what_is_kept_aside_is_held_by_no_job(common: bool) -> None:
    pool = HeldPool()
    there = context(pool).listing.dataset(TOP)
    assert there is not None
    kept = aside.detach(context(pool), there, there.named("one") if common else None, "diverged-now")
    assert kept == f"{TOP}-diverged-now"
    assert f"{kept}@two" in pool.rows
    # What both sides have in common goes back to the replica, and stays held.
    assert pool.held == {"one": {JOB_HOLD} if common else set(), "two": {"by-hand"}}


def test_holds_are_released_although_it_is_cut_off() -> None:
    whole = HeldPool()
    there = context(whole).listing.dataset(TOP)
    assert there is not None
    aside.detach(context(whole), there, there.named("one"), "diverged-now")
    promoted = [command[0] for command in whole.done].index("promote") + 1
    for cut in range(promoted, len(whole.done) + 1):
        pool = HeldPool()
        pool.cut_after = cut
        with_power_cut(lambda pool=pool: aside.detach(context(pool), there, there.named("one"), "diverged-now"))  # type: ignore[misc]
        pool.cut_after = None
        aside.finish(context(pool), TOP)
        assert pool.held == {"one": {JOB_HOLD}, "two": {"by-hand"}}, cut


# -- renames


def test_renaming_makes_parents_and_uses_a_placeholder() -> None:
    pool = Pool(row("tank/vm", "filesystem"), replica("tank/vm/old", 4))
    renaming.rename(context(pool), "old", "p/new")
    assert pool.done[-1] == ("rename", "tank/vm/old", "tank/vm/p/new")
    assert "tank/vm/p" in pool.rows
    pool = waiting()
    for name in (ARRIVAL, f"{ARRIVAL}@one"):
        pool.rows[name.replace(ARRIVAL, "tank/vm/old")] = pool.rows.pop(name).replace(ARRIVAL, "tank/vm/old")
    renaming.rename(context(pool), "old", "p/top")
    assert set(pool.rows) == {"tank/vm", "tank/vm/p", TOP, f"{TOP}@one", f"{TOP}/a", f"{TOP}/b"}


# -- clones


def test_a_clone_is_sent_from_its_origin() -> None:
    pool = Pool(
        row("tank/vm/a", guid=1, origin="tank/vm/o@base"),
        row("tank/vm/a@one", "snapshot", guid=2, createtxg=20, creation=1),
        row("tank/vm/o", guid=3),
        row("tank/vm/o@base", "snapshot", guid=4, createtxg=10, creation=1),
        row("tank/vm/o@later", "snapshot", guid=5, createtxg=30, creation=1),
    )
    where = context(pool)
    dataset = where.require("a")
    one = dataset.snapshots[0]
    base = base_of(where, "a", dataset, VersionRef("base", "4"))
    assert base is not None
    assert argv_of(dataset, base, one) == ("-L", "-e", "-c", "-i", "tank/vm/o@base", "tank/vm/a@one")
    for wrong in (VersionRef("base", "9"), VersionRef("later", "5")):
        with pytest.raises(ReplicatorError):
            base_of(where, "a", dataset, wrong)


# -- properties


def test_each_property_is_in_one_list_only() -> None:
    assert not set(TAKEN_OVER) & set(RESERVED)
    assert not FILESYSTEMS_ONLY & ZVOLS_ONLY
    assert not {"mountpoint", "sharenfs", "sharesmb", "exec", "setuid", "devices", "quota", "volmode"} & set(TAKEN_OVER)


def options(terms: Terms, *, zvol: bool) -> tuple[str, ...]:
    return terms.options(read_head(make_head(1, zvol=zvol)))


def test_options_of_a_receive() -> None:
    terms = Terms(override={"compression": "zstd", "atime": "off", "volmode": "none", "mountpoint": "none"})
    never = ("-x", "sharenfs", "-x", "sharesmb")
    assert options(Terms(), zvol=True) == ()
    assert options(Terms(), zvol=False) == ("-x", "mountpoint", *never)
    assert options(terms, zvol=True) == ("-o", "compression=zstd", "-o", "volmode=none")
    assert options(terms, zvol=False) == (
        *never, "-o", "compression=zstd", "-o", "atime=off", "-o", "mountpoint=none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (make_head(1, form=2), "package"),
        (make_head(1, features=1 << 26), "holds of another node"),
        (make_head(1, features=1 << 21), "redacted"),
    ],
)
def test_streams_that_bring_more_or_less_are_refused(head: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        Terms().check(read_head(head), "store:vm")


def test_the_form_that_is_accepted() -> None:
    raw, plain = read_head(make_head(1, features=1 << 24)), read_head(make_head(1))
    for accept, right, wrong in ((StreamForm.RAW, raw, plain), (StreamForm.PLAIN, plain, raw)):
        terms = Terms(accept)
        terms.check(right, "store:vm")
        with pytest.raises(Unsupported, match=f"accepts only {accept}") as caught:
            terms.check(wrong, "store:vm")
        assert "[storage.store]" in caught.value.hint
    Terms().check(raw, "store:vm")


GET = ("zfs", "get")
VALUES = "compression\ton\tdefault\nrecordsize\t131072\tdefault\natime\toff\tinherited from tank\nxattr\tsa\tlocal\n"


def test_what_a_source_offers_is_what_somebody_set() -> None:
    runner = RecordedRunner({GET: VALUES + "acltype\toff\treceived\nmountpoint\t/\tlocal\nshort\n"})
    found = taking_over.offered(context(runner), "tank/vm/a")
    assert found == (Property("atime", "off"), Property("xattr", "sa"), Property("acltype", "off"))
    assert ",".join(TAKEN_OVER) in runner.asked[0]


def apply(
    runner: RecordedRunner, terms: Terms, zvol: bool, **given: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    where = context(runner)
    listed = Pool(row("tank/vm/a", "volume" if zvol else "filesystem"))
    dataset = context(listed).require("a")
    told = taking_over.apply(where, dataset, [Property(name, value) for name, value in given.items()], terms)
    return told, [args for args in runner.asked if args[:2] == ("zfs", "set")]


def test_what_is_taken_over_is_set_once() -> None:
    runner = RecordedRunner({GET: VALUES, ("zfs", "set"): ""})
    told, ran = apply(
        runner, Terms(exclude=frozenset({"recordsize"}), override={"atime": "on"}), False,
        compression="zstd", recordsize="4096", atime="off", xattr="sa", mountpoint="/", acltype="x y",
    )  # fmt: skip
    assert (told, ran) == ((), [("zfs", "set", "compression=zstd", "tank/vm/a")])
    assert apply(RecordedRunner({GET: VALUES}), Terms(), False, xattr="sa") == ((), [])
    assert apply(RecordedRunner({}), Terms(), True, recordsize="4096", atime="off") == ((), []), "a zvol has neither"


def test_missing_rights_are_told_at_once() -> None:
    runner = RecordedRunner({GET: VALUES, ("zfs", "set"): failed("cannot set property: permission denied")})
    told, ran = apply(runner, Terms(), False, compression="zstd", atime="on")
    assert len(told) == len(ran) == 1
    assert "zfs allow USER compression,atime" in told[0]


def test_what_cannot_be_set_is_told_and_the_rest_is_set() -> None:
    bad = failed("cannot set property for 'tank/vm/a': 'compression' must be one of 'on | off'")
    runner = RecordedRunner(
        {GET: VALUES, ("zfs", "set"): bad, ("zfs", "set", "atime=on"): "", ("zfs", "set", "compression=x"): bad}
    )
    told, ran = apply(runner, Terms(), False, compression="x", atime="on")
    assert len(told) == 1
    assert "must be one of" in told[0]
    assert ran[-1] == ("zfs", "set", "atime=on", "tank/vm/a")
