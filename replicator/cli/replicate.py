"""``sync``, ``verify``, ``resync``, ``restore``: the verbs that move data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import (
    DONE,
    FAILED,
    MISSED,
    consent,
    console,
    hint,
    json_option,
    note,
    print_json,
    say,
    yes_option,
)

if TYPE_CHECKING:
    from replicator.control import ResyncPreview, RunReport
    from replicator.verification import Resync, Verification

SHOWN_RANGES = 10

_target = click.option("--target", metavar="NODE:STORAGE", help="Only this target.")


@click.command(cls=Verb)
@click.argument("job")
@click.option("--volume", metavar="STORAGE:NAME", help="Only this volume.")
@_target
@json_option
@click.pass_obj
def sync(app: App, job: str, volume: str | None, target: str | None, as_json: bool) -> int:
    """Run JOB now, whatever its schedule: take snapshots, send what changed, prune.

    Ctrl-C stops where the next run continues. Exits with 1 if any volume was not brought over.

    \b
    Examples:
      replicator sync vms
      replicator sync vms --volume tank:vm-100 --target prox2:backup
    """
    from replicator.cli import work
    from replicator.web.messages import REPORTS

    with connect.open_control(app, tell=True) as control:
        reports = work.run(lambda listen, cancel: control.sync(job, volume, target, listen, cancel))
    if as_json:
        print_json(REPORTS, reports)
    else:
        _show_reports(job, reports)
    return FAILED if any(report.outcome not in ("ok", "skipped") for report in reports) else DONE


def _show_reports(job: str, reports: tuple[RunReport, ...]) -> None:
    from replicator import units
    from replicator.cli.tables import run_table

    if not reports:
        say(f"Job {job} selects no volume that matches: nothing was done.")
        return
    out = console()
    out.print(run_table(reports, width=out.width))
    counts = {
        outcome: sum(report.outcome == outcome for report in reports)
        for outcome in dict.fromkeys(report.outcome for report in reports)
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    done, sent = sum(report.done for report in reports), sum(report.sent for report in reports)
    say(f"Job {job}: {told}; {units.format_size(done)} of changes, {units.format_size(sent)} sent.")


@click.command(cls=Verb)
@click.argument("volume")
@_target
@click.option("--snapshot", metavar="NAME", help="Compare this one. Default: the newest that both sides have.")
@click.option("--repair", is_flag=True, help="Mend what differs.")
@click.option("--scrub", is_flag=True, help="ZFS: read nothing; compare identities, scrub both pools now, and wait.")
@yes_option
@json_option
@click.pass_obj
def verify(
    app: App, volume: str, target: str | None, snapshot: str | None, repair: bool, scrub: bool, yes: bool, as_json: bool
) -> int:
    """Compare a snapshot of VOLUME with the same one on its targets, reading all of both: images and zvols block by
    block, filesystems file by file.

    ZFS that cannot be read (its key is not loaded, no right to mount) is verified by the identities of its snapshots
    and the last scrubs of both pools; the result always says which it was.

    With --repair, what differs is replaced by the source's: of an image the damaged snapshot is kept aside; of ZFS,
    from OpenZFS 2.2 on, blocks that the target cannot read are healed where they are. Exits with 3 if something
    differs and was not mended.

    \b
    Examples:
      replicator verify tank:vm-100
      replicator verify tank:vm-100 --target prox2:backup --repair
      replicator verify tank:vm-100 --scrub
    """
    from replicator.cli import work
    from replicator.web.messages import VERIFICATIONS

    if repair:
        consent(
            f"Blocks of the replicas of {volume} that differ are replaced by the source's; a damaged snapshot of an "
            "image is kept aside as diverged-<time>, blocks that ZFS cannot read are healed where they are. Go on?",
            yes=yes,
        )
    with connect.open_control(app, tell=True) as control:
        found = work.run(
            lambda listen, cancel: control.verify(volume, target, snapshot, repair, scrub, listen, cancel),
        )
    if as_json:
        print_json(VERIFICATIONS, found)
    else:
        for item in found:
            _show_verification(item)
    return DONE if all((item.equal or item.repaired) and not item.standing for item in found) else MISSED


def _show_verification(item: Verification) -> None:
    from replicator.mismatches import told, ways_out
    from replicator.verification import Method

    pair = f"{item.volume} → {item.target}"
    if item.equal:
        say(f"{pair}: {_equal(item)}")
    elif item.method is Method.SCRUB:
        say(f"{pair}: not right at {item.snapshot}. {_NOT_READ}")
    elif item.method is Method.FILES:
        _show_files(pair, item)
    elif item.range_count:
        _show_ranges(pair, item)
    else:
        say(f"{pair}: the blocks of {item.snapshot} are equal on both sides, but:")
    for problem in item.problems:
        say(f"  {problem}")
    for remark in item.notes:
        note(f"- {remark}")
    if item.repaired:
        kept = f" What was there is kept as {item.aside}." if item.aside else ""
        say(f"Mended: the replica has the source's blocks now.{kept}")
    if (item.equal or item.repaired) and item.standing:
        say(f"That does not end what was found before: {told(item.standing)}.")
    if item.standing or not (item.equal or item.repaired):
        hint(ways_out(item.volume, item.target, item.standing))


_NOT_READ = "The data was not read and compared: identities and the pools' scrubs were."


def _equal(item: Verification) -> str:
    from replicator import units
    from replicator.verification import Method

    checked = units.format_size(item.checked)
    match item.method:
        case Method.SCRUB:
            return (
                f"same snapshots up to {item.snapshot}, and both pools scrubbed without a damage in them. {_NOT_READ}"
            )
        case Method.FILES:
            return (
                f"equal. All {item.entries} files and folders of {item.snapshot} ({checked}) were read and compared on "
                "both sides."
            )
        case _:
            return f"equal. All {checked} of {item.snapshot} were read and compared on both sides."


def _show_ranges(pair: str, item: Verification) -> None:
    from replicator import units
    from replicator.cli.tables import plain_table

    ranges = f"{item.range_count} range{'s' if item.range_count > 1 else ''}"
    checked = units.format_size(item.checked)
    say(f"{pair}: {units.format_size(item.differing)} of {checked} differ, in {ranges} of {item.snapshot}:")
    table = plain_table("  OFFSET", "LENGTH", right=(0, 1))
    for piece in item.ranges[:SHOWN_RANGES]:
        table.add_row(f"  {piece.offset}", units.format_size(piece.length))
    console().print(table)
    if item.range_count > SHOWN_RANGES:
        say(f"  and {item.range_count - SHOWN_RANGES} more; --json has them")


def _show_files(pair: str, item: Verification) -> None:
    say(f"{pair}: {item.file_count} of {item.entries} files and folders of {item.snapshot} differ:")
    for file in item.files[:SHOWN_RANGES]:
        say(f"  {file.path}: {'; '.join(file.what)}")
    if item.file_count > SHOWN_RANGES:
        say(f"  and {item.file_count - SHOWN_RANGES} more; --json has them")


@click.command(cls=Verb)
@click.argument("volume")
@_target
@click.option("--full", is_flag=True, help="ZFS: keep the whole replica aside and send everything anew in any case.")
@yes_option
@json_option
@click.pass_obj
def resync(app: App, volume: str, target: str | None, full: bool, yes: bool, as_json: bool) -> int:
    """Make the replicas of VOLUME right again, whatever happened to them: missing, diverged, damaged, their snapshots
    gone. Says what it will change and what that takes, and asks.

    Images: compares both sides by digest and sends only the blocks that differ. Data that only the target has is
    first kept aside there as a snapshot diverged-<time>.

    ZFS: puts the replica back to the newest snapshot that both sides have, keeps what it has after that as a dataset
    NAME-diverged-<time>, and sends what changed since. It keeps the whole replica so, and sends everything anew, where
    nothing is common, where a verification found a difference, where raw and plain streams would be mixed, and
    with --full. Cut off, that is continued by the next resync or sync.

    \b
    Examples:
      replicator resync tank:vm-100
      replicator resync tank:vm-100 --target prox2:backup --yes
      replicator resync tank:vm-100 --target prox2:backup --full
    """
    from replicator.cli import work
    from replicator.web.messages import RESYNCS

    with connect.open_control(app, tell=True) as control:
        previews = control.preview_resync(volume, target, full)
        _show_previews(previews)
        consent("Go on?", yes=yes)
        results = work.run(lambda listen, cancel: control.resync(volume, target, full, listen, cancel))
    if as_json:
        print_json(RESYNCS, results)
    else:
        for result in results:
            _show_resync(result)
    return DONE


def _show_previews(previews: tuple[ResyncPreview, ...]) -> None:
    for preview in previews:
        console(stderr=True).print(f"resync of {preview.volume} → {preview.target}:")
        for effect in preview.effects:
            note(f"- {effect}")


def _show_resync(result: Resync) -> None:
    from replicator import units

    compared = f"{units.format_size(result.compared)} compared, " if result.compared else ""
    kept = f" What only the target had is kept there as {', '.join(result.aside)}." if result.aside else ""
    state = "right again at" if result.made_equal else "continued from what both sides have, and now at"
    say(
        f"{result.volume} → {result.target}: {state} {result.snapshot}: {compared}"
        f"{units.format_size(result.changed)} replaced, {units.format_size(result.sent)} sent.{kept}"
    )
    if not result.made_equal:
        note(
            f"- whether all of it is equal, `replicator verify {result.volume} --target {result.target}` finds out; "
            "--full sends everything anew"
        )


@click.command(cls=Verb)
@click.argument("snapshot", metavar="VOLUME@SNAPSHOT")
@click.option("--to", required=True, metavar="STORAGE:NAME", help="The new volume, on this node; it must not exist.")
@json_option
@click.pass_obj
def restore(app: App, snapshot: str, to: str, as_json: bool) -> int:
    """Make any snapshot a new volume of this node, wherever the snapshot is: here, or on another node.

    Nothing that exists is changed. `replicator snapshots VOLUME` lists what there is. In the ZFS storage that has the
    snapshot the new volume is a clone, and keeps it from being destroyed. A filesystem is not mounted
    (canmount=noauto).

    \b
    Example:
      replicator restore tank:vm-100@replicator_vms_20261120T081710.123Z --to tank:vm-100-restored
    """
    from replicator import units
    from replicator.cli import work
    from replicator.web.messages import RESTORED

    with connect.open_control(app, tell=True) as control:
        found = work.run(lambda listen, cancel: control.restore(snapshot, to, listen, cancel))
    if as_json:
        print_json(RESTORED, found)
        return DONE
    size = f", {units.format_size(found.size)}" if found.size is not None else ""
    copied = f"{units.format_size(found.copied)} copied" if found.copied else "it shares its data with the snapshot"
    say(f"{found.volume} is there{size}: snapshot {found.snapshot} of node {found.source_node}; {copied}.")
    return DONE
