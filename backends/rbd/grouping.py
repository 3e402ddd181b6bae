"""A group of images while it is used for a snapshot: joining it, and leaving nothing of ours in it or because of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from backends.rbd.binding import Group, Image, Ioctx
from backends.rbd.catalog import needless, read_metadata, read_raw, record_of, remove_named
from backends.rbd.cluster import Session, is_absent
from backends.rbd.naming import HIDDEN, Place

GROUP = f"{HIDDEN}together"
"""The group of ours, in each namespace where one is needed."""
_PART = re.compile(r"\.group\.[0-9a-f]+_([0-9a-f]+)_([0-9a-f]+)")
"""librbd's name of an image's part of a group snapshot: pool, group, snapshot (librbd/api/Group.cc)."""
_HEADER = "rbd_group_header."  # RBD_GROUP_HEADER_PREFIX (rbd_types.h)


@dataclass(frozen=True, slots=True)
class Grouping:
    """A group, ours or somebody else's; only under the lock that keeps others from doing the same.

    :ivar pool: the number of the group's pool
    """

    session: Session
    ioctx: Ioctx
    pool: int
    namespace: str
    name: str
    group: Group

    @classmethod
    @contextmanager
    def of(cls, session: Session, pool: int, namespace: str, name: str) -> Iterator[Grouping]:
        """The group of that name, which need not be there."""
        with session.ioctx(namespace, pool) as ioctx:
            yield cls(session, ioctx, pool, namespace, name, session.binding.open_group(ioctx, name))

    @property
    def _is_ours(self) -> bool:
        return self.name == GROUP

    def join(self, images: Iterable[tuple[str, int]]) -> None:
        """Make the group and put images into it, by name and number of the pool. Somebody else's has them already."""
        if not self._is_ours:
            return
        self.session.pool.group_create(self.ioctx, self.name)
        for image, pool in images:
            with self.session.ioctx(self.namespace, pool) as ioctx:
                self.group.add_image(ioctx, image)

    def parts(self, image: Image) -> dict[int, str]:
        """The snapshots of an image that are parts of snapshots of this group, and what those are called in it."""
        found = {}
        for snapshot in image.list_snaps():
            group: Mapping[str, object] | None = snapshot.get("group")
            if group is not None and (group["pool"], group["name"]) == (self.pool, self.name):
                found[int(snapshot["id"])] = str(group["snap_name"])
        return found

    def clean(self) -> None:
        """Remove what is no version, have the group forget what is one, and a group of ours itself."""
        if self.name not in self.session.pool.group_list(self.ioctx):
            return
        members = [(Place(self.namespace, str(each["name"])), int(each["pool"])) for each in self.group.list_images()]
        ours = [name for each in self.group.list_snaps() if (name := str(each["name"])).startswith(HIDDEN)]
        kept: dict[str, tuple[str, str]] = {}
        if ours or self._is_ours:
            for place, pool in members:
                with self.session.image(place, read_only=False, pool=pool) as image:
                    kept |= self._clean_image(image, ours)
        for name in ours:
            if name in kept:
                self._forget(*kept[name])
            else:
                self.group.remove_snap(name)
        if self._is_ours:
            for place, pool in members:
                with self.session.ioctx(self.namespace, pool) as ioctx:
                    self.group.remove_image(ioctx, place.image)
            self.session.pool.group_remove(self.ioctx, self.name)

    def _clean_image(self, image: Image, ours: list[str]) -> dict[str, tuple[str, str]]:
        """Which snapshots of the group are versions of this image, with the ids of group and snapshot."""
        parts, metadata, identity = self.parts(image), read_metadata(image), image.id()
        kept = {}
        for raw in list(read_raw(image, identity)):
            name = parts.get(raw.id)
            ids = _PART.fullmatch(raw.name)
            if name not in ours or ids is None:
                continue
            if record_of(raw, metadata) is None:
                image.remove_snap_by_id(raw.id)
            else:
                kept[name] = (ids[1], ids[2])
        remove_named(self.session, image, needless(list(read_raw(image, identity))))
        return kept

    def _forget(self, group: str, snapshot: str) -> None:
        """Have the group forget a snapshot whose parts stay. librbd itself would remove them with it."""
        op = self.ioctx.create_write_op()
        try:
            data = snapshot.encode()
            op.execute("rbd", "group_snap_remove", struct.pack("<I", len(data)) + data)  # cls/rbd/cls_rbd.cc
            self.ioctx.operate_write_op(op, _HEADER + group)
        except self.session.binding.errors as error:
            if not is_absent(error):
                raise
        finally:
            op.release()
