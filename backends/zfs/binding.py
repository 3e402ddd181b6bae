"""libzfs_core through the distribution's Python binding (Debian: python3-pyzfs), where it can be used.

The binding must be of the same version as the zfs command: both are the same libzfs_core underneath, so whatever the
command can do with this kernel, it can. Where a worker is lost (``workers.py``), the command does it all from then on.
`replicator check` calls it once, and says which of the two it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from backends.zfs.commands import CHANGE_DEADLINE, LIST_DEADLINE, Runner
from backends.zfs.failures import Operation, failure_of
from backends.zfs.library import ESTIMATE_DEADLINE, CommandLibrary, Library
from backends.zfs.workers import Core, WorkerLost
from replicator.errors import ReplicatorError, StorageUnavailable

PACKAGE = "pyzfs"
"""The name of the binding's distribution; its module is libzfs_core."""
_NUMBERS = re.compile(r"\d+(?:\.\d+)+")
_ENOENT, _EEXIST = 2, 17
_FLAGS = {"-L": "large_blocks", "-e": "embedded_data", "-c": "compress", "-w": "raw"}


class BindingLibrary:
    """By libzfs_core; see :class:`~backends.zfs.library.Library`.

    :param instead: does what is asked where the binding cannot be called after all
    """

    def __init__(self, storage: str, core: Core, label: str, instead: Library) -> None:
        self._storage = storage
        self._core = core
        self._label = label
        self._instead = instead
        self._lost = ""

    def describe(self) -> str:
        """See :class:`~backends.zfs.library.Library`."""
        return f"the zfs command ({self._lost})" if self._lost else self._label

    def warning(self) -> str:
        """See :class:`~backends.zfs.library.Library`."""
        return self._lost and f"{self._label} cannot be used, so the zfs command is: {self._lost}"

    def probe(self, root: str) -> None:
        """See whether it can be called: it must find a dataset that is there."""
        try:
            found = self._ask(LIST_DEADLINE, call="exists", dataset=root).get("done")
        except WorkerLost:
            return
        if found is not True:
            self._lost = f"it does not find {root}"

    def snapshot(self, snapshots: Sequence[str]) -> None:
        """See :class:`~backends.zfs.library.Library`."""
        for error in self.try_snapshot(snapshots).values():
            raise error

    def try_snapshot(self, snapshots: Sequence[str]) -> dict[str, ReplicatorError]:
        """See :class:`~backends.zfs.library.Library`."""
        if not snapshots:
            return {}
        try:
            answer = self._ask(CHANGE_DEADLINE, call="snapshot", names=list(snapshots))
        except WorkerLost:
            return self._instead.try_snapshot(snapshots)
        return {
            name: self._failure(said, name or snapshots[0], "taking the snapshot") for name, _, said in _failed(answer)
        }

    def destroy(self, names: Sequence[str]) -> dict[str, ReplicatorError]:
        """See :class:`~backends.zfs.library.Library`."""
        snapshots = [name for name in names if "#" not in name]
        marks = [name for name in names if "#" in name]
        return self._destroy("destroy_snapshots", snapshots) | self._destroy("destroy_bookmarks", marks)

    def _destroy(self, call: str, left: list[str]) -> dict[str, ReplicatorError]:
        """One that cannot go keeps all others of its call, which is made again without it."""
        failed: dict[str, ReplicatorError] = {}
        while left:
            try:
                answer = self._ask(CHANGE_DEADLINE, call=call, names=left)
            except WorkerLost:
                return failed | self._instead.destroy(left)
            bad = {name: said for name, _, said in _failed(answer)}
            if not bad.keys() <= set(left):  # it is not said which of them
                bad = dict.fromkeys(left, "; ".join(sorted(set(bad.values()))))
            failed |= {name: self._failure(said, name, "destroying") for name, said in bad.items()}
            left = [name for name in left if name not in bad] if bad else []
        return failed

    def hold(self, snapshot: str, tag: str) -> None:
        """See :class:`~backends.zfs.library.Library`."""
        try:
            answer = self._ask(CHANGE_DEADLINE, call="hold", snapshot=snapshot, tag=tag)
        except WorkerLost:
            self._instead.hold(snapshot, tag)
            return
        self._raise(answer, snapshot, "holding", fine=_EEXIST)

    def release(self, snapshot: str, tag: str) -> None:
        """See :class:`~backends.zfs.library.Library`."""
        try:
            answer = self._ask(CHANGE_DEADLINE, call="release", snapshot=snapshot, tag=tag)
        except WorkerLost:
            self._instead.release(snapshot, tag)
            return
        self._raise(answer, snapshot, "releasing", fine=_ENOENT)

    def bookmark(self, snapshot: str, bookmark: str) -> None:
        """See :class:`~backends.zfs.library.Library`."""
        try:
            answer = self._ask(CHANGE_DEADLINE, call="bookmark", snapshot=snapshot, bookmark=bookmark)
        except WorkerLost:
            self._instead.bookmark(snapshot, bookmark)
            return
        self._raise(answer, bookmark, "making the bookmark", fine=_EEXIST)

    def send_space(self, snapshot: str, base: str | None, flags: Sequence[str]) -> int | None:
        """See :class:`~backends.zfs.library.Library`."""
        options = [_FLAGS[flag] for flag in flags]
        try:
            answer = self._ask(ESTIMATE_DEADLINE, call="send_space", snapshot=snapshot, base=base, flags=options)
        except WorkerLost:
            return self._instead.send_space(snapshot, base, flags)
        except StorageUnavailable:
            return None
        size = answer.get("done")
        return size if isinstance(size, int) else None

    def _ask(self, deadline: float, **request: Any) -> dict[str, Any]:
        if self._lost:
            raise WorkerLost(self._lost)
        try:
            answer = self._core.ask(request, deadline)
            if "done" not in answer and not _failed(answer):
                raise WorkerLost("its answer cannot be understood")
        except WorkerLost as error:
            self._lost = str(error)
            raise
        return answer

    def _raise(self, answer: dict[str, Any], name: str, doing: str, fine: int) -> None:
        for _, number, said in _failed(answer):
            if number != fine:
                raise self._failure(said, name, doing)

    def _failure(self, said: str, name: str, doing: str) -> ReplicatorError:
        return failure_of(said, Operation(self._storage, name, doing))


