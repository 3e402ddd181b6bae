"""A pool of zvols in memory that answers zfs and zpool as far as a run asks them, and counts what it was asked."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from backends.zfs.commands import Finished
from backends.zfs.library import CommandLibrary, Library
from backends.zfs.stream_head import read_head
from tests.support.zfs_records import make_head

Values = dict[str, str]
SIZE = 4096
_GUIDS = itertools.count(1000)


@dataclass
class FakeZfs:
    """Thread-safe.

    :ivar asked: every command that was started
    :ivar busy: datasets that somebody uses
    :ivar refused: what zfs program answers instead, "" for what it finds
    """

    root: str = "tank/vm"
    datasets: dict[str, Values] = field(default_factory=dict)
    snapshots: dict[str, Values] = field(default_factory=dict)
    bookmarks: dict[str, Values] = field(default_factory=dict)
    holds: dict[str, set[str]] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    refused: str = ""
    txg: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self.make(self.root)

    # -- what tests do

    def make(self, name: str, **values: str) -> None:
        """A zvol."""
        self.datasets[name] = {"type": "volume", "guid": str(next(_GUIDS)), "written": "0", **values}

    def write(self, name: str) -> None:
        """Somebody writes to it."""
        self.datasets[name]["written"] = "512"

    # -- Runner

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        assert deadline > 0
        args = tuple(argv)
        with self._lock:
            self.asked.append(args)
            if args[0] == "zpool":
                return Finished(args, 0, "ONLINE\n", "")
            act: Callable[[tuple[str, ...]], Finished] = getattr(self, f"_{args[1]}")
            return act(args)

    def read_from(self, argv: Sequence[str]) -> FakeProcess:
        args = tuple(argv)
        with self._lock:
            self.asked.append(args)
            to = self.snapshots[args[-1]]
            base = 0
            if "-i" in args:
                base = int((self.snapshots | self.bookmarks)[args[args.index("-i") + 1]]["guid"])
            return FakeProcess(args, make_head(int(to["guid"]), base), None)

    def write_to(self, argv: Sequence[str]) -> FakeProcess:
        args = tuple(argv)
        with self._lock:
            self.asked.append(args)
            if args[1] == "program":
                found = "Channel program execution failed:\nrefused with 16" if args[-1] in self.busy else ""
                said = self.refused or found
                return FakeProcess(args, None, lambda _: None, said)
            return FakeProcess(args, None, lambda data: self._received(args, data))

    def _received(self, args: tuple[str, ...], data: bytes) -> None:
        with self._lock:
            name = args[-1].partition("@")[0]
            if name not in self.datasets:
                settings = [args[at + 1] for at, word in enumerate(args) if word == "-o"]
                self.make(name, **dict(setting.split("=", 1) for setting in settings))
            head = read_head(data)
            self._snap(args[-1], head.to_guid)

    # -- commands

    def _list(self, args: tuple[str, ...]) -> Finished:
        columns = args[args.index("-o") + 1].split(",")
        types = args[args.index("-t") + 1].split(",") if "-t" in args else ["filesystem", "volume", "snapshot"]
        plain = iter(args[2:])
        wanted = [word for word in plain if not (word.startswith("-") and (word in ("-H", "-p", "-r") or next(plain)))]
        everything = {**self.datasets, **self.snapshots, **self.bookmarks}
        shown: dict[str, None] = {}
        missing = [name for name in wanted if name not in everything]
        for name in wanted:
            for other in everything:
                rest = other.removeprefix(name) if other.startswith(name) else None
                own = rest == "" or (rest is not None and rest[0] in "@#/" and "-r" in args)
                near = "-d" in args and rest is not None and rest[:1] in "@#/" and not set("@#/") & set(rest[1:])
                if own or near:
                    shown[other] = None
        lines = []
        for name in shown:
            values = {"name": name, "used": "1", "available": "1", **everything[name], **self._told(name)}
            if values["type"] in types:
                lines.append("\t".join(values.get(column, "-") for column in columns) + "\n")
        errors = "\n".join(f"cannot open '{name}': dataset does not exist" for name in missing)
        return Finished(args, 1 if missing else 0, "".join(lines), errors)

    def _told(self, name: str) -> Values:
        if name in self.snapshots:
            return {"userrefs": str(len(self.holds.get(name, ())))}
        own = [each for each in self.snapshots if each.startswith(f"{name}@")]
        return {"prevsnap": own[-1]} if own else {}

    def _holds(self, args: tuple[str, ...]) -> Finished:
        lines = [f"{name}\t{tag}\tFri Nov 20\n" for name in args[3:] for tag in sorted(self.holds.get(name, ()))]
        return Finished(args, 0, "".join(lines), "")

    def _hold(self, args: tuple[str, ...]) -> Finished:
        assert args[3] in self.snapshots
        self.holds.setdefault(args[3], set()).add(args[2])
        return Finished(args, 0, "", "")

    def _release(self, args: tuple[str, ...]) -> Finished:
        self.holds[args[3]].remove(args[2])
        return Finished(args, 0, "", "")

    def _snapshot(self, args: tuple[str, ...]) -> Finished:
        for name in args[2:]:
            self._snap(name, str(next(_GUIDS)))
        return Finished(args, 0, "", "")

    def _snap(self, name: str, guid: str) -> None:
        self.txg += 1
        self.datasets[name.partition("@")[0]]["written"] = "0"
        self.snapshots[name] = {
            "type": "snapshot", "guid": guid, "createtxg": str(self.txg), "creation": str(self.txg),
            "volsize": str(SIZE),
        }  # fmt: skip

    def _bookmark(self, args: tuple[str, ...]) -> Finished:
        of = self.snapshots[args[2]]
        self.bookmarks[args[3]] = {**{key: of[key] for key in ("guid", "createtxg", "creation")}, "type": "bookmark"}
        return Finished(args, 0, "", "")

    def _destroy(self, args: tuple[str, ...]) -> Finished:
        dataset, mark, names = args[2].partition("@")
        for name in names.split(",") if mark else ():
            assert not self.holds.get(f"{dataset}@{name}"), "held"
            del self.snapshots[f"{dataset}@{name}"]
        if not mark:
            del self.bookmarks[args[2]]
        return Finished(args, 0, "", "")

    def _set(self, args: tuple[str, ...]) -> Finished:
        self.datasets[args[-1]].update(setting.split("=", 1) for setting in args[2:-1])  # type: ignore[misc]
        return Finished(args, 0, "", "")

    def _create(self, args: tuple[str, ...]) -> Finished:
        self.make(args[-1], **dict(word.split("=", 1) for word in args[3:-1] if "=" in word))
        self.datasets[args[-1]]["type"] = "filesystem"
        return Finished(args, 0, "", "")

    def _rename(self, args: tuple[str, ...]) -> Finished:
        self.datasets[args[3]] = self.datasets.pop(args[2])
        return Finished(args, 0, "", "")

    def _get(self, args: tuple[str, ...]) -> Finished:
        return Finished(args, 0, "", "")

    def _send(self, args: tuple[str, ...]) -> Finished:
        return Finished(args, 0, "size\t10\n", "")

    def _version(self, args: tuple[str, ...]) -> Finished:
        return Finished(args, 0, "zfs-2.3.9\nzfs-kmod-2.3.9\n", "")


class FakeProcess:
    """A zfs send that writes ``gives``, or a zfs receive that gives all it has got to ``takes``; one that fails says
    why."""

    def __init__(
        self, argv: tuple[str, ...], gives: bytes | None, takes: Callable[[bytes], None] | None, errors: str = ""
    ) -> None:
        self._argv = argv
        self._errors = errors
        self._takes = takes
        reading, writing = os.pipe()
        if gives is not None:
            os.write(writing, gives)
            os.close(writing)
        self._pipe = reading if gives is not None else writing
        self._other = None if gives is not None else reading
        self._open = True

    @property
    def pipe(self) -> int:
        return self._pipe

    def close_pipe(self) -> None:
        if self._open:
            self._open = False
            os.close(self._pipe)

    def finish(self, deadline: float) -> Finished:  # noqa: ARG002 - it is done
        if self._takes is not None and self._other is not None:
            data = bytearray()
            while piece := os.read(self._other, 1 << 20):
                data += piece
            os.close(self._other)
            self._other = None
            self._takes(bytes(data))
        return Finished(self._argv, 1 if self._errors else 0, "", self._errors)

    def kill(self) -> None:
        pass

    def check(self) -> None:
        pass


class ByCommand:
    """The choice of changing everything by the zfs command, so that all of it is counted."""

    def __init__(self, runner: FakeZfs) -> None:
        self._library = CommandLibrary("store", runner)

    def library(self) -> Library:
        return self._library

    def probe(self) -> str:
        return ""

    def close(self) -> None:
        pass
