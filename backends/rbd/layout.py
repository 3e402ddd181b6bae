"""How an image is laid out and what is noted of it: telling of a source, making and keeping a replica like it.

Which properties there are, and why no others, is in :mod:`replicator.rbd_properties`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from backends.rbd.binding import Image
from backends.rbd.cluster import Session
from replicator.model import Property
from replicator.rbd_properties import (
    DATA_POOL,
    DEEP_FLATTEN,
    MAX_NOTE,
    MAX_NOTES,
    META,
    NOTE_PREFIXES,
    NOTES,
    ORDER,
    STRIPE_COUNT,
    STRIPE_UNIT,
)

_MIN_ORDER, _MAX_ORDER = 12, 25  # librbd's own limits (librbd/internal.cc: validate_layout and create_v2)
_MAX_STRIPE_COUNT = 4096
_POOL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Layout:
    """What is fixed when an image is made; None where the cluster's own default is as good.

    :ivar order: objects have two to the power of this bytes
    :ivar stripe_unit, stripe_count: both, or none
    :ivar data_pool: None: where the image is
    :ivar only_there: no other data pool will do
    """

    order: int | None = None
    stripe_unit: int | None = None
    stripe_count: int | None = None
    deep_flatten: bool | None = None
    data_pool: str | None = None
    only_there: bool = False

    @property
    def options(self) -> dict[str, int | str | None]:
        """As librbd takes them. What is said of the order alone it takes the rest of from what is cloned."""
        unit, count = self.stripes or (1 << self.order if self.order is not None else None, 1)
        given = {
            "order": self.order,
            "stripe_unit": unit,
            "stripe_count": None if unit is None else count,
            "data_pool": self.data_pool,
        }
        return {name: value for name, value in given.items() if value is not None}

    def simpler(self) -> tuple[Layout, ...]:
        """What may still be possible where this is not, the most like it first."""
        without_pool = self if self.only_there else replace(self, data_pool=None)
        without_stripes = replace(without_pool, stripe_unit=None, stripe_count=None)
        return tuple(dict.fromkeys((self, without_pool, without_stripes, replace(without_stripes, order=None))))

    @property
    def stripes(self) -> tuple[int, int] | None:
        """Their unit and count; None where data is not striped."""
        striped = self.stripe_unit is not None and self.stripe_count is not None and self.stripe_count > 1
        return (self.stripe_unit or 0, self.stripe_count or 0) if striped else None


DEFAULT = Layout()
"""As the cluster makes images by itself."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a source has, as far as it can be meant.

    :ivar notes: of its metadata
    """

    layout: Layout = DEFAULT
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def is_note(key: str) -> bool:
    """Whether an entry of the metadata is one that a replica takes over."""
    return bool(_KEY.fullmatch(key)) and (key in NOTES or key.startswith(NOTE_PREFIXES))


def layout_of(session: Session, image: Image) -> Layout:
    """Of an open image; every value is there."""
    rbd = session.binding.rbd
    order = int(image.stat()["order"])
    pool = image.data_pool_id()
    return Layout(
        order,
        int(image.stripe_unit()),
        int(image.stripe_count()),
        bool(image.features() & rbd.RBD_FEATURE_DEEP_FLATTEN),
        None if pool in (-1, session.pool_id) else session.rados.pool_reverse_lookup(pool),
    )


def offered(session: Session, image: Image) -> tuple[Property, ...]:
    """What a source tells of itself."""
    layout = layout_of(session, image)
    found = [Property(ORDER, str(layout.order)), Property(DEEP_FLATTEN, "on" if layout.deep_flatten else "off")]
    if layout.stripes is not None:
        found += [Property(STRIPE_UNIT, str(layout.stripe_unit)), Property(STRIPE_COUNT, str(layout.stripe_count))]
    if layout.data_pool is not None:
        found.append(Property(DATA_POOL, layout.data_pool))
    notes = sorted((key, value) for key, value in image.metadata_list() if is_note(key) and len(value) <= MAX_NOTE)
    return (*found, *(Property(META + key, value) for key, value in notes[:MAX_NOTES]))


def wanted(properties: Iterable[Property]) -> Wanted:
    """What of these properties can be meant; they come from a peer."""
    given = {each.name: each.value for each in properties}
    order = _number(given.get(ORDER), _MIN_ORDER, _MAX_ORDER)
    size = 1 << order if order is not None else 1 << _MAX_ORDER
    unit, count = (
        _number(given.get(STRIPE_UNIT), 512, size),
        _number(given.get(STRIPE_COUNT), 2, _MAX_STRIPE_COUNT),
    )
    if unit is None or count is None or order is None or size % unit:
        unit = count = None
    pool = given.get(DATA_POOL, "")
    deep = given.get(DEEP_FLATTEN)
    named = {name.removeprefix(META): value for name, value in given.items() if name.startswith(META)}
    notes = {key: value for key, value in sorted(named.items()) if is_note(key) and len(value) <= MAX_NOTE}
    return Wanted(
        Layout(
            order,
            unit,
            count,
            deep == "on" if deep in ("on", "off") else None,
            pool if _POOL.fullmatch(pool) else None,
        ),
        dict(list(notes.items())[:MAX_NOTES]),
    )


def _number(text: str | None, low: int, high: int) -> int | None:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 10:
        return None
    return int(text) if low <= int(text) <= high else None


def follow(session: Session, image: Image, label: str, source: Wanted) -> tuple[str, ...]:
    """Note on a replica what is noted on its source; what of the source it is not like, a sentence each.

    Nothing of this is worth failing for: the data is there.
    """
    try:
        now = dict(image.metadata_list())
        for key, value in source.notes.items():
            if now.get(key) != value:
                image.metadata_set(key, value)
        return differences(session, image, label, source.layout)
    except session.binding.errors as error:
        return (f"what {label} takes over of its source could not be written: {error}",)


def differences(session: Session, image: Image, label: str, source: Layout) -> tuple[str, ...]:
    """What is fixed and is not as it is at the source."""
    mine = layout_of(session, image)
    told = []
    if source.order is not None and source.order != mine.order:
        told.append(f"objects of {1 << source.order} bytes, and not of {1 << (mine.order or 0)}")
    if source.order is not None and source.stripes != mine.stripes:
        told.append(f"{source.stripes[1]} stripes of {source.stripes[0]} bytes" if source.stripes else "no stripes")
    if source.deep_flatten is not None and source.deep_flatten != mine.deep_flatten:
        told.append("deep-flatten" if source.deep_flatten else "no deep-flatten")
    if source.data_pool is not None and source.data_pool != mine.data_pool:
        why = "is not in this cluster" if not session.rados.pool_exists(source.data_pool) else "was not used"
        told.append(f"its data in pool {source.data_pool}, which {why}")
    return (
        (f"{label} is laid out as it was made: its source has {'; '.join(told)}. Its data is the same",) if told else ()
    )
