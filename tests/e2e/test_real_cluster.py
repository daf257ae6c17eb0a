"""The whole product on a real node: images, chart, a DPOJob, faults, an upgrade, and what is left after uninstalling.

The tests tell one story, in this order. One that is run alone begins on an empty cluster, with the chart installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_api.metrics import METRICS, OPERATOR
from dpo_api.progress import Progress
from dpo_testing.jobs import Jobs
from dpo_testing.kubeapi import DPOJOBS, PODS, Object, eventually, path_of
from dpo_testing.prometheusserver import PrometheusServer
from dpo_testing.realcluster import images, monitoring, nextversion, objectstore, release
from dpo_testing.realcluster.cluster import OPERATOR_IMAGE, Cluster
from dpo_testing.realcluster.layout import BASE_IMAGE, NODE
from dpo_testing.realcluster.steps import Steps
from dpo_testing.realcluster.watching import RANDOM_UID, Run, quickstart

STEPS = 100
EVERY = 10
FAULTS = {"maxSteps": STEPS, "epochs": 20, "validationInterval": "100%"}
"""Long enough that a checkpoint lies well before half of the steps."""


@pytest.fixture(scope="module")
def prometheus(
    cluster: Cluster, installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrometheusServer]:
    """It watches from the first run on. Pods are reached by their own addresses."""
    need_own_node(cluster)
    with PrometheusServer(monitoring.config(cluster, tmp_path_factory.mktemp("prometheus"))) as server:
        yield server


def disturbable(cluster: Cluster, name: str) -> Object:
    """A long run on two nodes, of one process each: starting a process takes most of the time of these tests."""
    body = quickstart(cluster, name, training=FAULTS, every_steps=EVERY)
    body["spec"]["resources"]["processesPerNode"] = 1
    return body


def checkpointed(progress: Progress) -> bool:
    return progress.phase == "train" and (progress.last_checkpoint_step or 0) >= EVERY


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, jobs: Jobs, steps: Steps, installed: None, request: pytest.FixtureRequest
) -> dict[int, float]:
    """The losses of a run that nothing befell."""
    if cluster.given is None:
        request.getfixturevalue("prometheus")
    run = Run(cluster, jobs, "calm")
    body = disturbable(cluster, "calm")
    body["spec"]["checkpoint"]["monitor"] = "val/loss"
    with steps.step("an undisturbed run"):
        run.create(body)
        assert run.wait_succeeded()["state"] == "Succeeded"
    losses = run.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def need_own_node(cluster: Cluster) -> None:
    if cluster.given is not None:
        pytest.skip("reaches into the node, which is not this machine")


def test_the_operators_image_is_small(cluster: Cluster) -> None:
    need_own_node(cluster)
    sizes = images.size(cluster.layout, OPERATOR_IMAGE), images.size(cluster.layout, BASE_IMAGE)
    added = (sizes[0] - sizes[1]) / 1e6
    print(f"  the operator adds {added:.0f} MB to its base")
    assert 0 < added < 150


def test_the_stock_init_container_is_refused_and_the_status_says_why(
    cluster: Cluster, jobs: Jobs, steps: Steps, stock: None
) -> None:
    need_own_node(cluster)
    run = Run(cluster, jobs, "aligned")
    with steps.step("the stock init container is refused"):
        assert run.submit(quickstart(cluster, run.name)).startswith(
            "dpojob.dpo-operator.dev/aligned serverside-applied"
        )
        refused = eventually(
            lambda: jobs.conditions("aligned"),
            until=lambda found: any(c["reason"] == "InitContainerRefused" for c in found.values()),
            seconds=90,
            what="a condition InitContainerRefused",
        )
    message = next(c["message"] for c in refused.values() if c["reason"] == "InitContainerRefused")
    print(f"  status: {message}")
    assert "init-pytorch" in message
    with steps.step("the start time-out ends the job"):
        jobs.patch(run.name, {"runPolicy": {"startTimeoutSeconds": 10, "maxRestarts": 0}})
        assert run.jobs.wait_state("Failed", name=run.name)["attempts"][-1]["reason"] == "StartTimeout"
    assert "dpo retry aligned" in run.dpo("status")


def test_a_job_aligns_the_model_under_a_random_user(
    cluster: Cluster, jobs: Jobs, steps: Steps, installed: None, tmp_path: Path
) -> None:
    run = Run(cluster, jobs, "aligned")
    with steps.step("DPOJob, 2 nodes of 2 processes, from S3 to S3"):
        if cluster.api.find(DPOJOBS, jobs.namespace, run.name) is not None:  # the one whose init container was refused
            jobs.patch(run.name, {"runPolicy": {"startTimeoutSeconds": 1800, "maxRestarts": 3}})
            assert "retried: attempt " in run.dpo("retry")
            eventually(lambda: jobs.status(run.name)["state"] != "Failed", what="the job is retried")
        followed = run.submit(quickstart(cluster, run.name), "--follow", seconds=1200)
    print(*(f"  | {line}" for line in followed.splitlines()), sep="\n")
    status = jobs.status(run.name)
    assert status["state"] == "Succeeded", status
    assert status["modelURI"] in followed
    assert f"model       {status['modelURI']}" in run.dpo("status")
    words = ("logs", run.pod(status["attempt"]), "-c", "pytorch", "--tail=20")
    assert run.dpo("logs", "--tail", "20") == cluster.kubectl("-n", jobs.namespace, *words) != ""
    columns = cluster.kubectl("-n", jobs.namespace, "get", "dpo", "aligned", "--no-headers").split()
    print("  " + " ".join(columns))
    assert columns[1] == "Succeeded"
    assert columns[2] == "63/63"
    assert float(columns[3]) >= 0.95
    pod = cluster.api.get(PODS, jobs.namespace, run.pod(status["attempt"]))
    assert pod["spec"]["securityContext"]["runAsUser"] == RANDOM_UID

    run.download("model", tmp_path)
    from transformers import AutoModelForCausalLM

    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    assert model.num_parameters() > 900_000


def survive(
    run: Run,
    steps: Steps,
    what: str,
    fault: Callable[[], Any],
    undisturbed: dict[int, float],
    *,
    attempts: int | None,
    parallelism: Object | None = None,
) -> list[Object]:
    """Disturb a run after a checkpoint and before half of it; it must end as if nothing had been.

    ``attempts``: how many it takes in the end. None: one or two, of whose pods the first ones are gone after ``fault``.
    ``parallelism``: it has two processes a node, in this layout; by default one, which holds the whole model.
    """
    body = disturbable(run.cluster, run.name)
    if parallelism is not None:
        body["spec"]["resources"]["processesPerNode"] = 2
        body["spec"]["parallelism"] = parallelism
    run.create(body)
    with steps.step(f"{what}: until the fault"):
        before = run.wait_step(1, checkpointed)
    assert before.step < STEPS // 2
    began = time.monotonic()
    fault()
    with steps.step(f"{what}: from the fault to the end"):
        # The first step that was not done before: a run that goes on, or the next attempt past its checkpoint.
        last = before.step if attempts == 1 else EVERY
        after = run.wait_step(attempts, lambda p: p.phase == "train" and p.step > last)
        passed = time.monotonic() - began
        steps.note(f"{what}: from the fault to the next step", passed)
        status = run.wait_succeeded()
    tried = status["attempts"]
    print(f"  at step {before.step}; {passed:.1f} s from the fault to step {after.step}")
    print(*(f"    attempt {summary_of(each)}" for each in tried), sep="\n")
    assert status["state"] == "Succeeded", status
    assert len(tried) in ([attempts] if attempts else [1, 2])
    assert not [each for each in tried[1:] if not each.get("fromStep")]
    # Another layout rounds sums in another way. After 26 steps this small model has made more than 1e-5 of that.
    # The fault and the next checkpoint come before.
    assert_same_losses(run, undisturbed, until=STEPS if parallelism is None else 2 * EVERY)
    return list(tried)


def assert_same_losses(run: Run, undisturbed: dict[int, float], *, until: int = STEPS) -> None:
    losses = run.losses()
    assert sorted(losses) == sorted(undisturbed)
    apart = {step: (loss, undisturbed[step]) for step, loss in losses.items() if step <= until
             and abs(loss - undisturbed[step]) > 1e-5 * max(1.0, abs(undisturbed[step]))}  # fmt: skip
    assert apart == {}


def summary_of(attempt: Object) -> str:
    return " ".join(str(attempt.get(key)) for key in ("number", "result", "failureClass", "reason", "fromStep"))


def test_a_killed_worker(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    need_own_node(cluster)
    run = Run(cluster, jobs, "killed")
    fault = lambda: run.kill_container(run.pod(1, "worker-0"))  # noqa: E731
    layout = {"tensor": 2, "sequence": True}  # on each of the two pods; data parallel between them
    first, _ = survive(run, steps, "worker killed", fault, undisturbed, attempts=2, parallelism=layout)
    assert (first["result"], first["failureClass"], first["reason"]) == ("Failed", "retryable", "Killed")


@pytest.mark.optional
def test_a_suspended_job(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    run = Run(cluster, jobs, "paused")

    def fault() -> None:
        run.dpo("suspend")
        jobs.wait_state("Suspended", name=run.name, seconds=90)
        eventually(lambda: not uids(jobs.pods(), run.name), what="its pods are gone")
        run.dpo("resume")

    first, last = survive(run, steps, "suspended and resumed", fault, undisturbed, attempts=2)
    assert (first["result"], first["reason"]) == ("Stopped", "Suspended")
    assert last["fromStep"] >= first.get("lastStep", EVERY), "a step was lost"


@pytest.mark.optional
def test_a_deleted_master(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    run = Run(cluster, jobs, "deleted")

    def fault() -> None:
        cluster.kubectl("-n", jobs.namespace, "delete", "pod", run.pod(1), "--wait=false")

    first, _ = survive(run, steps, "master deleted", fault, undisturbed, attempts=2)
    assert (first["failureClass"], first["reason"]) == ("infrastructure", "PodDeleted")


@pytest.mark.optional
def test_a_drained_node(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    """The drain takes the operator and training-operator too: their absence only delays.

    If neither saw the pods go, the one that is back first decides: the operator ends the attempt, training-operator
    creates new pods. In both cases the run continues from the drained pods' checkpoint.
    """
    need_own_node(cluster)
    run = Run(cluster, jobs, "drained")

    def fault() -> None:
        words = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s")
        out = cluster.kubectl("drain", NODE, *words)
        cluster.kubectl("uncordon", NODE)
        assert "training-operator" in out
        assert run.pod(1, "worker-0") in out

    *ended, last = survive(run, steps, "node drained", fault, undisturbed, attempts=None)
    assert last["fromStep"] >= EVERY
    assert [(each["failureClass"], each["reason"]) for each in ended] in ([], [("infrastructure", "Drained")])


@pytest.mark.optional
def test_a_stopped_object_store(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    need_own_node(cluster)
    run = Run(cluster, jobs, "storeless")

    def fault() -> None:
        objectstore.stop(cluster.layout)
        time.sleep(30)
        objectstore.start(cluster.layout)

    survive(run, steps, "S3 away for 30 s", fault, undisturbed, attempts=1)


@pytest.mark.optional
def test_a_deleted_operator(cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float]) -> None:
    run = Run(cluster, jobs, "orphaned")

    def fault() -> None:
        cluster.kubectl("-n", release.NAMESPACE, "delete", "pod", "-l", release.OPERATOR, "--wait=false")

    survive(run, steps, "operator deleted", fault, undisturbed, attempts=1)


def test_prometheus_finds_every_series_that_dashboards_and_alerts_use(
    prometheus: PrometheusServer, undisturbed: dict[int, float], steps: Steps
) -> None:
    table = {metric.name for metric in (*METRICS, *OPERATOR) if not (metric.on_gpus or metric.of_several)}
    histograms = {metric.name for metric in OPERATOR if metric.kind == "histogram"}

    def held() -> set[str]:
        names = set(prometheus.get("label/__name__/values"))
        return names | {name for name in histograms if f"{name}_count" in names}

    with steps.step("Prometheus holds every series"):
        eventually(lambda: table - held(), until=lambda missing: not missing, seconds=60, what="no series is missing")
    runs = prometheus.query("last_over_time(dpo_train_loss[1h])")
    assert {"calm", "killed"} <= {series["metric"]["dpojob"] for series in runs}
    # The first one trained for a second, which may lie between two scrapes.
    assert "2" in {s["metric"]["attempt"] for s in runs if s["metric"]["dpojob"] == "killed"}


@pytest.mark.optional
def test_two_alerts_fire_for_their_causes(
    cluster: Cluster, jobs: Jobs, steps: Steps, prometheus: PrometheusServer
) -> None:
    body = quickstart(cluster, "homeless")
    body["spec"]["podTemplate"]["nodeSelector"] = {"nowhere": "here"}
    jobs.create(body)
    deployment = ("-n", release.NAMESPACE, "scale", "deployment", "-l", "app.kubernetes.io/name=dpo-operator")
    try:
        with steps.step("alert: a job finds no node"):
            # Other jobs may be seen to wait, too: five seconds of starting are enough here.
            fires = eventually(
                prometheus.firing,
                until=lambda found: "homeless" in {each["dpojob"] for each in found.get("DPOJobPendingTooLong", ())},
                seconds=90,
            )
        assert "DPOOperatorDown" not in fires
        cluster.kubectl(*deployment, "--replicas=0")
        with steps.step("alert: the operator is down"):
            eventually(prometheus.firing, until=lambda found: "DPOOperatorDown" in found, seconds=90)
    finally:
        cluster.kubectl(*deployment, "--replicas=1")
        jobs.delete("homeless")


@pytest.fixture(scope="module")
def later(cluster: Cluster, steps: Steps) -> Path:
    """The next version of this tree; its images too, where the node is this machine."""
    with steps.step(f"a second build of the tree, version {nextversion.VERSION}"):
        tree = nextversion.tree(cluster.layout)
        if cluster.given is None:
            nextversion.build(cluster.layout, tree)
    return tree


def test_an_upgrade_leaves_a_running_job_alone(
    cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float], later: Path
) -> None:
    run = Run(cluster, jobs, "upgraded")

    def fault() -> None:
        pods, child = uids(jobs.pods(), run.name), jobs.children()["upgraded-1"]
        upgrade(cluster, later)
        assert f'"{nextversion.VERSION}"' in cluster.helm("list", "-n", release.NAMESPACE, "-o", "json")
        assert uids(jobs.pods(), run.name) == pods
        assert jobs.children()["upgraded-1"]["metadata"]["generation"] == child["metadata"]["generation"]

    before = jobs.status("calm")["image"]
    survive(run, steps, "helm upgrade", fault, undisturbed, attempts=1)
    assert run.jobs.status(run.name)["image"] == before

    body = quickstart(cluster, "noted")
    body["spec"][nextversion.FIELD] = "the definition has one more field"
    cluster.api.call("POST", path_of(DPOJOBS, jobs.namespace), body, dryRun="All", fieldValidation="Strict")


def upgrade(cluster: Cluster, later: Path) -> None:
    """Bring the release to the next version, unless it has it."""
    given = release.values(init_container=False)  # a given cluster's nodes know no image of the next version
    if cluster.given is None:
        given = release.values(operator=nextversion.OPERATOR_IMAGE, trainer=nextversion.TRAINER_IMAGE)
    release.install(cluster, given, chart=later / "charts" / "dpo-operator")


def test_helm_test_runs_a_job(cluster: Cluster, steps: Steps, installed: None) -> None:
    need_own_node(cluster)
    with steps.step("helm test"):
        said = release.try_out(cluster)
    print("  " + "\n  ".join(said.strip().splitlines()[-2:]))
    assert "Succeeded" in said


def test_uninstalling_leaves_jobs_alone_and_keeps_them(
    cluster: Cluster, jobs: Jobs, steps: Steps, undisturbed: dict[int, float], later: Path
) -> None:
    """The last one. Nothing tells of the job then but its pods and training-operator; it is one of the new version."""
    upgrade(cluster, later)
    print("  " + release.figures(cluster))
    run = Run(cluster, jobs, "noted")
    body = disturbable(cluster, run.name)
    if cluster.given is None:  # elsewhere this version's operator runs, which would refuse the field
        body["spec"][nextversion.FIELD] = "the definition has one more field"
    run.create(body)
    with steps.step("helm uninstall: until then"):
        run.wait_step(1, checkpointed)
    if cluster.given is None:
        assert jobs.status(run.name)["image"] == nextversion.TRAINER_IMAGE
    pods, kept = uids(jobs.pods(), run.name), cluster.kubectl("-n", jobs.namespace, "get", "dpo", "-o", "name")
    with steps.step("helm uninstall"):
        release.uninstall(cluster)
        eventually(
            lambda: cluster.api.list(PODS, release.NAMESPACE, labelSelector=release.OPERATOR),
            until=lambda left: not left,
            what="the operator's pod is gone",
        )
    assert cluster.kubectl("-n", jobs.namespace, "get", "dpo", "-o", "name") == kept
    assert {f"dpojob.dpo-operator.dev/{name}" for name in ("calm", run.name)} <= set(kept.split())
    with steps.step("helm uninstall: the job without an operator"):
        then = run.wait_step(1, lambda p: p.phase == "train")
        run.wait_step(1, lambda p: p.step > then.step)
        assert uids(jobs.pods(), run.name) == pods
        eventually(
            lambda: jobs.children()["noted-1"]["status"]["conditions"],
            until=lambda found: any(c["type"] == "Succeeded" and c["status"] == "True" for c in found),
            seconds=120,
            what="the PyTorchJob is Succeeded",
        )
    print(f"  at step {then.step} when the operator was gone")
    # training-operator deletes a worker that is not done when the master is.
    left = eventually(
        lambda: {name: pod for name, pod in jobs.pods().items() if pod["metadata"]["uid"] in pods},
        until=lambda found: {pod["status"]["phase"] for pod in found.values()} == {"Succeeded"},
        what="the job's pods have succeeded",
    )
    assert run.pod(1) in left
    assert_same_losses(run, undisturbed)


def uids(pods: dict[str, Object], name: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod_name, pod in pods.items() if pod_name.startswith(f"{name}-")}
