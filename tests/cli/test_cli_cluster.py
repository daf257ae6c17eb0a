"""`dpo` for clusters, without one: what it prints of stored jobs, how it follows them, and errors before any answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_api.progress import Progress
from dpo_cli.cluster.errors import ClusterError, failure, program
from dpo_cli.cluster.follow import Story, exit_code
from dpo_cli.cluster.kubectl import NO_KUBECTL, Job, Kubectl
from dpo_cli.cluster.logs import node_of
from dpo_cli.cluster.show import next_step, status_lines, top_lines
from dpo_operator.clock import to_moment
from dpo_testing.cli import Dpo
from dpo_testing.s3server import free_port, need, tool

KUBECTL = Kubectl()
THEN = "2026-01-02T10:00:00Z"
NOW = to_moment("2026-01-02T12:00:00Z")
RUNNING: dict[str, Any] = {
    "state": "Running",
    "message": "Training, step 40 of 100.",
    "observedGeneration": 1,
    "attempt": 2,
    "restarts": 1,
    "chargedRestarts": 1,
    "runDirectory": "s3://runs/job/",
    "summary": {"step": "40/100", "accuracy": "0.75", "margin": "1.20"},
    "progress": {
        "phase": "train", "step": 40, "total": 100, "etaSeconds": 30, "tokensPerSecond": 5000.0,
        "metrics": {"train/loss": 0.5, "train/acc": 0.75, "train/rewards_margin": 1.2}, "lastCheckpointStep": 30,
        "observedAt": "2026-01-02T11:59:30Z",
    },
    "attempts": [
        {
            "number": 1, "child": "job-1", "startTime": "2026-01-02T10:00:00Z", "endTime": "2026-01-02T11:00:00Z",
            "fromStep": 0, "lastStep": 34, "result": "Failed", "reason": "NodeLost", "message": "node b is lost",
            "failureClass": "infrastructure",
            "pods": [{"name": f"job-1-worker-{i}", "node": f"node-{i}"} for i in range(4)],
        },
        {
            "number": 2, "child": "job-2", "startTime": "2026-01-02T11:01:00Z", "fromStep": 30, "lastStep": 40,
            "runningTime": "2026-01-02T11:02:00Z",
        },
    ],
}  # fmt: skip


def job(name: str = "job", *, gpus: int = 8, nodes: int = 4, generation: int = 1, **status: Any) -> Job:
    resources = {"nodes": nodes, "gpusPerNode": gpus}
    metadata = {
        "name": name,
        "namespace": "team",
        "generation": generation,
        "creationTimestamp": "2026-01-02T10:00:00Z",
    }
    spec = {"resources": resources, "checkpoint": {"uri": "s3://runs/job/"}, "runPolicy": {"maxRestarts": 5}}
    return Job.of({"metadata": metadata, "spec": spec, "status": status})


def test_the_status_of_a_running_job() -> None:
    assert status_lines(job(**RUNNING), KUBECTL) == [
        "job",
        "  state       Running: Training, step 40 of 100.",
        "  size        4 nodes with 8 GPUs",
        "  step        40/100  2.00 steps/s  5,000 tok/s  ETA 0:30",
        "  train       loss 0.500  acc 0.75  margin 1.20",
        "  checkpoint  step 30",
        "  restarts    1; 1 of 5 count against maxRestarts",
        "  run         s3://runs/job/",
        "  next        dpo logs job -f",
        "",
        "  ATTEMPT   RESULT   REASON     NODES              FROM   STEP   START                  END",
        "  1         Failed   NodeLost   node-0,node-1,+2   0      34     2026-01-02T10:00:00Z   2026-01-02T11:00:00Z",
        "  2         -        -          -                  30     40     2026-01-02T11:01:00Z   -",
    ]


def test_the_best_validation_and_the_step_of_the_model() -> None:
    progress = {**RUNNING["progress"], "best": {"metric": "val/loss", "step": 20, "value": 0.5123}}
    status = {**RUNNING, "state": "Succeeded", "progress": progress, "modelURI": "s3://m", "modelStep": 20}
    lines = status_lines(job(**status), KUBECTL)
    assert "  best        val/loss 0.512 at step 20" in lines
    assert "  model       s3://m (of step 20)" in lines
    assert "  model       s3://m" in status_lines(job(**status | {"modelStep": 40}), KUBECTL)


def test_conditions_that_need_attention_are_shown_and_others_are_not() -> None:
    kinds = [("Learning", "False", "AtChance"), ("Finite", "True", "LossFinite"), ("TrainingStalled", "True", "NoStep")]
    found = [
        {"type": kind, "status": status, "reason": reason, "message": "Look.", "lastTransitionTime": THEN}
        for kind, status, reason in kinds
    ]
    lines = [line for line in status_lines(job(**RUNNING, conditions=found), KUBECTL) if "attention" in line]
    assert lines == [
        "  attention   Learning=False  AtChance: Look.",
        "  attention   TrainingStalled=True  NoStep: Look.",
    ]


def test_a_job_that_no_operator_has_seen() -> None:
    lines = status_lines(job(), KUBECTL)
    assert "  state       Pending: the operator has not processed the job yet." in lines
    assert any("has not processed the newest change" in line for line in lines)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "Suspended"}, "dpo resume job -n team"),
        ({"state": "Queued"}, "kubectl get workloads -n team"),
        ({"state": "Rejected"}, "correct the manifest, then: dpo submit FILE -n team"),
        ({"state": "Succeeded", "runDirectory": "s3://r/"}, "dpo report s3://r/"),
        ({"state": "Restarting"}, "dpo logs job -f -n team"),
    ],
)
def test_what_to_do_next(status: dict[str, Any], words: str) -> None:
    assert next_step(job(**status), Kubectl(namespace="team")) == words


def test_a_failure_comes_with_its_remedy() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "AccessDenied", "message": "no",
              "lastTransitionTime": "2026-01-02T10:00:00Z"}  # fmt: skip
    text = next_step(job(state="Failed", conditions=[failed]), KUBECTL)
    assert "keys" in text or "credentials" in text
    assert text.endswith(" Then: dpo retry job")


def test_top_lists_running_jobs_first() -> None:
    jobs = [job("done", state="Succeeded", completionTime="2026-01-02T11:00:00Z"), job("a", state="Queued"),
            job("z", **RUNNING)]  # fmt: skip
    assert top_lines(jobs, NOW, everywhere=True) == [
        "NAMESPACE   NAME   STATE       STEP     STEP/S   ACC    MARGIN   GPUS   ETA    AGE",
        "team        z      Running     40/100   2.00     0.75   1.20     32     0:30   2h0m",
        "team        a      Queued      -        -        -      -        32     -      2h0m",
        "team        done   Succeeded   -        -        -      -        32     -      2h0m",
    ]


def shown(story: Story, **status: Any) -> list[str]:
    return [new if isinstance(new, str) else f"{new.phase} {new.step}" for new in story.feed(job(**status))]


def test_a_job_that_is_followed_tells_each_thing_once() -> None:
    story = Story()
    assert shown(story) == ["  pending    the operator has not processed the job yet."]
    assert shown(story, state="Queued", message="Waiting.") == ["  queued     Waiting."]
    assert shown(story, state="Queued", message="Waiting.") == []
    # Polling missed how attempt 1 ended.
    assert shown(story, **RUNNING) == ["  attempt 1  NodeLost: node b is lost", "train 40"]
    assert shown(story, **RUNNING) == []
    ended = [RUNNING["attempts"][0], {**RUNNING["attempts"][1], "result": "Failed", "reason": "Killed"}]
    restarting = {**RUNNING, "attempts": ended, "state": "Restarting", "message": "Attempt 2 ended (Killed)."}
    assert shown(story, **restarting) == ["  restarting Attempt 2 ended (Killed)."]


def test_progress_of_an_earlier_attempt_is_not_shown() -> None:
    attempts = [RUNNING["attempts"][0], {**RUNNING["attempts"][1], "runningTime": "2026-01-02T11:59:59Z"}]
    assert shown(Story(), **{**RUNNING, "attempts": attempts}) == ["  attempt 1  NodeLost: node b is lost"]


def test_progress_is_what_the_screen_of_a_run_shows() -> None:
    [_, said] = Story().feed(job(**RUNNING))
    assert isinstance(said, Progress)
    assert (said.step, said.total, said.eta_seconds, said.attempt) == (40, 100, 30, 2)
    assert said.observed_at == to_moment("2026-01-02T11:59:30Z")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"state": "Succeeded"}, 0),
        ({"state": "Rejected"}, 2),
        *(({"state": "Failed", "attempts": [{"number": 1, "child": "j-1", "reason": o.name}]}, o.exit_code)
          for o in Outcome if o.exit_code),
        ({"state": "Failed", "attempts": [{"number": 1, "child": "j-1", "reason": "NodeLost"}]}, 1),
        ({"state": "Failed"}, 1),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_causes(status: dict[str, Any], code: int) -> None:
    assert exit_code(job(**status).status) == code


@pytest.mark.parametrize(("rank", "node"), [(0, 0), (7, 0), (8, 1), (31, 3)])
def test_the_node_of_a_rank(rank: int, node: int) -> None:
    assert node_of(job(), rank) == node


def test_a_rank_that_a_job_lacks() -> None:
    with pytest.raises(Exception, match=r"--rank 32: job has the ranks 0 to 31 \(4 x 8\)"):
        node_of(job(), 32)
    assert node_of(job(gpus=0, nodes=2), 1) == 1


def test_a_status_of_another_version_is_no_traceback() -> None:
    with pytest.raises(ClusterError, match=r'"job": dpo .* cannot read status.state: .* install the operator'):
        job(state="Dreaming")


def test_only_the_servers_own_answers_are_final() -> None:
    assert failure('Error from server (NotFound): dpojobs "x" not found\n', 1).is_final
    assert failure("error: You must be logged in to the server (Unauthorized)", 1).is_final
    assert not failure("The connection to the server 10.0.0.1 was refused - did you specify", 1).is_final
    assert not failure("Unable to connect to the server: net/http: TLS handshake timeout", 1).is_final
    assert not failure("Error from server (ServiceUnavailable): the server is currently unable", 1).is_final
    assert not failure("Error from server (Timeout): the server was unable to return a response in time", 1).is_final
    assert not failure("Error from server (TooManyRequests): the server has asked for the client to wait", 1).is_final
    assert not failure("Error from server: etcdserver: leader changed", 1).is_final
    assert failure('Error from server (Forbidden): dpojobs.dpo-operator.dev "x" is forbidden', 1).is_final
    assert failure("", 7).exit_code == 7
    assert "is dpo-operator installed" in str(failure('error: the server doesn\'t have a resource type "dpojobs"', 1))


def test_the_plugin_names_itself_as_kubectl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/kubectl-dpo", "status"])
    assert program() == "kubectl dpo"
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/dpo", "status"])
    assert program() == "dpo"


COMMANDS = ["status", "logs", "suspend", "resume", "retry", "delete"]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_kubectl(dpo: Dpo, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = dpo(command, "job")
    assert (said.code, said.out, said.err) == (1, "", f"{NO_KUBECTL}\n")


@pytest.mark.tools
def test_a_cluster_that_does_not_answer(dpo: Dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("kubectl")
    monkeypatch.setenv("PATH", f"{tool('kubectl').parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    server = f"http://127.0.0.1:{free_port()}"
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": ""}}],
    }  # fmt: skip
    (tmp_path / "config").write_text(json.dumps(config))
    said = dpo("status", "job", "--kubeconfig", str(tmp_path / "config"))
    assert said.code == 1
    assert f"The connection to the server {server.removeprefix('http://')} was refused" in said.err
    missing = dpo("top", "--kubeconfig", str(tmp_path / "none"))
    assert missing.code == 1
    assert str(tmp_path / "none") in missing.err


def test_submit_reports_all_findings_before_it_needs_a_cluster(
    dpo: Dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = """
apiVersion: dpo-operator.dev/v1alpha1
kind: DPOJob
metadata: {name: job}
spec:
  model: {huggingFace: {uri: s3://models/tiny/}}
  data: {train: [{uri: s3://prefs/train.jsonl}]}
"""
    (tmp_path / "job.yaml").write_text(text)
    said = dpo("submit", str(tmp_path / "job.yaml"))
    assert (said.code, said.out) == (2, "")
    assert "2 errors" in said.err
    assert "spec.checkpoint.uri" in said.err
    assert "spec.resources.gpusPerNode" in said.err
    missing = dpo("submit", str(tmp_path / "none.yaml"))
    assert missing.code == Outcome.NotFound.exit_code
