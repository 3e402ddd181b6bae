"""Images as a whole: whether they are there, making and removing them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from backends.rbd.cluster import Session, exists_already, is_absent
from backends.rbd.failures import DENIED, number
from backends.rbd.layout import DEFAULT, Layout
from backends.rbd.naming import Place

_IMPOSSIBLE = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EDOM})
_FORBIDDEN = DENIED | {errno.ENOENT}
"""What another pool may answer, and this one then does not."""


def image_id(session: Session, place: Place) -> str | None:
    """The id of an image, which stays the same whatever it is called; None if there is none."""
    try:
        with session.image(place) as image:
            return image.id()
    except session.binding.errors as error:
        if is_absent(error):
            return None
        raise


def exists(session: Session, place: Place) -> bool:
    """Whether there is such an image."""
    return image_id(session, place) is not None


def make_namespace(session: Session, place: Place) -> None:
    """Make the namespace of an image, where it is missing."""
    if not place.namespace:
        return
    with session.ioctx("") as ioctx:
        try:
            session.pool.namespace_create(ioctx, place.namespace)
        except session.binding.errors as error:
            if not exists_already(error):
                raise


def create_image(session: Session, place: Place, size: int, layout: Layout = DEFAULT) -> None:
    """Make an image, unless it is there: with what changes are found by, and laid out like that, where the cluster can.

    What it cannot is left out; :func:`backends.rbd.layout.differences` tells.
    """
    make_namespace(session, place)
    with session.ioctx(place.namespace) as ioctx:

        def create(**options: int | str | None) -> None:
            session.pool.create(ioctx, place.image, size, **options)

        try:
            _made_like(session, layout, create)
        except session.binding.errors as error:
            if exists_already(error):
                return
            if number(error) not in _IMPOSSIBLE or layout.only_there:
                raise
            create()


def clone_image(session: Session, parent: Place, snapshot: str, place: Place, layout: Layout = DEFAULT) -> None:
    """Make an image that is a clone of a snapshot; see :func:`create_image`.

    :param snapshot: as RBD calls it
    :raises: one of the binding's errors, EEXIST where there is an image of that name
    """
    make_namespace(session, place)
    with session.ioctx(parent.namespace) as above, session.ioctx(place.namespace) as ioctx:

        def clone(**options: int | str | None) -> None:
            session.pool.clone(above, parent.image, snapshot, ioctx, place.image, **options)

        _made_like(session, layout, clone)


def _made_like(session: Session, layout: Layout, make: Callable[..., None]) -> None:
    """Make an image as much like that as is possible."""
    rbd = session.binding.rbd
    configured = int(session.pool.features_from_string(session.rados.conf_get("rbd_default_features") or ""))
    wanted = _needed(session) | configured
    if layout.deep_flatten is not None:
        deep = int(rbd.RBD_FEATURE_DEEP_FLATTEN)
        wanted = wanted | deep if layout.deep_flatten else wanted & ~deep
    if layout.data_pool is not None and not session.rados.pool_exists(layout.data_pool):
        layout = replace(layout, data_pool=None)
    *before, last = layout.simpler()
    for each in before:
        try:
            make(features=wanted, **each.options)
        except session.binding.errors as error:
            if number(error) not in _IMPOSSIBLE | _FORBIDDEN:
                raise
        else:
            return
    make(features=wanted, **last.options)


def _needed(session: Session) -> int:
    """The features by which changes are found and writers kept apart, and snapshots protected."""
    rbd = session.binding.rbd
    return int(
        rbd.RBD_FEATURE_LAYERING
        | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
        | rbd.RBD_FEATURE_OBJECT_MAP
        | rbd.RBD_FEATURE_FAST_DIFF
    )


def remove_image(session: Session, place: Place) -> None:
    """Remove an image that has no snapshots, if it is there."""
    with session.ioctx(place.namespace) as ioctx:
        try:
            session.pool.remove(ioctx, place.image)
        except session.binding.errors as error:
            if not is_absent(error):
                raise
