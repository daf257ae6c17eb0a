"""`dpo` on a cluster: each command against the real API server and operator, through the real kubectl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpo_api.progress import Progress
from dpo_api.status import StatusProgress
from dpo_cli.cluster import follow
from dpo_testing.cli import PACKAGES, Dpo, in_this_process
from dpo_testing.controlplane import ControlPlane
from dpo_testing.fakekubelet import FakeKubelet, last_words
from dpo_testing.faketrainer import FakeTrainer
from dpo_testing.jobs import Jobs, manifest
from dpo_testing.kubeapi import DPOJOBS, eventually
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.podlogs import PodLogs
from dpo_testing.s3server import tool

DONE = last_words("Succeeded", step=64, total=64, metrics={"val/acc": 0.75, "val/rewards_margin": 1.5},
                  runDir="s3://runs/job/", modelUri="s3://runs/job/model/")  # fmt: skip
REFUSED = last_words("AccessDenied", message="s3://runs/ refused the credentials")


@pytest.fixture(scope="module")
def space(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[str]:
    with cluster.namespace("dpo") as name:
        yield name


@pytest.fixture(scope="module")
def operator(cluster: ControlPlane, space: str) -> Iterator[OperatorProcess]:
    flags = ("--scrape-by=pod-ip", "--backoff-base-seconds=0.05", "--backoff-max-seconds=0.05")
    with OperatorProcess(cluster.kubeconfig, *flags, namespaces=space) as process:
        yield process
        assert process.exceptions() == []


@pytest.fixture(scope="module")
def podlogs(cluster: ControlPlane, kubelet: FakeKubelet) -> Iterator[PodLogs]:
    with PodLogs(cluster.admin) as logs:
        yield logs


@pytest.fixture
def jobs(cluster: ControlPlane, space: str, operator: OperatorProcess) -> Jobs:
    return Jobs(cluster.admin, space)


@pytest.fixture
def dpo(
    cluster: ControlPlane,
    space: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Dpo:
    """Run `dpo` in this process, with kubectl on the PATH and a kubeconfig as users have one."""
    config = json.loads(cluster.kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = space
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("PATH", f"{tool('kubectl').parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(cluster.folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpo_cli.cluster.follow.POLL_SECONDS", 0.1)
    monkeypatch.setattr("dpo_cli.cluster.logs.POLL_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["dpo"])
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    return in_this_process(capfd)


def write(*bodies: object) -> str:
    Path("job.yaml").write_text(yaml.safe_dump_all(bodies))
    return "job.yaml"


def test_a_jobs_life_from_submit_to_delete(
    dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, podlogs: PodLogs, space: str
) -> None:
    said = dpo("submit", write(manifest("whole", nodes=2, run_policy={"maxRestarts": 0})))
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == ["dpojob.dpo-operator.dev/whole serverside-applied", "  next     dpo status whole"]
    managers = jobs.get("whole")["metadata"]["managedFields"]
    assert ("dpo", "Apply") in [(each["manager"], each["operation"]) for each in managers]

    rank0 = kubelet.pod(space, "whole-1-master-0")
    kubelet.pod(space, "whole-1-worker-0")
    jobs.wait_state("Running", name="whole")
    with FakeTrainer.of(rank0) as trainer:
        trainer.say(step=12, total=64, etaSeconds=26, tokensPerSecond=1234, lastCheckpointStep=10,
                    metrics={"train/acc": 0.625, "train/loss": 0.61, "train/rewards_margin": 0.25})  # fmt: skip
        eventually(lambda: (jobs.status("whole").get("progress") or {}).get("step") == 12, what="step 12")
        shown = dpo("status", "whole").out
        for text in (
            *("whole\n", "state       Running: Training, step 12 of 64.", "size        2 nodes, CPU"),
            *("step        12/64  2.00 steps/s  1,234 tok/s  ETA 0:26", "loss 0.610  acc 0.62  margin 0.250"),
            *("checkpoint  step 10", "run         s3://runs/whole/", "next        dpo logs whole -f"),
        ):
            assert text in shown
        head, row = dpo("top").out.splitlines()
        assert head.split() == ["NAME", "STATE", "STEP", "STEP/S", "ACC", "MARGIN", "GPUS", "ETA", "AGE"]
        assert row.split()[:8] == ["whole", "Running", "12/64", "2.00", "0.62", "0.25", "0", "0:26"]
        assert json.loads(dpo("status", "whole", "-o", "json").out)["progress"]["step"] == 12
        assert yaml.safe_load(dpo("status", "whole", "-o", "yaml").out)["state"] == "Running"

    podlogs.texts |= {"whole-1-master-0": "step 12\n", "whole-1-worker-0": "step 12 of rank 1\n"}
    assert dpo("logs", "whole").out == "step 12\n"
    assert dpo("logs", "whole", "--rank", "1", "--attempt", "1").out == "step 12 of rank 1\n"

    assert dpo("suspend", "whole").out == "dpojob.dpo-operator.dev/whole suspended\n"
    jobs.wait_state("Suspended", name="whole")
    assert dpo("suspend", "whole").out == "dpojob.dpo-operator.dev/whole suspended (no change)\n"
    assert "next        dpo resume whole" in dpo("status", "whole").out
    gone = dpo("logs", "whole", "--attempt", "1")
    assert gone.code == 1
    assert '(NotFound): pods "whole-1-master-0" not found' in gone.err
    assert "The pods of attempt 1 are gone" in gone.err
    assert dpo("resume", "whole").out == "dpojob.dpo-operator.dev/whole resumed\n"

    kubelet.finish(space, "whole-2-master-0", REFUSED, 10)
    jobs.wait_state("Failed", name="whole")
    podlogs.texts["whole-2-master-0"] = "the end of attempt 2\n"
    assert dpo("logs", "whole", "-f").out == "the end of attempt 2\n"
    shown = dpo("status", "whole").out
    assert "state       Failed: s3://runs/ refused the credentials." in shown
    assert "Then: dpo retry whole" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:3] for row in rows] == [["1", "Stopped", "Suspended"], ["2", "Failed", "AccessDenied"]]
    assert rows[1][3].startswith("node-")
    ended = dpo("suspend", "whole")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == ("error: dpojob.dpo-operator.dev/whole has ended (Failed): there is nothing to suspend\n")

    retried = "dpojob.dpo-operator.dev/whole retried: attempt 3 continues from step 10\n"
    assert dpo("retry", "whole").out == retried
    kubelet.finish(space, "whole-3-master-0", DONE)
    status = jobs.wait_state("Succeeded", name="whole")
    assert [attempt["result"] for attempt in status["attempts"]] == ["Stopped", "Failed", "Succeeded"]
    refused = dpo("retry", "whole")
    assert refused.code == 1
    assert refused.err.startswith("error: dpojob.dpo-operator.dev/whole is Succeeded: only a job that failed")
    assert "model       s3://runs/job/model/" in dpo("status", "whole").out
    again = dpo("submit", write(manifest("whole", nodes=2, run_policy={"maxRestarts": 0})))
    assert "whole has ended before (Succeeded); to run it again: dpo delete whole" in again.out

    assert 'dpojob.dpo-operator.dev "whole" deleted' in dpo("delete", "whole").out
    for command in ("status", "logs", "suspend", "resume", "retry", "delete"):
        missing = dpo(command, "whole")
        assert (missing.code, missing.out) == (1, "")
        assert missing.err == 'Error from server (NotFound): dpojobs.dpo-operator.dev "whole" not found\n'


def test_submit_follows_a_job_through_a_restart_to_its_model(
    dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threading.Event()
    real = follow.progress_of

    def progress_of(said: StatusProgress, attempt: int) -> Progress:
        seen.set()
        return real(said, attempt)

    monkeypatch.setattr(follow, "progress_of", progress_of)

    def world() -> None:
        kubelet.finish(space, "followed-1-master-0", last_words("StorageUnavailable", message="S3 is away"), 74)
        rank0 = kubelet.pod(space, "followed-2-master-0")
        with FakeTrainer.of(rank0) as trainer:
            trainer.say(step=32, total=64, metrics={"train/loss": 0.5, "train/acc": 0.75})
            eventually(lambda: (jobs.status("followed").get("progress") or {}).get("step") == 32, what="step 32")
            seen.wait(120)  # it looks every two seconds
        kubelet.finish(space, "followed-2-master-0", DONE)

    thread = threading.Thread(target=world)
    thread.start()
    said = dpo("submit", "--follow", write(manifest("followed")))
    thread.join()
    assert (said.code, said.err) == (0, "")
    assert "followed  1 node · run directory s3://runs/followed/" in said.out
    assert "S3 is away" in said.out
    assert "/64  loss 0.500  acc 0.75" in said.out
    assert "result      validation: acc 0.75  margin 1.50" in said.out
    assert "model       s3://runs/job/model/" in said.out


def test_logs_are_followed_through_a_restart(
    dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, podlogs: PodLogs, space: str
) -> None:
    podlogs.texts |= {"logged-1-master-0": "S3 is away\n", "logged-2-master-0": "done\n"}

    def world() -> None:
        kubelet.finish(space, "logged-1-master-0", last_words("StorageUnavailable", message="S3 is away"), 74)
        kubelet.finish(space, "logged-2-master-0", DONE)

    jobs.create(manifest("logged"))
    thread = threading.Thread(target=world)
    thread.start()
    said = dpo("logs", "logged", "-f")
    thread.join()
    assert (said.code, said.out) == (0, "S3 is away\ndone\n")
    assert said.err.endswith("attempt 2:\n")
    only = dpo("logs", "logged", "--attempt", "3")
    assert (only.code, only.out) == (1, "")
    assert only.err == "error: --attempt 3: dpojob.dpo-operator.dev/logged has the attempts 1 to 2\n"


def test_following_ends_with_the_exit_code_of_the_cause(dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    thread = threading.Thread(target=lambda: kubelet.finish(space, "refused-1-master-0", REFUSED, 10))
    thread.start()
    said = dpo("submit", "--follow", write(manifest("refused")))
    thread.join()
    assert said.code == 10
    assert said.err.startswith("error  dpojob.dpo-operator.dev/refused is Failed: s3://runs/ refused the credentials.")
    assert "again:   dpo retry refused" in said.err
    thread = threading.Thread(target=lambda: kubelet.finish(space, "refused-2-master-0", DONE))
    thread.start()
    said = dpo("retry", "refused", "--follow")
    thread.join()
    assert (said.code, said.err) == (0, "")


def test_a_rejected_job_is_corrected_by_submitting_it_again(
    dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, space: str
) -> None:
    jobs.create(manifest("corrected", data={"train": [{"uri": "/data/train.jsonl"}]}))
    jobs.wait_state("Rejected", name="corrected")
    shown = dpo("status", "corrected").out
    assert "state       Rejected: 1 error: spec.data.train[0].uri" in shown
    assert "next        correct the manifest, then: dpo submit FILE" in shown
    assert "only a job that failed is retried; correct the manifest" in dpo("retry", "corrected").err
    # The end that the status still has is that of the manifest before.
    thread = threading.Thread(target=lambda: kubelet.finish(space, "corrected-1-master-0", DONE))
    thread.start()
    said = dpo("submit", "--follow", "--force-conflicts", write(manifest("corrected")))
    thread.join()
    assert (said.code, said.err) == (0, "")


def test_a_deleted_job_ends_following(dpo: Dpo, jobs: Jobs, kubelet: FakeKubelet, space: str) -> None:
    def world() -> None:
        kubelet.pod(space, "brief-1-master-0")
        jobs.delete("brief")

    thread = threading.Thread(target=world)
    thread.start()
    said = dpo("submit", "--follow", write(manifest("brief")))
    thread.join()
    assert said.code == 1
    assert said.err == 'Error from server (NotFound): dpojobs.dpo-operator.dev "brief" not found\n'


def test_nothing_is_applied_if_one_job_has_errors(dpo: Dpo, jobs: Jobs, cluster: ControlPlane, space: str) -> None:
    right, wrong = manifest("right"), manifest("wrong", resources={"nodes": 1})
    wrong["spec"]["checkpoint"] = {}
    said = dpo("submit", write(right, wrong))
    assert (said.code, said.out) == (2, "")
    for field in ("spec.checkpoint.uri", "spec.resources.gpusPerNode"):
        assert field in said.err, said.err
    assert cluster.admin.find(DPOJOBS, space, "right") is None


def test_several_jobs_and_other_objects_in_a_file(dpo: Dpo, jobs: Jobs, space: str) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    path = write(secret, manifest("one", run_policy={"suspend": True}), manifest("two", run_policy={"suspend": True}))
    said = dpo("submit", path, "--set", "training.maxSteps=7")
    assert said.code == 0
    assert "not applied, since dpo submits DPOJobs alone: Secret keys" in said.err
    assert {name: jobs.get(name)["spec"]["training"] for name in ("one", "two")} == {
        "one": {"maxSteps": 7}, "two": {"maxSteps": 7},
    }  # fmt: skip
    many = dpo("submit", path, "--follow")
    assert many.code == 64
    assert "--follow follows one job, but there are 2: one, two" in many.err
    assert [line.split()[0] for line in dpo("top").out.splitlines() if line.startswith(("one", "two"))] == [
        "one",
        "two",
    ]
    gone = dpo("delete", "one", "two")
    assert gone.code == 0


def test_what_the_api_server_refuses_is_said_as_kubectl_says_it(dpo: Dpo, jobs: Jobs, space: str) -> None:
    jobs.create(manifest("owned", run_policy={"suspend": True}))
    conflict = dpo("submit", write(manifest("owned", run_policy={"suspend": False})))
    assert (conflict.code, conflict.out) == (1, "")
    assert "Apply failed with 1 conflict" in conflict.err
    assert ".spec.runPolicy.suspend" in conflict.err
    assert dpo("submit", write(manifest("owned", run_policy={"suspend": False})), "--force-conflicts").code == 0
    other = dpo("status", "owned", "-n", "no-such-namespace")
    assert (other.code, other.err) == (1, 'Error from server (NotFound): namespaces "no-such-namespace" not found\n')
    assert dpo("status", "owned", "--context", "none").err.endswith(
        "context was not found for specified context: none\n"
    )
    assert dpo("logs", "owned", "--rank", "1").code == 64
    jobs.delete("owned")


def test_kubectl_finds_the_plugin(dpo: Dpo, cluster: ControlPlane, jobs: Jobs, space: str, tmp_path: Path) -> None:
    jobs.create(manifest("plugged", run_policy={"suspend": True}))
    jobs.wait_state("Suspended", name="plugged")
    plugin = tmp_path / "bin" / "kubectl-dpo"
    plugin.parent.mkdir()
    plugin.write_text(f"#!{sys.executable}\nfrom dpo_cli.__main__ import main\nmain()\n")
    plugin.chmod(0o755)
    environment = {**os.environ, "PATH": f"{plugin.parent}:{os.environ['PATH']}", "PYTHONPATH": ":".join(PACKAGES)}
    words = ["kubectl", "dpo", "status", "plugged", "-n", space]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"next        kubectl dpo resume plugged -n {space}" in done.stdout
    jobs.delete("plugged")
