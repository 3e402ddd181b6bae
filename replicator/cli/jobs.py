"""``prune``, ``pause``, ``resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, FAILED, consent, console, json_option, print_json, safe, say, yes_option

if TYPE_CHECKING:
    from replicator.control import PruneReport


@click.command(cls=Verb)
@click.argument("job")
@click.option("--dry-run", is_flag=True, help="Only show what would be destroyed, and why.")
@yes_option
@json_option
@click.pass_obj
def prune(app: App, job: str, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Apply the retention of JOB now, on its sources and targets. Shows which snapshots it will destroy and why, and
    asks.

    Never destroyed, whatever the policy says: the newest snapshot that both sides have, held ones, and those that
    JOB did not make. Exits with 1 if something could not be destroyed.

    \b
    Examples:
      replicator prune vms --dry-run
      replicator prune vms --yes
    """
    from replicator.web.messages import PRUNES

    with connect.open_control(app, tell=True) as control:
        reports: tuple[PruneReport, ...] = ()
        if dry_run or not yes:
            reports = control.prune(job, True)
            going = sum(not outcome.kept for report in reports for outcome in report.outcomes)
            if not (dry_run and as_json):
                _show(job, reports, dry_run=True, stderr=as_json)
            if dry_run or not going:
                if as_json:
                    print_json(PRUNES, reports)
                return _verdict(reports)
            consent(f"Destroy {going} snapshot{'s' if going > 1 else ''}?", yes=yes)
        reports = control.prune(job, False)
    if as_json:
        print_json(PRUNES, reports)
    else:
        _show(job, reports, dry_run=False, stderr=False)
    return _verdict(reports)


def _verdict(reports: tuple[PruneReport, ...]) -> int:
    failed = any(report.message or any(outcome.error for outcome in report.outcomes) for report in reports)
    return FAILED if failed else DONE


def _show(job: str, reports: tuple[PruneReport, ...], *, dry_run: bool, stderr: bool) -> None:
    from rich.text import Text

    from replicator.cli.tables import fold, plain_table

    out = console(stderr=stderr)
    table = plain_table("NODE/VOLUME", "SNAPSHOT", "REASON")
    table.columns[2].no_wrap, table.columns[2].overflow = False, "fold"
    gone = kept = failed = 0
    for report in reports:
        for outcome in report.outcomes:
            kept += outcome.kept
            if outcome.kept and not outcome.error:
                continue
            gone += not outcome.kept and not outcome.error
            failed += bool(outcome.error)
            reason = (
                Text(f"not destroyed: {safe(outcome.error)}", "red") if outcome.error else Text(safe(outcome.reason))
            )
            table.add_row(fold(f"{report.node}/{report.volume}", 24), fold(outcome.version.name, 36), reason)
    if table.row_count:
        out.print(table)
    for report in reports:
        if report.message:
            out.print(Text(f"{safe(report.node)}/{safe(report.volume)}: {safe(report.message)}", "red"), soft_wrap=True)
    verb = "would be destroyed" if dry_run else "destroyed"
    told = f"Job {safe(job)}: {gone} {verb}, {kept} kept{f', {failed} failed' if failed else ''}."
    out.print(told, soft_wrap=True)


@click.command(cls=Verb)
@click.argument("job")
@click.pass_obj
def pause(app: App, job: str) -> int:
    """Let JOB not run by itself any more, also after a restart, until it is resumed. `replicator sync` still runs it;
    what runs now goes on.

    \b
    Example:
      replicator pause vms
    """
    with connect.open_control(app) as control:
        control.pause(job)
    say(f"Job {job} is paused. `replicator resume {job}` lets it run again.")
    return DONE


@click.command(cls=Verb)
@click.argument("job")
@click.pass_obj
def resume(app: App, job: str) -> int:
    """Let a paused JOB run by its schedule again.

    \b
    Example:
      replicator resume vms
    """
    with connect.open_control(app) as control:
        control.resume(job)
    say(f"Job {job} runs by its schedule again.")
    return DONE
