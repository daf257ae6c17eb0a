"""Runs kubectl: it knows every kind of kubeconfig and credential, and its messages are the ones that users know."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from dpo_api.manifest import GROUP
from dpo_api.status import DPOJobStatus
from dpo_api.version import VERSION
from dpo_cli.cluster.errors import ClusterError, failure, program

RESOURCE = f"dpojobs.{GROUP}"
SINGULAR = f"dpojob.{GROUP}"
MANAGER = "dpo"
"""The field manager of everything that `dpo` writes."""

READ_TIMEOUT = "--request-timeout=30s"
NO_KUBECTL = "kubectl is not on the PATH; dpo reaches the cluster through it: https://kubernetes.io/docs/tasks/tools/"


@dataclass(frozen=True)
class Job:
    """One DPOJob as the cluster stores it."""

    raw: dict[str, Any]
    status: DPOJobStatus

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Job:
        """Parse an object. Raises ClusterError for a status that this version cannot read."""
        try:
            return cls(raw, DPOJobStatus.model_validate(raw.get("status") or {}))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ClusterError(
                f'error: {RESOURCE} "{raw["metadata"]["name"]}": dpo {VERSION} cannot read status.{field}: '
                f"{first['msg']}; install the operator's version of dpo"
            ) from None

    @property
    def name(self) -> str:
        """metadata.name."""
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """metadata.namespace."""
        return str(self.raw["metadata"].get("namespace") or "default")

    @property
    def spec(self) -> dict[str, Any]:
        """The spec as it is stored. It may have fields of a newer version."""
        spec: dict[str, Any] = self.raw.get("spec") or {}
        return spec

    @property
    def nodes(self) -> int:
        """Nodes of an attempt."""
        return int((self.spec.get("resources") or {}).get("nodes") or 1)

    @property
    def gpus(self) -> int:
        """GPUs of an attempt, on all nodes."""
        return self.nodes * int((self.spec.get("resources") or {}).get("gpusPerNode") or 0)

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended. A rejected job has, until its spec is corrected."""
        return self.status.completion_time is not None or self.status.state in ("Succeeded", "Failed", "Rejected")

    @property
    def is_observed(self) -> bool:
        """Whether the operator has seen the newest change of the spec."""
        return (self.status.observed_generation or 0) >= int(self.raw["metadata"].get("generation") or 0)

    @property
    def reference(self) -> str:
        """The job in the form of kubectl's messages."""
        return f"{SINGULAR}/{self.name}"


@dataclass(frozen=True)
class Kubectl:
    """kubectl with the options that every command of `dpo` for clusters has."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None

    @property
    def options(self) -> list[str]:
        """The options that choose cluster and namespace, as the user would type them."""
        pairs = (("--kubeconfig", self.kubeconfig), ("--context", self.context), ("-n", self.namespace))
        return [word for option, value in pairs if value is not None for word in (option, value)]

    def within(self, namespace: str | None) -> Kubectl:
        """Return the same for another namespace; None: the same one."""
        return self if namespace is None else replace(self, namespace=namespace)

    def run(self, *words: str, stdin: str | None = None) -> str:
        """Run one command and return its output. Its warnings go to standard error. Raises ClusterError."""
        done = self.attempt(*words, stdin=stdin)
        if done.returncode != 0:
            raise failure(done.stderr, done.returncode)
        sys.stderr.write(done.stderr)
        return done.stdout

    def attempt(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command, which may fail. Raises ClusterError if there is no kubectl."""
        try:
            return subprocess.run(
                ["kubectl", *self.options, *words],
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise ClusterError(NO_KUBECTL) from None

    def stream(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one command that writes to our standard output as it goes; only its errors are captured."""
        try:
            return subprocess.run(
                ["kubectl", *self.options, *words],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise ClusterError(NO_KUBECTL) from None

    def job(self, name: str) -> Job:
        """Read one DPOJob. Raises ClusterError."""
        return Job.of(self._read(name))

    def jobs(self, *, everywhere: bool = False) -> list[Job]:
        """Read all DPOJobs of the namespace, or of all namespaces. Raises ClusterError."""
        scope = ["--all-namespaces"] if everywhere else []
        return [Job.of(each) for each in self._read(*scope)["items"]]

    def _read(self, *words: str) -> dict[str, Any]:
        """Read DPOJobs. Warnings are dropped: they would be repeated while a job is followed."""
        done = self.attempt("get", RESOURCE, *words, "-o", "json", READ_TIMEOUT)
        if done.returncode != 0:
            raise failure(done.stderr, done.returncode)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def patch(self, name: str, body: dict[str, Any]) -> None:
        """Merge-patch one DPOJob. Raises ClusterError."""
        self.run("patch", RESOURCE, name, "--type=merge", f"--field-manager={MANAGER}", "-p", json.dumps(body))


def suggestion(kubectl: Kubectl, *words: str) -> str:
    """Return a command to run next, for the same cluster and namespace."""
    return f"{program()} {shlex.join([*words, *kubectl.options])}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in kubectl's form."""
    lines = [list(head), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
