"""The files of a configuration: replicator.toml, and beside it those of the drop-in directory replicator.d.

Drop-ins are the files ``*.toml`` in the directory that is called as the main file is, with ``.d`` for ``.toml``, in the
order of their names; names that begin with a dot are not read. They add and never override: whatever stands in two
files is refused, and both are named. A table with a name (``[job.vms]``) stands in one file as a whole; those of which
there is one (``[limits]``) may be spread over several, each key in one of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from replicator.errors import Problem
from replicator.setting_types import key_path

MAX_BYTES = 4 * 1024 * 1024
"""A larger file was not meant to be a configuration."""
NAMED = ("storage", "peer", "job")
"""Tables that have a name each."""


@dataclass(frozen=True, slots=True)
class Document:
    """What stands in all files together.

    :ivar tables: as one file would have it
    :ivar origins: in which file a key stands, by its path as problems name it
    """

    path: Path
    tables: Mapping[str, object]
    origins: Mapping[str, str] = field(default_factory=dict)

    def file_of(self, key: str) -> str:
        """The file in which a key stands; the main one for a key that is missing."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return str(self.path)


class Unreadable(Exception):
    """Files that cannot be read, with all that is wrong with them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__()
        self.problems = tuple(problems)


def drop_ins(path: Path) -> list[Path]:
    """The drop-in files of a configuration, in their order. :raises OSError: the directory cannot be read"""
    folder = path.with_suffix(".d")
    try:
        found = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(file for file in found if file.name.endswith(".toml") and not file.name.startswith("."))


def read_documents(path: Path) -> Document:
    """Everything that a configuration consists of.

    :raises Unreadable: a file cannot be read, is no TOML, or has what another one has
    """
    problems: list[Problem] = []
    try:
        files = [path, *drop_ins(path)]
    except OSError as error:
        folder = str(path.with_suffix(".d"))
        raise Unreadable(
            [Problem(folder, "", f"cannot be read: {error.strerror}", "make it readable for this user")]
        ) from None
    documents: dict[str, Mapping[str, object]] = {}
    for file in files:
        try:
            documents[str(file)] = parse_text(_text_of(file), file)
        except Unreadable as error:
            problems += error.problems
    if problems:
        raise Unreadable(problems)
    merged = _merge(path, documents, problems)
    if problems:
        raise Unreadable(problems)
    return merged


def parse_text(text: str, path: Path) -> Mapping[str, object]:
    """One file's TOML. :raises Unreadable: it is none"""
    try:
        return tomllib.loads(text)
    except RecursionError:
        nested = Problem(str(path), "", "is nested too deeply", "no table of it has more than three levels")
        raise Unreadable([nested]) from None
    except tomllib.TOMLDecodeError as error:
        cause, _, place = str(error).rpartition(" (at ")
        where = place.rstrip(")") if cause else ""
        wrong = Problem(str(path), where, cause or str(error), "correct the TOML syntax there, or just above")
        raise Unreadable([wrong]) from None


def _text_of(path: Path) -> str:
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        remedy = "make one with: replicator init, or name one with --config"
        raise Unreadable([Problem(name, "", "there is no such file", remedy)]) from None
    except OSError as error:
        remedy = "make it readable for this user" if isinstance(error, PermissionError) else "name a file with --config"
        raise Unreadable([Problem(name, "", f"cannot be read: {error.strerror}", remedy)]) from None
    if len(data) > MAX_BYTES:
        raise Unreadable([Problem(name, "", f"is larger than {MAX_BYTES} bytes", "name a configuration file")])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable([Problem(name, f"line {line}", "is not UTF-8", "save the file as UTF-8")]) from None


def _merge(path: Path, documents: Mapping[str, Mapping[str, object]], problems: list[Problem]) -> Document:
    tables: dict[str, object] = {}
    origins: dict[str, str] = {}

    def claim(key: str, file: str) -> bool:
        """Whether this file is the first that has the key."""
        first = origins.setdefault(key, file)
        if first != file:
            problems.append(Problem(file, key, f"is in {first} already", "leave it in one of the two: files only add"))
        return first == file

    for file, document in documents.items():
        for name, value in document.items():
            there = tables.get(name)
            if not isinstance(value, Mapping) or not (there is None or isinstance(there, dict)):
                if claim(key_path(name), file):
                    tables[name] = value
                continue
            origins.setdefault(key_path(name), file)
            merged = tables.setdefault(name, {})
            for key, inner in value.items():
                if claim(key_path(name, key), file) and isinstance(merged, dict):
                    merged[key] = inner
    return Document(path, tables, origins)
