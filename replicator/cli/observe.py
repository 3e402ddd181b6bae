"""``plan``, ``snapshots``, ``history``, ``check``: the verbs that look and change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, FAILED, MISSED, console, hint, json_option, print_json, safe, say, styled

if TYPE_CHECKING:
    from rich.table import Table

    from replicator.control import Finding, HistoryEntry, PlannedReplica, SideSnapshots
    from replicator.endpoint import PruneOutcome


@click.command(cls=Verb)
@click.argument("job", required=False)
@json_option
@click.pass_obj
def plan(app: App, job: str | None, as_json: bool) -> int:
    """What a run of JOB (or of every job) would do now: what is sent and how much, which snapshots are pruned and
    why, and what stands in the way. Changes nothing.

    Exits with 3 if something stands in the way.

    \b
    Examples:
      replicator plan
      replicator plan vms --json
    """
    from replicator.web.messages import PLAN

    with connect.open_control(app) as control:
        planned = control.plan(job)
    if as_json:
        print_json(PLAN, planned)
    else:
        for item in planned:
            _show_planned(item)
        say(_plan_sentence(planned))
    return MISSED if any(item.conflict for item in planned) else DONE


def _show_planned(item: PlannedReplica) -> None:
    from rich.padding import Padding
    from rich.text import Text

    out = console()
    out.print(
        Text.assemble((f"{safe(item.volume)} → {safe(item.target)}", "bold"), (f" (job {safe(item.job)})", "dim"))
    )
    for note in item.notes:
        out.print(Padding(styled(note, "dim"), (0, 0, 0, 2)))
    if item.conflict:
        out.print(Padding(Text.assemble(("stopped: ", "bold red"), safe(item.conflict)), (0, 0, 0, 2)))
        hint(item.hint, indent="  ")
    elif item.steps:
        out.print(_steps(item))
    else:
        say("  nothing to send but that" if item.notes else "  nothing to send: the target has the newest snapshot")
    for side, prunes in (("source", item.source_prunes), ("target", item.target_prunes)):
        going = [outcome for outcome in prunes if not outcome.kept]
        if going:
            say(f"  then prunes on the {side}:")
            out.print(_reasons(going))
    out.print()


def _steps(item: PlannedReplica) -> Table:
    from rich.text import Text

    from replicator import units
    from replicator.cli.tables import plain_table

    table = plain_table("  SENDS", "SIZE", right=(1,))
    for step in item.steps:
        since = f"changes since {safe(step.base)}" if step.base else "everything"
        if step.resumes_at is not None:
            since += f"\n  continued at {units.format_size(step.resumes_at)}"
        size = units.format_size(step.size) if step.size is not None else "not known"
        table.add_row(Text.assemble(f"  {safe(step.to)}\n", (f"  {since}", "dim")), size)
    column = table.columns[0]
    column.no_wrap, column.overflow = False, "fold"
    return table


def _reasons(outcomes: list[PruneOutcome]) -> Table:
    from replicator.cli.tables import plain_table

    table = plain_table("    SNAPSHOT", "REASON")
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
    for outcome in outcomes:
        table.add_row(f"    {safe(outcome.version.name)}", safe(outcome.error or outcome.reason))
    return table


def _plan_sentence(planned: tuple[PlannedReplica, ...]) -> str:
    from replicator import units

    steps = [step for item in planned for step in item.steps]
    prunes = sum(not outcome.kept for item in planned for outcome in (*item.source_prunes, *item.target_prunes))
    conflicts = sum(bool(item.conflict) for item in planned)
    size = sum(step.size or 0 for step in steps)
    least = "at least " if any(step.size is None for step in steps) else ""
    told = [f"{_count(len(planned), 'replica')}: {_count(len(steps), 'transfer')} of {least}{units.format_size(size)}"]
    told.append(f"{_count(prunes, 'snapshot')} pruned")
    if conflicts:
        told.append(f"{conflicts} stopped until somebody decides")
    return ", ".join(told) + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@click.command(cls=Verb)
@click.argument("volume")
@json_option
@click.pass_obj
def snapshots(app: App, volume: str, as_json: bool) -> int:
    """The snapshots of VOLUME on every side in one table, matched by identity: what stands in one row is the same
    data. Also what is held and by whom, and what is half received.

    \b
    Example:
      replicator snapshots tank:vm-100
    """
    from replicator.web.messages import SNAPSHOTS

    with connect.open_control(app) as control:
        sides = control.snapshots(volume)
    if as_json:
        print_json(SNAPSHOTS, sides)
    else:
        _show_sides(sides)
    return DONE


def _show_sides(sides: tuple[SideSnapshots, ...]) -> None:
    from replicator.cli.snapshots import details, snapshot_table

    out = console()
    table = snapshot_table(sides, width=out.width)
    if table is not None:
        out.print(table)
        out.print()
    for line in details(sides):
        out.print(line, soft_wrap=True)


@click.command(cls=Verb)
@click.option("--limit", type=click.IntRange(1, 100_000), default=30, show_default=True, help="Entries, at most.")
@json_option
@click.pass_obj
def history(app: App, limit: int, as_json: bool) -> int:
    """What happened on this node, newest first: runs, verifications, resyncs, and how they ended.

    \b
    Example:
      replicator history --limit 100
    """
    from replicator.web.messages import HISTORY

    with connect.open_control(app) as control:
        entries = control.history(limit)
    if as_json:
        print_json(HISTORY, entries)
    elif entries:
        _show_history(entries)
    else:
        say("Nothing has happened yet.")
    return DONE


def _show_history(entries: tuple[HistoryEntry, ...]) -> None:
    from rich.text import Text

    from replicator import units
    from replicator.cli.tables import MIN_NAME, NOTHING, OUTCOMES, fold, fold_pair, natural_width, plain_table, short

    def build(names: list[str], messages: list[str], room: int | None = None) -> Table:
        table = plain_table("TIME", "WHAT", "OUTCOME", "VOLUME, TARGET", "TOOK", "CHANGES", "SENT", right=(4, 5, 6))
        column = table.columns[3]
        column.no_wrap, column.overflow, column.max_width = False, "fold", room
        for entry, name, message in zip(entries, names, messages, strict=True):
            moment = entry.time.astimezone()
            table.add_row(
                f"{moment:%m-%d %H:%M:%S}",
                safe(entry.kind),
                Text(safe(entry.outcome), style=OUTCOMES.get(entry.outcome, "")),
                Text.assemble(name, "\n" if name and message else "", (message, "dim")),
                short(entry.seconds),
                units.format_size(entry.done) if entry.done else NOTHING,
                units.format_size(entry.sent) if entry.sent else NOTHING,
            )
        return table

    out = console()
    blank = [""] * len(entries)
    rest = natural_width(build(blank, blank)) - len("VOLUME, TARGET")
    room = max(out.width - rest, MIN_NAME)
    names = [
        fold_pair(entry.volume, entry.target, room) if entry.target else fold(entry.volume or entry.job, room)
        for entry in entries
    ]
    out.print(build(names, [safe(entry.message) for entry in entries], room))


@click.command(cls=Verb)
@json_option
@click.pass_obj
def check(app: App, as_json: bool) -> int:
    """Look at the configuration, names, the cluster network, clocks, storages, peers and space, and say what to do
    about what is wrong. Changes nothing.

    Exits with 1 if something would keep replication from working, with 2 if the configuration cannot be used.

    \b
    Example:
      replicator check
    """
    from replicator.control import Level
    from replicator.web.messages import FINDINGS

    with connect.open_control(app) as control:
        findings = control.check()
    if as_json:
        print_json(FINDINGS, findings)
    else:
        _show_findings(findings)
    return FAILED if any(finding.level is Level.FAILED for finding in findings) else DONE


def _show_findings(findings: tuple[Finding, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    from replicator.control import Level

    styles = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILED: "red"}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=28)
    table.add_column(overflow="fold")
    for finding in findings:
        told = Text(safe(finding.message))
        if finding.remedy:
            told.append(f"\nhint: {safe(finding.remedy)}", style="dim")
        table.add_row(Text(finding.level.value, style=styles[finding.level]), safe(finding.subject), told)
    console().print(table)
    failed = sum(finding.level is Level.FAILED for finding in findings)
    warned = sum(finding.level is Level.WARNING for finding in findings)
    if failed:
        also = f", {_count(warned, 'warning')}" if warned else ""
        say(f"{_count(failed, 'thing')} must be put right{also}.")
    elif warned:
        say(f"Replication can work; {_count(warned, 'warning')}.")
    else:
        say("All is well.")
