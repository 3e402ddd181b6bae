"""Which volumes a job means: globs, and whether two jobs mean the same ones.

``*`` matches any characters, ``/`` included (``tank:*`` is everything of the storage, as Proxmox users expect),
``?`` one character, ``[abc]`` ``[a-z]`` ``[!abc]`` one of (or none of) a set. A pattern that begins with ``!``
excludes; it may leave out the storage. Case matters. All functions are pure.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from replicator import names
from replicator.errors import UsageError
from replicator.model import Role, VolumeInfo

MAX_PATTERN = 1024
"""Characters of a pattern, at most."""
_MAX_STATES = 20_000
"""Where :func:`overlap` gives up; far beyond what real patterns need."""


@dataclass(frozen=True, slots=True)
class _Any:
    """``*``."""


@dataclass(frozen=True, slots=True)
class _One:
    """One character: in one of the ranges (both ends included), or with ``negated`` in none of them."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    def matches(self, character: str) -> bool:
        return any(low <= character <= high for low, high in self.ranges) != self.negated


def _read_set(text: str, start: int) -> tuple[_One, int] | None:
    """The ``[...]`` whose first character after the bracket is at ``start``, and where it ends; None: unclosed."""
    negated = text[start : start + 1] == "!"
    first = start + negated
    end = text.find("]", first + 1)  # "[]]" has the bracket itself
    if end < 0:
        return None
    body, ranges, at = text[first:end], [], 0
    while at < len(body):
        if at + 2 < len(body) and body[at + 1] == "-":
            ranges.append((body[at], body[at + 2]))
            at += 3
        else:
            ranges.append((body[at], body[at]))
            at += 1
    return _One(tuple(ranges), negated), end + 1


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern over volume names; matching takes time in proportion to name times pattern, whatever the pattern."""

    text: str
    _tokens: tuple[_Any | _One, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.text:
            raise UsageError("the volume pattern is empty", hint='"*" means all volumes')
        if len(self.text) > MAX_PATTERN:
            raise UsageError(f"a volume pattern of {len(self.text)} characters", hint=f"at most {MAX_PATTERN} are read")
        tokens: list[_Any | _One] = []
        at = 0
        while at < len(self.text):
            character = self.text[at]
            at += 1
            if character == "*":
                if not tokens or not isinstance(tokens[-1], _Any):
                    tokens.append(_Any())
            elif character == "?":
                tokens.append(_One((), negated=True))
            elif character == "[":
                found = _read_set(self.text, at)
                if found is None:
                    raise UsageError(f"pattern {self.text!r} has a '[' without ']'", hint="write '[[]' for a bracket")
                tokens.append(found[0])
                at = found[1]
            else:
                tokens.append(_One(((character, character),)))
        object.__setattr__(self, "_tokens", tuple(tokens))

    @property
    def prefix(self) -> str:
        """What every matching name begins with."""
        return re.split(r"[*?\[]", self.text, maxsplit=1)[0]

    def start(self) -> frozenset[int]:
        """The state before the first character: positions in the pattern that may be next."""
        return self._skip({0})

    def step(self, state: frozenset[int], character: str) -> frozenset[int]:
        """The state after one more character."""
        following = set()
        for position in state:
            if position < len(self._tokens):
                token = self._tokens[position]
                if isinstance(token, _Any):
                    following.add(position)
                elif token.matches(character):
                    following.add(position + 1)
        return self._skip(following)

    def accepts(self, state: frozenset[int]) -> bool:
        """Whether the pattern may end here."""
        return len(self._tokens) in state

    def matches(self, name: str) -> bool:
        """Whether the whole name matches."""
        state = self.start()
        for character in name:
            state = self.step(state, character)
            if not state:
                return False
        return self.accepts(state)

    def boundaries(self) -> set[str]:
        """Characters among which one of each kind that this pattern can tell apart is found."""
        found: set[str] = set()
        for token in self._tokens:
            if isinstance(token, _One):
                for low, high in token.ranges:
                    found.update((low, high, _next(low), _next(high)))
        return found

    def _skip(self, positions: set[int]) -> frozenset[int]:
        """Add what a ``*`` that matches nothing leads to."""
        pending = list(positions)
        while pending:
            position = pending.pop()
            following = position + 1
            if position < len(self._tokens) and isinstance(self._tokens[position], _Any) and following not in positions:
                positions.add(following)
                pending.append(following)
        return frozenset(positions)


def _next(character: str) -> str:
    return chr(min(ord(character) + 1, 0x10FFFF))


def _allowed(character: str) -> str:
    """The character itself, or the next one that a volume's name may have."""
    while ord(character) < 0x10FFFF and (not character.isprintable() or character in "@#\\"):
        character = _next(character)
    return character


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of a job's source: ``STORAGE:GLOB``, ``!STORAGE:GLOB`` or ``!GLOB``.

    :ivar storage: None only for an exclude of all storages
    """

    storage: str | None
    glob: Glob
    exclude: bool = False

    def __str__(self) -> str:
        place = f"{self.storage}:" if self.storage is not None else ""
        return f"{'!' if self.exclude else ''}{place}{self.glob.text}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        :raises UsageError: no storage, no glob, an unclosed bracket
        :raises InvalidName: the storage's name may not be used
        """
        exclude = text.startswith("!")
        storage, colon, glob = text.removeprefix("!").partition(":")
        if not colon and not exclude:
            raise UsageError(
                f"source {text!r} has no storage",
                hint='write it as STORAGE:GLOB, for example "tank:*" or "tank:vm-100"',
            )
        if not colon:
            return cls(None, Glob(storage), exclude=True)
        return cls(names.check_word("storage name", storage), Glob(glob), exclude)


