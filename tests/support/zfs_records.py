"""Makes what ZFS writes (resume tokens, stream heads, listings) and a runner that answers from a record."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from backends.zfs.commands import Finished, Process
from backends.zfs.listing import COLUMNS

Values = dict[str, int | str | bool | None]


def native_nvlist(pairs: Values, *more: Values) -> bytes:
    """A packed nvlist in native encoding, little-endian, as OpenZFS packs resume tokens. None is a value of a type that
    tokens do not have; more pairs may have names that are there already."""
    out = bytearray(b"\0\1\0\0" + struct.pack("<iI", 0, 1))
    for name, value in (pair for part in (pairs, *more) for pair in part.items()):
        text = name.encode() + b"\0"
        if value is True:
            kind, count, data = 1, 0, b""
        elif value is None:
            kind, count, data = 2, 1, b"\1"
        elif isinstance(value, int):
            kind, count, data = 8, 1, struct.pack("<Q", value)
        else:
            kind, count, data = 9, 1, str(value).encode() + b"\0"
        head = 16 + len(text)
        start = (head + 7) // 8 * 8
        size = start + (len(data) + 7) // 8 * 8
        pair = struct.pack("<ihhii", size, len(text), 0, count, kind) + text
        out += pair.ljust(start, b"\0") + data.ljust(size - start, b"\0")
    return bytes(out + b"\0\0\0\0")


def make_token(*more: Values, **values: int | str | bool | None) -> str:
    """A resume token."""
    plain = native_nvlist(values, *more)
    packed = zlib.compress(plain)
    words = struct.unpack_from(f"<{len(packed) // 4}I", packed)
    return f"1-{sum(words) & 0xFFFFFFFFFFFFFFFF:x}-{len(plain):x}-{packed.hex()}"


def make_head(
    to_guid: int,
    base_guid: int = 0,
    *,
    name: str = "",
    form: int = 1,
    features: int = 0,
    zvol: bool = True,
    order: str = "<",
) -> bytes:
    """The first record of a send stream.

    :param form: 1 for one stream, 2 for a package
    """
    version = form | features << 2
    head = struct.pack(
        f"{order}IIQQQIIQQ256s",
        *(0, 0, 0x2F5BACBAC, version, 1700000000, 3 if zvol else 2, 0, to_guid, base_guid, name.encode()),
    )
    return head.ljust(312, b"\0")


def row(name: str, kind: str = "volume", **values: object) -> str:
    """A line of the listing; what is not given is "-"."""
    given = {"name": name, "type": kind, **{key.replace("__", ":"): str(value) for key, value in values.items()}}
    return "\t".join(given.get(column, "-") for column in COLUMNS)


def shown(rows: Iterable[str], argv: Sequence[str]) -> str:
    """Those of these rows (of :func:`row`) that a zfs list shows, in the columns that it asks for."""
    args = list(argv)
    types = args[args.index("-t") + 1].split(",") if "-t" in args else ["filesystem", "volume"]
    columns = args[args.index("-o") + 1].split(",")
    below = "-d" in args or "-r" in args
    lines = []
    for line in rows:
        values = dict(zip(COLUMNS, line.split("\t"), strict=True))
        if values["type"] in types and (below or values["name"] in args):
            lines.append("\t".join(values.get(column, "-") for column in columns) + "\n")
    return "".join(lines)


def listing(*rows: str) -> Callable[[tuple[str, ...]], str]:
    """What zfs list answers where these are all that there is."""
    return lambda argv: shown(rows, argv)


Answer = Finished | str | Callable[[tuple[str, ...]], "Finished | str"]


@dataclass
class RecordedRunner:
    """Answers commands by the beginning of their arguments, the longest first.

    :ivar asked: all commands that were run
    """

    answers: dict[tuple[str, ...], Answer]
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        assert deadline > 0
        args = tuple(argv)
        self.asked.append(args)
        for length in range(len(args), 0, -1):
            answer = self.answers.get(args[:length])
            if answer is not None:
                found = answer(args) if callable(answer) else answer
                return found if isinstance(found, Finished) else Finished(args, 0, found, "")
        raise AssertionError(f"not in the record: {args}")

    def read_from(self, argv: Sequence[str]) -> Process:
        raise AssertionError(f"not in the record: {argv}")

    def write_to(self, argv: Sequence[str]) -> Process:
        raise AssertionError(f"not in the record: {argv}")


def failed(errors: str, status: int = 1) -> Finished:
    """A command that failed with these words."""
    return Finished(("zfs",), status, "", errors)
