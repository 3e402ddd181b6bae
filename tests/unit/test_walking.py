"""The manifest of a folder: what is seen of each kind of entry, and what a comparison of two says."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends import walking
from replicator.cancellation import Cancellation
from replicator.errors import NotReadable, ProtocolError
from replicator.manifest import (
    MAX_RUN,
    Entry,
    EntryKind,
    Holes,
    Leave,
    Record,
    Run,
    RunKind,
    Unreadable,
    chunks,
    encode,
    records,
)
from replicator.manifest_comparison import FileDifference, Tally, compare_manifests, shown_path
from replicator.streams import BLOCK_SIZE, NativeChunk
from transport import checksum

KEY = bytes(range(32))
ODD = (b"a b", b"dots...", b"line\nend", b"\xff\xfe", "Ünï".encode(), b"-rf", b"\\x", b" ")


def manifest(folder: Path, key: bytes = KEY) -> list[Record]:
    """What the walk of a folder says, through its form as bytes."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return list(records(chunks(walking.walk(fd, key, checksum, Cancellation()))))
    finally:
        os.close(fd)


def entries(folder: Path) -> dict[bytes, Entry]:
    return {r.name: r for r in manifest(folder) if isinstance(r, Entry)}


def compare(ours: list[Record], theirs: list[Record]) -> tuple[dict[str, FileDifference], Tally]:
    tally = Tally()
    found = [item for item in compare_manifests(iter(ours), iter(theirs), tally) if item is not None]
    return {item.path: item for item in found}, tally


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 200_000)
    (root / "empty").touch()
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "sub" / "deeper" / "leaf").write_bytes(b"leaf")
    (root / "link").symlink_to("file")
    os.mkfifo(root / "pipe")
    for name in ODD:
        (root / os.fsdecode(name)).write_bytes(name)
    return root


def test_a_folder_is_equal_to_itself(tree: Path) -> None:
    found, tally = compare(manifest(tree), manifest(tree))
    assert found == {}
    assert tally.entries == 8 + len(ODD)
    assert tally.checked > 200_000


def test_names_come_in_the_order_of_their_bytes_whatever_they_are(tree: Path) -> None:
    names = [r.name for r in manifest(tree) if isinstance(r, Entry)]
    top = [name for name in names if name not in (b"", b"deeper", b"leaf")]
    assert top == sorted([b"file", b"empty", b"sub", b"link", b"pipe", *ODD])


def test_names_that_do_not_fit_the_memory_are_sorted_all_the_same(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number * 7 % 25:02}").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert list(walking.sorted_names(fd, limit=4)) == [b"%02d" % n for n in range(25)]
    finally:
        os.close(fd)


def add(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"new")


def keep_times(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, offset: int) -> None:
    def write() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"?")

    keep_times(path, write)


def relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("other")


