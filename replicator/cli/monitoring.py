"""``monitoring``: what Prometheus and Grafana need to watch this node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, note, say
from replicator.errors import ReplicatorError, UsageError

if TYPE_CHECKING:
    from replicator.config import Config

_ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")


@click.group(subcommand_metavar="VERB ...")
def monitoring() -> None:
    """What Prometheus and Grafana need to watch this node.

    \b
    Example:
      replicator monitoring export /etc/prometheus/replicator
    """


@monitoring.command(cls=Verb, short_help="Write alert rules, a dashboard and a runbook.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--address", metavar="HOST:PORT", help="Where Prometheus finds this node. Default: [network] http.")
@click.option(
    "--at-once", is_flag=True, help="Let alerts fire as soon as something is wrong; each waits for a while by itself."
)
@click.pass_obj
def export(app: App, folder: Path, address: str | None, at_once: bool) -> int:
    """Write to DIR what Prometheus and Grafana need to watch this node, made for its configuration: alert rules, tests
    of them, the file of targets, a dashboard for all nodes, and a runbook. Files that it wrote before are replaced.

    \b
    Examples:
      replicator monitoring export /etc/prometheus/replicator --address 10.0.0.1:9571
      promtool test rules /etc/prometheus/replicator/prox1.tests.yml
    """
    from replicator.monitoring.files import files, write
    from replicator.monitoring.site import site_of

    config = connect.load_config(app)
    site = site_of(config, _address(config, address), at_once=at_once)
    try:
        written = write(folder, files(site))
    except OSError as error:
        raise ReplicatorError(f"cannot write to {folder}: {error.strerror}", hint="name a folder of yours") from error
    for path, about in written:
        say(f"{path}: {about}")
    note("docs/monitoring.md shows what prometheus.yml needs beside them")
    return DONE


def _address(config: Config, given: str | None) -> str:
    """Where Prometheus finds the node. :raises UsageError: nobody knows"""
    if given is not None:
        if not _ADDRESS.fullmatch(given):
            raise UsageError(f"{given!r} is not HOST:PORT", hint="write for example --address 10.0.0.1:9571")
        return given
    if config.network.http is None:
        raise UsageError(
            f"{config.node.name} serves no metrics: [network] http is empty",
            hint='write for example http = "127.0.0.1:9571", or name with --address where they are to be had',
        )
    return str(config.network.http)
