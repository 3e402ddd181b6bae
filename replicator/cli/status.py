"""``status``: once, as JSON, or live."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, MISSED, console, json_option, print_json
from replicator.errors import ReplicatorError, UsageError

if TYPE_CHECKING:
    from replicator.control import Control, Status

WATCH_SECONDS = 1.0


@click.command(cls=Verb)
@click.option("--watch", is_flag=True, help="Stay, and show it live until Ctrl-C.")
@json_option
@click.pass_obj
def status(app: App, watch: bool, as_json: bool) -> int:
    """How every replica is now: its state, how far it is behind and how far it may be, the last and the next sync,
    how long the last one took, how many bytes crossed the network, how often in a row it failed.

    Exits with 3 if a replica is further behind than its job allows, failed, or is in conflict.

    \b
    Examples:
      replicator status
      replicator status --watch
      replicator status --json | jq '.replicas[] | {volume, target, lag}'
    """
    if watch and (as_json or not sys.stdout.isatty()):
        raise UsageError("--watch needs a terminal", hint="programs ask again: replicator status --json")
    with connect.open_control(app) as control:
        if watch:
            return _watch(control)
        found = control.status()
    if as_json:
        from replicator.web.messages import STATUS

        print_json(STATUS, found)
    else:
        from replicator.cli.tables import status_view

        out = console()
        out.print(status_view(found, width=out.width))
    return _verdict(found)


def _verdict(found: Status) -> int:
    from replicator.control import State

    bad = any(row.misses_objective or row.state in (State.FAILED, State.CONFLICT) for row in found.replicas)
    return MISSED if bad else DONE


def _watch(control: Control) -> int:
    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from replicator.cli.output import styled
    from replicator.cli.tables import status_view

    out = console()
    shown: RenderableType = Text()
    try:
        with Live(console=out, auto_refresh=False, screen=True) as live:
            while True:
                try:
                    found = control.status()
                    clock = found.now.astimezone().strftime("%H:%M:%S")
                    shown = status_view(found, width=out.width)
                    last = Text(f"{clock}  Ctrl-C ends this; replication goes on.", style="dim")
                    live.update(Group(shown, last), refresh=True)
                except ReplicatorError as error:
                    # What was seen last stays, until whoever restarts the daemon has done so.
                    live.update(Group(shown, styled(f"{error}; trying again", "yellow")), refresh=True)
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        out.print(shown)
        return DONE
