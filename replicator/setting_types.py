"""The values that stand in replicator.toml: how each is written, read and refused.

The annotated types at the end are what the tables of :mod:`replicator.settings` are made of. A refusal is a pydantic
error of type :data:`REFUSED`, which :mod:`replicator.config` turns into a problem with file, key and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import zoneinfo
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainValidator, Strict, ValidationInfo
from pydantic_core import PydanticCustomError

from replicator import names, retention, units
from replicator.errors import ReplicatorError, UsageError
from replicator.rate_windows import RateLimit
from replicator.selection import Pattern, SnapshotPatterns
from replicator.zfs_properties import RESERVED, TAKEN_OVER

DEFAULT_PORT = 8571
DEFAULT_HTTP_PORT = 9571

REFUSED = "refused"
"""Type of the pydantic errors made here; their context has ``message`` and ``remedy``."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where something listens: an IP address (never a name, so nothing depends on a name server) and a port."""

    host: IPv4Address | IPv6Address
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.host.version == 6 else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int = DEFAULT_PORT) -> Address:
        """``10.99.0.1:8571``, ``10.99.0.1``, ``[fd00::1]:8571`` or ``fd00::1``.

        :raises UsageError: not an IP address, or a port outside 1 to 65535
        """
        host, port = text.strip(), str(default_port)
        if host.startswith("["):
            host, bracket, rest = host[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise UsageError(f"{text!r} is not an address", hint='write for example "[fd00::1]:8571"')
            port = rest[1:] if rest else port
        elif host.count(":") == 1:
            host, _, port = host.partition(":")
        try:
            address = ip_address(host)
        except ValueError:
            raise UsageError(
                f"{host!r} is not an IP address", hint='write address and port, for example "10.99.0.1:8571"'
            ) from None
        if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise UsageError(f"{text!r} has no port from 1 to 65535", hint='write for example "10.99.0.1:8571"')
        return cls(address, int(port))


@dataclass(frozen=True, slots=True)
class Target:
    """A storage of a node that a job replicates to."""

    node: str
    storage: str

    def __str__(self) -> str:
        return f"{self.node}:{self.storage}"

    @classmethod
    def parse(cls, text: str, this_node: str) -> Target:
        """``NODE:STORAGE``, or ``STORAGE`` for one of ``this_node``.

        :raises InvalidName: a name that may not be used
        """
        node, colon, storage = text.rpartition(":")
        return cls(names.check_node(node) if colon else this_node, names.check_word("storage name", storage))


def describe(value: object) -> str:
    """What a TOML value is, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return words.get(type(value), "a table" if isinstance(value, dict) else "a date or time")


def key_path(*parts: object) -> str:
    """A key as TOML writes it: ``job.vms.targets[0]``, with quotes where a part needs them."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = str(part)
            bare = word.isascii() and word.replace("-", "").replace("_", "").isalnum()
            text += ("." if text else "") + (word if bare else json.dumps(word))
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)), None)


def refused(message: str, remedy: str = "") -> PydanticCustomError:
    """A problem of one key; without a remedy the field's description is shown."""
    return PydanticCustomError(REFUSED, "{message}", {"message": message, "remedy": remedy})


def _text(parse: Callable[[str], object]) -> PlainValidator:
    """A setting written as a text that ``parse`` reads."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            raise refused(f"is {describe(value)}, but must be a text in quotes")
        try:
            return parse(value)
        except ReplicatorError as error:
            raise refused(str(error), error.hint) from None

    return PlainValidator(read, json_schema_input_type=str)


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        meant = ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"{text!r} is not a network", hint='write for example "10.99.0.0/24"') from None
    raise UsageError(f"{text!r} is an address, not a network", hint=f'write "{meant}"')


def _absolute(text: str) -> Path:
    if not text.startswith("/") or "\0" in text or ".." in Path(text).parts:
        raise UsageError(f"{text!r} is not an absolute path", hint="begin it with '/' and leave out '..'")
    return Path(text)


def _device(text: str) -> Path:
    path = _absolute(text)
    if not path.is_relative_to("/dev") or path == Path("/dev"):
        raise UsageError(f"{text!r} is not a device", hint='write for example "/dev/vg0/vm-100"')
    return path


def _zone(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(f"{text!r} is not a time zone", hint='write for example "Europe/Vienna" or "UTC"') from None
    return text


def _keep(text: str) -> str:
    retention.parse(text)
    return text


def _dataset(text: str) -> str:
    if " " in text:
        raise UsageError(f"{text!r} is not a dataset", hint='write for example "tank/vm"')
    return names.check_volume(text)


def _http(text: str) -> Address | None:
    return Address.parse(text, DEFAULT_HTTP_PORT) if text else None


def _target(value: object, info: ValidationInfo) -> Target:
    if not isinstance(value, str):
        raise refused(f"is {describe(value)}, but must be a text in quotes")
    try:
        return Target.parse(value, (info.context or {}).get("node", ""))
    except ReplicatorError as error:
        raise refused(str(error), error.hint) from None


def _source(value: object, info: ValidationInfo) -> object:
    """The short forms, a text or a list of them, as the table that they stand for."""
    if isinstance(value, str | list):
        value = {"volumes": value}
    if isinstance(value, dict):
        value = {"node": (info.context or {}).get("node", ""), **value}
        if isinstance(value.get("volumes"), str):
            value["volumes"] = [value["volumes"]]
    return value


class SourceForm(BaseModel):
    """A job's source as a table, as the file may have it; for the schema only."""

    model_config = ConfigDict(extra="forbid")

    node: str | None = None
    volumes: str | list[str]


