"""Writes the JSON of a dashboard with Grafana's Foundation SDK."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from grafana_foundation_sdk.builders import common, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as words
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dpo_monitoring.panels import Annotation, Dashboard, Form, Panel, Row, Variable

TAG = "dpo-operator"
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_LETTERS = "ABCDEFGHIJKLMNOP"

type _Built = timeseries.Panel | stat.Panel | table.Panel


def to_json(dashboard: Dashboard) -> str:
    """Return the dashboard's JSON. Equal dashboards give equal text."""
    return JSONEncoder(sort_keys=True, indent=2).encode(_dashboard(dashboard).build()) + "\n"


def _dashboard(dashboard: Dashboard) -> builders.Dashboard:
    numbers = itertools.count(1)
    built = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags([TAG])
        .time(dashboard.start, "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .link(_others())
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in dashboard.variables:
        built.with_variable(_variable(variable))
    for annotation in dashboard.annotations:
        built.annotation(_Marks(annotation))
    for row in dashboard.rows:
        built.with_row(_row(row, numbers))
        if not row.folded:
            for panel in row.panels:
                built.with_panel(_panel(panel, next(numbers)))
    return built


def _others() -> builders.DashboardLink:
    """The other dashboards with our tag."""
    link = builders.DashboardLink("Other dashboards of DPO jobs").type(models.DashboardLinkType.DASHBOARDS)
    return link.tags([TAG]).include_vars(include_vars=True).keep_time(keep_time=True)


def _variable(variable: Variable) -> builders.QueryVariable:
    return (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.description)
        .datasource(_SOURCE)
        .query({"query": variable.query, "refId": variable.name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(variable.everything)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


class _Marks(builders.AnnotationQuery):
    """An annotation with the texts that only the Prometheus data source reads."""

    def __init__(self, annotation: Annotation) -> None:
        super().__init__()
        self._internal = _AnnotationModel(annotation.text)
        self.name(annotation.name).datasource(_SOURCE).enable(annotation.shown).icon_color(annotation.color)
        self.expr(annotation.expr)


class _AnnotationModel(models.AnnotationQuery):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"titleFormat": self._text, "textFormat": "{{namespace}}", "tagKeys": "dpojob"}


def _row(row: Row, numbers: Iterator[int]) -> builders.Row:
    built = builders.Row(row.title).id(next(numbers)).collapsed(collapsed=row.folded)
    if row.folded:  # Grafana keeps the panels of a folded row inside it
        for panel in row.panels:
            built.with_panel(_panel(panel, next(numbers)))
    return built


def _panel(panel: Panel, number: int) -> _Built:
    built = _FORMS[panel.form](panel).id(number).title(panel.title).description(panel.description)
    built.datasource(_SOURCE).unit(panel.unit).span(panel.width).height(panel.height).no_value(panel.none)
    if panel.lowest is not None:
        built.min(panel.lowest)
    if panel.highest is not None:
        built.max(panel.highest)
    if panel.decimals is not None:
        built.decimals(panel.decimals)
    for letter, query in zip(_LETTERS, panel.queries, strict=False):
        target = queries.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend).datasource(_SOURCE)
        if panel.form == "table":
            target.instant().format(PromQueryFormat.TABLE)
        elif panel.form == "stat":
            target.instant()
        else:
            target.range()
        built.with_target(target)
    return built


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(show_legend=True).placement(words.LegendPlacement.BOTTOM)
    legend.display_mode(words.LegendDisplayMode.LIST)
    tooltip = common.VizTooltipOptions().mode(words.TooltipDisplayMode.MULTI).sort(words.SortOrder.DESCENDING)
    built = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).fill_opacity(0)
    if panel.form == "stacked":
        built.stacking(common.StackingConfig().mode(words.StackingMode.NORMAL)).fill_opacity(30)
    if panel.logarithmic:
        built.scale_distribution(common.ScaleDistributionConfig().type(words.ScaleDistribution.LOG).log(10))
    return built


def _stat(_: Panel) -> stat.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(reduce)
        .text_mode(words.BigValueTextMode.VALUE_AND_NAME)
        .graph_mode(words.BigValueGraphMode.NONE)
    )


def _table(panel: Panel) -> table.Panel:
    """One row per job: the results of the queries side by side, without Prometheus' own columns."""
    names: dict[str, str] = {"cluster": "Cluster", "namespace": "Namespace", "dpojob": "Job", "state": "State"}
    hidden = {"Time": True}
    for letter, query in zip(_LETTERS, panel.queries, strict=False):
        names[f"Value #{letter}"] = query.legend
        hidden[f"Value #{letter}"] = query.legend == "State"  # the state is a label; its value is always 1
    built = table.Panel()
    built.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    options = {"excludeByName": {name: True for name, gone in hidden.items() if gone}, "renameByName": names}
    built.with_transformation(models.DataTransformerConfig(id_val="organize", options=options))
    for title, unit in panel.units.items():
        built.override_by_name(title, [models.DynamicConfigValue(id_val="unit", value=unit)])
    built.override_by_name("Job", [models.DynamicConfigValue(id_val="links", value=[_TO_TRAINING])])
    return built


_TO_TRAINING = {
    "title": "DPO training",
    "url": "/d/dpo-training?var-namespace=${__data.fields.Namespace}&var-dpojob=${__value.text}"
    "&${cluster:queryparam}&${__url_time_range}",
}

_FORMS: dict[Form, Callable[[Panel], _Built]] = {"lines": _lines, "stacked": _lines, "stat": _stat, "table": _table}