def make_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "content": (lambda t: flip(t / "file", 150_000), "file", "content differs"),
    "mode": (lambda t: (t / "file").chmod(0o600), "file", "mode is 0600, not 0644"),
    "mtime": (
        lambda t: os.utime(t / "empty", ns=(0, 1)),
        "empty",
        "modification time is 1970-01-01T00:00:00.000000001",
    ),
    "size": (lambda t: keep_times(t / "file", lambda: os.truncate(t / "file", 199_999)), "file", "size is 199999"),
    "missing": (lambda t: (t / "sub/deeper/leaf").unlink(), "sub/deeper/leaf", "file is missing on the target"),
    "extra": (lambda t: add(t / "sub", "more"), "sub/more", "file is on the target only"),
    "link": (lambda t: relink(t / "link"), "link", "points to another place"),
    "links": (lambda t: os.link(t / "file", t / "sub/name"), "file", "names of the file: 2, not 1"),
    "kind": (lambda t: make_folder_of(t / "empty"), "empty", "is a folder, not a file"),
    "xattr": (lambda t: os.setxattr(t / "file", "user.note", b"1"), "file", "extended attributes differ"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_found_and_named(tree: Path, what: str) -> None:
    change, path, words = CHANGES[what]
    before = manifest(tree)
    change(tree)
    found, _ = compare(before, manifest(tree))
    assert path in found, found
    assert any(said.startswith(words) for said in found[path].what), found[path]
    assert found[path].differing > 0


def test_only_the_blocks_that_differ_are_named(tree: Path) -> None:
    before = manifest(tree)
    flip(tree / "file", 150_000)
    found, _ = compare(before, manifest(tree))
    assert [(r.offset, r.length) for r in found["file"].ranges] == [(2 * BLOCK_SIZE, BLOCK_SIZE)]
    assert list(found) == ["file"]


def test_what_is_after_a_missing_entry_is_still_compared(tree: Path) -> None:
    before = manifest(tree)
    keep_times(tree, (tree / "empty").unlink)
    flip(tree / "sub" / "deeper" / "leaf", 0)
    assert set(compare(before, manifest(tree))[0]) == {"empty", "sub/deeper/leaf"}


def test_a_folder_that_is_missing_is_one_difference_with_its_size(tree: Path) -> None:
    before = manifest(tree)
    (tree / "sub").rename(tree.parent / "gone")
    found, _ = compare(before, manifest(tree))
    assert found["sub"].what == ("folder with all in it is missing on the target",)
    assert not [path for path in found if path.startswith("sub/")]


def test_zeros_are_equal_to_a_hole_and_the_difference_in_storing_is_told(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    with file.open("wb") as out:
        out.truncate(1 << 24)
        out.seek(1 << 23)
        out.write(b"data")
    sparse = manifest(tmp_path)
    keep_times(file, lambda: file.open("r+b").write(bytes(1 << 20)))
    found, tally = compare(sparse, manifest(tmp_path))
    assert found == {}
    assert tally.holes == 1
    assert tally.checked < BLOCK_SIZE + 1000


def test_a_huge_hole_costs_nothing(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb") as out:
        out.truncate(1 << 42)
    said = manifest(tmp_path)
    assert [r for r in said if isinstance(r, Run)] == [Run(RunKind.ZEROS, 1 << 26)]
    assert compare(said, said)[0] == {}


def test_content_of_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    os.link(tmp_path / "a", tmp_path / "b")
    found = entries(tmp_path)
    assert (found[b"a"].linked, found[b"b"].linked) == (False, True)
    assert found[b"a"].inode == found[b"b"].inode
    assert len([r for r in manifest(tmp_path) if isinstance(r, Holes)]) == 1


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to("/")
    (tmp_path / "in" / "loop").symlink_to(".")
    assert [r.kind for r in manifest(tmp_path / "in") if isinstance(r, Entry)] == [
        EntryKind.FOLDER,
        EntryKind.SYMLINK,
        EntryKind.SYMLINK,
    ]


def test_pipes_and_sockets_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        found = entries(tmp_path)
    assert (found[b"pipe"].kind, found[b"socket"].kind) == (EntryKind.PIPE, EntryKind.SOCKET)


@pytest.mark.tier("root")
def test_device_numbers_count(tmp_path: Path) -> None:
    before, after = tmp_path / "1", tmp_path / "2"
    for folder, minor in ((before, 3), (after, 5)):
        folder.mkdir()
        os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    found, _ = compare(manifest(before), manifest(after))
    assert "device number is 1:5, not 1:3" in found["null"].what


def test_a_path_longer_than_the_system_takes(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    said = manifest(tmp_path)
    assert sum(isinstance(r, Leave) for r in said) == 41
    assert compare(said, said)[0] == {}


def test_an_unreadable_block_differs_even_from_one_that_is_unreadable_too(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = manifest(tree)
    read = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= BLOCK_SIZE < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    bad = manifest(tree)
    for ours, theirs, side in ((good, bad, "target"), (bad, good, "source"), (bad, bad, "target")):
        found, tally = compare(ours, theirs)
        assert f"cannot be read in full on the {side}" in found["file"].what
        assert [(r.offset, r.length) for r in found["file"].ranges] == [(BLOCK_SIZE, BLOCK_SIZE)]
        assert tally.unreadable_source + tally.unreadable_target in (BLOCK_SIZE, 2 * BLOCK_SIZE)


def test_an_unreadable_folder_and_entry_are_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = manifest(tree)
    real = os.stat

    def status(path: bytes, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        if path == b"empty":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", status)
    bad = manifest(tree)
    found, _ = compare(good, bad)
    assert found["empty"].what == ("cannot be read on the target",)
    assert list(found) == ["empty"]


def test_no_permission_is_told_as_such(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    fd = os.open(tree, os.O_RDONLY)
    walk = walking.walk(fd, KEY, checksum, Cancellation())
    next(walk)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(NotReadable, match="Permission denied"):
        list(walk)
    os.close(fd)


def test_control_characters_and_bytes_that_are_no_text_are_shown_unambiguously() -> None:
    assert shown_path(b"") == "."
    assert shown_path(b"a b/\xff\n") == "a b/\\xff\\n"
    assert shown_path(b"\\xff") == "\\x5cxff"
    assert len(shown_path(b"x" * 5000)) < 1100


# -- what a peer may send


ROOT = Entry(b"", EntryKind.FOLDER)
FILE = Entry(b"f", EntryKind.FILE, size=BLOCK_SIZE)


def read(*items: Record, cut: int = 0) -> list[Record]:
    data = b"".join(bytes(chunk.data) for chunk in chunks(items))
    data = data[: len(data) - cut]

    def pieces() -> Iterator[NativeChunk]:
        for start in range(0, len(data), 7):
            yield NativeChunk(data[start : start + 7])

    return list(records(pieces()))


def test_records_are_the_same_after_crossing_in_any_pieces() -> None:
    said: list[Record] = [
        ROOT,
        FILE,
        Run(RunKind.DATA, 2, bytes(range(32))),
        Run(RunKind.ZEROS, 1 << 40),
        Run(RunKind.UNREADABLE, 1),
        Holes(5, bytes(16)),
        Entry(b"g", EntryKind.UNKNOWN, unreadable=Unreadable.ENTRY),
        Entry(b"h", EntryKind.FILE, 0o777, 1, 2, -5, 999, 2, 4, 5, 2**63, 2**62, 0, linked=True),
        Leave(),
    ]
    assert read(*said) == said


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([], id="nothing"),
        pytest.param([FILE], id="no root"),
        pytest.param([ROOT], id="not left"),
        pytest.param([ROOT, Leave(), Leave()], id="left twice"),
        pytest.param([ROOT, Leave(), ROOT, Leave()], id="two roots"),
        pytest.param([ROOT, ROOT, Leave(), Leave()], id="no name"),
        pytest.param([ROOT, FILE, Leave()], id="no content"),
        pytest.param([ROOT, Holes(0), Leave()], id="content of nothing"),
        pytest.param([ROOT, FILE, Run(RunKind.ZEROS, 0), Holes(0), Leave()], id="empty run"),
        pytest.param([ROOT, FILE, Run(RunKind.ZEROS, 1 << 60), Holes(0), Leave()], id="huge run"),
        pytest.param([ROOT, FILE, Run(RunKind.DATA, 1, b"x" * 15), Holes(0), Leave()], id="part of a digest"),
        pytest.param([ROOT, FILE, Run(RunKind.DATA, 0, bytes(16 * MAX_RUN + 16)), Holes(0), Leave()], id="long run"),
        pytest.param([ROOT, FILE, Holes(0), FILE, Holes(0), Leave()], id="a name twice"),
        pytest.param([ROOT, Entry(b"b", EntryKind.PIPE), Entry(b"a", EntryKind.PIPE), Leave()], id="disorder"),
        pytest.param([ROOT, Entry(b"..", EntryKind.PIPE), Leave()], id="above"),
        pytest.param([ROOT, Entry(b"a/b", EntryKind.PIPE), Leave()], id="a path"),
        pytest.param([ROOT, *[Entry(b"d" * 255, EntryKind.FOLDER)] * 5000], id="endless"),
    ],
)
def test_a_manifest_out_of_order_or_range_is_refused(items: list[Record]) -> None:
    with pytest.raises(ProtocolError, match="manifest"):
        read(*items)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_manifest_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(ProtocolError, match="manifest"):
        read(ROOT, FILE, Run(RunKind.ZEROS, 1), Holes(0), Leave(), cut=cut)


def test_a_record_of_wrong_type_or_length_is_refused() -> None:
    head = bytes(next(chunks([])).data)
    for tail in (
        b"\x01\0\0\0\x09",
        b"\0\0\0\0\x06",
        b"\xff\xff\xff\x7f\x01",
        encode(ROOT).replace(b"\x01\x01", b"\x01\x63", 1),
    ):
        with pytest.raises(ProtocolError, match="manifest"):
            list(records([NativeChunk(head + tail + encode(Leave()))]))
