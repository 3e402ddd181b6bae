"""A disk image with a real ext4 file system, real files in it, and changes made inside it.

Works without root: ``mkfs.ext4 -d`` fills the file system and ``debugfs -w`` changes it (both of e2fsprogs).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replicator.errors import ReplicatorError
from transport import checksum

BLOCK = 4096
_MIB = 1024 * 1024
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
MAX_DOC_BYTES = 160 * _MIB


def tool(*argv: str, accept: tuple[int, ...] = (0,)) -> str:
    """Run one of e2fsprogs and return what it printed. :raises ReplicatorError: it is missing or failed"""
    program = shutil.which(argv[0], path=_PATH)
    if program is None:
        raise ReplicatorError(f"the command {argv[0]} is missing", hint="apt install e2fsprogs")
    done = subprocess.run(
        [program, *argv[1:]], capture_output=True, text=True, errors="replace", timeout=300, check=False
    )
    if done.returncode not in accept:
        raise ReplicatorError(f"{' '.join(argv[:3])} … failed: {(done.stderr or done.stdout).strip()[:500]}", hint="")
    return done.stdout


def is_ext4(image: Path) -> bool:
    """Whether there is an ext file system in it (superblock magic 0xEF53 at byte 1080)."""
    with image.open("rb") as file:
        file.seek(1080)
        return file.read(2) == b"\x53\xef"


def _copy_tree(source: Path, target: Path, budget: int) -> int:
    """Copy files until ``budget`` bytes; how many bytes were copied."""
    copied = 0
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            copied += path.stat().st_size
            if copied > budget:
                return copied
            shutil.copyfile(path, here / name)
    return copied


def make_image(image: Path, scratch: Path) -> int:
    """Fill an ext4 file system with this program's source and /usr/share/doc; the number of files in it."""
    tree = scratch / "tree"
    here = Path(__file__).resolve().parents[2]
    for part in ("replicator", "backends", "scheduler", "transport"):
        _copy_tree(here / part, tree / "source" / part, 64 * _MIB)
    _copy_tree(Path("/usr/share/doc"), tree / "doc", MAX_DOC_BYTES)
    files = [path for path in tree.rglob("*") if path.is_file()]
    used = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)
    size = max(256 * _MIB, -(-(used * 3 // 2 + 96 * _MIB) // _MIB) * _MIB)
    with image.open("wb") as file:
        file.truncate(size)
    inodes = str(2 * len(files) + 20_000)
    tool("mkfs.ext4", "-q", "-F", "-N", inodes, "-d", str(tree), str(image))
    shutil.rmtree(tree)
    return len(files)


class Fingerprint:
    """Digests of every 4 KiB block of a file, to say exactly how much of it changed."""

    def __init__(self, path: Path) -> None:
        self._key = checksum.new_key()
        self._path = path
        self._digests = self._read()

    def _read(self) -> bytes:
        parts = []
        with self._path.open("rb") as file:
            while data := file.read(16 * _MIB):
                parts.append(checksum.digest_blocks(data, self._key, block_size=BLOCK))
        return b"".join(parts)

    def changed(self) -> int:
        """Bytes in blocks that changed since the last call (or since the beginning)."""
        before, self._digests = self._digests, self._read()
        return len(checksum.differing_blocks(before, self._digests)) * BLOCK


@dataclass(frozen=True, slots=True)
class Round:
    """One round of changes."""

    title: str
    commands: tuple[str, ...]


def rounds(scratch: Path) -> Iterator[Round]:
    """Three rounds of changes inside the file system: files added, replaced, removed."""
    scratch.mkdir(parents=True, exist_ok=True)

    def file(name: str, size: int) -> Path:
        path = scratch / name
        path.write_bytes(secrets.token_bytes(size))
        return path

    added = [file(f"mail-{i}", 20_000 + 3_000 * i) for i in range(40)]
    yield Round("40 files written", ("mkdir /spool", *(f"write {path} /spool/{path.name}" for path in added)))
    again = [file(f"mail-{i}", 50_000) for i in range(0, 40, 2)]
    yield Round(
        "20 files replaced",
        tuple(command for path in again for command in (f"rm /spool/{path.name}", f"write {path} /spool/{path.name}")),
    )
    big = file("database", 12 * _MIB)
    yield Round(
        "10 files removed, one of 12 MiB written",
        (*(f"rm /spool/mail-{i}" for i in range(1, 21, 2)), f"write {big} /spool/database"),
    )


def apply_round(image: Path, change: Round, scratch: Path) -> None:
    """Make the changes of one round in the file system."""
    script = scratch / "commands"
    script.write_text("\n".join(change.commands) + "\n")
    tool("debugfs", "-w", "-f", str(script), str(image))


def scribble(image: Path, pieces: int = 24) -> None:
    """Change an image that has no file system that we know: random blocks at random places."""
    size = image.stat().st_size
    with image.open("r+b") as file:
        for _ in range(pieces):
            file.seek(secrets.randbelow(max(1, size // BLOCK)) * BLOCK)
            file.write(secrets.token_bytes(min(BLOCK * 16, max(0, size - file.tell()))))
        file.flush()
        os.fsync(file.fileno())


def damage(path: Path) -> int:
    """Flip bits in a few places of a file, as a bad cable or disk does; how many places."""
    size = path.stat().st_size
    places = [size // 7, size // 3, size // 2, size - size // 5]
    path.chmod(0o600)
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1) or b"\0"
            file.seek(place)
            file.write(bytes([byte[0] ^ 0x10]))
    path.chmod(0o400)
    return len(places)


def same_bytes(left: Path, right: Path) -> bool:
    """Compare two files byte by byte."""
    if left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as a, right.open("rb") as b:
        while True:
            one, other = a.read(4 * _MIB), b.read(4 * _MIB)
            if one != other:
                return False
            if not one:
                return True
