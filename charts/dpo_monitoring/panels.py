"""The parts of a dashboard, as plain data; ``grafana`` converts them to Grafana's JSON."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

Form = Literal["lines", "stacked", "stat", "table"]


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expr: str
    legend: str = ""
    """Text of the legend; in a table, the title of the column."""


@dataclass(frozen=True)
class Panel:
    """One panel. Its title is unique in its dashboard."""

    title: str
    description: str
    """What the panel shows, and how to read it."""
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[Query, ...]
    _: KW_ONLY
    form: Form = "lines"
    width: int = 8
    """Of 24."""
    height: int = 8
    lowest: float | None = None
    highest: float | None = None
    decimals: int | None = None
    logarithmic: bool = False
    none: str = "–"
    """Shown if there is no value."""
    units: dict[str, str] = field(default_factory=dict)
    """For a table: the unit of a column, by its title."""


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]
    folded: bool = False


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of one label."""

    name: str
    label: str
    description: str
    query: str
    everything: str = ".+"
    """The pattern for All."""


def clusters(series: str) -> Variable:
    """Return the choice of clusters. Where no series has the label, only All can be chosen, which fits every series."""
    text = "Clusters, where Prometheus gives series the label cluster."
    return Variable("cluster", "Cluster", text, f"label_values({series}, cluster)", ".*")


@dataclass(frozen=True)
class Annotation:
    """Marks on the time axis of every panel, at each time at which a query has a value."""

    name: str
    description: str
    expr: str
    text: str
    color: str
    shown: bool = True
    """Whether it is on when the dashboard opens."""


@dataclass(frozen=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    start: str
    """The initial time range, such as now-6h."""
    annotations: tuple[Annotation, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)