@dataclass(frozen=True, slots=True)
class SnapshotPatterns:
    """Snapshots by the patterns of their names; ``!`` excludes, wherever it stands.

    :ivar include, exclude: globs
    """

    include: tuple[Glob, ...] = ()
    exclude: tuple[Glob, ...] = ()

    def __str__(self) -> str:
        return ", ".join([glob.text for glob in self.include] + [f"!{glob.text}" for glob in self.exclude])

    @classmethod
    def parse(cls, texts: Iterable[str]) -> SnapshotPatterns:
        """:raises UsageError: an empty pattern, an unclosed bracket"""
        texts = tuple(texts)
        excluded = tuple(Glob(text[1:]) for text in texts if text.startswith("!"))
        return cls(tuple(Glob(text) for text in texts if not text.startswith("!")), excluded)

    def matches(self, name: str) -> bool:
        """Whether a snapshot of that name is meant."""
        return any(glob.matches(name) for glob in self.include) and not any(glob.matches(name) for glob in self.exclude)


def covers(patterns: Sequence[Pattern], storage: str, name: str) -> bool:
    """Whether the patterns mean a volume of that name in that storage."""
    chosen = False
    for pattern in patterns:
        if pattern.storage in (None, storage) and pattern.glob.matches(name):
            if pattern.exclude:
                return False
            chosen = True
    return chosen


def select(patterns: Sequence[Pattern], volumes: Iterable[VolumeInfo]) -> list[VolumeInfo]:
    """The volumes that the patterns mean, sorted; an exclude wins wherever it stands.

    Replicas are left out: a job never replicates on what another node replicated here.
    """
    chosen = [
        volume
        for volume in volumes
        if (volume.lineage is None or volume.lineage.role is not Role.REPLICA)
        and covers(patterns, volume.id.storage, volume.id.name)
    ]
    return sorted(chosen, key=lambda volume: volume.id)


def included_storages(patterns: Sequence[Pattern]) -> list[str]:
    """The storages that have included volumes, in the order of the patterns."""
    return list(dict.fromkeys(p.storage for p in patterns if p.storage is not None and not p.exclude))


def overlap(first: Sequence[Pattern], of: str, second: Sequence[Pattern], on: str) -> str | None:
    """A name that ``first`` selects in storage ``of`` and ``second`` in storage ``on``; None if there can be none.

    Exact, excludes included: the patterns are walked together as one automaton, breadth first, so the name is one of
    the shortest. (Patterns contrived to need more than ``_MAX_STATES`` states count as not overlapping.)
    """
    sides = [
        [pattern for pattern in patterns if pattern.storage in (None, storage)]
        for patterns, storage in ((first, of), (second, on))
    ]
    everything = [*sides[0], *sides[1]]
    cut = len(sides[0])
    letters = {_allowed(c) for c in {"a"}.union(*(pattern.glob.boundaries() for pattern in everything))}
    # Readable ones first, so that an example looks like a name.
    alphabet = sorted(letters, key=lambda c: (not c.isalnum(), c))

    def covered(states: tuple[frozenset[int], ...], low: int, high: int) -> bool:
        ending = [p.exclude for p, s in zip(everything[low:high], states[low:high], strict=True) if p.glob.accepts(s)]
        return bool(ending) and not any(ending)

    begin = tuple(pattern.glob.start() for pattern in everything)
    seen: set[tuple[frozenset[int], ...]] = set()  # without begin: it may come again, after a first character
    queue = deque([(begin, "")])
    while queue and len(seen) < _MAX_STATES:
        states, name = queue.popleft()
        if name and covered(states, 0, cut) and covered(states, cut, len(everything)):
            return name
        for letter in alphabet:
            following = tuple(p.glob.step(s, letter) for p, s in zip(everything, states, strict=True))
            if following not in seen:
                seen.add(following)
                queue.append((following, name + letter))
    return None
