"""The files of ``replicator monitoring export``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from replicator.monitoring.dashboard import dashboard
from replicator.monitoring.rules import RUNBOOK, rule_tests, rules, runbook, targets
from replicator.monitoring.site import Site


@dataclass(frozen=True, slots=True)
class File:
    """A file to write, and what it is for."""

    name: str
    text: str
    about: str


def files(site: Site) -> tuple[File, ...]:
    """Those of a node; the last two are the same for all nodes."""
    rule_file = f"{site.node}.rules.yml"
    return (
        File(rule_file, rules(site), "alert rules, for rule_files of prometheus.yml"),
        File(f"{site.node}.tests.yml", rule_tests(site, rule_file), "tests of them, for promtool test rules"),
        File(f"{site.node}.targets.json", targets(site), "where the node is, for file_sd_configs of prometheus.yml"),
        File("dashboard.json", dashboard(), "a dashboard, for Grafana"),
        File(RUNBOOK, runbook(), "what each alert means and what to do"),
    )


def write(folder: Path, wanted: Iterable[File]) -> list[tuple[Path, str]]:
    """Write files, each at once or not at all: Prometheus may be reading them. Where they are, and what for.

    :raises OSError: the folder or a file cannot be written
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file in wanted:
        path = folder / file.name
        beside = folder / f".{file.name}.new"
        beside.write_text(file.text, encoding="utf-8")
        beside.chmod(0o644)  # Prometheus runs as a user of its own
        os.replace(beside, path)  # noqa: PTH105 - as one step
        written.append((path, file.about))
    return written
