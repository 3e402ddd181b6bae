"""The partial state of an interrupted receive: ``partial/`` in a volume's private directory.

::

    partial/image          the base's bytes with the changes received so far
    partial/request.json   what is being received
    partial/progress.json  every change below this offset is durable

It appears complete, by a rename, with the base's bytes durable in it and progress 0.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backends.fields import BadRecord
from backends.image.catalog import IMAGE, Catalog
from backends.image.records import Pending, encode_progress, load_progress
from replicator.endpoint import ReceiveMode
from replicator.model import ResumeState, StreamKind


@dataclass(frozen=True, slots=True)
class PartialState:
    """What is durably there of a receive."""

    pending: Pending
    offset: int

    @property
    def resume(self) -> ResumeState | None:
        """As a listing shows it. A rebuild is not continued: its changes were made against what the target had then,
        not against a version that a later stream could start from."""
        if self.pending.mode is ReceiveMode.REBUILD:
            return None
        pending = self.pending
        return ResumeState(StreamKind.BLOCKS, pending.to_guid, pending.to_name, pending.base_guid, self.offset)


class Partial:
    """The partial state of one volume, if there is any. What changes it is called under ``Catalog.writing``."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._files = catalog.files
        self.folder = catalog.folder / "partial"

    @property
    def image(self) -> Path:
        """The file being written."""
        return self.folder / IMAGE

    @property
    def progress(self) -> Path:
        """The record of what is durable."""
        return self.folder / "progress.json"

    @property
    def exists(self) -> bool:
        """Whether there is a directory, usable or not."""
        return self.folder.is_dir()

    def load(self) -> PartialState | None:
        """What is there; None if nothing, or nothing that can be continued."""
        try:
            pending = Pending.load(self.folder / "request.json")
            offset = load_progress(self.progress)
            status = self.image.lstat()
        except (FileNotFoundError, NotADirectoryError, BadRecord):
            return None
        if status.st_size != pending.size or offset > pending.size:
            return None
        return PartialState(pending, offset)

    @property
    def published(self) -> bool:
        """Whether the image has another name already: a power cut came between publishing it and discarding this."""
        with contextlib.suppress(FileNotFoundError):
            return self.image.lstat().st_nlink > 1
        return False

    def begin(self, pending: Pending, fill: Callable[[int], None]) -> None:
        """Start anew. ``fill`` makes the open, empty image what the stream applies to."""
        temporary = self._catalog.folder / f".partial-{uuid.uuid4().hex}"
        self._files.make_directory(temporary)
        try:
            fd = self._files.open_new(temporary / IMAGE)
            try:
                fill(fd)
                self._files.sync(fd)
            finally:
                os.close(fd)
            self._files.create(temporary / "request.json", pending.encode())
            self._files.create(temporary / "progress.json", encode_progress(0))
            self._files.sync_directory(temporary)
            self._files.rename_new(temporary, self.folder)
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.remove_tree(temporary)
            raise
        self._files.sync_directory(self._catalog.folder)

    def discard(self) -> None:
        """Remove it. The rename makes it one step, so what is half removed is never taken for partial state."""
        if not self.exists:
            return
        gone = self._catalog.folder / f".gone-{uuid.uuid4().hex}"
        self._files.rename_new(self.folder, gone)
        self._files.sync_directory(self._catalog.folder)
        self._files.remove_tree(gone)
