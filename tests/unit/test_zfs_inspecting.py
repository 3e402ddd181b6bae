"""What ZFS says of its own health, read by us; and what a verification makes of it and of what it can read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from backends import walking
from backends.zfs import ZfsBackend
from backends.zfs.commands import Finished
from backends.zfs.scrubbing import attributed, damaged, last_scrub, progress
from replicator import manifest, native_verification
from replicator.block_comparison import compare_digests
from replicator.cancellation import Cancellation
from replicator.endpoint import (
    UNREADABLE_DIGEST,
    DigestBatch,
    ManifestRequest,
    Range,
    ReceiveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
)
from replicator.errors import NoSuchSnapshot, NotReadable, ReplicatorError, StorageError, Unsupported
from replicator.mending import Mender, Results
from replicator.model import (
    Capability,
    Lineage,
    Role,
    StorageInfo,
    StreamKind,
    VerifyBy,
    Version,
    VersionRef,
    VolumeId,
    VolumeState,
)
from replicator.planning import SendPolicy
from replicator.replication import Options, Pair
from replicator.runs import Runner
from replicator.settings import Job
from replicator.streams import BLOCK_SIZE, ChunkStream, NativeChunk, Stream
from replicator.tasks import Task
from replicator.tracker import ReplicaKey, Tracker
from replicator.verification import Method, Mismatch, Verification
from tests.support.zfs_records import RecordedRunner, failed, listing, row
from transport import checksum

HISTORY = """History for 'tank':
2026-11-20.11:28:03 zpool create -O mountpoint=none tank /dev/vdb
2026-11-20.11:28:11 [txg:12] scan setup func=1 mintxg=0 maxtxg=12
        scan_type: 1
        scan_command: 0
2026-11-20.11:28:12 [txg:14] scan done errors=0
2026-11-20.11:28:12 zpool scrub -w tank
2026-11-20.11:31:36 [txg:57] scan setup func=1 mintxg=0 maxtxg=57
2026-11-20.11:31:36 [txg:59] scan done errors=3
"""
RESILVER = "2026-11-20.12:00:00 [txg:90] scan setup func=2 mintxg=3 maxtxg=90\n"
DONE = "2026-11-20.12:01:00 [txg:99] scan done errors=0\n"
RUNNING = """  pool: tank
 state: ONLINE
  scan: scrub in progress since Fri Nov 20 11:31:36 2026
\t1.04G / 2.30G scanned at 53.2M/s, 500M / 2.30G issued at 26M/s
\t0B repaired, 21.23% done, 00:01:10 to go
config:

\tNAME        STATE     READ WRITE CKSUM
\ttank        ONLINE       0     0     0

errors: No known data errors
"""
DAMAGED = """  pool: tank
 state: ONLINE
status: One or more devices has experienced an error resulting in data
\tcorruption.  Applications may be affected.
  scan: scrub repaired 0B in 00:00:00 with 2 errors on Fri Nov 20 11:31:36 2026
config:

\tNAME        STATE     READ WRITE CKSUM
\ttank        ONLINE       0     0     0

errors: Permanent errors have been detected in the following files:

        tank/vm/a:/big
        tank/vm/a@one:/a b
        tank/vm/a/child:<0x1>
        tank/vm/ab:/x
        /mnt/a/mounted
        /mnt/ab/other
        <metadata>:<0x3d>
        <0x2f1>:<0x2>
