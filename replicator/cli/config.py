"""``config``: what can be said about replicator.toml without a node."""

from __future__ import annotations

import json

import click

from replicator.cli.main import Verb
from replicator.cli.output import DONE


@click.group(subcommand_metavar="VERB ...")
def config() -> None:
    """What can be said about replicator.toml without a node.

    \b
    Example:
      replicator config schema > /etc/replicator/replicator.schema.json
    """


@config.command(cls=Verb, short_help="Print a JSON Schema, for editors.")
def schema() -> int:
    """Print a JSON Schema of replicator.toml, with which editors complete and check it. It knows keys, types and
    choices; `replicator check` knows the rest.

    \b
    Example, and the first line of replicator.toml for editors that use Taplo:
      replicator config schema > /etc/replicator/replicator.schema.json
      #:schema ./replicator.schema.json
    """
    from replicator.config_schema import schema as made

    click.echo(json.dumps(made(), indent=2, ensure_ascii=False))
    return DONE
