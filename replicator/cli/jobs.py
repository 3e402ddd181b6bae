"""``prune``, ``pause``, ``resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, FAILED, consent, console, json_option, print_json, safe, say, yes_option

if TYPE_CHECKING:
    from replicator.control import OrphanReport, PruneReport


@click.command(cls=Verb)
@click.argument("job")
@click.option("--orphans", is_flag=True, help="Remove the replicas whose sources are gone, and nothing else.")
@click.option("--dry-run", is_flag=True, help="Only show what would be destroyed, and why.")
@yes_option
@json_option
@click.pass_obj
def prune(app: App, job: str, orphans: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Apply the retention of JOB now, on its sources and targets. Shows which snapshots it will destroy and why, and
    asks.

    Never destroyed, whatever the policy says: the newest snapshot that both sides have, held ones, and those that
    JOB did not make. Exits with 1 if something could not be destroyed.

    Replicas whose sources are gone are kept, with all their snapshots. --orphans shows those of JOB and asks whether to
    remove them, with all that they have.

    \b
    Examples:
      replicator prune vms --dry-run
      replicator prune vms --yes
      replicator prune vms --orphans
    """
    if orphans:
        return _prune_orphans(app, job, dry_run, yes, as_json)
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


def _prune_orphans(app: App, job: str, dry_run: bool, yes: bool, as_json: bool) -> int:
    from replicator.web.messages import ORPHANS

    with connect.open_control(app, tell=True) as control:
        found = control.orphans(job)
        going = tuple(report for report in found if not report.kept)
        if not as_json or not (dry_run or yes):
            _show_orphans(job, found, stderr=as_json)
        if dry_run or not going:
            if as_json:
                print_json(ORPHANS, found)
            return FAILED if found and not going and not dry_run else DONE
        what = f"{len(going)} replicas with all their" if len(going) > 1 else "1 replica with all its"
        consent(f"Remove {what} snapshots?", yes=yes)
        reports = control.remove_orphans(job, going)
    stay = tuple(report for report in reports if not report.gone)
    if as_json:
        print_json(ORPHANS, reports)
    else:
        if stay:
            _show_orphans(job, stay, stderr=False)
        say(f"Job {safe(job)}: {len(reports) - len(stay)} removed, {len(stay) + len(found) - len(going)} kept.")
    return FAILED if stay else DONE


def _show_orphans(job: str, reports: tuple[OrphanReport, ...], *, stderr: bool) -> None:
    from rich.text import Text

    from replicator.cli.tables import fold, plain_table
    from replicator.units import format_size

    out = console(stderr=stderr)
    if not reports:
        out.print(f"Job {safe(job)} has no replicas whose sources are gone.", soft_wrap=True)
        return
    table = plain_table("NODE/REPLICA", "SIZE", "SNAPSHOTS", "NEWEST", "KEPT BECAUSE")
    table.columns[4].no_wrap, table.columns[4].overflow = False, "fold"
    for report in reports:
        node = report.orphan.target.partition(":")[0]
        table.add_row(
            fold(f"{node}/{report.orphan.replica}", 24),
            "" if report.size is None else format_size(report.size),
            str(len(report.versions)),
            fold(report.versions[-1].name if report.versions else "", 36),
            Text(safe(report.kept), "yellow"),
        )
    out.print(table)


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
