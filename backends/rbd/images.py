"""Images as a whole: whether they are there, making and removing them."""

from __future__ import annotations

import errno

from backends.rbd.cluster import Session, exists_already, is_absent
from backends.rbd.failures import number
from backends.rbd.naming import Place


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


def create_image(session: Session, place: Place, size: int) -> None:
    """Make an image, unless it is there: with what changes are found by, where the cluster can."""
    make_namespace(session, place)
    rbd, pool = session.binding.rbd, session.pool
    wanted = (
        rbd.RBD_FEATURE_LAYERING
        | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
        | rbd.RBD_FEATURE_OBJECT_MAP
        | rbd.RBD_FEATURE_FAST_DIFF
    )
    configured = pool.features_from_string(session.rados.conf_get("rbd_default_features") or "")
    with session.ioctx(place.namespace) as ioctx:
        try:
            try:
                pool.create(ioctx, place.image, size, features=int(configured | wanted))
            except session.binding.errors as error:
                if number(error) not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                pool.create(ioctx, place.image, size)
        except session.binding.errors as error:
            if not exists_already(error):
                raise


def remove_image(session: Session, place: Place) -> None:
    """Remove an image that has no snapshots, if it is there."""
    with session.ioctx(place.namespace) as ioctx:
        try:
            session.pool.remove(ioctx, place.image)
        except session.binding.errors as error:
            if not is_absent(error):
                raise
