"""Dashboards and alerts as code. For development only: what users get is generated into the chart and into docs/."""
