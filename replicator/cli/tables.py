"""Tables of replicas: ``status`` and the results of runs, for terminals of 80 columns and for wide ones.

Colours only repeat what words say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.cells import cell_len
from rich.console import Group, JustifyMethod, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from replicator import units
from replicator.cli.output import safe, styled
from replicator.control import PeerStatus, ReplicaStatus, RunReport, State, Status
from replicator.model import Progress

NOTHING = "-"
"""Where there is nothing to show."""
MIN_NAME = 16
"""Columns that a name has at least, however narrow the terminal."""
FOLDED_NAME = 20
"""Columns that a name in a wide table must have; else the table with two lines a row is easier to read."""
WIDE = 100
SHOWN_THINGS = 3
"""Things named that have the same problem; of the others only the number is said."""

STYLES = {
    State.RUNNING: "cyan",
    State.CONFLICT: "bold red",
    State.FAILED: "red",
    State.LAGGING: "yellow",
    State.NEVER: "yellow",
    State.PAUSED: "blue",
    State.OK: "green",
}
OUTCOMES = {
    "ok": "green",
    "failed": "red",
    "conflict": "bold red",
    "cancelled": "yellow",
    "skipped": "yellow",
}

_BREAKS = frozenset("/:-_.@ ")


def short(seconds: float | None) -> str:
    """A duration in one unit, at most five columns: ``0.4s``, ``42s``, ``45min``, ``30h``, ``12d``."""
    if seconds is None:
        return NOTHING
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 9.95:
        return f"{sign}{seconds:.1f}".removesuffix(".0") + "s"
    if seconds < 99.5:
        return f"{sign}{seconds:.0f}s"
    if seconds < 99.5 * 60:
        return f"{sign}{seconds / 60:.0f}min"
    if seconds < 47.5 * 3600:
        return f"{sign}{seconds / 3600:.0f}h"
    return f"{sign}{seconds / 86400:.0f}d"


def ago(moment: datetime | None, now: datetime, *, words: bool = True) -> str:
    """How long ago, or in how long; without words only the duration."""
    if moment is None:
        return NOTHING
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "now"
    if not words:
        return short(abs(round(seconds)))
    return f"{short(round(seconds))} ago" if seconds > 0 else f"in {short(round(-seconds))}"


def fold(text: str, width: int) -> str:
    """Break a name into lines of at most ``width`` columns, after ``/ : - _ .`` where that is possible."""
    text, width = safe(text), max(width, 2)
    lines: list[str] = []
    while cell_len(text) > width:
        end, used, best = 0, 0, 0
        for end, letter in enumerate(text):
            used += cell_len(letter)
            if used > width:
                break
            if letter in _BREAKS and used > width // 3:
                best = end + 1
        cut = best or max(end, 1)
        lines.append(text[:cut])
        text = text[cut:]
    return "\n".join([*lines, text])


def plain_table(*headers: str, right: Sequence[int] = ()) -> Table:
    """A table without lines, its numbers on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", no_wrap=True)
    return table


def natural_width(table: Table) -> int:
    """Columns that a table of single lines needs."""
    from rich.console import Console

    return table.__rich_measure__(Console(width=10_000), Console(width=10_000).options).maximum


def status_table(status: Status, *, width: int) -> RenderableType:
    """One row a replica, in one line where the terminal is wide enough for that, else in two."""
    for words in (True, False):
        table = _wide_status(status, words=words)
        over = natural_width(table) - width
        if over <= 0:
            return table
    room = max((cell_len(safe(row.volume)) for row in status.replicas), default=0) - over
    return _wide_status(status, words=False, room=room) if room >= FOLDED_NAME else _narrow_status(status, width)


def _lag_style(row: ReplicaStatus) -> str:
    return "yellow" if row.misses_objective else ""


def _state(row: ReplicaStatus) -> Text:
    text = Text(row.state.value, style=STYLES[row.state])
    if row.paused and row.state is not State.PAUSED:
        text.append(", paused", style=STYLES[State.PAUSED])
    return text


def _sent(row: ReplicaStatus) -> str:
    return NOTHING if row.last_sync is None and not row.sent else units.format_size(row.sent)


