"""One world for all queries: a real trainer, a real operator, a real API server, and a real Prometheus that sees them.

The trainer's pod exists in the API server and runs in this machine: FakeKubelet gives it a loopback address, at which
the test starts the trainer with the attempt that the pod's own command names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_monitoring.alerts import rules
from dpo_testing import runs
from dpo_testing.controlplane import ControlPlane
from dpo_testing.dcgm import DcgmExporter
from dpo_testing.fakekubelet import PORT, FakeKubelet, last_words
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import PYTORCHJOBS, Object, eventually
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.preloaded import STEP_SECONDS
from dpo_testing.prometheusserver import Config, PrometheusServer, pin_operator, rendered, scrape_config
from dpo_testing.s3server import need
from dpo_testing.training_world import make, merged, preferences

TOOLS = ("prometheus", "promtool", "scrape-config", "helm", "kube-apiserver")


@pytest.fixture(scope="session")
def tools() -> None:
    """What these tests run, built if Go is here."""
    need(*TOOLS)


@dataclass(frozen=True)
class World:
    """Where everything is."""

    prometheus: PrometheusServer
    operator: OperatorProcess
    namespace: str
    """Of the job ``curve``, which trains."""
    waiting: str
    """Of the job ``waits``, whose pods find no node."""


def _trainer_arguments(pod: Object) -> list[str]:
    """The attempt that the pod's command names, at the pod's own address."""
    command = pod["spec"]["containers"][0]["command"]
    attempt = command[command.index("--attempt") + 1]
    return [f"--attempt={attempt}", f"--host={pod['status']['podIP']}", f"--port={PORT}"]


def _spec(folder: Path) -> Object:
    """A run that goes on for as long as anybody looks, with validations, checkpoints, and a pair that is too long."""
    spec = make(folder)
    long = {**preferences(1, seed=3)[0], "chosen_response": "word " * 200}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    return merged(
        spec,
        {
            "data": {"overLength": "drop"},
            "dpo": {"sftWeight": 0.1},
            "training": {"maxSteps": 100_000, "validationInterval": 20, "learningRate": 1e-4},
            "checkpoint": {"everySteps": 20, "keep": 1, "monitor": "val/loss"},
        },
    )


def _config(plane: ControlPlane, operator: OperatorProcess, gpus: list[DcgmExporter]) -> Config:
    objects = rendered("monitoring.interval=1s", "monitoring.trainer.interval=1s")
    config = scrape_config(objects, kubeconfig=plane.kubeconfig)
    pin_operator(config, objects, f"127.0.0.1:{operator.port}")
    # dcgm-exporter's labels are honoured in one cluster and renamed in the next: the GPU operator leaves it open.
    for exporter, honour in zip(gpus, (True, False), strict=True):
        config["scrape_configs"].append(
            {
                "job_name": f"dcgm-{honour}",
                "honor_labels": honour,
                "scrape_interval": "1s",
                "static_configs": [
                    {
                        "targets": [exporter.address],
                        "labels": {"namespace": "gpu-operator", "pod": "dcgm-exporter-x7", "container": "exporter"},
                    }
                ],
            }
        )
    return config


def _queue(plane: ControlPlane, jobs: Jobs) -> None:
    """Make the job ``queues`` wait as Kueue does: by suspending its PyTorchJob."""
    jobs.create(manifest("queues", run_policy={"queueName": "all"}))
    jobs.wait_child("queues-1")
    plane.admin.patch(PYTORCHJOBS, jobs.namespace, "queues-1", {"spec": {"runPolicy": {"suspend": True}}})
    jobs.wait_state("Queued", name="queues")


@pytest.fixture(scope="module")
def world(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with contextlib.ExitStack() as stack:
        plane = ControlPlane()
        stack.callback(plane.stop)
        plane.start()
        kubelet = FakeKubelet(plane.admin, nodes=2)
        kubelet.start()
        stack.callback(kubelet.stop)
        training = stack.enter_context(plane.namespace("training"))
        waiting = stack.enter_context(plane.namespace("waiting"))
        kubelet.hold(waiting)
        operator = stack.enter_context(
            OperatorProcess(plane.kubeconfig, "--scrape-by=pod-ip", namespaces=f"{training},{waiting}")
        )
        Jobs(plane.admin, waiting).create(manifest("waits"))
        of_training = Jobs(plane.admin, training)
        of_training.create(manifest("curve", resources={"nodes": 1, "gpusPerNode": 2}))
        of_training.create(manifest("fails"))
        of_training.create(manifest("wrong", podTemplate={"env": [{"name": "LD_PRELOAD", "value": "x"}]}))
        of_training.wait_state("Rejected", name="wrong")
        _queue(plane, Jobs(plane.admin, waiting))
        pod = kubelet.pod(training, "curve-1-master-0")
        scratch = folder / "scratch"
        trainer = runs.start(
            _spec(folder),
            folder / "run",
            processes=1,
            scratch=scratch,
            environment={STEP_SECONDS: "0.1"},  # it trains until the last test: the others need the machine, too
            more=_trainer_arguments(pod),
            name="curve",
        )
        stack.callback(runs.kill, trainer)
        gpus = [stack.enter_context(DcgmExporter(training, pod["metadata"]["name"], [gpu])) for gpu in (0, 1)]
        config = _config(plane, operator, gpus)
        alerts = folder / "alerts.yaml"
        quick = rules()
        for rule in quick["groups"][0]["rules"]:
            rule["for"] = "0s"  # a test has no half hour
        alerts.write_text(json.dumps(quick))
        prometheus = stack.enter_context(PrometheusServer({**config, "rule_files": [str(alerts)]}))
        runs.wait_for_step(folder / "run", 25)
        # An increase shows only where the value before it was scraped.
        eventually(lambda: prometheus.query("dpo_operator_restarts_total"), seconds=60, what="the operator is scraped")
        kubelet.finish(training, "fails-1-master-0", last_words("InvalidData"), code=3)
        of_training.wait_state("Failed", name="fails")
        yield World(prometheus, operator, training, waiting)
