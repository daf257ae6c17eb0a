"""Metrics and progress of a run: sums that become metrics, the writers they go to, and the status server."""