"""


def test_the_last_complete_scrub_and_what_it_had_read() -> None:
    found = last_scrub(HISTORY.split("\n"))
    assert found is not None
    assert (found.position, found.errors) == (57, 3)
    assert found.finished == datetime(2026, 11, 20, 11, 31, 36, tzinfo=UTC)


def test_a_resilver_is_no_scrub_and_one_under_way_is_not_complete() -> None:
    found = last_scrub((HISTORY + RESILVER + DONE).split("\n"))
    assert found is not None
    assert found.position == 57
    begun = HISTORY + RESILVER.replace("func=2 mintxg=3", "func=1 mintxg=0")
    found = last_scrub(begun.split("\n"))
    assert found is not None
    assert found.position == 57
    assert last_scrub((begun + DONE).split("\n")) != found
    assert last_scrub(["2026-11-20.12:01:00 [txg:99] scan done errors=0"]) is None


def test_how_far_a_scrub_is() -> None:
    assert progress(RUNNING) == (True, 21.23)
    assert progress(DAMAGED) == (False, 0.0)


def test_damage_is_attributed_and_what_has_no_name_counts() -> None:
    assert list(damaged(RUNNING)) == []
    ours, elsewhere = attributed(damaged(DAMAGED), "tank", "tank/vm/a", "/mnt/a")
    assert ours == [
        "tank/vm/a:/big",
        "tank/vm/a@one:/a b",
        "/mnt/a/mounted",
        "<metadata>:<0x3d>",
        "<0x2f1>:<0x2>",
    ]
    assert elsewhere == 3


def backend(**answers: object) -> ZfsBackend:
    record = {
        ("zfs", "list"): listing(row("tank/vm/a", "filesystem", guid="1", written="0")),
        ("zpool", "status"): DAMAGED,
        ("zpool", "history"): HISTORY,
        ("zpool", "list"): "1000\n",
        ("zfs", "get"): "none\n",
        **{tuple(name.split("_")): answer for name, answer in answers.items()},
    }
    return ZfsBackend("store", "tank/vm", checksums=checksum, runner=RecordedRunner(record))  # type: ignore[arg-type]


A = VolumeId("store", "a")


def test_a_pool_is_looked_at() -> None:
    found = backend().scrub(ScrubRequest(A))
    assert (found.pool, found.running, found.position, found.errors, found.total) == ("tank", False, 57, 3, 1000)
    assert found.damaged[0] == "tank/vm/a:/big"
    assert backend(zpool_scrub="").scrub(ScrubRequest(A, start=True)) == found


def test_damage_that_zfs_cannot_name_counts() -> None:
    """zpool status -v of OpenZFS 2.3.9 where the key of the damaged dataset is not loaded."""
    said = Finished(
        ("zpool",), 0, RUNNING.partition("errors:")[0], "errors: List of errors unavailable: permission denied"
    )
    found = backend(zpool_status=said).scrub(ScrubRequest(A))
    assert found.damaged == ("something that ZFS cannot name, because a key is not loaded,",)
    assert found.damaged_elsewhere == 0


@pytest.mark.parametrize("words", ["cannot scrub tank: permission denied", "must be root to scrub"])
def test_who_may_not_scrub_is_told_so(words: str) -> None:
    with pytest.raises(NotReadable, match="pool tank failed") as raised:
        backend(zpool_scrub=failed(words)).scrub(ScrubRequest(A, start=True))
    assert "root" in raised.value.hint


def test_a_scrub_that_runs_already_is_no_error() -> None:
    busy = failed("cannot scrub tank: currently scrubbing; use 'zpool scrub -s' to cancel current scrub")
    assert backend(zpool_scrub=busy, zpool_status=RUNNING).scrub(ScrubRequest(A, start=True)).running


def test_an_encrypted_volume_without_its_key_cannot_be_read() -> None:
    rows = listing(
        row("tank/vm/a", "filesystem", guid="1", written="0", encryption="aes-256-gcm"),
        row("tank/vm/a@one", "snapshot", guid="7", createtxg="5", creation="5"),
    )
    store = backend(zfs_list=rows, zfs_get="unavailable\n")
    with pytest.raises(NotReadable, match="key is not loaded") as raised:
        store.manifest(ManifestRequest(A, VersionRef("one", "7"), "ab" * 32), Cancellation())
    assert "zfs load-key tank/vm/a" in raised.value.hint


# -- verification over two nodes that walk folders of this machine


INFO = StorageInfo("x", "zfs", StreamKind.NATIVE, Capability.SEND, 1, 1, "")
GOOD = Scrub("tank", False, 0, 100, datetime(2026, 11, 20, 11, 0, tzinfo=UTC), 100, 0)


def version(number: int, name: str = "", guid: str = "") -> Version:
    moment = datetime(2026, 11, 20, 10, number, tzinfo=UTC)
    return Version(name or f"v{number}", guid or f"g{number}", moment, number * 10)


@dataclass
class Side:
    """A node with one filesystem."""

    node: str
    folder: Path
    snapshots: tuple[Version, ...]
    pool: list[Scrub] = field(default_factory=lambda: [GOOD])
    reading: ReplicatorError | None = None
    heal: Callable[[], object] = lambda: None
    held: list[str] = field(default_factory=list)
    started: int = 0

    def storage(self, name: str) -> StorageInfo:
        return replace(INFO, name=name)

    def state(self, volume: VolumeId) -> VolumeState:
        return VolumeState(volume, None, self.snapshots, None)

    def hold(self, _volume: VolumeId, found: VersionRef, _tag: str) -> None:
        self.held.append(found.name)

    def release(self, _volume: VolumeId, found: VersionRef, _tag: str) -> None:
        self.held.remove(found.name)

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        assert self.held
        if self.reading is not None:
            raise self.reading
        fd = os.open(self.folder, os.O_RDONLY)
        walk = walking.walk(fd, bytes.fromhex(request.key), checksum, cancel)
        return ChunkStream(StreamKind.NATIVE, manifest.chunks(walk), on_close=lambda: os.close(fd))

    def scrub(self, request: ScrubRequest) -> Scrub:
        self.started += request.start
        return self.pool.pop(0) if len(self.pool) > 1 else self.pool[0]

    def ensure_primary(self, _volume: VolumeId) -> Lineage:
        return Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)

    def send(self, request: SendRequest, _cancel: Cancellation) -> Stream:
        assert request.base is None
        return ChunkStream(StreamKind.NATIVE, iter([NativeChunk(b"all of it")]))

    def receive(self, request: ReceiveRequest, stream: Stream, _cancel: Cancellation) -> Version:
        assert [bytes(chunk.data) for chunk in stream] == [b"all of it"]
        self.heal()
        return request.to


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(b"x" * 100_000)
    history = tuple(version(number) for number in (1, 2, 3))
    made = Side("one", tmp_path / "data", history), Side("two", tmp_path / "data", history)
    yield made
    assert made[0].held == made[1].held == []


def pair_of(sides: tuple[Side, Side]) -> Pair:
    return Pair(sides[0], VolumeId("tank", "a"), sides[1], VolumeId("backup", "one/a"), "t")  # type: ignore[arg-type]


def verify(sides: tuple[Side, Side], **how: object) -> Verification:
    return native_verification.verify(
        pair_of(sides), Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation(), **how  # type: ignore[arg-type]
    )  # fmt: skip


def other(folder: Path) -> Path:
    """A folder where the file has other bytes in the second block."""
    made = folder.parent / "other"
    made.mkdir()
    (made / "file").write_bytes(b"x" * 70_000 + b"y" + b"x" * 29_999)
    return made


def test_what_is_read_and_equal(sides: tuple[Side, Side]) -> None:
    found = verify(sides)
    assert found.equal
    assert (found.method, found.snapshot, found.entries) == (Method.FILES, "v3", 2)


def test_what_is_read_and_different_is_named_and_never_a_matter_of_scrubs(sides: tuple[Side, Side]) -> None:
    sides[1].folder = other(sides[1].folder)
    found = verify(sides)
    assert not found.equal
    file = next(item for item in found.files if item.path == "file")
    assert "content differs" in file.what
    assert file.ranges == (Range(BLOCK_SIZE, 100_000 - BLOCK_SIZE),)


def test_a_stranger_under_a_known_name_is_named_whatever_else_is_equal(sides: tuple[Side, Side]) -> None:
    sides[1].snapshots = (version(1), version(2), version(3, guid="other"))
    found = verify(sides)
    assert not found.equal
    assert found.snapshot == "v2"
    assert "snapshot v3 of backup:one/a on two is not the source's" in found.problems[0]
    assert found.differing >= 1
    with pytest.raises(NoSuchSnapshot, match=r"guid g3 and other"):
        verify(sides, snapshot="v3")


def test_where_a_side_cannot_read_its_scrubs_count_and_the_result_says_so(sides: tuple[Side, Side]) -> None:
    sides[1].reading = NotReadable("the key is not loaded", hint="load it")
    found = verify(sides)
    assert found.equal
    assert (found.method, found.checked, found.entries) == (Method.SCRUB, 0, 0)
    assert found.notes[0] == "the key is not loaded"
    assert "scrubbed until 2026-11-20 11:00 UTC" in found.notes[1]
    assert sides[0].started == sides[1].started == 0
    with pytest.raises(NotReadable, match="not loaded"):
        verify(sides, by=VerifyBy.READING)


def test_another_error_of_reading_is_not_covered_up_by_a_scrub(sides: tuple[Side, Side]) -> None:
    sides[1].reading = StorageError("the disk is on fire", hint="")
    with pytest.raises(StorageError, match="fire"):
        verify(sides)


def test_a_scrub_counts_for_what_was_there_when_it_began(sides: tuple[Side, Side]) -> None:
    sides[1].pool = [replace(GOOD, position=25)]
    assert verify(sides, by=VerifyBy.SCRUB).snapshot == "v2"
    with pytest.raises(StorageError, match="no scrub has read v3"):
        verify(sides, by=VerifyBy.SCRUB, snapshot="v3")
    sides[1].pool = [replace(GOOD, position=9)]
    with pytest.raises(StorageError, match="no scrub has read a common snapshot") as raised:
        verify(sides, by=VerifyBy.SCRUB)
    assert "--scrub" in raised.value.hint
    sides[1].pool = [replace(GOOD, position=None, finished=None)]
    with pytest.raises(StorageError, match="no complete scrub"):
        verify(sides, by=VerifyBy.SCRUB)
    sides[1].reading = NotReadable("the key is not loaded", hint="load it")
    with pytest.raises(NotReadable, match="key is not loaded; and the pools' scrubs do not stand in") as both:
        verify(sides)
    assert both.value.hint.startswith("load it; or ")


def test_damage_that_a_pool_knows_of_makes_it_wrong(sides: tuple[Side, Side]) -> None:
    sides[1].pool = [replace(GOOD, errors=1, damaged=("tank/a:/file",))]
    found = verify(sides, by=VerifyBy.SCRUB)
    assert not found.equal
    assert found.problems == ("pool tank of two says that tank/a:/file is damaged",)
    sides[1].pool = [replace(GOOD, errors=1)]
    assert not verify(sides, by=VerifyBy.SCRUB).equal
    sides[1].pool = [replace(GOOD, errors=1, damaged_elsewhere=1)]
    assert verify(sides, by=VerifyBy.SCRUB).equal


def test_a_scrub_is_started_and_waited_for(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_verification, "SCRUB_POLL", 0.0)
    old = replace(GOOD, position=5)
    running = replace(old, running=True, done=50)
    sides[0].pool = [running, running, old, running, GOOD]  # one was under way, and is of no use
    found = verify(sides, by=VerifyBy.SCRUB, scrub_now=True)
    assert found.equal
    assert sides[0].started == 2
    assert sides[1].started == 1
    sides[0].pool = [running, old, running, old]
    with pytest.raises(StorageError, match="was stopped"):
        verify(sides, by=VerifyBy.SCRUB, scrub_now=True)


def repair(sides: tuple[Side, Side], found: Verification) -> Verification:
    def renew() -> None:
        for side in sides:
            side.snapshots += (version(len(side.snapshots) + 1),)

    return native_verification.repair(
        pair_of(sides), found, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation(), renew=renew
    )


WAY_OUT = "`replicator resync tank:a --target two:backup --full` keeps the whole replica aside"


def test_repair_counts_only_once_the_data_was_read_again(sides: tuple[Side, Side]) -> None:
    good, target = sides[1].folder, sides[1]
    target.folder = other(good)
    target.heal = lambda: setattr(target, "folder", good)
    found = repair(sides, verify(sides))
    assert found.repaired
    assert found.file_count > 0
    assert found.notes[-2].startswith("healed; v4, which was taken afterwards")
    assert repair(sides, verify(sides)).equal


def test_repair_that_does_not_help_says_so(sides: tuple[Side, Side]) -> None:
    sides[1].folder = other(sides[1].folder)
    found = repair(sides, verify(sides))
    assert not found.repaired
    assert not found.equal
    assert "did not help" in found.notes[-1]
    assert WAY_OUT in found.notes[-1]


def test_repair_by_a_storage_that_cannot_heal_names_what_helps(sides: tuple[Side, Side]) -> None:
    def refuse() -> None:
        raise Unsupported("an old OpenZFS", hint="upgrade it")

    sides[1].folder = other(sides[1].folder)
    sides[1].heal = refuse
    with pytest.raises(Unsupported, match="an old OpenZFS") as raised:
        repair(sides, verify(sides))
    assert WAY_OUT in raised.value.hint
    assert raised.value.hint.endswith("; or upgrade it")


def test_what_was_found_stays_known_where_a_repair_fails(sides: tuple[Side, Side]) -> None:
    def refuse() -> None:
        raise Unsupported("an old OpenZFS", hint="upgrade it")

    sides[1].folder = other(sides[1].folder)
    sides[1].heal = refuse
    pair, tracker, told = pair_of(sides), Tracker(), []
    turns = SimpleNamespace(exclusive=lambda *_: nullcontext())
    runner = SimpleNamespace(tracker=tracker, options=lambda _: Options(SendPolicy()), turns=turns)
    results = SimpleNamespace(verified=lambda found, _job: told.append(found), known=lambda *_: None)
    job = SimpleNamespace(name="vms", verify_by=VerifyBy.AUTO)
    task = Task(cast(Job, job), ReplicaKey("vms", "tank:a", "two:backup"), pair, "two")
    with pytest.raises(Unsupported):
        Mender(cast(Runner, runner), cast(Results, results)).verify(task, None, True, lambda _: None, Cancellation())
    (found,) = told
    assert tracker.get(task.key).mismatches == (Mismatch("v3", found.differing, found.guid),)


# -- blocks that cannot be read


def batch(*digests: bytes) -> Iterator[DigestBatch]:
    yield DigestBatch(0, BLOCK_SIZE, b"".join(digests))


def test_a_block_that_a_side_cannot_read_differs_even_where_neither_can() -> None:
    one, two = b"1" * 16, b"2" * 16
    gone = UNREADABLE_DIGEST
    for left, right in (((one, gone), (one, two)), ((one, two), (one, gone)), ((one, gone), (one, gone))):
        steps = compare_digests(batch(*left), batch(*right), 2 * BLOCK_SIZE)
        assert [item for step in steps for item in step.differing] == [Range(BLOCK_SIZE, BLOCK_SIZE)]
    across = (b"1" * 8 + bytes(8), bytes(8) + b"2" * 8)  # zeros that are no digest
    steps = compare_digests(batch(*across), batch(*across), 2 * BLOCK_SIZE)
    assert not [item for step in steps for item in step.differing]


def test_the_walks_of_both_sides_are_closed_when_one_fails(sides: tuple[Side, Side]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    sides[1].reading = StorageError("gone", hint="")
    with suppress(StorageError):
        verify(sides)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
