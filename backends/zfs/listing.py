"""What zfs list says, as values. One command lists a dataset with all its versions, or all datasets of a storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from backends.zfs import properties
from backends.zfs.commands import LIST_DEADLINE, Runner
from backends.zfs.failures import Operation, failure, is_missing
from backends.zfs.naming import DatasetNames
from backends.zfs.properties import StreamForm, read_form, read_lineage
from backends.zfs.tokens import ResumeToken, read_token
from replicator import names
from replicator.errors import InvalidName, StorageError, StorageUnavailable
from replicator.model import Form, Lineage, Role, Version, VersionKind

COLUMNS = (
    "name",
    "type",
    "guid",
    "createtxg",
    "creation",
    "userrefs",
    "volsize",
    "written",
    "encryption",
    "origin",
    "receive_resume_token",
    *properties.READ,
)
"""Properties that listings ask for of datasets: no more than is used."""
SNAPSHOT_COLUMNS = ("name", "type", "guid", "createtxg", "creation", "userrefs", "volsize")
"""Those of snapshots: each costs time on every one of them."""
_NO_VALUE = "-"
_HOLDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Row:
    """One line of zfs list."""

    values: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.values[column]

    @property
    def name(self) -> str:
        """Dataset, snapshot or bookmark, in full."""
        return self.values["name"]

    @property
    def type(self) -> str:
        """filesystem, volume, snapshot or bookmark."""
        return self.values["type"]

    def number(self, column: str) -> int | None:
        """A value as a number, None where there is none."""
        text = self.values[column]
        return int(text) if text.isascii() and text.isdigit() else None


def parse(output: str, columns: Sequence[str] = COLUMNS) -> Iterator[Row]:
    """The rows of ``zfs list -Hp -o COLUMNS``. A line with another number of fields (a user property with a line end in
    its value) is left out."""
    for line in output.split("\n"):
        fields = line.split("\t")
        if len(fields) == len(columns):
            yield Row(dict(zip(columns, fields, strict=True)))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A filesystem or zvol with what was listed of it.

    :ivar volsize: bytes; None for a filesystem
    :ivar written: bytes of live data since the newest snapshot
    :ivar token: of a receive that was interrupted
    :ivar stands_for: a placeholder's own name, or that of the one above it; for another one's own, see
        ``is_leaving``
    :ivar versions: oldest first; only where they were listed
    :ivar children: datasets directly below it; only where they were listed
    """

    name: str
    guid: str
    is_zvol: bool
    volsize: int | None
    written: int
    encrypted: bool
    origin: str
    token: ResumeToken | None
    lineage: Lineage | None
    form: StreamForm | None
    of: str
    stands_for: str
    versions: tuple[Version, ...] = ()
    children: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_placeholder(self) -> bool:
        """Whether it is one of ours that only holds others. (Its children inherit the property, but not its name.) Once
        it receives, it has a lineage, and is a volume."""
        return self.stands_for == self.name and self.lineage is None

    @property
    def is_leaving(self) -> bool:
        """Whether it is being put back to one of its snapshots, and that may have been interrupted."""
        return self.stands_for == self.name and self.lineage is not None

    @property
    def snapshots(self) -> tuple[Version, ...]:
        """The versions that have data, oldest first."""
        return tuple(v for v in self.versions if v.kind is VersionKind.SNAPSHOT)

    @property
    def head_changed(self) -> bool:
        """Whether a replica has live data that no snapshot has. What a first receive has brought so far is none."""
        replica = self.lineage is not None and self.lineage.role is Role.REPLICA
        partial = self.token is not None and not self.snapshots
        return replica and self.written > 0 and not partial

    @property
    def default_form(self) -> StreamForm:
        """The pinned form, or the one to pin: raw where it is encrypted, so that no copy needs the key."""
        return self.form or (StreamForm.RAW if self.encrypted else StreamForm.PLAIN)

    @property
    def stream_form(self) -> Form:
        """In which form its streams are; of a replica, were (see ``VolumeState.form``). What is not encrypted is never
        raw, whatever is asked of zfs send."""
        if self.lineage is not None and self.lineage.role is Role.REPLICA:
            return "" if self.form is None else "raw" if self.form is StreamForm.RAW else "plain"
        return "raw" if self.default_form is StreamForm.RAW and self.encrypted else "plain"

    def find(self, guid: str, kind: VersionKind = VersionKind.SNAPSHOT) -> Version | None:
        """The version of that identity and kind."""
        return next((v for v in self.versions if v.guid == guid and v.kind is kind), None)

    def named(self, name: str) -> Version | None:
        """The snapshot of that name."""
        return next((v for v in self.snapshots if v.name == name), None)


