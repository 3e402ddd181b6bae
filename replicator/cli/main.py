"""``replicator``: the verbs, found when they are called, and the one place where errors become words and exit codes."""

from __future__ import annotations

import difflib
import importlib
import io
import keyword
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from replicator.cli.output import FAILED, USAGE, print_error
from replicator.errors import Cancelled, ReplicatorError, UsageError

DEFAULT_CONFIG = Path("/etc/replicator/replicator.toml")


@dataclass(slots=True)
class App:
    """What all verbs share."""

    config: Path = DEFAULT_CONFIG


@dataclass(frozen=True, slots=True)
class Entry:
    """A verb: where it is, and what the list says of it."""

    name: str
    module: str
    short: str


SECTIONS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    (
        "Set up",
        (
            Entry("init", "setup", "Write a commented replicator.toml."),
            Entry("cluster", "cluster", "Make a cluster, add nodes to it, take them out."),
            Entry("check", "observe", "Look for what is wrong, before it matters."),
            Entry("config", "config", "A JSON Schema of replicator.toml, for editors."),
            Entry("serve", "setup", "Run the daemon."),
            Entry("demo", "setup", "See the main job on this machine, start to finish."),
        ),
    ),
    (
        "See",
        (
            Entry("status", "status", "How every replica is now."),
            Entry("health", "health", "Whether all is well, in one line, for Nagios and its kin."),
            Entry("monitoring", "monitoring", "Alert rules, a dashboard and a runbook for Prometheus and Grafana."),
            Entry("plan", "observe", "What a run would do."),
            Entry("snapshots", "observe", "The snapshots of a volume, on every side."),
            Entry("history", "observe", "What happened."),
        ),
    ),
    (
        "Replicate",
        (
            Entry("sync", "replicate", "Run a job now."),
            Entry("verify", "replicate", "Compare a replica with its source, block by block."),
            Entry("resync", "replicate", "Make a diverged, damaged or missing replica right again."),
            Entry("restore", "replicate", "Make any snapshot a new volume."),
            Entry("export", "diffs", "Write a snapshot, or what changed, as `rbd export-diff` does."),
            Entry("import", "diffs", "Read what `export` or `rbd export-diff` wrote."),
        ),
    ),
    (
        "Change roles",
        (
            Entry("promote", "roles", "Make a replica the primary, as the primary is lost."),
            Entry("switchover", "roles", "Hand a volume over to another node, without loss."),
            Entry("rejoin", "roles", "Make a former primary follow the new one."),
            Entry("demote", "roles", "Make a primary a replica."),
        ),
    ),
    (
        "Manage jobs",
        (
            Entry("prune", "jobs", "Apply a job's retention now."),
            Entry("pause", "jobs", "Let a job not run by itself any more."),
            Entry("resume", "jobs", "Let a paused job run again."),
        ),
    ),
)


def _take_config(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(App).config = value


def _config_option(*, hidden: bool) -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        metavar="PATH",
        help=f"The configuration. Default: {DEFAULT_CONFIG}",
        callback=_take_config,
        expose_value=False,
        hidden=hidden,
    )


def _debug_option(*, hidden: bool) -> click.Option:
    return click.Option(
        ["--debug"], is_flag=True, help="Show where an error came from.", expose_value=False, hidden=hidden
    )


class Verb(click.Command):
    """A verb; the options of all verbs may stand before or after its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [_config_option(hidden=True), _debug_option(hidden=True)]


class Verbs(click.Group):
    """The group of all verbs. Loads the module of a verb only when that verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, as the help lists them."""
        return [entry.name for _, entries in SECTIONS for entry in entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb of that name."""
        for _, entries in SECTIONS:
            for entry in entries:
                if entry.name == cmd_name:
                    module = importlib.import_module(f"replicator.cli.{entry.module}")
                    attribute = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
                    command: click.Command = getattr(module, attribute)
                    return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a better word for what is not there. :raises UsageError: no such verb"""
        name = args[0]
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            near = difflib.get_close_matches(name, self.list_commands(ctx), 1)
            meant = f"did you mean `replicator {near[0]}`? " if near else ""
            raise UsageError(f"there is no verb {name!r}", hint=f"{meant}`replicator --help` lists all verbs")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list of verbs, by what one wants to do."""
        for title, entries in SECTIONS:
            with formatter.section(title):
                formatter.write_dl([(entry.name, entry.short) for entry in entries], col_max=12)

    def main(  # type: ignore[override]
        self,
        args: list[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; exits with the documented code, whatever happens."""
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(self._run(words, prog_name or "replicator", complete_var, extra))

    def _run(self, words: list[str], prog_name: str, complete_var: str | None, extra: dict[str, Any]) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that lacks a letter must not end the work
        try:
            result = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except BrokenPipeError:
            # Whoever read has enough. Python would complain when it flushes at its end, so there is nothing to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx is not None else error.format_message(), err=True)
            return USAGE
        except Exception as error:  # the boundary: no traceback ever, but on request
            if "--debug" in words:
                raise
            told = _as_ours(error)
            print_error(told)
            return told.exit_code
        except KeyboardInterrupt:
            print_error(_stopped())
            return FAILED
        return result if isinstance(result, int) else 0


def _stopped() -> ReplicatorError:
    return Cancelled("stopped on request", hint="")


def _as_ours(error: Exception) -> ReplicatorError:
    if isinstance(error, ReplicatorError):
        return error
    if isinstance(error, click.Abort):
        return _stopped()
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "replicator"
        message = error.format_message().rstrip(".")
        return UsageError(message[:1].lower() + message[1:], hint=f"`{path} --help` shows how it is used")
    if isinstance(error, click.ClickException):
        return ReplicatorError(error.format_message())
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return ReplicatorError(f"this verb needs {error.name}, which is not installed", hint="install replicator anew")
    return ReplicatorError(
        f"internal error: {type(error).__name__}: {error}",
        hint="this is a mistake in replicator; the same command with --debug shows where",
    )


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from replicator.version import version

        click.echo(f"replicator {version()}")
        context.exit()


@click.group(
    "replicator",
    cls=Verbs,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def main(context: click.Context) -> None:
    """Keep copies of ZFS datasets, Ceph RBD images and disk images on other nodes: seconds or minutes behind,
    provably equal, ready to take over.

    A VOLUME is STORAGE:NAME as in replicator.toml, a TARGET is NODE:STORAGE. Verbs talk to the daemon of this node,
    or work alone where none runs.

    Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 done, but an objective is missed (a replica lags,
    or is not equal to its source). `health` has those of monitoring plugins.
    """
    context.ensure_object(App)


main.params += [_config_option(hidden=False), _debug_option(hidden=False)]

__all__ = ["DEFAULT_CONFIG", "FAILED", "SECTIONS", "USAGE", "App", "Verb", "main"]

if __name__ == "__main__":
    main()
