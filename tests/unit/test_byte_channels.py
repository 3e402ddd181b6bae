"""Files and pipes that diffs are written to and read from."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.byte_channels import NewFile, Reader, Writer, told, write_new
from replicator.cancellation import Cancellation
from replicator.errors import Cancelled, NoSpace, StorageError, UsageError
from tests.support.blocks import pattern

DATA = pattern(3 << 20)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_a_pipe_carries_all_and_stays_as_it_was(pipe: tuple[int, int]) -> None:
    out, into = pipe
    before = flags(out), flags(into)
    cancel = Cancellation()

    def write() -> None:
        writer = Writer(into, "pipe", cancel)
        for at in range(0, len(DATA), 10_007):
            writer.write(DATA[at : at + 10_007])
        writer.flush()
        writer.close()
        os.close(into)

    thread = threading.Thread(target=write)
    thread.start()
    reader = Reader(out, "pipe", cancel)
    found = [reader.read(17), reader.read(1 << 20), reader.read(5 << 20), reader.read(1)]
    reader.close()
    thread.join()
    assert b"".join(found) == DATA
    assert [len(part) for part in found] == [17, 1 << 20, len(DATA) - (1 << 20) - 17, 0]
    assert flags(out) == before[0]


@pytest.mark.parametrize("side", ["writer", "reader"])
def test_waiting_for_the_other_end_can_be_cancelled(pipe: tuple[int, int], side: str) -> None:
    out, into = pipe
    cancel = Cancellation()
    raised: list[Exception] = []
    began = threading.Event()

    def work() -> None:
        try:
            if side == "writer":
                writer = Writer(into, "pipe", cancel)
                began.set()
                writer.write(DATA)
            else:
                reader = Reader(out, "pipe", cancel)
                began.set()
                reader.read(1)
        except Exception as error:  # noqa: BLE001 - it is looked at below
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert began.wait(30)
    cancel.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [Cancelled]


def test_nobody_reads_any_more(pipe: tuple[int, int]) -> None:
    out, into = pipe
    os.close(out)
    with pytest.raises(BrokenPipeError):
        Writer(into, "pipe", Cancellation()).write(DATA)


def test_a_full_device_is_told() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(NoSpace, match="writing full"):
        Writer(full.fileno(), "full", Cancellation()).write(DATA)
    assert isinstance(told(OSError(errno.EFBIG, "File too large"), "writing x"), StorageError)


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "diff"
    new = NewFile(path)
    os.write(new.fd, b"half")
    assert not path.exists()
    new.discard()
    assert list(tmp_path.iterdir()) == []
    again = NewFile(path)
    os.write(again.fd, b"whole")
    again.publish()
    again.discard()
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("diff", b"whole")]
    assert path.stat().st_mode & 0o777 == 0o600, "it is a guest's disk"


def test_what_exists_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "diff"
    new = NewFile(path)
    path.write_bytes(b"another's")
    for attempt in (new.publish, lambda: NewFile(path), lambda: write_new(path, b"x", Cancellation())):
        with pytest.raises(UsageError, match="exists"):
            attempt()
    new.discard()
    assert path.read_bytes() == b"another's"
    with pytest.raises(UsageError, match="no folder"):
        NewFile(tmp_path / "none" / "diff")


def test_what_a_cut_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "diff.partial").write_bytes(b"of an export that was killed, and longer")
    write_new(tmp_path / "diff", b"new", Cancellation())
    assert (tmp_path / "diff").read_bytes() == b"new"
