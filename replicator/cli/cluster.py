"""``cluster``: who belongs to it. Works on the state directory of this node; a running daemon reads what changes."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, consent, console, json_option, note, print_json, safe, say, yes_option
from replicator.errors import UsageError

if TYPE_CHECKING:
    from replicator.config import Config
    from transport.joining import JoinToken

FROM_STDIN = "-"


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


@cluster.command(cls=Verb, short_help="Print a token with which a node joins.")
@click.argument("node")
@click.option(
    "--valid", "valid_text", metavar="DURATION", default="24h", show_default=True, help="How long it can be used."
)
@click.pass_obj
def invite(app: App, node: str, valid_text: str) -> int:
    """Print a token with which NODE joins the cluster, once. On the node that made the cluster; its daemon must run
    when NODE joins.

    The token is a secret until it is used: carry it over a channel that you trust.

    \b
    Example:
      replicator cluster invite prox2
    """
    from replicator.units import format_duration, parse_duration
    from transport.identity import Identity
    from transport.joining import invite as make_token

    config = connect.load_config(app)
    valid: timedelta = parse_duration(valid_text)
    token = make_token(Identity(config.node.state_dir), node, str(config.network.listen), lifetime=valid)
    click.echo(token.encode())
    note(f"on {node}, within {format_duration(valid)}: replicator cluster join TOKEN")
    note("the token is good for one join; `replicator serve` must be running here until then")
    return DONE


@cluster.command(cls=Verb, short_help="Join a cluster with a token.")
@click.argument("token")
@click.pass_obj
def join(app: App, token: str) -> int:
    """Join the cluster that TOKEN is of: make a key here, have it certified by the node that invited, store the
    certificate. The key never leaves this node. With "-" the token is read from standard input.

    \b
    Example:
      replicator cluster join rj1-...
    """
    from transport.joining import TIMEOUT, JoinToken
    from transport.joining import join as join_cluster
    from transport.network import dial, parse_address

    config = connect.load_config(app)
    invitation = JoinToken.decode(sys.stdin.read(4096) if token == FROM_STDIN else token)
    if invitation.node != config.node.name:
        raise UsageError(
            f"the token is for node {invitation.node}, but this node is named {config.node.name}",
            hint=f"invite it by that name: `replicator cluster invite {config.node.name}` on {invitation.issuer}",
        )
    address, port = parse_address(invitation.address)
    network, source = config.network.cluster, config.network.listen.host
    identity = join_cluster(
        config.node.state_dir,
        invitation,
        lambda: dial(network, invitation.issuer, address, port, timeout=TIMEOUT, source=source),
    )
    say(f"{config.node.name} is in the cluster of {invitation.issuer} now.")
    note(f"its certificate is good until {identity.expires:%Y-%m-%d}; the daemon renews it before")
    _show_peers(config, invitation)
    return DONE


def _show_peers(config: Config, invitation: JoinToken) -> None:
    """What has to be in the two configurations, so that the two nodes know each other."""
    if invitation.issuer not in config.peers:
        click.echo(f"\nAdd to {config.path} here:\n")
        _show_peer(invitation.issuer, invitation.address)
    click.echo(f"\nAdd to the replicator.toml of {invitation.issuer}, unless it is there:\n")
    _show_peer(config.node.name, str(config.network.listen))
    click.echo("\nThen start the daemons anew, and look with `replicator check`.")


def _show_peer(name: str, address: str) -> None:
    click.echo(f'  [peer.{name}]\n  address = "{address}"')
    click.echo("  may_push_to = []      # storages of that node it may write replicas into")


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
