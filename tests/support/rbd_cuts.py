"""Binding of Ceph whose connection is cut at a chosen change of an image: nothing gets through after it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backends.rbd.binding import Binding, Group, Image, Ioctx, Pool, load
from backends.rbd.header import Notes

_CHANGES = frozenset(
    {
        "aio_flush",
        "create_snap",
        "metadata_remove",
        "metadata_set",
        "protect_snap",
        "remove_snap",
        "remove_snap_by_id",
        "rename_snap",
        "resize",
        "unprotect_snap",
    }
)
_WRITES = frozenset({"aio_write", "aio_write_zeroes"})
_POOL_CHANGES = frozenset({"create", "group_create", "group_remove", "remove", "rename"})
_GROUP_CHANGES = frozenset({"add_image", "create_snap", "remove_image", "remove_snap"})


@dataclass
class Cut:
    """When the connection is cut.

    :ivar at: the number of the change that is not done any more; None: never
    :ivar done: the changes so far
    """

    at: int | None = None
    done: list[str] = field(default_factory=list)

    def guard(self, name: str, call: Callable[..., Any], *, counts: bool) -> Callable[..., Any]:
        """The same call, unless the connection is cut."""

        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.at is not None and len(self.done) >= self.at:
                raise load().rbd.ConnectionShutdown(f"cut at {name}", errno=errno.ESHUTDOWN)
            if counts:
                self.done.append(name)
            return call(*arguments, **options)

        return guarded


class _Guarded:
    def __init__(self, inner: Any, cut: Cut, counted: frozenset[str], others: frozenset[str] = frozenset()) -> None:
        self._inner = inner
        self._cut = cut
        self._counted = counted
        self._others = others

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in self._counted | self._others:
            return self._cut.guard(name, found, counts=name in self._counted)
        return found


@dataclass(frozen=True)
class CutBinding(Binding):
    """The real one, through which changes go as long as ``cut`` lets them."""

    cut: Cut = field(default_factory=Cut)

    def open_image(self, ioctx: Ioctx, name: str, *, read_only: bool) -> Image:
        """An image that can be cut off."""
        guarded: Any = _Guarded(super().open_image(ioctx, name, read_only=read_only), self.cut, _CHANGES, _WRITES)
        return guarded  # type: ignore[no-any-return]

    def open_header(self, ioctx: Ioctx, image: str) -> Notes:
        """Records that can be cut off."""
        guarded: Any = _Guarded(super().open_header(ioctx, image), self.cut, _CHANGES)
        return guarded  # type: ignore[no-any-return]

    def pool(self) -> Pool:
        """A pool that can be cut off."""
        guarded: Any = _Guarded(super().pool(), self.cut, _POOL_CHANGES)
        return guarded  # type: ignore[no-any-return]

    def open_group(self, ioctx: Ioctx, name: str) -> Group:
        """A group that can be cut off."""
        guarded: Any = _Guarded(super().open_group(ioctx, name), self.cut, _GROUP_CHANGES)
        return guarded  # type: ignore[no-any-return]


def cut_binding(cut: Cut) -> Callable[[], Binding]:
    """Loads the binding that is cut."""
    real = load()
    return lambda: CutBinding(real.rados, real.rbd, real.errors, cut)
