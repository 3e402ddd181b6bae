"""Whom a verb talks to: the daemon of this node, or an engine in this process where none runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from replicator.cli.output import note

if TYPE_CHECKING:
    from replicator.cli.main import App
    from replicator.config import Config
    from replicator.control import Control
    from replicator.local import LocalEndpoint


def load_config(app: App) -> Config:
    """The configuration of this command line. :raises ConfigError: anything in it is wrong"""
    from replicator.config import load
    from scheduler.schedule import parse_schedule

    return load(app.config, check_schedule=parse_schedule)


@contextmanager
def open_control(app: App, *, tell: bool = False) -> Iterator[Control]:
    """The Control to ask.

    :param tell: say so where no daemon runs
    :raises ConfigError: the configuration is wrong
    :raises DaemonUnreachable: a daemon runs, but this user may not ask it
    """
    from replicator.client import SOCKET_NAME, DaemonClient, daemon_answers

    config = load_config(app)
    socket_path = config.node.state_dir / SOCKET_NAME
    if daemon_answers(socket_path):
        with DaemonClient(socket_path) as client:
            yield client
        return
    from replicator.assembly import open_engine

    if tell:
        note("no daemon runs here: working alone")
    with open_engine(config) as engine:
        yield engine


@contextmanager
def open_local(config: Config) -> Iterator[LocalEndpoint]:
    """The storages of this node, in this process, whether or not a daemon runs: storages keep two processes apart.

    :raises MissingBinding, Unsupported: a storage of the configuration cannot be used here
    """
    from replicator.local import LocalEndpoint
    from replicator.storages import build_backends

    endpoint = LocalEndpoint(config.node.name, build_backends(config.storages))
    try:
        yield endpoint
    finally:
        endpoint.close()
