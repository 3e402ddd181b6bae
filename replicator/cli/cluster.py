"""``cluster``: who belongs to it. Works on the state directory of this node; a running daemon reads what changes."""

from __future__ import annotations

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, consent, console, json_option, note, print_json, safe, say, yes_option


@click.group(subcommand_metavar="VERB ...")
def cluster() -> None:
    """Make a cluster, add nodes to it, take them out.

    Every node has a certificate of the cluster's own authority, which lives on the node that made the cluster. Keys
    never leave the node that made them.

    \b
    Example, on the first node, then on the second:
      replicator cluster create
      replicator cluster invite prox2
      replicator cluster join TOKEN
    """


@cluster.command(cls=Verb, short_help="Make a cluster with this node as its first.")
@click.pass_obj
def create(app: App) -> int:
    """Make a cluster with this node as its first: the authority, and this node's certificate. Once per cluster; the
    other nodes join it.

    \b
    Example:
      replicator cluster create
    """
    from transport.identity import create_cluster

    config = connect.load_config(app)
    identity = create_cluster(config.node.state_dir, config.node.name)
    say(f"Made a cluster. {config.node.name} is its first node.")
    note(f"its certificate is good until {identity.expires:%Y-%m-%d}; the daemon renews it before")
    note("next: `replicator serve` here, then `replicator cluster invite NODE` for each other node")
    note(f"keep a backup of {config.node.state_dir / 'identity'}: without its ca.key no node can be added or revoked")
    return DONE


@cluster.command(cls=Verb, short_help="The certificates of this cluster.")
@json_option
@click.pass_obj
def nodes(app: App, as_json: bool) -> int:
    """The certificates of this cluster: of which node, until when, and whether revoked. On the node that made the
    cluster.

    \b
    Example:
      replicator cluster nodes
    """
    from pydantic import TypeAdapter
    from rich.text import Text

    from replicator.cli.tables import plain_table
    from transport.identity import Identity, IssuedNode

    config = connect.load_config(app)
    found = Identity(config.node.state_dir).nodes()
    if as_json:
        print_json(TypeAdapter(tuple[IssuedNode, ...]), found)
        return DONE
    table = plain_table("NODE", "CERTIFICATE", "SINCE", "UNTIL", "STATE")
    for item in found:
        state = Text(f"revoked {item.revoked:%Y-%m-%d %H:%M}", "red") if item.revoked else Text("good", "green")
        table.add_row(
            safe(item.node), f"{item.serial:x}"[:16], f"{item.issued:%Y-%m-%d}", f"{item.expires:%Y-%m-%d}", state
        )
    console().print(table)
    good = len({item.node for item in found if item.revoked is None})
    say(f"{good} node{'' if good == 1 else 's'} in the cluster of {config.node.name}.")
    return DONE


@cluster.command(cls=Verb, short_help="Take a node out.")
@click.argument("node")
@yes_option
@click.pass_obj
def revoke(app: App, node: str, yes: bool) -> int:
    """Take NODE out: every certificate of it is revoked, and no node accepts it any more. It can be invited anew.

    \b
    Example:
      replicator cluster revoke prox3
    """
    from transport.identity import Identity

    config = connect.load_config(app)
    identity = Identity(config.node.state_dir)
    consent(f"Revoke every certificate of {node}? It cannot replicate with this cluster any more.", yes=yes)
    done = identity.revoke(node)
    if not done:
        say(f"{node} was revoked already.")
        return DONE
    count = f"{len(done)} certificate{'' if len(done) == 1 else 's'}"
    say(f"Revoked {count} of {node}. Peers refuse it as soon as they have the new list from this node.")
    note(f"take [peer.{node}] out of the configuration of every node, too")
    return DONE
