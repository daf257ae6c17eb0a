"""The process around the pure reconcile: watches, caches, the work queue, requests, health and metrics."""
