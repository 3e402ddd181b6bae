"""Runs the command line over a fake Control."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner, Result

from replicator.cli import connect
from replicator.cli.main import App, main
from replicator.cli.output import note
from replicator.control import Control
from tests.support.control import FakeControl


class Terminal:
    """A command line; what it prints goes nowhere but into the result."""

    def __init__(self, control: FakeControl) -> None:
        self.control = control

    def run(self, *words: str, columns: int | None = None, answer: str | None = None) -> Result:
        """Run ``replicator WORDS``; ``columns`` as a terminal of that width would have."""
        environment = {"COLUMNS": str(columns) if columns else None}
        return CliRunner().invoke(main, list(words), env=environment, input=answer)

    def lines(self, *words: str, columns: int | None = None) -> list[str]:
        """The lines on stdout, without blanks at their ends."""
        return [line.rstrip() for line in self.run(*words, columns=columns).stdout.splitlines()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A command line whose verbs all reach ``terminal.control``."""
    control = FakeControl()

    @contextmanager
    def open_control(_app: App, *, tell: bool = False) -> Iterator[Control]:
        if tell:
            note("no daemon runs here: working alone")
        yield control

    monkeypatch.setattr(connect, "open_control", open_control)
    return Terminal(control)