class LibraryChoice:
    """libzfs_core where it can be used, else the zfs command; decided at the first use.

    :param root: the storage's root dataset
    :param installed: says which version of the binding is installed, None for none
    """

    def __init__(
        self, storage: str, root: str, runner: Runner, core: Core, installed: Callable[[], str | None]
    ) -> None:
        self._storage = storage
        self._root = root
        self._runner = runner
        self._core = core
        self._installed = installed
        self._lock = threading.Lock()
        self._library: Library | None = None
        self._binding: BindingLibrary | None = None

    def library(self) -> Library:
        """The one to use now."""
        with self._lock:
            if self._library is None:
                self._library = self._choose()
            return self._library

    def _choose(self) -> Library:
        found = self._installed()
        if found is None:
            return self._command("python3-pyzfs is not installed")
        done = self._runner.run(("zfs", "version"), LIST_DEADLINE)
        zfs = numbers(done.output.partition("\n")[0])
        if numbers(found) != zfs:
            why = f"the binding of libzfs_core is of version {found}, OpenZFS is {zfs or 'of an unknown one'}"
            return self._command(why, f"{why}: install the python3-pyzfs of this OpenZFS")
        self._binding = BindingLibrary(self._storage, self._core, f"libzfs_core {found}", self._command())
        return self._binding

    def probe(self) -> str:
        """Call libzfs_core, if it is what is used, without changing anything; why that cannot be done, "" if it can.
        Until this or a first change nothing is started, so that verbs which only look cost no process."""
        self.library()
        if self._binding is None:
            return ""
        self._binding.probe(self._root)
        return self._binding.warning()

    def _command(self, why: str = "", warning: str = "") -> CommandLibrary:
        return CommandLibrary(self._storage, self._runner, why, warning)

    def close(self) -> None:
        """End what calls libzfs_core."""
        self._core.close()


def installed() -> str | None:
    """The version of the binding that this Python sees; None where there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> str:
    """The numbers of a version: ``2.3.9`` of ``zfs-2.3.9-0+deb13u1``."""
    found = _NUMBERS.search(text)
    return found[0] if found else ""


def _failed(answer: dict[str, Any]) -> list[tuple[str, int, str]]:
    """What failed, as far as it can be read."""
    listed = answer.get("failed")
    found = []
    for item in listed if isinstance(listed, list) else ():
        if isinstance(item, list) and len(item) == 3 and isinstance(item[1], int):
            found.append((str(item[0]), item[1], str(item[2])))
    return found
