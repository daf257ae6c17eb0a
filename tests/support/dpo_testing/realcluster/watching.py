"""One DPOJob on the real cluster: made, watched from within its pods, disturbed, and read when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from urllib3.exceptions import HTTPError

from dpo_api.progress import Progress
from dpo_cli.metrics_log import attempt_of, merge, parse_events
from dpo_testing.jobs import Jobs
from dpo_testing.kubeapi import DPOJOBS, ApiError, Object, eventually, path_of
from dpo_testing.realcluster import objectstore, release
from dpo_testing.realcluster.cluster import Cluster
from dpo_testing.realcluster.layout import REPOSITORY
from dpo_testing.realcluster.node import ctr
from dpo_testing.realcluster.objectstore import BUCKET, server

SECRET = "s3-credentials"
RANDOM_UID = 1_000_650_000
"""A user that no image knows, as OpenShift gives each namespace."""
TRAINER_PORT = 9400


def namespace(cluster: Cluster, name: str) -> Jobs:
    """Return a namespace that enforces the restricted Pod Security level and holds the bucket's credentials."""
    release.make_namespace(cluster, name, **{"pod-security.kubernetes.io/enforce": "restricted"})
    store = server(cluster.layout)
    keys = {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": name}, "stringData": keys}
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(secret))
    eventually(lambda: cluster.api.find(("v1", "serviceaccounts"), name, "default"), what="a default ServiceAccount")
    return Jobs(cluster.api, name)


def quickstart(cluster: Cluster, name: str, *, training: Object | None = None, every_steps: int = 20) -> Object:
    """Return the quickstart's manifest for this cluster: two nodes of two processes, its S3 server, a random user."""
    text = (REPOSITORY / "examples" / "quickstart.yaml").read_text()
    body: Object = yaml.safe_load(text.replace("s3://quickstart/", f"s3://{BUCKET}/"))
    body["metadata"]["name"] = name
    spec = body["spec"]
    spec["resources"] = {"nodes": 2, "gpusPerNode": 0, "processesPerNode": 2}
    spec["storage"] = {"endpoint": server(cluster.layout).endpoint, "credentialsSecretRef": {"name": SECRET}}
    spec["checkpoint"] |= {"uri": f"s3://{BUCKET}/runs/{name}/", "everySteps": every_steps, "gracePeriodSeconds": 60}
    security = {"runAsUser": RANDOM_UID, "runAsGroup": 0, "fsGroup": RANDOM_UID}
    spec["podTemplate"] = {"security": security, "env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}
    spec["training"] |= training or {}
    return body


@dataclass(frozen=True)
class Run:
    """A DPOJob's life as its pods show it."""

    cluster: Cluster
    jobs: Jobs
    name: str

    def create(self, body: Object) -> None:
        """Create the job in an empty run directory, also where an earlier story ran it."""
        objectstore.empty(self.cluster.layout, f"runs/{self.name}/")
        self.jobs.create(body)

    def dpo(self, command: str, *words: str, seconds: float = 180) -> str:
        """Run a command of `dpo` about the job; return what it printed."""
        return self.cluster.dpo(command, self.name, *words, "-n", self.jobs.namespace, seconds=seconds)

    def submit(self, body: Object, *words: str, seconds: float = 180) -> str:
        """Run `dpo submit`; return what it printed. A job that is not there yet starts in an empty run directory."""
        if self.cluster.api.find(DPOJOBS, self.jobs.namespace, self.name) is None:
            objectstore.empty(self.cluster.layout, f"runs/{self.name}/")
        path = self.cluster.layout.run / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(body))
        return self.cluster.dpo("submit", str(path), *words, "-n", self.jobs.namespace, seconds=seconds)

    def pod(self, attempt: int, role: str = "master-0") -> str:
        """Return the name of an attempt's pod."""
        return f"{self.name}-{attempt}-{role}"

    def progress(self, attempt: int) -> Progress | None:
        """Return what rank 0 says now; None while it does not answer."""
        pod = path_of(("v1", "pods"), self.jobs.namespace, f"{self.pod(attempt)}:{TRAINER_PORT}", "proxy/status")
        try:
            return Progress.model_validate(self.cluster.api.call("GET", pod, timeout=2.0))
        except (ApiError, HTTPError, ValueError):
            return None

    def wait_step(self, attempt: int | None, reached: Callable[[Progress], bool], seconds: float = 180) -> Progress:
        """Wait until rank 0 of an attempt, or of the newest one, says so."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.jobs.status(self.name)
            found = self.progress(attempt or status.get("attempt") or 1)
            if found is not None and reached(found):
                return found
            if status.get("state") in {"Failed", "Rejected"} or time.monotonic() > deadline:
                raise AssertionError(f"{self.name}, attempt {attempt}: {found}\n{yaml.safe_dump(status)}")
            time.sleep(0.1)

    def wait_succeeded(self, seconds: float = 300) -> Object:
        """Wait for the end; return the status."""
        return self.jobs.wait_state("Succeeded", "Failed", "Rejected", name=self.name, seconds=seconds)

    def attempts(self) -> list[Object]:
        """Return the attempts of the status."""
        found: list[Object] = self.jobs.status(self.name).get("attempts") or []
        return found

    def kill_container(self, pod: str) -> None:
        """Kill a pod's trainer as the kernel would: SIGKILL to its first process."""
        status = self.cluster.api.get(("v1", "pods"), self.jobs.namespace, pod)["status"]
        container = status["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        done = ctr(self.cluster.layout, "tasks", "kill", "--signal=SIGKILL", container)
        assert done.returncode == 0, done.stderr

    def losses(self) -> dict[int, float]:
        """Return the training loss of each step, out of the run directory in the bucket."""
        client = server(self.cluster.layout).client()
        prefix = f"runs/{self.name}/"
        events = []
        for found in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
            attempt = attempt_of(found["Key"].removeprefix(prefix))
            if attempt is not None:
                data = client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
                events += parse_events(found["Key"], data, attempt)
        return dict(merge(events).get("train/loss"))

    def download(self, prefix: str, folder: Any) -> None:
        """Copy a folder of the run directory to this machine."""
        client = server(self.cluster.layout).client()
        start = f"runs/{self.name}/{prefix}/"
        for found in client.list_objects_v2(Bucket=BUCKET, Prefix=start).get("Contents", []):
            target = folder / found["Key"].removeprefix(start)
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, found["Key"], str(target))
