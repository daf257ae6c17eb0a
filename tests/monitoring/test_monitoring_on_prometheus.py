"""Runs every query of every panel and alert on a real Prometheus that scrapes a real run and a real operator."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from dpo_api.metrics import METRICS, OPERATOR
from dpo_monitoring.alerts import ALERTS
from dpo_monitoring.pages import DASHBOARDS
from dpo_monitoring.panels import Dashboard
from dpo_monitoring.queries import GPU
from dpo_testing.dcgm import VALUES
from dpo_testing.kubeapi import eventually

if TYPE_CHECKING:
    from conftest import World

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.xdist_group("monitoring")]

QUERIES = [
    pytest.param(query.expr, id=f"{dashboard.uid}: {panel.title}: {query.legend}")
    for dashboard in DASHBOARDS
    for panel in dashboard.panels
    for query in panel.queries
]
PARTS = [
    pytest.param(part, id=f"{alert.name}: part {number}")
    for alert in ALERTS
    for number, part in enumerate(alert.parts, 1)
]


def filled_in(expr: str) -> str:
    """Return a query as Grafana sends it if All is chosen.

    A subquery looks at whole minutes, the first of which a test would wait for: it looks at whole seconds here.
    """
    expr = expr.replace("$__rate_interval", "10s").replace("$__range", "5m").replace(":1m]", ":1s]")
    return expr.replace("$namespace", ".+").replace("$dpojob", ".+").replace("$cluster", ".*")


def answer(world: World, expr: str) -> list[dict[str, Any]]:
    """The series of an expression, once there are any."""
    return eventually(
        lambda: world.prometheus.query(filled_in(expr)), until=bool, seconds=60, what=f"data for {filled_in(expr)}"
    )


@pytest.mark.parametrize("expr", QUERIES)
def test_a_panel_has_data(world: World, expr: str) -> None:
    assert "$" not in filled_in(expr).replace('"$1"', ""), "a variable that no dashboard has"
    if any(metric.name in expr for metric in METRICS if metric.on_gpus or metric.of_several):
        world.prometheus.query(filled_in(expr))  # it is understood; the trainer here has no GPU, and is one process
        return
    assert answer(world, expr)


@pytest.mark.parametrize("expr", PARTS)
def test_what_an_alert_compares_has_data(world: World, expr: str) -> None:
    assert answer(world, expr)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_s_expression_is_understood(world: World, alert: Any) -> None:
    world.prometheus.query(alert.expr)


@pytest.mark.parametrize("mark", [m for d in DASHBOARDS for m in d.annotations], ids=lambda mark: mark.expr)
def test_a_mark_s_expression_is_understood(world: World, mark: Any) -> None:
    assert "$" not in filled_in(mark.expr)
    world.prometheus.query(filled_in(mark.expr))
    if mark.name == "Checkpoints":
        assert answer(world, mark.expr)


def test_choosing_a_job_leaves_out_the_others(world: World) -> None:
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            for query in panel.queries:
                other = query.expr.replace("$namespace", "elsewhere").replace("$dpojob", "nobody")
                if other != query.expr:
                    assert world.prometheus.query(filled_in(other)) == [], panel.title


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_the_variables_have_values(world: World, dashboard: Dashboard) -> None:
    for variable in dashboard.variables:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable.query)
        assert found is not None
        values = {series["metric"].get(found[2]) for series in answer(world, filled_in(found[1]))}
        # This Prometheus gives no cluster: its series fit all the same.
        expected = {"namespace": world.namespace, "dpojob": "curve", "cluster": None}[variable.name]
        assert expected in values


def test_a_run_s_series_are_labelled_with_their_job(world: World) -> None:
    (series,) = answer(world, "dpo_train_loss")
    assert series["metric"]["namespace"] == world.namespace
    assert series["metric"]["dpojob"] == "curve"
    assert series["metric"]["attempt"] == "1"


def test_both_ways_of_labelling_gpus_are_read(world: World) -> None:
    panel = next(panel for panel in DASHBOARDS[0].panels if panel.title == "GPU errors")
    found = eventually(
        lambda: world.prometheus.query(filled_in(panel.queries[0].expr)), until=lambda s: len(s) == 2, what="two GPUs"
    )
    assert {series["metric"]["gpu"] for series in found} == {"0", "1"}
    for series in found:
        assert series["metric"]["pod"] == "curve-1-master-0"
        assert series["metric"]["namespace"] == world.namespace
    assert set(VALUES) == set(GPU)


def exported(world: World) -> set[str]:
    """Names of our series that Prometheus holds, a histogram's three as one."""
    histograms = {metric.name for metric in OPERATOR if metric.kind == "histogram"}
    found = set()
    for name in world.prometheus.get("label/__name__/values"):
        base = re.sub("_(bucket|count|sum)$", "", name)
        if name.startswith("dpo_"):
            found.add(base if base in histograms else name)
    return found


def test_trainer_and_operator_export_exactly_the_table(world: World) -> None:
    table = {metric.name for metric in (*METRICS, *OPERATOR) if not (metric.on_gpus or metric.of_several)}
    eventually(lambda: table - exported(world), until=lambda missing: not missing, what="every series of the table")
    assert exported(world) - table == set()


def test_a_job_that_waits_and_an_operator_that_ends_raise_their_alerts(world: World) -> None:
    fires = eventually(
        world.prometheus.firing, until=lambda found: "DPOJobPendingTooLong" in found, what="the pending job's alert"
    )
    assert [labels["dpojob"] for labels in fires["DPOJobPendingTooLong"]] == ["waits"]
    assert "DPOOperatorDown" not in fires
    world.operator.kill()
    try:
        eventually(world.prometheus.firing, until=lambda found: "DPOOperatorDown" in found, what="the operator's alert")
    finally:
        world.operator.start()  # the other tests need it
        world.operator.wait_ready()
