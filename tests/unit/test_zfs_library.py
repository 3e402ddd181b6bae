"""Which library is used, and what it makes of its answers; the same contract on real ZFS is in tests/conformance."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backends.zfs import binding_worker, workers
from backends.zfs.binding import LibraryChoice, numbers
from backends.zfs.commands import SystemRunner
from backends.zfs.library import CommandLibrary
from backends.zfs.pool_state import PoolState
from backends.zfs.workers import Worker, WorkerLost, Workers
from replicator.errors import NoSpace, NoSuchSnapshot, SnapshotExists, StorageError, StorageUnavailable, VolumeBusy
from tests.support.zfs_records import Answer, RecordedRunner, failed

VERSION = "zfs-2.3.9-0+deb13u1\nzfs-kmod-2.3.9-0+deb13u1\n"


@dataclass
class RecordedCore:
    """Answers calls by their name, in the order given; the last answer stays."""

    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    lost: str = ""

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        assert deadline > 0
        if self.lost:
            raise WorkerLost(self.lost)
        self.asked.append(request)
        given = self.answers.get(request["call"], [{"done": request["call"] == "exists"}])
        return given.pop(0) if len(given) > 1 else given[0]

    def close(self) -> None:
        pass


def choice(core: RecordedCore, found: str | None = "2.3.9", **answers: Answer) -> LibraryChoice:
    runner = RecordedRunner({("zfs", "version"): VERSION, **{("zfs", k): v for k, v in answers.items()}})
    return LibraryChoice("store", "tank/vm", runner, core, lambda: found)


def refused(*failures: tuple[str, int, str]) -> dict[str, Any]:
    return {"failed": [list(failure) for failure in failures]}


# -- which one


def test_the_binding_of_this_version_is_used() -> None:
    core = RecordedCore()
    chosen = choice(core)
    library = chosen.library()
    assert (library.describe(), library.warning()) == ("libzfs_core 2.3.9", "")
    assert core.asked == []  # who only looks needs no process
    assert chosen.probe() == ""
    assert core.asked == [{"call": "exists", "dataset": "tank/vm"}]


def test_without_a_binding_the_command_is_used() -> None:
    library = choice(RecordedCore(), None).library()
    assert (library.describe(), library.warning()) == ("the zfs command (python3-pyzfs is not installed)", "")


@pytest.mark.parametrize("found", ["2.1.11", "0.2.3", "2.3.8", "none"])
def test_a_binding_of_another_version_is_not_used(found: str) -> None:
    core = RecordedCore()
    library = choice(core, found).library()
    assert isinstance(library, CommandLibrary)
    assert f"of version {found}, OpenZFS is 2.3.9" in library.warning()
    assert core.asked == []


def test_a_binding_that_cannot_be_called_is_not_used() -> None:
    for core, why in (
        (RecordedCore(lost="OSError: no libzfs_core.so.3"), "OSError: no libzfs_core.so.3"),
        (RecordedCore({"exists": [{"done": False}]}), "it does not find tank/vm"),
    ):
        chosen = choice(core)
        assert chosen.probe() == f"libzfs_core 2.3.9 cannot be used, so the zfs command is: {why}"
        assert chosen.library().describe() == f"the zfs command ({why})"


def test_one_that_is_lost_later_makes_way_for_the_command() -> None:
    core = RecordedCore()
    chosen = choice(core, snapshot="", hold="", release="", bookmark="", destroy="", send="size\t5\n")
    library = chosen.library()
    core.lost = "it ended without an answer"
    library.snapshot(["tank/vm/a@one"])
    library.hold("tank/vm/a@one", "tag")
    library.release("tank/vm/a@one", "tag")
    library.bookmark("tank/vm/a@one", "tank/vm/a#one")
    assert library.destroy(["tank/vm/a@one", "tank/vm/a#one"]) == {}
    assert library.send_space("tank/vm/a@one", None, ("-L",)) == 5
    assert library.describe() == "the zfs command (it ended without an answer)"
    assert library.warning() == "libzfs_core 2.3.9 cannot be used, so the zfs command is: it ended without an answer"


def test_versions() -> None:
    assert [numbers(text) for text in (VERSION, "2.1.11", "zfs-2.1.11-1+deb12u1", "x")] == [
        "2.3.9", "2.1.11", "2.1.11", ""
    ]  # fmt: skip


# -- what failed


def test_failures_have_the_name_the_operation_and_zfs_own_words() -> None:
    core = RecordedCore(
        {
            "snapshot": [refused(("tank/vm/b@one", 17, "Snapshot already exists: File exists"))],
            "hold": [refused(("tank/vm/a@one", 2, "Snapshot not found: No such file or directory"))],
            "bookmark": [refused(("tank/vm/a#m", 28, "No space left: No space left on device"))],
            "release": [refused(("tank/vm/a@one", 1, "Failed to release snapshot hold: Operation not permitted"))],
            "send_space": [refused(("tank/vm/a@one", 2, "Snapshot not found"))],
        }
    )
    library = choice(core).library()
    with pytest.raises(SnapshotExists) as exists:
        library.snapshot(["tank/vm/a@one", "tank/vm/b@one"])
    assert str(exists.value) == (
        "storage store: taking the snapshot tank/vm/b@one failed: Snapshot already exists: File exists"
    )
    with pytest.raises(NoSuchSnapshot, match="holding tank/vm/a@one"):
        library.hold("tank/vm/a@one", "tag")
    with pytest.raises(NoSpace, match="making the bookmark tank/vm/a#m"):
        library.bookmark("tank/vm/a@one", "tank/vm/a#m")
    with pytest.raises(StorageError, match="not permitted") as refusal:
        library.release("tank/vm/a@one", "tag")
    assert "zfs allow" in refusal.value.hint
    assert library.send_space("tank/vm/a@one", None, ("-w",)) is None


def test_what_is_done_already_is_no_failure() -> None:
    core = RecordedCore(
        {
            "hold": [refused(("a", 17, "Hold exists"))],
            "bookmark": [refused(("a", 17, "Bookmark already exists"))],
            "release": [refused(("a", 2, "Hold not found"))],
        }
    )
    library = choice(core).library()
    library.hold("tank/vm/a@one", "tag")
    library.bookmark("tank/vm/a@one", "tank/vm/a#m")
    library.release("tank/vm/a@one", "tag")


def test_what_cannot_be_destroyed_is_left_out_of_the_next_call() -> None:
    busy = ("tank/a@2", 16, "Snapshot is busy: Device or resource busy")
    core = RecordedCore({"destroy_snapshots": [refused(busy), {"done": None}]})
    failures = choice(core).library().destroy(["tank/a@1", "tank/a@2", "tank/a#m"])
    assert [(name, type(error)) for name, error in failures.items()] == [("tank/a@2", VolumeBusy)]
    assert [call["names"] for call in core.asked] == [["tank/a@1", "tank/a@2"], ["tank/a@1"], ["tank/a#m"]]


@pytest.mark.parametrize("name", ["", "tank/b@9"])
def test_a_failure_without_a_name_is_that_of_all(name: str) -> None:
    core = RecordedCore({"destroy_snapshots": [refused((name, 5, "I/O error"))]})
    assert set(choice(core).library().destroy(["tank/a@1", "tank/a@2"])) == {"tank/a@1", "tank/a@2"}


def test_the_command_destroys_one_by_one_where_one_cannot_go() -> None:
    runner = RecordedRunner(
        {
            ("zfs", "destroy"): "",
            ("zfs", "destroy", "tank/a@1,2,3"): failed("cannot destroy snapshot tank/a@2: dataset is busy"),
            ("zfs", "destroy", "tank/a@2"): failed("cannot destroy snapshot tank/a@2: dataset is busy"),
            ("zfs", "destroy", "tank/a@3"): failed("could not find any snapshots to destroy; check snapshot names."),
        }
    )
    failures = CommandLibrary("store", runner).destroy(["tank/a@1", "tank/b@1", "tank/a@2", "tank/a#m", "tank/a@3"])
    assert list(failures) == ["tank/a@2"]
    assert [argv[2] for argv in runner.asked] == [
        "tank/a@1,2,3", "tank/a@1", "tank/a@2", "tank/a@3", "tank/b@1", "tank/a#m"
    ]  # fmt: skip


# -- workers


def program(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text("import sys, json\n" + text)
    return path


ECHO = """
print(json.dumps({"version": "1.2"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["call"] == "die":
        sys.exit(1)
    if asked["call"] == "rubbish":
        print("[", flush=True)
    elif "state" in asked:
        open(asked["state"], "w").write("SUSPENDED")
    elif asked["call"] != "hang":
        print(json.dumps({"done": asked["call"]}), flush=True)
"""


def test_workers_are_kept_and_made_anew(tmp_path: Path) -> None:
    started: list[Worker] = []

    def start(pool: PoolState) -> Worker:
        started.append(Worker(pool, program(tmp_path, ECHO)))
        return started[-1]

    some = Workers(PoolState("none", tmp_path), start=start)
    for call in ("one", "two"):
        assert some.ask({"call": call}, 30) == {"done": call}
    assert [worker.version for worker in started] == ["1.2"]
    for call in ("die", "rubbish"):
        with pytest.raises(WorkerLost):
            some.ask({"call": call}, 30)
    before = len(started)
    with pytest.raises(StorageUnavailable, match="in time"):
        some.ask({"call": "hang"}, 0.2)
    assert some.ask({"call": "three"}, 30) == {"done": "three"}
    assert len(started) == before + 2
    some.close()
    assert all(worker._process.returncode is not None for worker in started)


def test_workers_that_nothing_uses_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = Workers(PoolState("none", tmp_path), start=lambda pool: Worker(pool, program(tmp_path, ECHO)))
    many = [Worker(PoolState("none", tmp_path), program(tmp_path, ECHO)) for _ in range(2)]
    for worker in many:
        some._ask(worker, {"call": "one"}, 1e12)
    monkeypatch.setattr(workers, "IDLE", 0.0)
    assert some.ask({"call": "two"}, 30) == {"done": "two"}
    assert [worker for _, worker in some._idle] == [many[1]]
    assert many[0]._process.returncode is not None
    some.close()


def test_programs_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_ANSWER", 1000)
    for text, why in (
        ("", "without an answer"),
        ("print(json.dumps({'unusable': 'ImportError: x'}))", "ImportError: x"),
        ("print('x' * 5000)", "more than"),
    ):
        with pytest.raises(WorkerLost, match=why):
            Worker(PoolState("none", tmp_path), program(tmp_path, text))


def test_the_real_one_says_why_there_is_no_binding(tmp_path: Path) -> None:
    if "libzfs_core" in sys.modules or _found("libzfs_core"):
        return
    with pytest.raises(WorkerLost, match="libzfs_core"):
        Worker(PoolState("none", tmp_path))


def _found(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


class HeldSnapshot(Exception):
    errno, message, name = 16, "Snapshot is held", b"tank/a@1"


HeldSnapshot.__name__ = "SnapshotIsHeld"


class Generic(Exception):
    """As the binding makes it: name and message in each other's place."""

    errno, message, name = 1, b"tank/a@1", "Failed to hold snapshot"


Generic.__name__ = "ZFSGenericError"


def test_exceptions_of_the_binding_are_told_with_their_words() -> None:
    many = Exception()
    many.errors = [HeldSnapshot(), Generic()]  # type: ignore[attr-defined]
    assert binding_worker.failures(many) == [
        ("tank/a@1", 16, "Snapshot is busy: Device or resource busy"),
        ("tank/a@1", 1, "Failed to hold snapshot: Operation not permitted"),
    ]


# -- suspended pools


def test_nothing_is_started_for_a_suspended_pool_and_nothing_waits_for_one(tmp_path: Path) -> None:
    (tmp_path / "tank").mkdir()
    state = tmp_path / "tank" / "state"
    pool = PoolState("tank", tmp_path)
    pool.check()
    state.write_text("ONLINE\n")
    runner = SystemRunner(pool.check)
    assert runner.run(("/bin/sh", "-c", f"echo SUSPENDED > {state}"), 30).status == 0
    with pytest.raises(StorageUnavailable, match="pool tank is suspended") as error:
        runner.run(("/bin/true",), 30)
    assert "zpool clear tank" in error.value.hint
    with pytest.raises(StorageUnavailable, match="is suspended"):
        Workers(pool).ask({"call": "one"}, 30)
    state.write_text("ONLINE\n")
    with pytest.raises(StorageUnavailable, match="is suspended"):
        runner.run(("/bin/sh", "-c", f"echo SUSPENDED > {state}; exec sleep 1000"), 900)
    state.write_text("ONLINE\n")
    some = Workers(pool, start=lambda _: Worker(pool, program(tmp_path, ECHO)))
    with pytest.raises(StorageUnavailable, match="is suspended"):
        some.ask({"call": "hang", "state": str(state)}, 900)
