"""A dashboard for Grafana: one for all nodes, with a choice of them. Pure.

https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from replicator.health import STALLED

UID = "replicator"
NODES = '{node=~"$node"}'
_WIDTH = 24
"""Columns of a dashboard."""
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    :ivar queries: expression and legend
    :ivar unit: of Grafana: s, bytes, Bps, short, dateTimeFromNow, percentunit
    :ivar kind: timeseries, stat or table
    :ivar limits: value and colour from which on it has that, ascending
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    limits: tuple[tuple[float, str], ...] = ()
    about: str = ""


_REPLICA = "{{volume}} on {{target}}"
_BAD = ((1.0, "red"),)
PANELS = (
    Panel(
        "Replicas",
        ((f"count(replicator_replica_consecutive_failures{NODES})", ""),),
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Behind their objective",
        (
            (
                f"count(replicator_replica_lag_seconds{NODES} > replicator_replica_lag_objective_seconds) or vector(0)",
                "",
            ),
        ),
        kind="stat",
        width=4,
        height=4,
        limits=_BAD,
    ),
    Panel(
        "Failed or in conflict",
        (('sum(replicator_replica_state{node=~"$node",state=~"failed|conflict"}) or vector(0)', ""),),
        kind="stat",
        width=4,
        height=4,
        limits=_BAD,
    ),
    Panel(
        "Known to differ",
        ((f"sum(replicator_replica_mismatched_bytes{NODES}) or vector(0)", ""),),
        "bytes",
        kind="stat",
        width=4,
        height=4,
        limits=_BAD,
    ),
    Panel(
        "Peers down",
        ((f"sum(1 - replicator_peer_up{NODES}) or vector(0)", ""),),
        kind="stat",
        width=4,
        height=4,
        limits=_BAD,
    ),
    Panel(
        "Scheduler last seen",
        ((f"time() - replicator_scheduler_heartbeat_timestamp_seconds{NODES}", "{{node}}"),),
        "s",
        kind="stat",
        width=4,
        height=4,
        limits=((STALLED.total_seconds(), "red"),),
    ),
    Panel(
        "Lag",
        ((f"replicator_replica_lag_seconds{NODES}", _REPLICA),),
        "s",
        about="How much would be lost if the source were lost now, at most.",
    ),
    Panel(
        "Lag as part of what is allowed",
        ((f"replicator_replica_lag_seconds{NODES} / replicator_replica_lag_objective_seconds", _REPLICA),),
        "percentunit",
        limits=((1.0, "red"),),
        about="Where the job has max_lag. Above 100% the objective is missed.",
    ),
    Panel(
        "Replicas, worst first",
        ((f"sort_desc(replicator_replica_lag_seconds{NODES})", ""),),
        "s",
        kind="table",
        width=24,
    ),
    Panel(
        "Sent",
        (
            (
                f"sum by (job, target) (rate(replicator_sent_bytes_total{NODES}[$__rate_interval]))",
                "{{job}} to {{target}}",
            ),
        ),
        "Bps",
        about="Over the network, after compression.",
    ),
    Panel(
        "Transfers under way",
        ((f"sum by (job, target) (replicator_transfers_active{NODES})", "{{job}} to {{target}}"),),
    ),
    Panel(
        "Runs",
        (
            (
                f"sum by (job, outcome) (increase(replicator_runs_total{NODES}[$__rate_interval]))",
                "{{job}}: {{outcome}}",
            ),
        ),
        about="By how they ended, one for each volume.",
    ),
    Panel(
        "How long runs take, 95 of 100",
        (
            (
                "histogram_quantile(0.95, sum by (job, target, le) "
                f"(rate(replicator_run_duration_seconds_bucket{NODES}[$__rate_interval])))",
                "{{job}} to {{target}}",
            ),
        ),
        "s",
    ),
    Panel("Failures in a row", ((f"replicator_replica_consecutive_failures{NODES} > 0", _REPLICA),)),
    Panel("Not sent yet", ((f"replicator_replica_backlog_bytes{NODES}", _REPLICA),), "bytes"),
    Panel(
        "Free space",
        ((f"replicator_storage_free_bytes{NODES} / replicator_storage_size_bytes", "{{node}}: {{storage}}"),),
        "percentunit",
    ),
    Panel("Round trip", ((f"replicator_peer_round_trip_seconds{NODES}", "{{node}} to {{peer}}"),), "s"),
    Panel("Clocks", ((f"replicator_peer_clock_difference_seconds{NODES}", "{{peer}} seen from {{node}}"),), "s"),
    Panel(
        "Certificates end in",
        ((f"replicator_certificate_expiry_timestamp_seconds{NODES} - time()", "{{node}}"),),
        "s",
        kind="stat",
    ),
)


def dashboard() -> str:
    """The dashboard as Grafana imports it."""
    return (
        json.dumps(
            {
                "uid": UID,
                "title": "replicator",
                "tags": ["replicator"],
                "schemaVersion": 39,
                "editable": True,
                "refresh": "30s",
                "time": {"from": "now-24h", "to": "now"},
                "timezone": "browser",
                "templating": {"list": [_source(), _nodes()]},
                "panels": list(_placed(PANELS)),
            },
            indent=2,
        )
        + "\n"
    )


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _nodes() -> dict[str, Any]:
    query = "label_values(replicator_build_info, node)"
    return {
        "name": "node",
        "label": "Node",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "nodes"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _placed(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    """From left to right, row by row."""
    x = y = row = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > _WIDTH:
            x, y, row = 0, y + row, 0
        yield _panel(number, panel, x, y)
        x, row = x + panel.width, max(row, panel.height)


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in panel.limits]
    once = panel.kind == "table"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {"thresholdsStyle": {"mode": "line"}} if panel.limits and panel.kind == "timeseries" else {},
            },
            "overrides": [],
        },
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if panel.kind == "stat" else {},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": once,
                "range": not once,
                "format": "table" if once else "time_series",
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }
