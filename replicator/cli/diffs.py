"""``export`` and ``import``: snapshots as files of ``rbd export-diff``.

They work in this process, also where a daemon runs: what they move is this process's standard input and output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replicator.cli import connect
from replicator.cli.main import App, Verb
from replicator.cli.output import DONE, json_option, note, print_json, say
from replicator.errors import UsageError

if TYPE_CHECKING:
    from replicator.cancellation import Cancellation
    from replicator.control import Listener
    from replicator.diff_identity import DiffIdentity
    from replicator.exporting import Exported, Seed
    from replicator.importing import Imported

_path = click.Path(path_type=Path)


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--from", "base", metavar="SNAPSHOT", help="What the reader has already. Default: nothing.")
@click.option("--to", required=True, metavar="SNAPSHOT", help="The snapshot to export.")
@click.option("--output", type=_path, metavar="FILE", help="Write it there, and FILE.identity. Default: to stdout.")
@click.option("--identity", type=_path, metavar="FILE", help="Write the identity there.")
@click.option("--for", "target", metavar="NODE:STORAGE", help="Keep the snapshot until this target of a job has it.")
@json_option
@click.pass_obj
def export(
    app: App, volume: str, base: str | None, to: str, output: Path | None, identity: Path | None, target: str | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Write a snapshot of VOLUME, or what changed since another, as `rbd export-diff` does, for `rbd import-diff` and
    `replicator import`. VOLUME is any volume of images or RBD on this node, also a replica.

    The identity says which snapshot this is and what its bytes are. With it, an import is verified and makes a replica
    that a job continues from: a first copy can travel on a disk (--for keeps the snapshot meanwhile; pause the job,
    so that it does not send it over the network).

    \b
    Examples:
      replicator export pool:vm --to SNAPSHOT | rbd import-diff - other/vm
      replicator export pool:vm --from SNAPSHOT --to SNAPSHOT --output /mnt/disk/vm.2
      replicator export images:vm.raw --to SNAPSHOT --output /mnt/disk/vm --for prox2:backup
    """
    from pydantic import TypeAdapter

    from replicator import units
    from replicator.exporting import Exported

    if output is None and sys.stdout.isatty():
        raise UsageError("a diff is nothing for a terminal", hint="add --output FILE, or > FILE")
    if output is None and as_json:
        raise UsageError("--json needs --output: the diff itself goes to stdout", hint="add --output FILE")
    done, seed = _export(app, volume, base, to, output, identity, target)
    if as_json:
        print_json(TypeAdapter(Exported), done)
        return DONE
    since = f" since {done.base}" if done.base is not None else ""
    tell = say if output is not None else note
    tell(f"{done.volume}: {done.snapshot}{since}, {units.format_size(done.length)} written.")
    if seed is not None:
        tell(f"{done.snapshot} is kept until {seed.node}:{seed.replica.storage} has it. On {seed.node}:")
        tell(f"  replicator import {seed.replica} {output.name if output is not None else 'FILE'}")
    return DONE


def _export(
    app: App, volume: str, base: str | None, to: str, output: Path | None, identity: Path | None, target: str | None
) -> tuple[Exported, Seed | None]:  # fmt: skip
    from replicator.byte_channels import NewFile, Writer, check_new, write_new
    from replicator.cli import work
    from replicator.diff_identity import SUFFIX
    from replicator.errors import NoSuchVolume
    from replicator.export_holds import FOLDER, ExportHolds
    from replicator.exporting import Export, seed_for
    from replicator.model import VolumeId, VolumeInfo

    wanted = VolumeId.parse(volume)
    if identity is None and output is not None:
        identity = output.with_name(output.name + SUFFIX)
    if target is not None and identity is None:
        raise UsageError("--for needs the identity: the job continues by it", hint="add --output or --identity FILE")
    if identity is not None:
        check_new(identity)
    config = connect.load_config(app)
    with ExitStack() as stack:
        endpoint = stack.enter_context(connect.open_local(config))
        seed = None
        if target is not None:
            listed = [found for found in endpoint.volumes(wanted.storage) if found.id == wanted]
            if not listed:
                raise NoSuchVolume(f"node {endpoint.node} has no volume {wanted}", hint="correct the name")
            info: VolumeInfo = listed[0]
            seed = seed_for(config, info, target)
        found = Export(endpoint, wanted, base, to)
        holds = ExportHolds(endpoint, config.node.state_dir / FOLDER)
        holds.release_abandoned()
        new = NewFile(output) if output is not None else None
        if new is not None:
            stack.callback(new.discard)
        if seed is not None:
            stack.enter_context(found.kept_for(seed))

        def move(listen: Listener, cancel: Cancellation) -> Exported:
            with ExitStack() as part:
                out = new.fd if new is not None else sys.stdout.fileno()
                writer = Writer(out, str(output or "standard output"), cancel)
                part.callback(writer.close)
                digester = found.run(writer.write, writer.flush, holds, observer=listen, cancel=cancel)
            if identity is not None:
                write_new(identity, found.identity(digester).encode(), cancel)
            if new is not None:
                new.publish()
            return found.result(digester)

        return work.run(move), seed


