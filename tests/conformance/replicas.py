"""A replica under test, and how it is asked to take something."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest, SendRequest
from replicator.errors import (
    ConnectionLost,
)
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VolumeId, VolumeState
from replicator.streams import BLOCK_SIZE, Stream
from tests.support.blocks import (
    KEY,
    changed,
    full_chunks,
    make_chunk,
    make_stream,
    make_version,
    pattern,
)
from tests.support.cases import BackendCase

VM = VolumeId("store", "prox1/vm")
SOURCE = VolumeId("store", "source")
PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
OTHER = Lineage("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
SIZE = 8 * BLOCK_SIZE
DATA = changed(pattern(SIZE), [(BLOCK_SIZE, BLOCK_SIZE)])
TAG = "replicator:vms:prox2:backup"


def asked(to: Version, base: Version | None = None, **request: object) -> ReceiveRequest:
    made = ReceiveRequest(VM, PRIMARY, base.ref if base else None, to, KEY)
    return replace(made, **request)  # type: ignore[arg-type]


def receive(case: BackendCase, request: ReceiveRequest, stream: Stream, cancel: Cancellation | None = None) -> Version:
    with stream:
        return case.backend.receive(request, stream, cancel or Cancellation())


def first(case: BackendCase, name: str = "one") -> Version:
    """The replica with a first snapshot of DATA; of native streams beside its source."""
    if case.backend.stream is StreamKind.NATIVE:
        case.create(SOURCE.name, DATA)
        case.backend.set_lineage(SOURCE.name, PRIMARY)
        (version,) = case.backend.snapshot((SOURCE.name,), name)
        return sent(case, SOURCE, asked(version))
    return receive(case, asked(make_version(name, SIZE)), make_stream(*full_chunks(DATA)))


def sent(case: BackendCase, source: VolumeId, request: ReceiveRequest) -> Version:
    """What was asked for, as the native stream of a volume of the same storage that has it."""
    asked_for = SendRequest(source, request.base, request.to.ref, KEY, lineage=request.lineage)
    stream = case.backend.send(asked_for, Cancellation())
    return receive(case, replace(request, kind=StreamKind.NATIVE), stream)


def state_of(case: BackendCase) -> VolumeState:
    state = case.backend.state(VM.name)
    assert state is not None
    return state


def rest_of(data: bytes, resume: ResumeState) -> Stream:
    """What a source sends of ``data`` to continue."""
    return make_stream(*([make_chunk((resume.offset, data[resume.offset :]))] if resume.offset < len(data) else []))


def interrupted(case: BackendCase, base: Version | None, to: Version, data: bytes) -> ResumeState:
    with pytest.raises(ConnectionLost):
        receive(case, asked(to, base), make_stream(*full_chunks(data)[:2], then=ConnectionLost("cut")))
    resume = state_of(case).resume
    assert resume is not None
    return resume
