"""Commands with deadlines and caps; streams into and out of processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from backends.zfs import commands
from backends.zfs.commands import Finished, Process, SystemProcess, SystemRunner
from backends.zfs.failures import Operation
from backends.zfs.receiving import IncomingStream, feed
from backends.zfs.sending import read_chunks
from replicator.cancellation import Cancellation
from replicator.errors import (
    Cancelled,
    ConnectionLost,
    NoSpace,
    NoSuchVolume,
    ProtocolError,
    StorageError,
    StorageUnavailable,
)
from replicator.model import StreamKind
from replicator.streams import CHUNK_SIZE, Chunk, ChunkStream, NativeChunk
from tests.support.blocks import make_chunk, pattern
from tests.support.zfs_records import make_head

RUNNER = SystemRunner()
OPERATION = Operation("store", "tank/vm/a@one", "receiving")
HEAD = make_head(1)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


# -- commands


def test_a_command_and_what_it_says() -> None:
    done = RUNNER.run(shell("echo out; echo $LC_ALL; echo err >&2; exit 3"), 30)
    assert (done.status, done.output, done.errors) == (3, "out\nC\n", "err")


def test_much_is_read_on_both_outputs() -> None:
    done = RUNNER.run(shell("head -c 3000000 /dev/zero | tr '\\0' a; head -c 3000000 /dev/zero >&2"), 30)
    assert len(done.output) == 3_000_000


def test_a_command_has_a_deadline() -> None:
    with pytest.raises(StorageUnavailable, match="sleep"):
        RUNNER.run(("sleep", "100"), 0.1)


def test_an_answer_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_OUTPUT", 1 << 20)
    with pytest.raises(StorageError, match="more than 1 MiB"):
        RUNNER.run(("cat", "/dev/zero"), 30)


def test_a_command_that_is_not_installed() -> None:
    with pytest.raises(StorageUnavailable, match="no-such-command") as caught:
        RUNNER.run(("no-such-command",), 1)
    assert "apt install zfsutils-linux" in caught.value.hint


TALK = "head -c 100000 /dev/zero | tr '\\0' w >&2; echo >&2"
"""More than fits a pipe."""


def test_a_talkative_process_is_listened_to_while_it_runs(tmp_path: Path) -> None:
    many = [NativeChunk(pattern(CHUNK_SIZE))] * 3
    fed(f"head -c 500000 > {tmp_path}/a; {TALK}; cat > {tmp_path}/b; {TALK}", incoming(NativeChunk(HEAD), *many))
    assert sum((tmp_path / name).stat().st_size for name in "ab") == len(HEAD) + 3 * CHUNK_SIZE
    assert sum(len(chunk.data) for chunk in sent(f"{TALK}; echo data; {TALK}; echo data; {TALK}")) == 10


def test_what_a_talkative_process_says_at_its_end_counts() -> None:
    with pytest.raises(NoSpace):
        fed(f"cat > /dev/null; {TALK}; echo 'cannot receive: out of space' >&2; exit 1", incoming(NativeChunk(HEAD)))
    process = RUNNER.read_from(shell(f"{TALK}; echo last >&2"))
    done = process.finish(30)
    assert done is not None
    assert (len(done.errors) <= commands.MAX_ERRORS, done.errors[-6:]) == (True, "w\nlast")


class Reluctant:
    """A killed process that takes its time to be gone.

    :param looks: how many of them find it there still
    :param suspended: its pool is
    """

    pipe = -1

    def __init__(self, looks: int, *, suspended: bool = False) -> None:
        self.calls: list[str] = []
        self._looks = looks
        self._suspended = suspended

    def close_pipe(self) -> None:
        self.calls.append("close")

    def kill(self) -> None:
        self.calls.append("kill")

    def finish(self, deadline: float) -> Finished | None:  # noqa: ARG002
        self.calls.append("finish")
        self._looks -= 1
        return None if self._looks >= 0 else Finished(("zfs",), -9, "", "")

    def check(self) -> None:
        if self._suspended:
            raise StorageUnavailable("pool tank is suspended", hint="")


def test_a_killed_process_is_waited_for_until_it_is_gone() -> None:
    process = Reluctant(5)
    commands.end(process)
    assert process.calls == ["kill", "close", *["finish"] * 6]


def test_a_killed_process_of_a_suspended_pool_is_left_behind() -> None:
    process = Reluctant(5, suspended=True)
    commands.end(process)
    assert process.calls == ["kill", "close", "finish"]


# -- sending


def sent(script: str, cancel: Cancellation | None = None) -> Iterator[NativeChunk]:
    return read_chunks(RUNNER.read_from(shell(script)), OPERATION, cancel or Cancellation())


def test_a_stream_is_read_in_full_chunks() -> None:
    sizes = []
    for chunk in sent("head -c 2500000 /dev/zero"):
        sizes.append(len(chunk.data))
        chunk.release()
        chunk.release()
    assert sum(sizes) == 2_500_000
    assert max(sizes) <= CHUNK_SIZE
    assert len(sizes) < 10


def test_buffers_are_not_used_before_they_are_released() -> None:
    chunks = list(sent("head -c 1048576 /dev/zero | tr '\\0' a; head -c 1048576 /dev/zero | tr '\\0' b"))
    assert b"".join(chunk.data for chunk in chunks) == b"a" * CHUNK_SIZE + b"b" * CHUNK_SIZE


def test_a_send_that_fails_at_the_end() -> None:
    chunks = sent("echo data; echo \"cannot open 'tank/vm/a': dataset does not exist\" >&2; exit 1")
    assert bytes(next(chunks).data) == b"data\n"
    with pytest.raises(NoSuchVolume if "@" not in OPERATION.dataset else StorageError, match="does not exist"):
        next(chunks)


def test_cancelling_ends_the_process() -> None:
    cancel = Cancellation()
    chunks = sent("echo data; exec sleep 1000", cancel)
    assert bytes(next(chunks).data) == b"data\n"
    threading.Timer(0.05, cancel.cancel).start()
    with pytest.raises(Cancelled):
        next(chunks)


# -- receiving


def incoming(*chunks: Chunk, then: Exception | None = None) -> IncomingStream:
    def generate() -> Iterator[Chunk]:
        yield from chunks
        if then is not None:
            raise then

    return IncomingStream(ChunkStream(StreamKind.NATIVE, generate()))


def fed(script: str, stream: IncomingStream, cancel: Cancellation | None = None) -> None:
    feed(RUNNER, shell(script), stream, OPERATION, cancel or Cancellation())


def test_all_of_a_stream_arrives(tmp_path: Path) -> None:
    parts = [HEAD + b"one", pattern(CHUNK_SIZE), b"three"]
    stream = incoming(*map(NativeChunk, parts))
    assert stream.head().to_guid == "1"
    fed(f"cat > {tmp_path}/got", stream)
    assert (tmp_path / "got").read_bytes() == b"".join(parts)


def test_the_last_chunk_is_held_back_until_the_stream_is_complete(tmp_path: Path) -> None:
    stream = incoming(NativeChunk(HEAD), NativeChunk(b"two"), NativeChunk(b"three"), then=ConnectionLost("cut"))
    with pytest.raises(ConnectionLost):
        fed(f"cat > {tmp_path}/got; echo 'checksum mismatch or incomplete stream' >&2; exit 1", stream)
    assert (tmp_path / "got").read_bytes() == HEAD + b"two"


def test_nothing_is_committed_after_cancelling(tmp_path: Path) -> None:
    cancel = Cancellation()
    cancel.cancel()
    with pytest.raises(Cancelled):
        fed(f"cat > {tmp_path}/got", incoming(NativeChunk(HEAD)), cancel)
    assert not (tmp_path / "got").exists() or (tmp_path / "got").read_bytes() == b""


def test_why_a_receive_ended_is_said() -> None:
    many = [NativeChunk(pattern(CHUNK_SIZE))] * 8
    with pytest.raises(NoSpace):
        fed("echo 'cannot receive: out of space' >&2; exit 1", incoming(NativeChunk(HEAD), *many))


def test_cancelling_a_receive_that_stands_still() -> None:
    cancel = Cancellation()
    threading.Timer(0.05, cancel.cancel).start()
    many = [NativeChunk(pattern(CHUNK_SIZE))] * 8
    with pytest.raises(Cancelled):
        fed("exec sleep 1000", incoming(NativeChunk(HEAD), *many), cancel)


class Stuck(SystemRunner):
    """Its processes wait for a pool that is suspended: they neither read nor die."""

    def __init__(self) -> None:
        self.suspended = False
        self.started: list[SystemProcess] = []
        super().__init__(self.check)

    def check(self) -> None:
        if self.suspended:
            raise StorageUnavailable("pool tank is suspended", hint="")

    def write_to(self, argv: Sequence[str]) -> Process:
        return self._start(argv, reading=False)

    def read_from(self, argv: Sequence[str]) -> Process:
        return self._start(argv, reading=True)

    def _start(self, argv: Sequence[str], *, reading: bool) -> Process:
        process = SystemProcess(tuple(argv), self.check, reading=reading)
        process.kill = lambda: None  # type: ignore[method-assign]
        self.started.append(process)
        return process


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    runner = Stuck()
    yield runner
    for process in runner.started:
        process._process.kill()
        process._process.wait(30)


def test_a_receive_on_a_suspended_pool_is_not_waited_for(stuck: Stuck) -> None:
    def suspend() -> Iterator[Chunk]:
        yield NativeChunk(HEAD)
        stuck.suspended = True
        yield from [NativeChunk(pattern(CHUNK_SIZE))] * 8

    stream = IncomingStream(ChunkStream(StreamKind.NATIVE, suspend()))
    with pytest.raises(StorageUnavailable, match="is suspended"):
        feed(stuck, ("/bin/sleep", "1000"), stream, OPERATION, Cancellation())


def test_a_receive_whose_end_waits_for_a_suspended_pool_is_not_waited_for(stuck: Stuck) -> None:
    def suspend() -> Iterator[Chunk]:
        yield NativeChunk(HEAD)
        stuck.suspended = True

    stream = IncomingStream(ChunkStream(StreamKind.NATIVE, suspend()))
    with pytest.raises(StorageUnavailable, match="is suspended"):
        feed(stuck, ("/bin/sleep", "1000"), stream, OPERATION, Cancellation())


def test_a_send_from_a_suspended_pool_is_not_waited_for(stuck: Stuck) -> None:
    chunks = read_chunks(stuck.read_from(shell("echo data; exec sleep 1000")), OPERATION, Cancellation())
    assert bytes(next(chunks).data) == b"data\n"
    stuck.suspended = True
    with pytest.raises(StorageUnavailable, match="is suspended"):
        next(chunks)
    with pytest.raises(StorageUnavailable, match="is suspended"):
        stuck.read_from(shell("echo data"))


@pytest.mark.parametrize("wrong", [make_chunk((0, b"x")), NativeChunk(b""), NativeChunk(bytes(CHUNK_SIZE + 1))])
def test_chunks_that_are_refused(wrong: Chunk) -> None:
    with pytest.raises(ProtocolError):
        incoming(wrong).head()
    with pytest.raises(ProtocolError):
        fed("cat > /dev/null", incoming(NativeChunk(HEAD), wrong))
    with pytest.raises(ProtocolError):
        incoming().head()
