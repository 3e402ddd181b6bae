"""Alert rules for Prometheus, and tests of them for ``promtool test rules``. Pure.

https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/ and .../unit_testing_rules/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta

from replicator.monitoring.alerts import ALERTS, Alert, Example
from replicator.monitoring.site import Site
from replicator.monitoring.yaml_text import Value, to_yaml

INTERVAL = timedelta(minutes=1)
"""Between two evaluations in the tests."""
RUNBOOK = "runbook.md"


def alerts_of(site: Site) -> tuple[Alert, ...]:
    """Those that have something to watch there."""
    return tuple(alert for alert in ALERTS if alert.expression(site))


def rules(site: Site) -> str:
    """The rule file."""
    group: Value = {
        "name": f"replicator {site.node}",
        "rules": [
            {
                "alert": alert.name,
                "expr": alert.expression(site),
                "for": _prometheus(_wait(alert, site)),
                "labels": {"severity": alert.severity},
                "annotations": _annotations(alert),
            }
            for alert in alerts_of(site)
        ],
    }
    return to_yaml({"groups": [group]})


def rule_tests(site: Site, rule_file: str) -> str:
    """The file of tests: each alert fires when it has held for long enough, not before, and not while all is well."""
    return to_yaml(
        {
            "rule_files": [rule_file],
            "evaluation_interval": _prometheus(INTERVAL),
            "tests": [test for alert in alerts_of(site) for test in _tests(alert, site)],
        }
    )


def targets(site: Site) -> str:
    """What ``file_sd_configs`` reads: where the node is, and what it is called."""
    return json.dumps([{"targets": [site.address], "labels": {"node": site.node}}], indent=2) + "\n"


def runbook() -> str:
    """All alerts, what they mean and what to do, as Markdown."""
    return "\n".join(
        [
            "# Runbook",
            "",
            "What each alert means, what to look at, and what to do. Written by `replicator monitoring export`, which",
            "makes the rules from the same texts.",
            "",
            *(line for alert in ALERTS for line in _section(alert)),
        ]
    )


def _section(alert: Alert) -> Iterator[str]:
    wait = f" for {_prometheus(alert.wait)}" if alert.wait else ", at once"
    yield from (f"## {alert.name}", "", f"*{alert.severity}{wait}.* {alert.meaning}", "")
    yield from (f"**Look:** {alert.look}", "", f"**Do:** {alert.act}", "")


def _wait(alert: Alert, site: Site) -> timedelta:
    return timedelta(0) if site.at_once else alert.wait


def _annotations(alert: Alert) -> Mapping[str, str]:
    return {"summary": alert.summary, "description": f"{alert.meaning} Look: {alert.look}", "runbook": _anchor(alert)}


def _anchor(alert: Alert) -> str:
    return f"{RUNBOOK}#{alert.name.lower()}"


def _prometheus(duration: timedelta) -> str:
    """As Prometheus writes durations: whole numbers of h, m, s."""
    seconds = round(duration.total_seconds())
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _tests(alert: Alert, site: Site) -> Iterator[Value]:
    example = alert.example(site)
    wait = _wait(alert, site)
    fires = example.begins + wait + INTERVAL
    fires = -(-fires // INTERVAL) * INTERVAL
    expected = {
        "exp_labels": {**_labels(site, example), "severity": alert.severity},
        "exp_annotations": {key: _shown(text, site, example) for key, text in _annotations(alert).items()},
    }
    moments: list[Value] = [_moment(alert, fires, [expected])]
    before = example.begins + wait - INTERVAL
    if wait >= 2 * INTERVAL:
        moments.insert(0, _moment(alert, before // INTERVAL * INTERVAL, []))
    yield _test(site, example, fires, moments)
    (name, labels, _), *others = example.series
    quiet = Example(((name, labels, example.quiet), *others), example.quiet)
    yield _test(site, quiet, fires, [_moment(alert, fires, [])])


def _moment(alert: Alert, at: timedelta, expected: list[Value]) -> Value:
    return {"eval_time": _prometheus(at), "alertname": alert.name, "exp_alerts": expected}


def _test(site: Site, example: Example, until: timedelta, moments: list[Value]) -> Value:
    count = until // INTERVAL + 1
    return {
        "interval": _prometheus(INTERVAL),
        "input_series": [
            {"series": _series(site, name, labels), "values": f"{value:.15g}x{count}"}
            for name, labels, value in example.series
        ],
        "alert_rule_test": moments,
    }


def _series(site: Site, name: str, labels: Mapping[str, str]) -> str:
    given = {"node": site.node, "instance": site.address, **labels}
    full = name if name == "up" else f"replicator_{name}"
    return f"{full}{{{','.join(f'{key}={json.dumps(value)}' for key, value in given.items())}}}"


def _labels(site: Site, example: Example) -> dict[str, str]:
    """Of the alert that fires."""
    if example.labels is not None:
        return {"node": site.node, **example.labels}
    _, labels, _ = example.series[0]
    return {"node": site.node, "instance": site.address, **labels}


def _shown(text: str, site: Site, example: Example) -> str:
    """A template as Prometheus fills it in."""
    for name, value in _labels(site, example).items():
        text = text.replace(f"{{{{ $labels.{name} }}}}", value)
    head, mark, rest = text.partition("{{ $value")
    return head + example.shown + rest.partition("}}")[2] if mark else text
