"""What the verbs print: results on stdout, everything else on stderr.

Texts that come from storages, peers and errors are shown without their control characters, and never read as markup.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from replicator.errors import ConfigError, ReplicatorError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from rich.console import Console
    from rich.text import Text

DONE, FAILED, USAGE, MISSED = 0, 1, 2, 3
"""Exit codes: done; failed; wrong usage or configuration; done, but an objective is missed."""

PIPE_WIDTH = 200
"""Columns where there is no terminal: wide enough that nothing is folded and grep finds it."""

# Control characters, and those that turn the direction of what follows (they could show one name as another).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")

_F = TypeVar("_F", bound=Callable[..., Any])


def safe(text: str) -> str:
    """A text of foreign origin, in one line and without control characters."""
    return _UNSAFE.sub(" ", text)


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as they are now."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def styled(text: str, style: str = "") -> Text:
    """A safe text in a style."""
    from rich.text import Text

    return Text(safe(text), style=style)


def say(text: str) -> None:
    """A sentence of the result; the terminal wraps it, so that commands in it can be copied."""
    console().print(styled(text), soft_wrap=True)


def note(text: str) -> None:
    """Something to know, dim, on stderr."""
    console(stderr=True).print(styled(text, "dim"), soft_wrap=True)


def hint(text: str, *, indent: str = "") -> None:
    """What to do about it, as part of the result."""
    if text:
        out = console()
        out.print(indent + "hint: " + safe(text), style="dim", soft_wrap=True)


def print_json(adapter: TypeAdapter[Any], value: object) -> None:
    """The result for programs."""
    click.echo(adapter.dump_json(value, indent=2))


def print_error(error: ReplicatorError) -> None:
    """``error: …`` and ``hint: …`` on stderr, and all problems of a configuration."""
    from rich.text import Text

    err = console(stderr=True)
    problems = error.problems if isinstance(error, ConfigError) else ()
    several = len(problems) > 1
    # The message of several problems lists them, too; here each gets lines of its own.
    message = error.message.partition("\n")[0] if several else error.message
    err.print(Text.assemble(("error: ", "bold red"), safe(message)), soft_wrap=True)
    if several:
        for problem in problems:
            where = f"{problem.file}: {problem.key}" if problem.key else problem.file
            err.print(f"  {safe(where)}: {safe(problem.message)}", soft_wrap=True)
            if problem.remedy:
                err.print(f"    {safe(problem.remedy)}", style="dim", soft_wrap=True)
    if error.hint:
        err.print(f"hint: {safe(error.hint)}", style="dim", soft_wrap=True)


def json_option(command: _F) -> _F:
    """Adds ``--json``."""
    return click.option("as_json", "--json", is_flag=True, help="Print the same facts as JSON.")(command)


def yes_option(command: _F) -> _F:
    """Adds ``--yes``."""
    return click.option("--yes", is_flag=True, help="Do not ask for consent.")(command)


def interactive() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def consent(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed or replaced.

    :raises UsageError: nobody can be asked, and ``--yes`` was not given
    :raises click.Abort: the answer is no
    """
    if yes:
        return
    if not interactive():
        raise UsageError("this needs consent, and there is no terminal to ask on", hint="add --yes to give it")
    if not click.confirm(safe(question), err=True):
        raise click.Abort
