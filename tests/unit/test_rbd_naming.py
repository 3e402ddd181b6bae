"""Names of volumes as names of RBD images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.rbd.naming import HIDDEN, Naming, Place, decode, encode
from replicator import names
from replicator.errors import InvalidName

WHOLE, INSIDE = Naming(None), Naming("ns")

components = st.text(
    st.sampled_from("ab%/2F45.- é@\u00df") | st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12
) | st.sampled_from([".replicator-new-vm", "%2F", "%2f", "%", ".replicator-", "%2Ereplicator-x"])


def is_volume(name: str) -> bool:
    try:
        names.check_volume(name)
    except InvalidName:
        return False
    return True


volumes = st.lists(components, min_size=1, max_size=4).map("/".join).filter(is_volume)


@pytest.mark.parametrize(
    ("naming", "volume", "place"),
    [
        (WHOLE, "vm", Place("", "vm")),
        (WHOLE, "prox1/vm", Place("prox1", "vm")),
        (WHOLE, "a/b/c", Place("a%2Fb", "c")),
        (WHOLE, "50% off", Place("", "50%25 off")),
        (INSIDE, "prox1/vm", Place("ns", "prox1%2Fvm")),
    ],
)
def test_the_image_of_a_volume(naming: Naming, volume: str, place: Place) -> None:
    assert naming.place(volume) == place
    assert naming.volume(place) == volume


@given(volumes, st.sampled_from([WHOLE, INSIDE]))
def test_each_volume_has_an_image_of_its_own(volume: str, naming: Naming) -> None:
    place = naming.place(volume)
    assert naming.volume(place) == volume
    assert not place.image.startswith(HIDDEN)
    for text in (place.namespace, place.image):
        assert "/" not in text
        assert "@" not in text


@given(components, components, st.sampled_from([WHOLE, INSIDE]))
def test_an_image_is_at_most_one_volume(namespace: str, image: str, naming: Naming) -> None:
    place = Place("ns" if naming is INSIDE else namespace, image)
    try:
        volume = naming.volume(place)
    except InvalidName:
        return
    assert naming.place(volume) == place


@given(st.text())
def test_encoding_is_reversible(text: str) -> None:
    assert decode(encode(text)) == text


@pytest.mark.parametrize(
    "image", ["a%2fb", "a%20b", "100%", "%", ".replicator-new-vm", "a%2Fb", "x\ny", "..", "", "a\\b"]
)
def test_images_that_are_no_volumes(image: str) -> None:
    with pytest.raises(InvalidName):
        WHOLE.volume(Place("", image))


def test_places_of_ours_are_no_volumes() -> None:
    for place in (WHOLE.place("a/vm").arriving, WHOLE.place("a/vm").restoring, INSIDE.place("a/vm").arriving):
        assert place.image.startswith(HIDDEN)
        for naming in (WHOLE, Naming(place.namespace)):
            with pytest.raises(InvalidName):
                naming.volume(place)
