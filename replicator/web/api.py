"""The HTTP API: :class:`~replicator.control.Control` as paths below ``/api/v1``.

What only reads is GET. Long work is POST and answers with a stream of events (see :mod:`replicator.web.messages`);
closing the connection stops the work at a resumable point. Errors are JSON: ``{code, message, hint, exit_code,
retryable, kind, problems}`` with a fitting HTTP status.

There are two faces of it. The Unix socket, which only root can open, has everything. The TCP listener has no
authentication, so it is read-only and cheap: health, status, metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from replicator import errors
from replicator.control import (
    Control,
    Finding,
    HistoryEntry,
    OrphanReport,
    PlannedReplica,
    ResyncPreview,
    RoleOrder,
    RolePreview,
    RoleVerb,
    SideSnapshots,
    Status,
)
from replicator.version import version
from replicator.web import messages
from replicator.web.messages import Done, Failure, Health
from replicator.web.streaming import EventStream, Works

MAX_HISTORY = 100_000
"""Entries of one answer, at most."""

Text = Annotated[str, Query(min_length=1, max_length=messages.MAX_TEXT)]
OptionalText = Annotated[str, Query(max_length=messages.MAX_TEXT)]

_STATUSES: tuple[tuple[type[errors.ReplicatorError], int], ...] = (
    # The first that fits; 500 for the rest.
    (errors.UsageError, 400),
    (errors.InvalidName, 400),
    (errors.NoSuchVolume, 404),
    (errors.NoSuchSnapshot, 404),
    (errors.ConflictError, 409),
    (errors.SnapshotExists, 409),
    (errors.SnapshotHeld, 409),
    (errors.VolumeBusy, 409),
    (errors.VolumeChanged, 409),
    (errors.StaleResume, 409),
    (errors.NotAReplica, 409),
    (errors.StaleEpoch, 409),
    (errors.Unsupported, 422),
    (errors.NotAuthorized, 403),
    (errors.NoSpace, 507),
    (errors.DeadlineExceeded, 504),
    (errors.TransportError, 502),
    (errors.StorageUnavailable, 503),
    (errors.Cancelled, 503),
)

_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": Failure, "description": "What went wrong."}}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events, one JSON object a line: progress, note, report, verification, resync, heartbeat; "
        "the last one is result or error.",
        "content": {messages.NDJSON: {"schema": {"type": "string"}}},
    },
    **_ERRORS,
}


def _answer(adapter: TypeAdapter[Any], value: object) -> Response:
    return Response(adapter.dump_json(value), media_type="application/json")


def _failure(error: Exception, status: int) -> Response:
    body = messages.FAILURE.dump_json(Failure.of(error))
    return Response(body, status_code=status, media_type="application/json")


def _refuse(_request: Request, error: Exception) -> Response:
    status = next((status for cls, status in _STATUSES if isinstance(error, cls)), 500)
    return _failure(error, status)


def _refuse_request(_request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": str(error)}
    where = ".".join(str(part) for part in first["loc"])
    told = errors.UsageError(f"the request is wrong at {where}: {first['msg']}", hint="see /api/v1/openapi.json")
    return _failure(told, 422)


def _refuse_http(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = error.detail if isinstance(error, HTTPException) else str(error)
    return _failure(errors.UsageError(f"the API answers: {text}", hint="see /api/v1/openapi.json"), status)


def _answers() -> Health:
    return Health("ok", version())


def make_api(
    control: Control,
    *,
    metrics: Callable[[], bytes],
    health: Callable[[], Health] = _answers,
    read_only: bool = False,
) -> FastAPI:
    """The application.

    :param metrics: makes the text of ``GET /metrics``
    :param health: what the daemon says of itself
    :param read_only: only health, status and metrics, as on the TCP listener
    """
    app = FastAPI(
        title="replicator",
        version=version(),
        description="Replication of disk images, ZFS and Ceph RBD between nodes.",
        openapi_url=f"{messages.PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.works = Works()
    app.add_exception_handler(errors.ReplicatorError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _refuse)

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response, tags=["read"])
    def get_metrics() -> Response:
        return Response(metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    app.include_router(_state(control, health))
    if not read_only:
        app.include_router(_questions(control))
        app.include_router(_orders(control))
        app.include_router(_work(control, app.state.works))
    return app


def works_of(app: FastAPI) -> Works:
    """The long works of an application that :func:`make_api` made."""
    works = app.state.works
    assert isinstance(works, Works)  # noqa: S101  tells the type checker what make_api does
    return works


def _state(control: Control, says: Callable[[], Health]) -> APIRouter:
    """What anybody may read who reaches the listener."""
    router = APIRouter(prefix=messages.PREFIX, tags=["read"])

    @router.get("/health", summary="Whether the daemon answers", response_model=Health)
    def health() -> Response:
        return _answer(messages.HEALTH, says())

    @router.get("/status", summary="What every replica is like now", response_model=Status)
    def status() -> Response:
        return _answer(messages.STATUS, control.status())

    return router


def _questions(control: Control) -> APIRouter:
    """What reads, and costs more than a look."""
    router = APIRouter(prefix=messages.PREFIX, tags=["read"])

    @router.get("/plan", summary="What a run would do now", response_model=tuple[PlannedReplica, ...])
    def plan(job: Text | None = None) -> Response:
        return _answer(messages.PLAN, control.plan(job))

    @router.get("/resync", summary="What a resync would change", response_model=tuple[ResyncPreview, ...])
    def preview_resync(volume: Text, target: Text | None = None, full: bool = False) -> Response:
        return _answer(messages.PREVIEWS, control.preview_resync(volume, target, full))

    @router.get("/role", summary="What a change of role would do", response_model=RolePreview)
    def preview_role(
        verb: RoleVerb,
        volume: Text,
        node: OptionalText = "",
        force: bool = False,
        primary_is_down: bool = False,
        fail_back: bool = False,
    ) -> Response:
        order = RoleOrder(verb, volume, node, force, primary_is_down, fail_back)
        return _answer(messages.ROLE_PREVIEW, control.preview_role(order))

    @router.get("/snapshots", summary="Snapshots of a volume on every side", response_model=tuple[SideSnapshots, ...])
    def snapshots(volume: Text) -> Response:
        return _answer(messages.SNAPSHOTS, control.snapshots(volume))

    @router.get("/orphans", summary="Replicas without sources", response_model=tuple[OrphanReport, ...])
    def orphans(job: Text) -> Response:
        return _answer(messages.ORPHANS, control.orphans(job))

    @router.get("/history", summary="What happened, newest first", response_model=tuple[HistoryEntry, ...])
    def history(limit: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 100) -> Response:
        return _answer(messages.HISTORY, control.history(limit))

    @router.get("/check", summary="Configuration, network, storages, peers", response_model=tuple[Finding, ...])
    def check() -> Response:
        return _answer(messages.FINDINGS, control.check())

    return router


def _orders(control: Control) -> APIRouter:
    """What changes something at once."""
    router = APIRouter(prefix=messages.PREFIX, tags=["change"])

    @router.post("/pause", summary="Let a job not run by itself any more", response_model=Done)
    def pause(job: Text) -> Response:
        control.pause(job)
        return _answer(messages.DONE, Done())

    @router.post("/resume", summary="Let a paused job run by its schedule again", response_model=Done)
    def resume(job: Text) -> Response:
        control.resume(job)
        return _answer(messages.DONE, Done())

    return router


def _work(control: Control, works: Works) -> APIRouter:
    """Long work."""
    router = APIRouter(prefix=messages.PREFIX, tags=["work"])

    @router.post("/sync", summary="Run a job now", response_class=Response, responses=_STREAM)
    def sync(order: messages.SyncRequest) -> Response:
        return EventStream(
            works,
            lambda listen, cancel: messages.REPORTS.dump_json(
                control.sync(order.job, order.volume, order.target, listen, cancel)
            ),
        )

    @router.post("/resync", summary="Make replicas right again", response_class=Response, responses=_STREAM)
    def resync(order: messages.ResyncRequest) -> Response:
        return EventStream(
            works,
            lambda listen, cancel: messages.RESYNCS.dump_json(
                control.resync(order.volume, order.target, order.full, listen, cancel)
            ),
        )

    @router.post("/verify", summary="Compare replicas with their source", response_class=Response, responses=_STREAM)
    def verify(order: messages.VerifyRequest) -> Response:
        return EventStream(
            works,
            lambda listen, cancel: messages.VERIFICATIONS.dump_json(
                control.verify(order.volume, order.target, order.snapshot, order.repair, order.scrub, listen, cancel)
            ),
        )

    @router.post("/prune", summary="Apply a job's retention now", response_class=Response, responses=_STREAM)
    def prune(order: messages.PruneOrder) -> Response:
        return EventStream(
            works, lambda _listen, _cancel: messages.PRUNES.dump_json(control.prune(order.job, order.dry_run))
        )

    @router.post(
        "/remove-orphans", summary="Remove replicas without sources", response_class=Response, responses=_STREAM
    )
    def remove_orphans(order: messages.OrphanOrder) -> Response:
        return EventStream(
            works, lambda _listen, _cancel: messages.ORPHANS.dump_json(control.remove_orphans(order.job, order.wanted))
        )

    @router.post("/role", summary="Promote, demote, switch over or rejoin", response_class=Response, responses=_STREAM)
    def change_role(order: RoleOrder) -> Response:
        return EventStream(
            works, lambda listen, cancel: messages.ROLE_REPORT.dump_json(control.change_role(order, listen, cancel))
        )

    @router.post("/restore", summary="Make a snapshot a new volume", response_class=Response, responses=_STREAM)
    def restore(order: messages.RestoreRequest) -> Response:
        return EventStream(
            works,
            lambda listen, cancel: messages.RESTORED.dump_json(
                control.restore(order.snapshot, order.to, listen, cancel)
            ),
        )

    return router