_WORDS = "LAG", "OBJECTIVE", "LAST SYNC", "NEXT SYNC", "DURATION", "BYTES", "FAILURES"
_SHORT = "LAG", "OF", "LAST", "NEXT", "TOOK", "BYTES", "FAILED"


def _wide_status(status: Status, *, words: bool, room: int | None = None) -> Table:
    headers = _WORDS if words else _SHORT
    table = plain_table("VOLUME", "TARGET", "STATE", *headers, "JOB", right=range(3, 10))
    for row in status.replicas:
        table.add_row(
            safe(row.volume) if room is None else fold(row.volume, room),
            safe(row.target),
            _state(row),
            Text(short(row.lag), style=_lag_style(row)),
            short(row.objective),
            ago(row.last_sync, status.now, words=words),
            ago(row.next_sync, status.now, words=words),
            short(row.duration),
            _sent(row),
            Text(str(row.failures), style="red" if row.failures else ""),
            safe(row.job),
        )
    return table


def _narrow_status(status: Status, width: int) -> Table:
    def build(names: Sequence[tuple[str, str]]) -> Table:
        table = plain_table("VOLUME, TARGET", "STATE", "LAG", "LAST", "NEXT", "TOOK", "BYTES", right=(2, 3, 4, 5, 6))
        for row, (volume, target) in zip(status.replicas, names, strict=True):
            state = _state(row)
            if row.failures:
                state.append(f"\n{row.failures} failure{'s' if row.failures > 1 else ''}", style="red")
            lag = Text(short(row.lag), style=_lag_style(row))
            if row.objective is not None:
                lag.append(f"\nof {short(row.objective)}", style="dim")
            table.add_row(
                Text.assemble(volume, "\n", (target, "dim")),
                state,
                lag,
                ago(row.last_sync, status.now, words=False),
                ago(row.next_sync, status.now, words=False),
                short(row.duration),
                _sent(row),
            )
        return table

    rest = natural_width(build([("", "")] * len(status.replicas))) - cell_len("VOLUME, TARGET")
    room = max(width - rest, MIN_NAME)
    return build([(fold(row.volume, room), fold(f"→ {row.target} ({row.job})", room)) for row in status.replicas])


def progress_table(running: Iterable[Progress], *, width: int) -> RenderableType:
    """A bar for each transfer, with how much, rate and time left; its name before or above that."""
    wide = width >= WIDE
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in _PROGRESS_COLUMNS:
        table.add_column(justify=justify, no_wrap=True)
    room = width - 20 - 26 - 10 - 11 - 8 if wide else width
    parts: list[RenderableType] = []
    for item in running:
        name = Text(fold(f"{item.volume} → {item.target}", max(room, MIN_NAME)), style="cyan")
        bar = _bar(item)
        figures = amount(item), units.format_rate(item.rate), left(item)
        if wide:
            table.add_row(name, bar, *figures)
        else:
            line = Table.grid(padding=(0, 2, 0, 0))
            for justify, size in zip(_PROGRESS_COLUMNS, (0, 20, 26, 10, 11), strict=True):
                line.add_column(justify=justify, no_wrap=True, min_width=size)
            line.add_row("", bar, *figures)
            parts += [name, line]
    return table if wide else Group(*parts)


_PROGRESS_COLUMNS: tuple[JustifyMethod, ...] = ("left", "left", "right", "right", "right")


def _bar(item: Progress) -> ProgressBar:
    """A bar of 20 columns; one that only moves where nobody knows the end."""
    total = item.total if item.total and item.total >= item.done else None
    return ProgressBar(total=total, completed=item.done, width=20, pulse=total is None, animation_time=item.done / 1e8)


