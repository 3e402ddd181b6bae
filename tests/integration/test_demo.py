"""``replicator demo`` holds on this machine, with its own file system and with an image that is given."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from replicator.demo import run

pytestmark = pytest.mark.timeout(240)


def _console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=120), text


def test_with_a_file_system_of_its_own() -> None:
    console, text = _console()
    assert run(None, console) == 0, text.getvalue()
    assert "e2fsck finds the replica's file system clean" in text.getvalue()
    assert "compared byte by byte: equal" in text.getvalue()


def test_with_an_image_that_is_given(tmp_path: Path) -> None:
    image = tmp_path / "some.raw"
    content = os.urandom(8 << 20) + bytes(8 << 20) + os.urandom(1 << 20)
    image.write_bytes(content)
    console, text = _console()
    assert run(image, console) == 0, text.getvalue()
    assert "compared byte by byte: equal" in text.getvalue()
    assert image.read_bytes() == content, "the image that was given was changed"
