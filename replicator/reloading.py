"""What a running daemon takes over of a changed configuration, and what it does not. Pure.

Taken over at once, without touching a transfer: every ``rate_limit``, ``[log]`` and ``[notify]``. Everything else
decides what the daemon is made of, and waits for a restart, which costs no progress either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from replicator.config import Config
from replicator.setting_types import key_path


def taken_over(running: Config, new: Config) -> Config:
    """The running configuration with what can be taken over of a new one."""
    jobs = {
        name: job.model_copy(update={"rate_limit": new.jobs[name].rate_limit}) if name in new.jobs else job
        for name, job in running.jobs.items()
    }
    limits = running.limits.model_copy(update={"rate_limit": new.limits.rate_limit})
    return replace(running, jobs=jobs, limits=limits, log=new.log, notify=new.notify)


def waiting(running: Config, new: Config) -> tuple[str, ...]:
    """The tables that a restart would change, as the file calls them.

    :param running: after :func:`taken_over`
    """
    found = [name for name in ("node", "network", "limits", "fence") if getattr(running, name) != getattr(new, name)]
    named: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("storage", running.storages, new.storages),
        ("peer", running.peers, new.peers),
        ("job", running.jobs, new.jobs),
    )
    return (*found, *(key for kind, ours, theirs in named for key in _differing(kind, ours, theirs)))


def _differing(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield key_path(kind, name)
