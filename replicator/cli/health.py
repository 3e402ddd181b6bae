"""``health``: one line and an exit status, for Nagios and its kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.errors import ConnectionLost, DaemonUnreachable, DeadlineExceeded, ReplicatorError

if TYPE_CHECKING:
    from replicator.health import Verdict

UNKNOWN = 3


class Plugin(Verb):
    """A verb whose exit status is that of a monitoring plugin, also where it was not used as it should be."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As click does. :raises click.exceptions.Exit: wrong usage, which is UNKNOWN"""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            click.echo(f"REPLICATOR UNKNOWN: {error.format_message()}")
            raise click.exceptions.Exit(UNKNOWN) from None


@click.command(cls=Plugin)
@click.option("--volume", metavar="VOLUME", help="Only this volume, as `replicator status` names it.")
@click.option(
    "--timeout", metavar="DURATION", default="10s", show_default=True, help="How long to wait for the daemon."
)
@click.pass_obj
def health(app: App, volume: str | None, timeout: str) -> int:
    """Whether all is well, in one line with figures, as Nagios, Icinga, Zabbix and others take it from their plugins.
    Asks the daemon of this node over its Unix socket.

    The exit status is not that of the other verbs:

    \b
      0 OK        every replica is within its objective
      1 WARNING   something failed and may still heal; a peer is down; a job is paused
      2 CRITICAL  an objective is missed, a conflict, a difference; no daemon answers
      3 UNKNOWN   wrong usage or configuration, no right to ask, no such volume

    \b
    Examples:
      replicator health
      replicator health --volume images:vm-100-disk-0.raw
    """
    from replicator.health import Grade, Verdict

    try:
        verdict = _asked(app, volume, timeout)
    except (DaemonUnreachable, DeadlineExceeded, ConnectionLost) as error:
        grade = Grade.UNKNOWN if isinstance(error.__cause__, PermissionError) else Grade.CRITICAL
        verdict = Verdict(grade, str(error))
    except ReplicatorError as error:
        verdict = Verdict(Grade.UNKNOWN, str(error))
    except Exception as error:  # noqa: BLE001 - another exit status would be taken for a verdict on the replicas
        verdict = Verdict(Grade.UNKNOWN, f"internal error: {type(error).__name__}: {error}")
    click.echo(verdict.line())
    return verdict.grade


def _asked(app: App, volume: str | None, timeout: str) -> Verdict:
    from replicator import units
    from replicator.client import SOCKET_NAME, DaemonClient, Timeouts, daemon_answers
    from replicator.health import Grade, Verdict, judge

    seconds = units.parse_duration(timeout).total_seconds()
    config = connect.load_config(app)
    socket_path = config.node.state_dir / SOCKET_NAME
    if not daemon_answers(socket_path):
        return Verdict(Grade.CRITICAL, f"no daemon runs on {config.node.name}, so nothing is replicated by itself")
    with DaemonClient(socket_path, timeouts=Timeouts(connect=seconds, answer=seconds)) as daemon:
        said = daemon.health()
        status = daemon.status()
    return judge(
        status,
        jobs=[job.name for job in config.jobs.values() if job.enabled],
        scheduler_seen=said.scheduler_seen,
        certificate_expires=said.certificate_expires,
        volume=volume,
    )