class Listing:
    """Asks zfs list about the datasets of one storage."""

    def __init__(self, dataset_names: DatasetNames, runner: Runner) -> None:
        self._names = dataset_names
        self._runner = runner

    def rows(self, argv: Sequence[str], doing: str, dataset: str, columns: Sequence[str] = COLUMNS) -> list[Row] | None:
        """The rows of a zfs list with our columns; None where the dataset does not exist.

        :raises StorageError: it failed for another reason
        """
        command = ("zfs", "list", "-H", "-p", "-o", ",".join(columns), *argv)
        done = self._runner.run(command, LIST_DEADLINE)
        if is_missing(done):
            return None
        if done.status != 0:
            raise failure(done, Operation(self._names.storage, dataset, doing))
        return list(parse(done.output, columns))

    def dataset(self, name: str) -> Dataset | None:
        """One dataset with its versions, their holds and its children; None if there is none.

        The dataset before its snapshots: one that was written to and snapshotted meanwhile has a newer snapshot.
        """
        rows = self.rows(("-d", "1", "-t", "filesystem,volume,bookmark", name), "looking at", name)
        head = next((row for row in rows or () if row.name == name), None)
        if rows is None or head is None:
            return None
        snapshots = self.rows(("-d", "1", "-t", "snapshot", name), "listing the snapshots of", name, SNAPSHOT_COLUMNS)
        if snapshots is None:
            return None
        problems: list[str] = []
        own = [
            *(row for row in snapshots if row.name.startswith(f"{name}@")),
            *(row for row in rows if row.name.startswith(f"{name}#")),
        ]
        held = self.holds(_held(own))
        versions = ordered_versions(own, held, problems)
        found = dataset_of(head, {v.guid for v in versions}, problems)
        children = tuple(row.name for row in rows if row.name.startswith(f"{name}/"))
        return replace(found, versions=tuple(versions), children=children, problems=tuple(problems))

    def some(self, name: str, snapshots: Sequence[str], *, holds: bool) -> Dataset | None:
        """One dataset with these of its snapshots, as far as they exist; None if there is no such dataset.

        :param holds: whether theirs are looked up

        A lineage that belongs to it by the guid of another snapshot is not recognised: then :attr:`Dataset.of` is not
        its own guid.
        """
        command = ("zfs", "list", "-H", "-p", "-o", ",".join(COLUMNS), "-t", "filesystem,volume,snapshot", name)
        done = self._runner.run((*command, *(f"{name}@{snapshot}" for snapshot in snapshots)), LIST_DEADLINE)
        if done.status != 0 and not is_missing(done):
            raise failure(done, Operation(self._names.storage, name, "looking at"))
        rows = list(parse(done.output))
        head = next((row for row in rows if row.name == name), None)
        if head is None:
            return None
        problems: list[str] = []
        own = [row for row in rows if row.type == "snapshot"]
        versions = ordered_versions(own, self.holds(_held(own)) if holds else {}, problems)
        found = dataset_of(head, {v.guid for v in versions}, problems)
        return replace(found, versions=tuple(versions), problems=tuple(problems))

    def quick(self, name: str) -> Dataset | None:
        """One dataset without its versions and children; None if there is none.

        What belongs to it by a snapshot's guid alone is not recognised; :meth:`dataset` does.
        """
        rows = self.rows((name,), "looking at", name)
        return dataset_of(rows[0], (), []) if rows else None

    def all(self) -> tuple[list[tuple[str, Dataset]], list[str]]:
        """All volumes below the root by name, without their versions; and what is wrong with some.

        :raises StorageUnavailable: the root is not there
        """
        root = self._names.root
        rows = self.rows(("-r", "-t", "filesystem,volume", root), "listing", root)
        if rows is None:
            raise self.absent()
        found: list[tuple[str, Dataset]] = []
        problems: list[str] = []
        owners = {row.name: row[properties.OF] for row in rows}
        for row in rows:
            if row.name == root:
                continue
            try:
                volume = self._names.volume(row.name)
            except InvalidName as error:
                problems.append(f"{row.name} is left out: {error}")
                continue
            mine: list[str] = []
            dataset: Dataset | None = dataset_of(row, (), mine)
            if dataset is not None and dataset.lineage is None and _owned_by_a_snapshot(row, owners):
                dataset = self.dataset(row.name)
                mine = list(dataset.problems) if dataset is not None else []
            problems += [f"{row.name}: {problem}" for problem in mine]
            if dataset is not None and not dataset.is_placeholder:
                found.append((volume, dataset))
        return sorted(found, key=lambda item: item[0]), problems

    def absent(self) -> StorageUnavailable:
        """The error for a root that is not there."""
        root, pool, storage = self._names.root, self._names.pool, self._names.storage
        return StorageUnavailable(
            f"storage {storage}: dataset {root} is not there",
            hint=f"import its pool (zpool import {pool}), make it (zfs create -p {root}), or correct root in "
            f"[storage.{storage}]",
        )

    def holds(self, snapshots: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The tags that hold these snapshots, by their full names."""
        found: dict[str, list[str]] = {}
        for start in range(0, len(snapshots), _HOLDS_AT_ONCE):
            part = snapshots[start : start + _HOLDS_AT_ONCE]
            done = self._runner.run(("zfs", "holds", "-H", *part), LIST_DEADLINE)
            if done.status != 0 and not is_missing(done):
                raise failure(done, Operation(self._names.storage, part[0], "listing the holds of"))
            for line in done.output.split("\n"):
                name, _, rest = line.partition("\t")
                tag, _, _ = rest.rpartition("\t")
                if tag:
                    found.setdefault(name, []).append(tag)
        return {name: tuple(sorted(tags)) for name, tags in found.items()}


def _held(rows: Iterable[Row]) -> list[str]:
    return [row.name for row in rows if row.type == "snapshot" and (row.number("userrefs") or 0) > 0]


def _owned_by_a_snapshot(row: Row, owners: dict[str, str]) -> bool:
    """Whether its lineage may be its own by a snapshot's guid: it has one that is not its parent's."""
    of = row[properties.OF]
    return of not in (_NO_VALUE, owners.get(row.name.rpartition("/")[0], _NO_VALUE))


def dataset_of(row: Row, guids: Iterable[str], problems: list[str]) -> Dataset:
    """The dataset of a row, without its versions; what cannot be read of it is a problem.

    :param guids: of snapshots that it has
    """
    token = None
    if row["receive_resume_token"] != _NO_VALUE:
        try:
            token = read_token(row["receive_resume_token"])
        except StorageError as error:
            problems.append(str(error))
    identities = {row["guid"], *guids}
    if token is not None:
        identities.add(token.to_guid)
    lineage, form = None, None
    try:
        lineage = read_lineage(row.values, identities)
        form = read_form(row.values, identities)
    except InvalidName as error:
        problems.append(str(error))
    return Dataset(
        row.name,
        row["guid"],
        row.type == "volume",
        row.number("volsize"),
        row.number("written") or 0,
        row["encryption"] not in (_NO_VALUE, "off"),
        "" if row["origin"] == _NO_VALUE else row["origin"],
        token,
        lineage,
        form,
        row[properties.OF],
        row[properties.PLACEHOLDER],
        problems=tuple(problems),
    )


def versions_of(rows: Iterable[Row], held: dict[str, tuple[str, ...]]) -> list[Version]:
    """Snapshots and bookmarks of rows, in the order of the rows."""
    return [version for row in rows if (version := _version(row, held)) is not None]


def ordered_versions(rows: Iterable[Row], held: dict[str, tuple[str, ...]], problems: list[str]) -> list[Version]:
    """Snapshots and bookmarks of one dataset, oldest first; what cannot be used is a problem."""
    found = []
    for row in rows:
        version = _version(row, held)
        if version is None:
            problems.append(f"{row.name} is left out: its name, guid or time cannot be used")
        else:
            found.append(version)
    # A bookmark has the position of its snapshot; the snapshot comes first, as what has the data.
    return sorted(found, key=lambda v: (v.position, v.kind is VersionKind.BOOKMARK))


def _version(row: Row, held: dict[str, tuple[str, ...]]) -> Version | None:
    kind = VersionKind.SNAPSHOT if row.type == "snapshot" else VersionKind.BOOKMARK
    name = row.name.partition("@" if kind is VersionKind.SNAPSHOT else "#")[2]
    guid, position, created = row.number("guid"), row.number("createtxg"), row.number("creation")
    try:
        names.check_snapshot(name)
    except InvalidName:
        return None
    if guid is None or position is None or created is None:
        return None
    return Version(
        name,
        str(guid),
        datetime.fromtimestamp(created, UTC),
        position,
        kind,
        row.number("volsize"),
        held.get(row.name, ()),
    )
