"""`dpo status` and `dpo top`: what the cluster stores about jobs."""

from __future__ import annotations

import json
import sys
import time

import yaml

from dpo_cli.cluster.kubectl import Kubectl
from dpo_cli.cluster.show import status_lines, top_lines
from dpo_cli.console import stderr, stdout


def status(kubectl: Kubectl, name: str, output: str) -> None:
    """Print one job's status: as a screen of text, or as it is stored. Raises ClusterError."""
    job = kubectl.job(name)
    if output == "json":
        sys.stdout.write(json.dumps(job.raw.get("status") or {}, indent=2, ensure_ascii=False) + "\n")
    elif output == "yaml":
        stored = yaml.safe_dump(job.raw.get("status") or {}, sort_keys=False, allow_unicode=True, width=120)
        sys.stdout.write(stored)
    else:
        first, *rest = status_lines(job, kubectl)
        stdout().print(first, style="bold")
        for line in rest:
            stdout().print(line)


def top(kubectl: Kubectl, *, everywhere: bool) -> None:
    """Print one line per job. Raises ClusterError."""
    jobs = kubectl.jobs(everywhere=everywhere)
    if not jobs:
        place = "" if everywhere else f" in {kubectl.namespace} namespace" if kubectl.namespace else ""
        stderr().print(f"No resources found{place}.")
        return
    for line in top_lines(jobs, time.time(), everywhere=everywhere):
        stdout().print(line)
