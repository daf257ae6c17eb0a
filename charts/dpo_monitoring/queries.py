"""PromQL over our own series. A name without a row in dpo_api.metrics raises KeyError."""

from __future__ import annotations

import re

from dpo_api.metrics import BY_NAME, OPERATOR, Metric

CLUSTER = "cluster"
"""The label by which a Prometheus of several clusters tells them apart; without it, a query by it is the same."""
JOB = (CLUSTER, "namespace", "dpojob")
ATTEMPT = (*JOB, "attempt")

GPU: dict[str, str] = {
    "DCGM_FI_DEV_GPU_UTIL": "GPU utilization in percent.",
    "DCGM_FI_DEV_FB_USED": "Framebuffer memory used in MiB.",
    "DCGM_FI_DEV_FB_FREE": "Framebuffer memory free in MiB.",
    "DCGM_FI_DEV_POWER_USAGE": "Power draw in W.",
    "DCGM_FI_DEV_GPU_TEMP": "GPU temperature in degrees Celsius.",
    "DCGM_FI_DEV_XID_ERRORS": "Value of the last XID error encountered.",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "Share of cycles in which the tensor cores were busy, 0 to 1.",
}
"""The only series that are not ours: those of NVIDIA's dcgm-exporter, by their documented names."""

_CLUSTERS = f'{CLUSTER}=~"${CLUSTER}"'
_HISTOGRAM = ("_bucket", "_sum", "_count")


def metric(name: str) -> Metric:
    """Return the row of a series. KeyError for a name that is not exported."""
    for ending in _HISTOGRAM:
        base = BY_NAME.get(name.removesuffix(ending))
        if base is not None and base.kind == "histogram" and name.endswith(ending):
            return base
    found = BY_NAME[name]
    if found.kind == "histogram":
        raise KeyError(f"{name} is a histogram: use {', '.join(name + ending for ending in _HISTOGRAM)}")
    return found


_NAME = re.compile(r"\bdpo_(?:train|val|data|checkpoint|trainer|job|operator)_\w+")


def rows_in(text: str) -> set[Metric]:
    """Return the rows of all series in a PromQL expression, or in a page that quotes one."""
    return {metric(name) for name in _NAME.findall(text)}


def of_run(name: str, more: str = "") -> str:
    """Select a run's series of the chosen jobs."""
    return f"{metric(name).name}{{{_chosen(name, 'attempt')}{more}}}"


def run(name: str) -> str:
    """Return a run's series by job and attempt: one line for each, even if its pod changed."""
    return f"max by ({', '.join(ATTEMPT)}) ({of_run(name)})"


def run_rate(name: str) -> str:
    """Return the rate per second of a run's counter, by job and attempt."""
    return f"max by ({', '.join(ATTEMPT)}) (rate({of_run(name)}[$__rate_interval]))"


def of_fleet(name: str, more: str = "") -> str:
    """Select the operator's series about the chosen namespaces."""
    metric(name)
    return f'{name}{{namespace=~"$namespace", {_CLUSTERS}{more}}}'


def fleet(name: str, *by: str, more: str = "") -> str:
    """Return the operator's series about the chosen namespaces; two operators during an upgrade count once."""
    return f"max by ({', '.join((CLUSTER, *by))}) ({of_fleet(name, more)})"


def own(name: str) -> str:
    """Return a series of the operator about itself, by cluster."""
    return f"max by ({CLUSTER}) ({of_operator(name)})"


def of_operator(name: str) -> str:
    """Select a series of the operator about itself."""
    metric(name)
    return f"{name}{{{_CLUSTERS}}}"


def gpu(name: str) -> str:
    """Return a series of dcgm-exporter by job, pod and GPU, for the pods of the chosen jobs.

    Without honorLabels, Prometheus prefixes its labels with ``exported_``. Pods are named
    ``<job>-<attempt>-<role>-<index>``.
    """
    if name not in GPU:
        raise KeyError(name)
    role = "-[0-9]+-(?:master|worker)-[0-9]+"
    ways = []
    for prefix in ("exported_", ""):
        chosen = f'{name}{{{prefix}namespace=~"$namespace", {_CLUSTERS}, {prefix}pod=~"(?:$dpojob){role}"}}'
        # If both forms match, the labels of the pod that uses the GPU take precedence.
        missing = "" if prefix else ', exported_pod=""'
        chosen = chosen.replace("}", f"{missing}}}")
        named = f'label_replace({chosen}, "dpojob", "$1", "{prefix}pod", "(.+){role}")'
        if prefix:
            named = f'label_replace({named}, "namespace", "$1", "{prefix}namespace", "(.+)")'
            named = f'label_replace({named}, "pod", "$1", "{prefix}pod", "(.+)")'
        ways.append(named)
    return f"max by ({', '.join((*JOB, 'pod', 'gpu'))}) ({' or '.join(ways)})"


def _chosen(name: str, label: str) -> str:
    if metric(name) in OPERATOR:
        raise KeyError(f"{name} is exported by the operator: it has no label {label}")
    return f'namespace=~"$namespace", {_CLUSTERS}, dpojob=~"$dpojob"'