@click.command("import", cls=Verb)
@click.argument("volume")
@click.argument("file", type=_path, required=False)
@click.option("--identity", type=_path, metavar="FILE", help="Its identity. Default: FILE.identity, where that is.")
@json_option
@click.pass_obj
def import_(app: App, volume: str, file: Path | None, identity: Path | None, as_json: bool) -> int:
    """Read a diff of `rbd export-diff` or `replicator export` from FILE (or stdin) into VOLUME of this node, and make
    its snapshot. A diff from nothing makes VOLUME; one from a snapshot continues it, if that is all that VOLUME has.

    VOLUME is a replica then: `replicator restore` makes its snapshots writable volumes. With the identity that
    `replicator export` wrote, the diff is verified and a job continues from it. A cut import is run again.

    \b
    Examples:
      replicator import backup:prox1/vm /mnt/disk/vm
      rbd export-diff pool/vm@SNAPSHOT - | replicator import backup:vm
    """
    from pydantic import TypeAdapter

    from replicator import units
    from replicator.importing import Imported

    if file is None and sys.stdin.isatty():
        raise UsageError("there is no diff: standard input is a terminal", hint="name a FILE, or add < FILE")
    done = _import(app, volume, file, identity)
    if as_json:
        print_json(TypeAdapter(Imported), done)
        return DONE
    if done.there_already:
        say(f"{done.volume} has {done.snapshot} already: nothing was done.")
        return DONE
    say(f"{done.volume}: {done.snapshot} is there; {units.format_size(done.changed)} of changes.")
    if not done.continues:
        note(
            "- it came without identity, so nothing was verified and no job continues from it; `replicator resync` "
            "compares a replica with its source and goes on from there"
        )
    return DONE


def _import(app: App, volume: str, file: Path | None, identity: Path | None) -> Imported:
    from replicator.byte_channels import Reader
    from replicator.cli import work
    from replicator.importing import Import
    from replicator.model import VolumeId
    from transport import checksum

    wanted = VolumeId.parse(volume)
    with ExitStack() as stack:
        found = _identity(file, identity)
        fd = stack.enter_context(_opened(file)) if file is not None else sys.stdin.fileno()
        endpoint = stack.enter_context(connect.open_local(connect.load_config(app)))

        def move(listen: Listener, cancel: Cancellation) -> Imported:
            reader = Reader(fd, str(file or "standard input"), cancel)
            try:
                return Import(endpoint, wanted, reader.read, found).run(checksum, observer=listen, cancel=cancel)
            finally:
                reader.close()

        return work.run(move)


def _identity(file: Path | None, given: Path | None) -> DiffIdentity | None:
    """The identity that was given, or is there."""
    from replicator.diff_identity import MAX_FILE, SUFFIX, DiffIdentity

    path = given
    if path is None and file is not None:
        beside = file.with_name(file.name + SUFFIX)
        path = beside if beside.exists() else None
    if path is None:
        return None
    with _opened(path) as fd, os.fdopen(os.dup(fd), "rb") as opened:
        return DiffIdentity.load(opened.read(MAX_FILE + 1)[:MAX_FILE], str(path))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="correct the name") from None
    try:
        yield fd
    finally:
        os.close(fd)
