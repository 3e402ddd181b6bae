"""replicator.toml -> :class:`Config`, or a :class:`~replicator.errors.ConfigError` with every problem at once.

Each problem has the file, the key, what is wrong and what would be right. What is legal but unwise is in
``Config.warnings``, for ``replicator check``. The tables are described in :mod:`replicator.settings`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import tzinfo
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from replicator import config_checks, names
from replicator.config_files import Document, Unreadable, parse_text, read_documents
from replicator.errors import ConfigError, InvalidName, Problem, ReplicatorError
from replicator.setting_types import REFUSED, Address, Target, describe, key_path, nearest
from replicator.settings import STORAGE_KINDS, Fence, Job, Limits, Log, Network, Node, Notify, Peer, Storage, Table

__all__ = ["DEFAULT_PATH", "Address", "Config", "Job", "Peer", "ScheduleCheck", "Storage", "Target", "load", "parse"]

DEFAULT_PATH = Path("/etc/replicator/replicator.toml")

ScheduleCheck = Callable[[str, tzinfo | None], object]
"""Reads a schedule text in a time zone (None: this machine's) or raises ScheduleError; that is ``parse_schedule`` of
the scheduler, which this module does not import."""

_KNOWN = ("node", "network", "storage", "peer", "job", "limits", "log", "fence", "notify")
_T = TypeVar("_T", bound=Table)


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; names in it refer to what is there.

    :ivar path: the file it was read from
    :ivar warnings: legal but unwise
    """

    path: Path
    node: Node
    network: Network
    storages: Mapping[str, Storage]
    peers: Mapping[str, Peer]
    jobs: Mapping[str, Job]
    limits: Limits
    log: Log
    fence: Fence | None = None
    notify: Notify | None = None
    warnings: tuple[Problem, ...] = ()

    def is_local(self, node: str) -> bool:
        """Whether that is this node."""
        return node == self.node.name

    def peer_at(self, address: Address) -> Peer | None:
        """The peer with that address."""
        return next((peer for peer in self.peers.values() if peer.address == address), None)


def load(
    path: str | Path = DEFAULT_PATH, *, check_schedule: ScheduleCheck | None = None, host_name: str | None = None
) -> Config:
    """Read a configuration: a file, and those of the drop-in directory beside it (:mod:`replicator.config_files`).

    :param check_schedule: reads the schedules; None leaves them unchecked
    :param host_name: the default of ``[node] name``; None: this machine's
    :raises ConfigError: a file is not there or not readable, or anything in it is wrong; ``problems`` has it all
    """
    path = Path(path)
    try:
        document = read_documents(path)
    except Unreadable as error:
        raise _failed(path, error.problems) from None
    return _read(document, check_schedule, host_name)


def parse(
    text: str,
    *,
    path: str | Path = "replicator.toml",
    check_schedule: ScheduleCheck | None = None,
    host_name: str | None = None,
) -> Config:
    """As :func:`load`, from a text; ``path`` is what problems name."""
    path = Path(path)
    try:
        document = Document(path, parse_text(text, path))
    except Unreadable as error:
        raise _failed(path, error.problems) from None
    return _read(document, check_schedule, host_name)


def _read(document: Document, check_schedule: ScheduleCheck | None, host_name: str | None) -> Config:
    path = document.path
    reader = _Reader(document)
    parts = reader.read(document.tables, host_name)
    warnings: list[Problem] = []
    if check_schedule is not None:
        _check_schedules(parts, check_schedule, reader.problem)
    config_checks.check(parts, reader.problem, lambda *told: warnings.append(Problem(document.file_of(told[0]), *told)))
    if reader.problems or parts.node is None or parts.network is None or parts.limits is None or parts.log is None:
        raise _failed(path, reader.problems)
    return Config(
        path=path,
        node=parts.node,
        network=parts.network,
        storages=MappingProxyType(config_checks.right(parts.storages)),
        peers=MappingProxyType(config_checks.right(parts.peers)),
        jobs=MappingProxyType(config_checks.right(parts.jobs)),
        limits=parts.limits,
        log=parts.log,
        fence=parts.fence,
        notify=parts.notify,
        warnings=tuple(warnings),
    )


def _failed(path: Path, problems: Iterable[Problem]) -> ConfigError:
    problems = tuple(problems)
    if len(problems) == 1:
        return ConfigError(str(replace(problems[0], remedy="")), hint=problems[0].remedy, problems=problems)
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(
        f"{path} has {len(problems)} problems:{lines}",
        hint="correct them all, then: replicator check",
        problems=problems,
    )


def _check_schedules(parts: config_checks.Parts, check: ScheduleCheck, problem: config_checks.Report) -> None:
    for job in config_checks.right(parts.jobs).values():
        for key, text in (("schedule", job.schedule), ("verify", job.verify)):
            if text is not None:
                try:
                    check(text, job.zone)
                except ReplicatorError as error:
                    problem(key_path("job", job.name, key), str(error), error.hint)


def _known(word: str, known: Iterable[str]) -> str:
    """A remedy for a word that is none of the known ones."""
    close = nearest(word, known)
    return f"did you mean {close!r}?" if close else f"known are {', '.join(sorted(known))}"


class _Reader:
    """Reads tables one by one and gathers what is wrong with them."""

    def __init__(self, document: Document) -> None:
        self.file_of = document.file_of
        self.problems: list[Problem] = []

    def problem(self, key: str, message: str, remedy: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(self.file_of(key), key, message, remedy))

    def read(self, document: Mapping[str, object], host_name: str | None) -> config_checks.Parts:
        """All tables; None stands for one that is wrong."""
        for key in document:
            if key not in _KNOWN:
                self.problem(
                    key_path(key),
                    "unknown table" if isinstance(document[key], dict) else "unknown key",
                    _known(key, _KNOWN),
                )
        node = self._node(document, host_name)
        this_node = node.name if node is not None else ""
        network: Network | None = None
        if "network" in document:
            network = self._table(Network, document["network"], ("network",))
        else:
            self.problem(
                "network", "is missing", 'write [network] with cluster = "10.99.0.0/24" and listen = "10.99.0.1:8571"'
            )
        return config_checks.Parts(
            this_node=this_node,
            node=node,
            network=network,
            storages={name: self._storage(name, table) for name, table in self._named(document, "storage")},
            peers={
                name: self._table(Peer, table, ("peer", name), name=name)
                for name, table in self._named(document, "peer")
            },
            jobs={
                name: self._table(Job, table, ("job", name), node=this_node, name=name)
                for name, table in self._named(document, "job")
            },
            limits=self._table(Limits, document.get("limits", {}), ("limits",)),
            log=self._table(Log, document.get("log", {}), ("log",)),
            fence=self._table(Fence, document["fence"], ("fence",)) if "fence" in document else None,
            notify=self._notify(document["notify"]) if "notify" in document else None,
        )

    def _node(self, document: Mapping[str, object], host_name: str | None) -> Node | None:
        table = document.get("node", {})
        if isinstance(table, dict) and "name" not in table:
            name = (host_name or socket.gethostname()).partition(".")[0].lower()
            try:
                table = {"name": names.check_node(name), **table}
            except InvalidName as error:
                self.problem("node.name", f"is missing, and the host's {error}", 'write for example name = "prox1"')
                return None
        return self._table(Node, table, ("node",))

    def _notify(self, table: object) -> Notify | None:
        if isinstance(table, dict) and not {"command", "smtp"} & set(table):
            self.problem("notify", "says neither command nor smtp", 'write for example command = ["mail", "root"]')
        return self._table(Notify, table, ("notify",))

    def _named(self, document: Mapping[str, object], kind: str) -> list[tuple[str, object]]:
        """The tables ``[kind.NAME]`` whose names may be used."""
        tables = document.get(kind, {})
        if not isinstance(tables, dict):
            self.problem(kind, f"is {describe(tables)}, but must be tables", f"write [{kind}.NAME]")
            return []
        found = []
        for name, table in tables.items():
            try:
                if kind == "peer":
                    names.check_node(name)
                else:
                    names.check_word(f"{kind} name", name)
            except InvalidName as error:
                self.problem(key_path(kind, name), str(error), error.hint)
            else:
                found.append((name, table))
        return found

    def _storage(self, name: str, table: object) -> Storage | None:
        key = ("storage", name)
        kind = table.get("kind") if isinstance(table, dict) else "image"
        if not isinstance(kind, str) or kind not in STORAGE_KINDS:
            what = "is missing" if kind is None else f"{kind!r} is no kind of storage"
            self.problem(key_path(*key, "kind"), what, 'write "image", "zfs" or "rbd"')
            return None
        return self._table(STORAGE_KINDS[kind], table, key, name=name)

    def _table(
        self, model: type[_T], table: object, key: tuple[str, ...], *, node: str = "", **given: str
    ) -> _T | None:
        """One table; ``given`` are fields that the file cannot set, ``node`` what names without a node mean."""
        if not isinstance(table, dict):
            self.problem(key_path(*key), f"is {describe(table)}, but must be a table", f"write [{key_path(*key)}]")
            return None
        for field in sorted(set(given) & set(table)):
            self.problem(key_path(*key, field), "unknown key", _known(field, set(model.model_fields) - set(given)))
        rest = {field: value for field, value in table.items() if field not in given}
        try:
            return model.model_validate({**rest, **given}, context={"node": node})
        except ValidationError as error:
            found = error.errors(include_url=False)
        for details in found:
            self._explain(model, table, key, details, hidden=set(given))
        # What is right in the table can still be compared with the others, so that those problems are told as well.
        wrong = {details["loc"][0] for details in found}
        rest = {field: value for field, value in rest.items() if field not in wrong}
        try:
            return model.model_validate({**rest, **given}, context={"node": node})
        except ValidationError:
            return None

    def _explain(
        self, model: type[Table], table: object, key: tuple[str, ...], details: ErrorDetails, hidden: set[str]
    ) -> None:
        """Note what pydantic found, in the words of this project."""
        kind, place = details["type"], [part for part in details["loc"] if part != "[key]"]
        owner, remedy = _find(model, place[:-1] if kind == "extra_forbidden" else place)
        where = key_path(*key, *_present(table, place, missing=kind == "missing"))
        context: Mapping[str, Any] = details.get("ctx", {})
        if kind == "extra_forbidden":
            self.problem(where, "unknown key", _known(str(place[-1]), set(owner.model_fields) - hidden))
        elif kind == "missing":
            self.problem(where, "is missing", remedy)
        elif kind == REFUSED:
            self.problem(where, context["message"], context["remedy"] or remedy)
        elif kind in ("literal_error", "enum", "greater_than_equal", "less_than_equal"):
            self.problem(where, f"{details['input']!r} is not allowed", remedy)
        else:
            self.problem(where, f"is {describe(details['input'])}, which is not allowed here", remedy)


def _find(model: type[BaseModel], place: Iterable[object]) -> tuple[type[BaseModel], str]:
    """The table in which a place of a pydantic error is, and the description of the innermost field there."""
    remedy = ""
    for part in place:
        field = model.model_fields.get(str(part))
        if field is None:
            break
        remedy = field.description or remedy
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        model = next((t for t in inner if issubclass(t, BaseModel)), model)
    return model, remedy


def _present(table: object, place: list[int | str], *, missing: bool) -> list[int | str]:
    """The part of a place that stands in the file: a short form has no inner keys."""
    found: list[int | str] = []
    for part in place:
        if not (isinstance(table, dict) and part in table) and not (isinstance(table, list) and isinstance(part, int)):
            return [*found, part] if missing and isinstance(table, dict) else found
        table = table[part]  # type: ignore[index]
        found.append(part)
    return found
