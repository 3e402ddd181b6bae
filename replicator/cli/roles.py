"""``promote``, ``demote``, ``switchover``, ``rejoin``: which copy is the one that is written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, consent, console, json_option, note, print_json, say, yes_option

if TYPE_CHECKING:
    from replicator.control import RoleOrder, RoleReport


@click.command(cls=Verb)
@click.argument("volume")
@click.option(
    "--primary-is-down",
    is_flag=True,
    help="Your word that nodes which do not answer are down, where no third node can say so.",
)
@click.option("--force", is_flag=True, help="Promote although a primary answers, or another copy is newer.")
@yes_option
@json_option
@click.pass_obj
def promote(app: App, volume: str, primary_is_down: bool, force: bool, yes: bool, as_json: bool) -> int:
    """Make the replica VOLUME of this node the primary: it has its newest complete snapshot, and can be written to.
    Says how old that is and what is known to be lost, and asks.

    Refuses while the primary answers, and while a node is silent that may have it, unless a third node does not reach
    that one either (or with --primary-is-down). Where [fence] is configured, its command must succeed first.

    \b
    Examples:
      replicator promote backup:prox1/vm-100
      replicator promote backup:prox1/vm-100 --primary-is-down --yes
    """
    from replicator.control import RoleOrder, RoleVerb

    order = RoleOrder(RoleVerb.PROMOTE, volume, force=force, primary_is_down=primary_is_down)
    return _change(app, order, yes=yes, as_json=as_json)


@click.command(cls=Verb)
@click.argument("volume")
@yes_option
@json_option
@click.pass_obj
def demote(app: App, volume: str, yes: bool, as_json: bool) -> int:
    """Make the primary VOLUME of this node a replica that nobody can write to, with a last snapshot of what it has.
    Refuses while it is in use.

    \b
    Example:
      replicator demote tank:vm-100
    """
    from replicator.control import RoleOrder, RoleVerb

    return _change(app, RoleOrder(RoleVerb.DEMOTE, volume), yes=yes, as_json=as_json)


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--to", required=True, metavar="NODE", help="The node that gets the primary.")
@yes_option
@json_option
@click.pass_obj
def switchover(app: App, volume: str, to: str, yes: bool, as_json: bool) -> int:
    """Hand VOLUME over to NODE as planned, without loss: brings the last changes there, makes the copy here a replica
    and the one there the primary. The job replicates the other way from then on; the same command with this node as
    NODE brings it back.

    Runs on the node that has the job. Stop what uses the volume first, or have the job's quiesce hook do it. Any
    failure leaves the primary where it was; run again, it finishes what was cut off, or undoes it.

    \b
    Example:
      replicator switchover tank:vm-100 --to prox2
    """
    from replicator.control import RoleOrder, RoleVerb

    return _change(app, RoleOrder(RoleVerb.SWITCHOVER, volume, to), yes=yes, as_json=as_json)


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--from", "source", required=True, metavar="NODE", help="The node that has the primary now.")
@click.option("--fail-back", is_flag=True, help="Once it is in sync, switch over to it: it is the primary again.")
@yes_option
@json_option
@click.pass_obj
def rejoin(app: App, volume: str, source: str, fail_back: bool, yes: bool, as_json: bool) -> int:
    """Make VOLUME of this node follow the primary on NODE: the former primary that comes back, or a replica whose
    primary is another node now. What only it has is kept aside as diverged-<time>; only the difference is sent.

    With --fail-back it is switched over to afterwards, without loss; stop what uses the primary first. It never
    happens by itself, as a node that comes and goes would take the primary with it each time.

    \b
    Examples:
      replicator rejoin tank:vm-100 --from prox2
      replicator rejoin tank:vm-100 --from prox2 --fail-back
    """
    from replicator.control import RoleOrder, RoleVerb

    order = RoleOrder(RoleVerb.REJOIN, volume, source, fail_back=fail_back)
    return _change(app, order, yes=yes, as_json=as_json)


def _change(app: App, order: RoleOrder, *, yes: bool, as_json: bool) -> int:
    from replicator.cli import work
    from replicator.web.messages import ROLE_REPORT

    with connect.open_control(app, tell=True) as control:
        preview = control.preview_role(order)
        console(stderr=True).print(f"{preview.verb} of {preview.volume}:")
        for effect in preview.effects:
            note(f"- {effect}")
        consent("Go on?", yes=yes)
        report = work.run(lambda listen, cancel: control.change_role(order, listen, cancel))
    if as_json:
        print_json(ROLE_REPORT, report)
    else:
        _show(report)
    return DONE


def _show(report: RoleReport) -> None:
    from datetime import timedelta

    from replicator import units

    at = f", at {report.snapshot}" if report.snapshot else ""
    say(f"{report.node}/{report.volume} is a {report.role} now (epoch {report.epoch}){at}.")
    match report.verb:
        case "promote":
            age = units.format_duration(timedelta(seconds=round(report.age or 0)))
            say(f"That is {age} old: what was written to the primary after it is not in this copy.")
            if report.beyond:
                say(f"{report.beyond[:1].upper()}{report.beyond[1:]}.")
        case "switchover" if report.without_primary is not None:
            say(f"Nothing is lost. For {report.without_primary:.1f} s there was no writable copy.")
        case "rejoin":
            say(f"{units.format_size(report.done)} were replaced, {units.format_size(report.sent)} sent.")
            if report.without_primary is not None:
                say(
                    f"It was switched back without loss. For {report.without_primary:.1f} s there was no writable copy."
                )
        case _:
            pass
    if report.aside:
        say(f"What only this copy had is kept here as {', '.join(report.aside)}.")
