"""``init``, ``serve``, ``demo``."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, console, say
from replicator.errors import InvalidName, ReplicatorError, UsageError


def _host_name() -> str:
    from replicator import names

    try:
        return names.check_node(socket.gethostname().partition(".")[0].lower())
    except InvalidName:
        return "node1"


@click.command(cls=Verb)
@click.option("--node", metavar="NAME", help="This node's name. Default: its host name.")
@click.option("--cluster", metavar="NETWORK", help='The cluster network, for example "10.99.0.0/24".')
@click.option("--listen", metavar="ADDRESS", help='This node\'s address on it, for example "10.99.0.1:8571".')
@click.pass_obj
def init(app: App, node: str | None, cluster: str | None, listen: str | None) -> int:
    """Write a commented replicator.toml to the path of --config. Never overwrites one.

    \b
    Examples:
      replicator init
      replicator --config ./replicator.toml init --node prox1 --cluster 10.99.0.0/24 --listen 10.99.0.1:8571
    """
    from replicator.config import parse
    from replicator.config_template import render_template

    path = app.config
    given = {key: value for key, value in (("cluster", cluster), ("listen", listen)) if value is not None}
    text = render_template(node or _host_name(), **given)  # type: ignore[arg-type]
    parse(text, path=path)
    _write_new(path, text)
    say(f"Wrote {path}.")
    say("Next:")
    say(f"  1. edit {path}: the cluster network, your storages, what to replicate where")
    say("  2. on the first node:   replicator cluster create")
    say("                          replicator serve")
    say("                          replicator cluster invite NODE")
    say("  3. on each other node:  replicator cluster join TOKEN")
    say("  4. on each node:        replicator check")
    return DONE


def _write_new(path: Path, text: str) -> None:
    def cannot(error: OSError) -> ReplicatorError:
        return ReplicatorError(
            f"cannot write {path}: {error.strerror}",
            hint="run as root, or name a path of yours: replicator --config PATH init",
        )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot(error) from error
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise UsageError(
            f"{path} exists already, and is left as it is",
            hint="edit it, or move it away first, or name another path: replicator --config PATH init",
        ) from None
    except OSError as error:
        raise cannot(error) from error


@click.command(cls=Verb)
@click.pass_obj
def serve(app: App) -> int:
    """Run the daemon of this node: it replicates by schedule, takes replicas of its peers, answers the other verbs, and
    serves metrics. Logs to stderr. SIGTERM ends transfers where the next run continues; SIGHUP has the
    configuration read anew.

    \b
    Examples:
      replicator serve
      replicator --config ./replicator.toml serve
    """
    config = connect.load_config(app)
    from replicator.daemon import run

    return run(config)


@click.command(cls=Verb)
@click.argument("image", required=False, type=click.Path(path_type=Path))
def demo(image: Path | None) -> int:
    """See the main job on this machine, start to finish: two nodes with a certificate each, joined by token; a disk
    image that changes and is replicated every few seconds; the replica is damaged, mended, and proved equal.

    Uses IMAGE (it is copied, never changed), or makes a file system of its own. Takes less than two minutes and
    cleans up behind itself. Exits with 0 only if all of it held.

    \b
    Examples:
      replicator demo
      replicator demo /var/lib/libvirt/images/debian.raw
    """
    if image is not None and not image.exists():
        raise UsageError(f"there is no image {image}", hint="name a raw disk image, or none to have one made")
    from replicator.demo import run

    return run(image, console())
