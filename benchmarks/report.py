"""What a benchmark found, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Result:
    """One figure of ours, beside a peer's or a limit.

    ``ratio`` says how many times better than the peer ours is, whether more or less of the ``unit`` is better; see
    :func:`compare`. ``target`` is the ratio that must be reached, None where the figure is for information. Where
    there is a limit instead of a peer, ``peer`` is the limit and ``peer_name`` says so.
    """

    subject: str
    case: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target


def compare(
    subject: str,
    case: str,
    ours: float,
    peer: float,
    peer_name: str,
    unit: str,
    *,
    target: float | None = None,
    less_is_better: bool = False,
) -> Result:
    """Return a result with its ratio worked out; for a note, take it through :func:`dataclasses.replace`."""
    better, worse = (peer, ours) if less_is_better else (ours, peer)
    return Result(subject, case, ours, peer, peer_name, unit, better / worse, target)


def wide_console() -> Console:
    """On a terminal as wide as that is; elsewhere wide enough that no cell is folded."""
    return Console(width=None if sys.stdout.isatty() else 180)


def print_table(results: Iterable[Result], console: Console | None = None) -> None:
    """Print one table per subject, in the order in which they came."""
    console = console or wide_console()
    subjects: dict[str, list[Result]] = {}
    for result in results:
        subjects.setdefault(result.subject, []).append(result)
    for subject, rows in subjects.items():
        console.print(_table(subject, rows))


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write the results, with the machine that they came from."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    rows = [{**asdict(result), "met": result.met} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n", encoding="utf-8")


def _table(subject: str, rows: Sequence[Result]) -> Table:
    table = Table(title=subject, title_justify="left")
    table.add_column("case")
    table.add_column("ours", justify="right")
    table.add_column("peer", justify="right")
    table.add_column("unit")
    table.add_column("beside")
    table.add_column("ratio", justify="right")
    table.add_column("target")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.case,
            _number(row.ours),
            "" if row.peer is None else _number(row.peer),
            row.unit,
            row.peer_name,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            _target(row),
            row.note,
        )
    return table


def _target(row: Result) -> Text:
    if row.target is None:
        return Text("")
    return Text(f"{row.target:g} {'met' if row.met else 'MISSED'}", style="green" if row.met else "bold red")


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
