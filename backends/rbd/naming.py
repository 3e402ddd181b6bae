"""Which image a volume is: names of ours to names of RBD, and back.

::

    storage without a namespace:   vm        ->  image vm of the default namespace
                                   prox1/vm  ->  image vm of namespace prox1
                                   a/b/c     ->  image c of namespace a%2Fb
    storage with one:              prox1/vm  ->  image prox1%2Fvm of that namespace

``/``, ``@`` and ``%`` are percent-encoded, as the command line of RBD divides names at the first two. Nothing else is,
so each volume has one image and each image at most one volume.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from replicator import names
from replicator.errors import InvalidName

HIDDEN = ".replicator-"
"""Images and snapshots whose names begin so are ours, and no volumes or versions."""
BEFORE = f"{HIDDEN}before-"
"""Of the snapshots that precede one in a group; see :mod:`backends.rbd.together`."""
_NEW, _RESTORE = f"{HIDDEN}new-", f"{HIDDEN}restore-"

_SPECIAL = re.compile("[/@%]")
_ESCAPE = re.compile("%([0-9A-F]{2})")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is: its namespace ("" is the default one) and its name there."""

    namespace: str
    image: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.image}" if self.namespace else self.image

    @property
    def arriving(self) -> Place:
        """Where a replica is made until it can be told that it is one."""
        return Place(self.namespace, _NEW + self.image)

    @property
    def restoring(self) -> Place:
        """Where a restored image is written until it is complete."""
        return Place(self.namespace, _RESTORE + self.image)


def _escape(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


def encode(text: str) -> str:
    """A name of ours as RBD takes it."""
    done = _SPECIAL.sub(_escape, text)
    return f"%2E{done[1:]}" if done.startswith(HIDDEN) else done


def decode(text: str) -> str:
    """The name that :func:`encode` made this of. :raises InvalidName: there is none"""
    done = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    if encode(done) != text:
        raise InvalidName(f"image name {text!r} has a '%' that stands for nothing", hint="rename the image")
    return done


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one storage.

    :ivar namespace: the one that everything is in; None: the whole pool
    """

    namespace: str | None

    def place(self, volume: str) -> Place:
        """The image of a volume. :raises InvalidName: it may not be called so"""
        names.check_volume(volume)
        if self.namespace is not None:
            return Place(self.namespace, encode(volume))
        parents, _, last = volume.rpartition("/")
        return Place(encode(parents), encode(last))

    def volume(self, place: Place) -> str:
        """The volume of an image. :raises InvalidName: it is none that we could name"""
        if self.namespace is not None:
            return names.check_volume(decode(place.image))
        last = decode(place.image)
        if "/" in last:
            raise InvalidName(
                f"image name {place.image!r} stands for a path", hint="rename the image, or put it into a namespace"
            )
        parents = decode(place.namespace)
        return names.check_volume(f"{parents}/{last}" if parents else last)
