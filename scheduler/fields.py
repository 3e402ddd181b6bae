"""Lists of numbers as calendar events and cron write them: ``*``, ``5``, ``1..5``, ``0/15``, ``8..17/3,22``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NUMBER = re.compile(r"[0-9]{1,4}")


class Refused(Exception):
    """A part of a schedule that cannot be read; whoever knows the whole text makes a ScheduleError of it.

    :param part: the offending part, as written
    :param cause: what is wrong with it
    :param remedy: what to write instead, where that can be told
    """

    def __init__(self, part: str, cause: str, remedy: str = "") -> None:
        super().__init__(f"{part!r}: {cause}")
        self.part = part
        self.cause = cause
        self.remedy = remedy


@dataclass(frozen=True)
class NumberField:
    """One field of a schedule: what its numbers are called and from where to where they go.

    ``star_from`` is where ``*/N`` begins to count; ``names`` are words that stand for numbers.
    """

    name: str
    lowest: int
    highest: int
    separator: str
    star_from: int | None = None
    names: Mapping[str, int] = field(default_factory=dict)

    def read(self, text: str) -> tuple[int, ...]:
        """The numbers that ``text`` lists, sorted, each once.

        :raises Refused: for anything but a list of numbers, ranges and repetitions within the field's bounds
        """
        found: set[int] = set()
        for item in text.split(","):
            found.update(self._item(item))
        if not found:
            raise Refused(text, f"no {self.name} from {self.lowest} to {self.highest} is in it")
        return tuple(sorted(found))

    def _item(self, item: str) -> range:
        span, slash, step_text = item.partition("/")
        step = self._step(step_text, item) if slash else 1
        if span == "*":
            start = self.lowest if self.star_from is None else self.star_from
            # The first number from the lowest on that a count from start reaches.
            return range(start + -(-(self.lowest - start) // step) * step, self.highest + 1, step)
        first_text, dots, last_text = span.partition(self.separator)
        first = self._number(first_text, item)
        if dots:
            last = self._number(last_text, item)
            if first > last:
                raise Refused(item, f"the range of {self.name}s begins after its end")
        else:
            last = self.highest if slash else first
        return range(first, last + 1, step)

    def _step(self, text: str, item: str) -> int:
        if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= self.highest:
            raise Refused(item, f"a step of {self.name}s is a number from 1 to {self.highest}")
        return int(text)

    def _number(self, text: str, item: str) -> int:
        if text in self.names:
            return self.names[text]
        if not _NUMBER.fullmatch(text):
            other = {"..": "-", "-": ".."}[self.separator]
            remedy = f"write the range with {self.separator!r}" if other in text else ""
            raise Refused(item, f"not a {self.name}", remedy)
        number = int(text)
        if not self.lowest <= number <= self.highest:
            raise Refused(item, f"a {self.name} is a number from {self.lowest} to {self.highest}")
        return number