def _rate_limit(value: object) -> RateLimit:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise refused(f"is {describe(value)}, but must be a text in quotes, or a list of them")
    try:
        return RateLimit.parse(texts)
    except ReplicatorError as error:
        raise refused(str(error), error.hint) from None


def _snapshots(value: object) -> SnapshotPatterns:
    if not isinstance(value, list | tuple):
        raise refused(f"is {describe(value)}, but must be a list")
    for text in value:
        if not isinstance(text, str):
            raise refused(f"has {describe(text)} in it, but must be a list of texts in quotes")
    try:
        found = SnapshotPatterns.parse(value)
    except ReplicatorError as error:
        raise refused(str(error), error.hint) from None
    if found.exclude and not found.include:
        raise refused("selects no snapshots", 'name some first, for example ["autosnap_*", "!*_hourly"]')
    return found


_PROPERTY = re.compile(r"[a-z][a-z0-9_]*|[a-z0-9][a-z0-9_.-]*:[a-z0-9_.:-]+")
"""Of ZFS, or a user property (zfsprops(7))."""


def _override(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _PROPERTY.fullmatch(name) or name.startswith("replicator:"):
            raise refused(f"{name!r} is not a property to set", 'write for example {compression = "zstd"}')
        if name in RESERVED:
            raise refused(f"{name!r} cannot be overridden: {RESERVED[name]}", "leave it out")
        if not text or len(text) > 1024 or not text.isprintable():
            raise refused(f"{name!r} has no value that can be set", "write the value as zfs set takes it")
    return value


def _taken_over(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if name not in TAKEN_OVER:
            close = nearest(name, TAKEN_OVER)
            remedy = f"did you mean {close!r}?" if close else f"leave it out; taken over are {', '.join(TAKEN_OVER)}"
            raise refused(f"{name!r} is not taken over from a source anyway", remedy)
    return value


def _some_included(value: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    if all(pattern.exclude for pattern in value):
        raise refused("selects no volumes", 'name some first, for example ["tank:*", "!tank:*-swap"]')
    return value


def _no_twins(value: tuple[Any, ...]) -> tuple[Any, ...]:
    twins = sorted({str(v) for v in value if value.count(v) > 1})
    if twins:
        raise refused(f"{twins[0]!r} is there twice", "name it once")
    return value


def _not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise refused("is an empty list")
    return value


def _argument(text: str) -> str:
    if not text or "\0" in text:
        raise UsageError(
            "an argument is empty", hint='write the command as a list, for example ["fsfreeze", "-f", "/srv"]'
        )
    return text


_MAIL_SERVER = re.compile(r"(?:\[[0-9a-f:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+")
"""What administrators have; nothing that a header could be broken with."""


def _mail_server(text: str) -> str:
    match = _MAIL_SERVER.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise UsageError(f"{text!r} is no HOST:PORT", hint='write for example "mail.example.org:587"')
    return text


def _mail_address(text: str) -> str:
    if not _MAIL_ADDRESS.fullmatch(text):
        raise UsageError(f"{text!r} is no mail address", hint='write for example "admin@example.org"')
    return text


def _word(text: str) -> str:
    return names.check_word("name", text)


# A TOML list becomes a tuple (that alone is not strict); what is in it is taken strictly as its type.
Duration = Annotated[timedelta, _text(units.parse_duration)]
Rate = Annotated[RateLimit, PlainValidator(_rate_limit, json_schema_input_type=str | list[str])]
AbsolutePath = Annotated[Path, _text(_absolute)]
Devices = dict[Annotated[str, _text(names.check_volume)], Annotated[Path, _text(_device)]]
Dataset = Annotated[str, _text(_dataset)]
Word = Annotated[str, _text(_word)]
NodeName = Annotated[str, _text(names.check_node)]
StorageNames = Annotated[tuple[Word, ...], Strict(False), AfterValidator(_no_twins)]
ClusterNetwork = Annotated[IPv4Network | IPv6Network, _text(_network)]
PeerAddress = Annotated[Address, _text(Address.parse)]
HttpAddress = Annotated[Address | None, _text(_http)]
TimeZone = Annotated[str, _text(_zone)]
KeepText = Annotated[str, _text(_keep)]
Targets = Annotated[
    tuple[Annotated[Target, PlainValidator(_target, json_schema_input_type=str)], ...],
    Strict(False),
    AfterValidator(_not_empty),
    AfterValidator(_no_twins),
]
Patterns = Annotated[
    tuple[Annotated[Pattern, _text(Pattern.parse)], ...],
    Strict(False),
    AfterValidator(_not_empty),
    AfterValidator(_some_included),
]
Snapshots = Annotated[SnapshotPatterns, PlainValidator(_snapshots, json_schema_input_type=list[str])]
Overrides = Annotated[dict[str, str], AfterValidator(_override)]
TakenOver = Annotated[tuple[str, ...], Strict(False), AfterValidator(_no_twins), AfterValidator(_taken_over)]
MailServer = Annotated[str, _text(_mail_server)]
MailAddress = Annotated[str, _text(_mail_address)]
MailAddresses = Annotated[tuple[MailAddress, ...], Strict(False), AfterValidator(_not_empty), AfterValidator(_no_twins)]
Argv = Annotated[tuple[Annotated[str, _text(_argument)], ...], Strict(False), AfterValidator(_not_empty)]
as_source = BeforeValidator(_source, json_schema_input_type=str | list[str] | SourceForm)
