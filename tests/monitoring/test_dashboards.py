"""The generated dashboards for Grafana, the rules for Prometheus, and the pages about both."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units

from dpo_api.metrics import BY_NAME, RUN_LABELS, Metric
from dpo_monitoring.alerts import ALERTS, RUNBOOKS, rules
from dpo_monitoring.pages import DASHBOARDS, REPOSITORY, generated, shown_in
from dpo_monitoring.queries import GPU, metric, of_run
from dpo_testing.s3server import tool

FILES = [REPOSITORY / "charts/dpo-operator/dashboards" / f"{dashboard.uid}.json" for dashboard in DASHBOARDS]
UNITS = {value for value in vars(units).values() if isinstance(value, str)}
NAME = re.compile(r"\b(?:dpo_(?:train|val|data|checkpoint|trainer|job|operator)_\w+|DCGM_\w+)")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels but the rows, those inside folded rows included."""
    everything = [*dashboard["panels"], *(inner for row in dashboard["panels"] for inner in row.get("panels", ()))]
    return [panel for panel in everything if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


@pytest.mark.parametrize("path", generated(), ids=str)
def test_what_is_generated_is_what_make_generate_writes(path: Path) -> None:
    assert (REPOSITORY / path).read_text() == generated()[path], "run `make generate`"


def test_the_chart_holds_no_dashboard_or_rule_beside() -> None:
    chart = REPOSITORY / "charts/dpo-operator"
    there = {path.relative_to(REPOSITORY) for folder in ("dashboards", "rules") for path in (chart / folder).iterdir()}
    assert there == {path for path in generated() if path.parts[0] == "charts"}


def test_dashboards_have_unique_names() -> None:
    found = [json.loads(path.read_text()) for path in FILES]
    assert len({item["uid"] for item in found}) == len({item["title"] for item in found}) == len(found)
    assert {item["title"] for item in found} == {"DPO training", "DPO fleet"}


def test_data_source_and_jobs_can_be_chosen(dashboard: dict[str, Any]) -> None:
    variables = {item["name"]: item for item in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    wanted = ["cluster", "namespace", *(["dpojob"] if dashboard["uid"] == "dpo-training" else [])]
    assert list(variables) == ["datasource", *wanted]
    for name in wanted:
        variable = variables[name]
        assert variable["type"] == "query"
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert variable["multi"], "several are compared"
        assert variable["includeAll"]
        assert variable["description"]
        assert variable["label"]
        # A Prometheus of one cluster gives no series the label: All must fit those too.
        assert re.fullmatch(variable["allValue"], "") or name != "cluster"


def test_every_query_keeps_clusters_apart(dashboard: dict[str, Any]) -> None:
    """What is selected is of the chosen clusters, and what is aggregated by job is aggregated by cluster too."""
    for expr in (*expressions(dashboard), *(mark["expr"] for mark in dashboard["annotations"]["list"])):
        selectors = re.findall(r"(?:dpo|DCGM)_\w+(\{[^}]*\}|)", expr)
        assert selectors
        assert all('cluster=~"$cluster"' in selector for selector in selectors), expr
        for by in re.findall(r"by \(([^)]*dpojob[^)]*)\)", expr):
            assert by.startswith("cluster, namespace, dpojob"), expr


def test_marks_on_the_time_axis_say_what_they_mark() -> None:
    marks = {mark["name"]: mark for mark in json.loads(FILES[0].read_text())["annotations"]["list"]}
    assert set(marks) == {"New attempts", "Checkpoints"}
    for mark in marks.values():
        assert mark["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert "{{dpojob}}" in mark["titleFormat"]
    assert (marks["New attempts"]["enable"], marks["Checkpoints"]["enable"]) == (True, False)


def test_every_panel_asks_the_chosen_prometheus(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        for target in (panel, *panel["targets"]):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_every_panel_has_an_id_a_title_a_unit_a_description_and_queries(dashboard: dict[str, Any]) -> None:
    numbers = [panel["id"] for panel in dashboard["panels"]] + [
        inner["id"] for row in dashboard["panels"] for inner in row.get("panels", ())
    ]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        for override in panel["fieldConfig"]["overrides"]:
            for change in override["properties"]:
                assert change["id"] != "unit" or change["value"] in UNITS


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    for group in (dashboard["panels"], *(row["panels"] for row in dashboard["panels"] if row.get("panels"))):
        taken: dict[tuple[int, int], str] = {}
        for panel in group:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"])
                         for y in range(place["y"], place["y"] + place["h"])):  # fmt: skip
                assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
                taken[cell] = panel["title"]


def test_no_query_names_a_series_that_is_not_exported(dashboard: dict[str, Any]) -> None:
    named = {name for expr in expressions(dashboard) for name in NAME.findall(expr)}
    assert named
    for name in named:
        if name not in GPU:
            metric(name)


def test_the_queries_of_a_run_aggregate_over_pods_and_follow_the_choice() -> None:
    training = json.loads(FILES[0].read_text())
    for expr in expressions(training):
        assert " by (" in expr, expr
        assert 'namespace=~"$namespace"' in expr, expr
        assert "$dpojob" in expr, expr
    fleet = json.loads(FILES[1].read_text())
    for expr in expressions(fleet):
        for found in re.finditer(r"dpo_(?:job_|operator_jobs|operator_gpus)\w*(.{0,24})", expr):
            assert found[1].startswith('{namespace=~"$namespace"'), expr


@pytest.mark.parametrize("row", BY_NAME.values(), ids=lambda row: row.name)
def test_a_series_has_a_panel_or_a_reason_for_none(row: Metric) -> None:
    panels = [place for place in shown_in(row) if "alerts/" not in place]
    assert bool(panels) != bool(row.no_panel), f"{row.name}: add a panel in charts/dpo_monitoring, or no_panel"


@pytest.mark.parametrize("name", ["dpo_train_lose", "dpo_operator_reconcile_duration_seconds", "dpo_train_loss_bucket"])
def test_a_wrong_name_cannot_be_written(name: str) -> None:
    with pytest.raises(KeyError):
        metric(name)


def test_a_series_of_the_operator_is_not_taken_for_a_run_s() -> None:
    with pytest.raises(KeyError):
        of_run("dpo_job_state")


def test_an_alert_compares_exactly_its_parts() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS) == 11
    for alert in ALERTS:
        rest = alert.expr
        for part in sorted(alert.parts, key=len, reverse=True):
            assert part in alert.expr, f"{alert.name}: {part} is no part of it"
            rest = rest.replace(part, "")
        assert not NAME.findall(rest.replace("offset", "")) or alert.name == "DPOCheckpointTooOld", rest
        for name in NAME.findall(alert.expr):
            metric(name)


def test_every_threshold_of_an_alert_is_a_value_of_the_chart() -> None:
    schema = json.loads((REPOSITORY / "charts/dpo-operator/values.schema.json").read_text())
    of_alerts = schema["properties"]["monitoring"]["properties"]["rules"]["properties"]["alerts"]["patternProperties"]
    common = {"enabled", "severity", "for"}
    found = {name.strip("^$"): set(each["properties"]) - common for name, each in of_alerts.items()}
    assert found == {alert.name: set(alert.thresholds) for alert in ALERTS}
    for alert in ALERTS:
        named = set(re.findall(r"@(\w+)@", json.dumps(alert.template)))
        assert named == set(alert.thresholds), alert.name
        assert "@" not in json.dumps(alert.rule), alert.name


def test_an_alert_has_its_job_a_severity_and_a_link_to_its_page() -> None:
    for alert in ALERTS:
        assert alert.summary
        assert alert.description.endswith(".")
        if alert.name != "DPOOperatorDown":
            assert all(f"$labels.{label}" in alert.summary for label in RUN_LABELS[:2])
        assert alert.rule["annotations"]["runbook_url"] == f"{RUNBOOKS}/{alert.name}.md"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_has_a_page_with_ordered_steps(alert: Any) -> None:
    page = (REPOSITORY / "docs/alerts" / f"{alert.name}.md").read_text()
    assert page.startswith(f"# {alert.name}\n")
    for heading in ("## What it means", "## What to check, in order", "## How to fix it"):
        assert heading in page
    assert "\n1. " in page
    for name in NAME.findall(page):
        metric(name)


def test_every_page_is_of_an_alert() -> None:
    pages = {path.stem for path in (REPOSITORY / "docs/alerts").glob("*.md")}
    assert pages == {alert.name for alert in ALERTS}


def test_promtool_takes_the_rules_and_their_unit_tests_hold(tools: None) -> None:
    promtool = str(tool("promtool"))
    for command in (
        [promtool, "check", "rules", "--lint=all", "--lint-fatal", "charts/dpo-operator/rules/alerts.yaml"],
        [promtool, "test", "rules", "tests/monitoring/alert_cases.yaml"],
    ):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = yaml.safe_load((REPOSITORY / "tests/monitoring/alert_cases.yaml").read_text())
    checks = [check for group in cases["tests"] for check in group["alert_rule_test"]]
    for alert in ALERTS:
        own = [check for check in checks if check["alertname"] == alert.name]
        assert any(check["exp_alerts"] for check in own), f"{alert.name} fires nowhere"
        assert any(not check["exp_alerts"] for check in own), f"{alert.name} is silent nowhere"
    assert {check["alertname"] for check in checks} == {rule["alert"] for rule in rules()["groups"][0]["rules"]}