def amount(item: Progress) -> str:
    """How far it is: ``38 MiB of 1.4 GiB, 3%``."""
    if not item.total:
        return units.format_size(item.done)
    percent = min(100, item.done * 100 // item.total)
    return f"{units.format_size(item.done)} of {units.format_size(max(item.total, item.done))}, {percent}%"


def left(item: Progress) -> str:
    """How long it takes yet, ``""`` where nobody knows."""
    if not item.total or item.rate <= 0 or item.done > item.total:
        return ""
    return f"{short(round((item.total - item.done) / item.rate))} left"


def problems(rows: Iterable[tuple[str, str, str]]) -> list[RenderableType]:
    """What is wrong with what, and what to do: lines beneath a table. Each row: the thing, the message, the hint.

    What is wrong with many things in the same way is said once.
    """
    things: dict[tuple[str, str], list[str]] = {}
    for thing, message, hint in rows:
        if message:
            things.setdefault((message, hint), []).append(safe(thing))
    found: list[RenderableType] = []
    for (message, hint), named in things.items():
        more = len(named) - SHOWN_THINGS
        label = ", ".join(named[:SHOWN_THINGS]) + (f" and {more} more" if more > 0 else "")
        found.append(Text.assemble((label + ": ", "bold"), safe(message)))
        if hint:
            found.append(Text(f"  hint: {safe(hint)}", style="dim"))
    return found


def status_view(status: Status, *, width: int) -> RenderableType:
    """All of ``status``: table, running transfers, problems with their remedies, peers that are away, a sentence."""
    parts: list[RenderableType] = []
    if status.replicas:
        parts += [status_table(status, width=width), Text()]
    running = [row.progress for row in status.replicas if row.progress is not None]
    if running:
        parts += [progress_table(running, width=width), Text()]
    # What went wrong last time is of no interest while it is being tried again.
    waiting = [row for row in status.replicas if row.state is not State.RUNNING]
    lines = problems((f"{row.volume} → {row.target}", row.message, row.hint) for row in waiting)
    told = {row.message for row in waiting}
    lines += [_away(peer, told) for peer in status.peers if not peer.up]
    lines += problems(
        (f"{orphan.replica} on {orphan.target.partition(':')[0]}", GONE, KEPT.format(job=orphan.job))
        for orphan in status.orphans
    )
    if lines:
        parts += [*lines, Text()]
    parts.append(_sentence(status))
    return Group(*parts)


GONE = "its source is gone; the replica is kept"
KEPT = (
    "`replicator restore` brings a snapshot of it back as a volume; when it is not needed, `replicator prune {job} "
    "--orphans` removes it"
)


def _away(peer: PeerStatus, told: set[str]) -> Text:
    reason = f": {peer.message}" if peer.message and peer.message not in told else ""
    return styled(f"peer {peer.node} ({peer.address}) is not reachable{reason}", "yellow")


def _sentence(status: Status) -> Text:
    count = len(status.replicas)
    if not count:
        text = styled(f"{status.node} has no replicas yet: no job of its configuration selects a volume.")
    else:
        by_state = {state: sum(row.state is state for row in status.replicas) for state in State}
        told = ", ".join(f"{number} {state.value}" for state, number in by_state.items() if number)
        text = styled(f"{status.node}: {count} replica{'s' if count > 1 else ''}, {told}")
        late = sum(row.misses_objective for row in status.replicas)
        text.append(f"; {late} behind the objective." if late else ".")
    if not status.daemon:
        text.append(" No daemon runs here, so nothing is scheduled.", style="yellow")
    return text


def run_table(reports: Sequence[RunReport], *, width: int) -> RenderableType:
    """What a run did, one row a replica, with what went wrong beneath."""

    def build(names: Sequence[str]) -> Table:
        table = plain_table("VOLUME, TARGET", "OUTCOME", "STEPS", "CHANGES", "SENT", "TOOK", right=(2, 3, 4, 5))
        for report, name in zip(reports, names, strict=True):
            table.add_row(
                name,
                Text(safe(report.outcome), style=OUTCOMES.get(report.outcome, "")),
                str(report.steps),
                units.format_size(report.done),
                units.format_size(report.sent),
                short(report.seconds),
            )
        return table

    rest = natural_width(build([""] * len(reports))) - cell_len("VOLUME, TARGET")
    room = max(width - rest, MIN_NAME)
    table = build([fold_pair(report.volume, report.target, room) for report in reports])
    lines = problems((f"{report.volume} → {report.target}", report.message, report.hint) for report in reports)
    return Group(table, *([Text(), *lines] if lines else []))


def fold_pair(volume: str, target: str, width: int) -> str:
    """A volume and its target in one line if it fits, else in two or more."""
    whole = f"{safe(volume)} → {safe(target)}"
    return whole if cell_len(whole) <= width else f"{fold(volume, width)}\n{fold('→ ' + target, width)}"
