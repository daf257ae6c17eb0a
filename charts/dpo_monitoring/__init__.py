"""Dashboards and alerts as code. Used only in development: `make generate` writes them to the chart and to docs/."""
