"""Argo CD's health of a DPOJob: the very script, in a Lua 5.1 like Argo CD's, over statuses that reconcile wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lupa.lua51
import pytest

from dpo_api.errors import Outcome
from dpo_testing.simcluster import SimCluster, manifest

SCRIPT = (Path(__file__).resolve().parents[3] / "hack" / "argocd" / "health.lua").read_text(encoding="utf-8")


def health(job: dict[str, Any] | None) -> tuple[str, str]:
    lua = lupa.lua51.LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = lua.table_from(job, recursive=True)
    result = lua.execute(SCRIPT)
    return result["status"], result["message"]


def started(**spec: Any) -> SimCluster:
    cluster = SimCluster(manifest(**spec))
    cluster.run_to("Running")
    return cluster


def test_a_job_without_a_status() -> None:
    assert health(SimCluster().job) == ("Progressing", "The operator has not processed the job yet.")


def test_starting_and_running_are_progress() -> None:
    cluster = SimCluster()
    cluster.settle()
    assert health(cluster.job) == ("Progressing", "0 of 2 pods are running (attempt 1).")
    cluster.run_to("Running")
    assert health(cluster.job)[0] == "Progressing"


def test_restarting_is_progress() -> None:
    cluster = started()
    cluster.end_pod("job-1-worker-0", Outcome.Communication)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    assert health(cluster.job)[0] == "Progressing"


def test_both_ends() -> None:
    good, bad = started(), started()
    for role in ("worker", "master"):
        good.end_pod(f"job-1-{role}-0", Outcome.Succeeded, step=1, total=1, model_uri="s3://m/model")
    good.settle()
    assert health(good.job) == ("Healthy", "Finished after step 1 of 1; the model is at s3://m/model.")
    bad.end_pod("job-1-worker-0", Outcome.InvalidData, message="line 7")
    bad.settle()
    bad.kill_leaving()
    bad.settle()
    assert health(bad.job) == ("Degraded", "line 7.")
    good.edit(ttlSecondsAfterFinished=10**6)
    assert health(good.job)[0] == "Healthy", "an edit after the end changes nothing"


def test_rejected() -> None:
    cluster = SimCluster(manifest(dpo={"beta": -1}))
    cluster.settle()
    status, message = health(cluster.job)
    assert status == "Degraded"
    assert "spec.dpo.beta" in message


def test_rejected_and_edited() -> None:
    cluster = SimCluster(manifest(dpo={"beta": -1}))
    cluster.settle()
    cluster.edit_spec(dpo={})
    assert health(cluster.job) == ("Progressing", "The change has not been looked at yet.")
    cluster.run_to("Running")
    assert health(cluster.job)[0] == "Progressing"


def test_suspended() -> None:
    cluster = SimCluster(manifest(runPolicy={"suspend": True}))
    cluster.settle()
    assert health(cluster.job)[0] == "Suspended"


def test_an_edit_that_is_not_observed_yet() -> None:
    cluster = SimCluster(manifest(runPolicy={"suspend": True}))
    cluster.settle()
    cluster.edit(suspend=False)
    assert health(cluster.job) == ("Progressing", "The change has not been looked at yet.")


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError"])
def test_a_job_that_needs_attention_is_degraded(reason: str) -> None:
    cluster = SimCluster()
    cluster.settle()
    waiting = {"name": "pytorch", "state": {"waiting": {"reason": reason, "message": "said the kubelet"}}}
    cluster.pods["job-1-worker-0"]["status"]["containerStatuses"] = [waiting]
    cluster.settle()
    status, message = health(cluster.job)
    assert status == "Degraded"
    assert "said the kubelet" in message


def test_a_run_that_goes_wrong_is_degraded() -> None:
    cluster = started()
    cluster.say(
        step=1, first_preference_loss=0.2, expected_first_preference_loss=math.log(2), metrics={"train/loss": 0.2}
    )
    cluster.settle()
    assert health(cluster.job)[0] == "Degraded"
