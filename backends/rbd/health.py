"""What an operator should know of a pool and its images, and what the cephx user may not do."""

from __future__ import annotations

import errno
import uuid
from dataclasses import dataclass

from backends.rbd.binding import Image
from backends.rbd.cluster import Session, Where
from backends.rbd.failures import DENIED, number
from backends.rbd.locks import lock_object
from replicator.model import Capability, Lack

_MAX_CHECKS = 5


@dataclass(frozen=True, slots=True)
class Space:
    """Of a pool, bytes."""

    total: int
    free: int


def space(session: Session, where: Where) -> Space:
    """How much there is, as ``ceph df`` says; zeros where this user may not ask."""
    found = session.ask_mon(prefix="df")
    pools = found.get("pools") if found is not None else None
    for pool in pools if isinstance(pools, list) else []:
        if pool.get("name") == where.pool:
            stats = pool.get("stats", {})
            free = int(stats.get("max_avail", 0))
            return Space(int(stats.get("stored", 0)) + free, free)
    return Space(0, 0)


def cluster_warnings(session: Session) -> list[str]:
    """What Ceph itself says is wrong."""
    found = session.ask_mon(prefix="health")
    if found is None or found.get("status") == "HEALTH_OK":
        return []
    checks = found.get("checks")
    said = [
        f"Ceph: {code}: {check.get('summary', {}).get('message', '')}"
        for code, check in sorted(checks.items() if isinstance(checks, dict) else [])
        if not check.get("muted")
    ]
    return [
        *said[:_MAX_CHECKS],
        *([f"Ceph: {len(said) - _MAX_CHECKS} more warnings"] if len(said) > _MAX_CHECKS else []),
    ]


def version(session: Session) -> str:
    """The version of the monitors, or of nothing where this user may not ask."""
    found = session.ask_mon(prefix="version")
    words = str(found.get("version", "")).split() if found is not None else []
    return words[2] if len(words) > 2 else ""


def foreign(session: Session, image: Image) -> str:
    """Why an image is no volume; "" where it is one."""
    rbd = session.binding.rbd
    features = image.features()
    if features & rbd.RBD_FEATURE_MIGRATING:
        return "it is being migrated"
    if features & rbd.RBD_FEATURE_NON_PRIMARY:
        return "it is what rbd-mirror writes to"
    if features & rbd.RBD_FEATURE_JOURNALING:
        mirror = image.mirror_image_get_info()
        if mirror["state"] == rbd.RBD_MIRROR_IMAGE_ENABLED and not mirror["primary"]:
            return "it is what rbd-mirror writes to"
    return ""


def image_warnings(session: Session, image: Image, label: str) -> list[str]:
    """What makes replicating an image slow."""
    rbd = session.binding.rbd
    if not image.features() & rbd.RBD_FEATURE_FAST_DIFF:
        return [
            f"{label} has no object map with fast-diff, so every object is asked for what changed: "
            "`rbd feature enable IMAGE exclusive-lock object-map fast-diff`"
        ]
    if image.flags() & (rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID):
        return [
            f"the object map of {label} is marked invalid, so every object is asked for what changed: "
            "`rbd object-map rebuild IMAGE`"
        ]
    return []


def group_warnings(session: Session, image: Image, label: str) -> list[str]:
    """What keeps the snapshots of an image from being of one instant with those of others."""
    if not image.features() & session.binding.rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
        return [
            f"{label} has no exclusive lock, so its snapshots are not of one instant with those of other images: "
            "`rbd feature enable IMAGE exclusive-lock`"
        ]
    return []


def no_groups(session: Session, namespace: str) -> str:
    """Why there can be no snapshots through groups; "" where there can."""
    if not session.binding.has_groups:
        return "the bindings of Ceph that are installed know no groups"
    with session.ioctx(namespace) as ioctx:
        try:
            session.pool.group_list(ioctx)
        except session.binding.errors as error:
            if number(error) not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL} | DENIED:
                raise
            session.lost = session.lost or number(error) in DENIED
            return f"the cluster refuses groups ({error})"
    return ""


def lacking(session: Session, where: Where, namespace: str, uses: Capability) -> tuple[Lack, ...]:
    """What the cephx user may not do, found by trying what leaves nothing behind. Once he may, a new connection may."""
    with session.ioctx(namespace) as ioctx:
        probe = lock_object(f"probe.{uuid.uuid4().hex}")
        try:
            session.pool.list(ioctx)
        except session.binding.errors as error:
            if number(error) in DENIED:
                session.lost = True
                return (
                    Lack(f"client.{where.user} may not list the images of pool {where.pool}", _grant(where, "rbd")),
                )
            raise
        try:
            ioctx.lock_exclusive(probe, "replicator", "probe", "", 10)
            ioctx.remove_object(probe)
        except session.binding.errors as error:
            if number(error) not in DENIED:
                raise
            session.lost = True
            what = "take replicas" if Capability.RECEIVE in uses else "take and hold snapshots"
            return (
                Lack(f"client.{where.user} may only read pool {where.pool}, so it cannot {what}", _grant(where, "rbd")),
            )
    return ()


def _grant(where: Where, profile: str) -> str:
    return (
        f"ceph auth caps client.{where.user} mon 'profile rbd' osd 'profile {profile} pool={where.pool}' mgr "
        f"'profile rbd pool={where.pool}'"
    )
