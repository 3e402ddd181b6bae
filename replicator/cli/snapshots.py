"""The table of ``snapshots``: every side's versions, matched by identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from replicator.cli.output import safe
from replicator.cli.tables import ago, fold, natural_width, plain_table
from replicator.control import SideSnapshots
from replicator.model import HoldTag, Version, VersionKind

MIN_NAME = 24


def snapshot_table(sides: tuple[SideSnapshots, ...], *, width: int, now: datetime | None = None) -> Table | None:
    """One row an identity, oldest first; one column a side. None where no side has any."""
    now = now or datetime.now(UTC)
    rows = _rows(sides)
    if not rows:
        return None

    def build(room: int, side_room: int) -> Table:
        headers = [fold(f"{side.node}/{side.volume}", side_room) for side in sides]
        table = plain_table("SNAPSHOT", "TAKEN", *headers, right=(1,))
        for versions in rows:
            first = next(version for version in versions if version is not None)
            cells = [_cell(version, first, side_room) for version in versions]
            table.add_row(Text(fold(first.name, room)), ago(first.created, now), *cells)
        return table

    whole = build(10_000, 10_000)
    if natural_width(whole) <= width:
        return whole
    longest = max(len(next(v for v in versions if v is not None).name) for versions in rows)
    side_room = max((width - min(longest, 36) - 12) // len(sides) - 2, 9)
    room = max(width - 12 - len(sides) * (side_room + 2), MIN_NAME)
    return build(room, side_room)


def _rows(sides: tuple[SideSnapshots, ...]) -> list[list[Version | None]]:
    by_side = [_by_guid(side.versions or ()) for side in sides]
    guids = {guid: version.created for side in by_side for guid, version in side.items()}
    for side in by_side:
        for guid, version in side.items():
            guids[guid] = min(guids[guid], version.created)
    ordered = sorted(guids, key=lambda guid: guids[guid])
    return [[side.get(guid) for side in by_side] for guid in ordered]


def _by_guid(versions: Sequence[Version]) -> dict[str, Version]:
    """Versions by identity; a snapshot goes before a bookmark of it."""
    return {v.guid: v for v in sorted(versions, key=lambda v: v.kind is VersionKind.SNAPSHOT)}


def _cell(version: Version | None, first: Version, room: int) -> Text:
    if version is None:
        return Text("-", style="dim")
    text = Text("yes", style="green") if version.kind is VersionKind.SNAPSHOT else Text("bookmark", style="cyan")
    if version.holds:
        text.append(", held", style="default")
    if version.name != first.name:
        text.append("\n" + fold(f"as {version.name}", room), style="dim")
    return text


def details(sides: tuple[SideSnapshots, ...]) -> Iterator[Text]:
    """What does not fit into a table: per side its role, what is held by whom, half received, or wrong."""
    for side in sides:
        where = Text(f"{safe(side.node)}/{safe(side.volume)}: ", style="bold")
        yield where.append(_summary(side), style="not bold")
        for version in side.versions or ():
            if version.tags:
                kept = "held" if version.kind is VersionKind.SNAPSHOT else "kept as a base"
                owners = ", ".join(safe(str(HoldTag.parse(tag) or tag)) for tag in version.tags)
                yield Text(f"  {safe(version.name)} is {kept} by {owners}", style="dim")
        if side.partial:
            yield Text(f"  half received: {safe(side.partial)}", style="yellow")
        if side.message:
            yield Text(f"  {safe(side.message)}", style="yellow")
        for leftover in side.leftovers:
            yield Text(f"  {safe(leftover)}; `replicator serve` releases it", style="yellow")


def _summary(side: SideSnapshots) -> str:
    if side.versions is None:
        return "could not be asked" if side.message else "does not exist"
    role = f"{side.role}, epoch {side.epoch}, " if side.role else "not replicated yet, "
    count = sum(version.kind is VersionKind.SNAPSHOT for version in side.versions)
    marks = len(side.versions) - count
    told = f"{count} snapshot{'' if count == 1 else 's'}"
    return role + told + (f", {marks} bookmark{'' if marks == 1 else 's'}" if marks else "")
