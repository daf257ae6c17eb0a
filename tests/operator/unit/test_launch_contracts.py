"""The trainer's command line: what was accepted under a contract is started under it, by every later operator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_api.manifest import parse_job
from dpo_operator.backend.launch import CONTRACTS, FIRST, NEWEST, PREFIX, Launch, command
from dpo_operator.config import Settings
from dpo_testing.simcluster import SimCluster, manifest
from dpo_trainer.entry import command_line

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "launch"
"""One file for each contract. A released one never changes: images that were built for it read no other words."""
DIGEST = "sha256:" + "5" * 64


def words(contract: int) -> list[str]:
    spec = parse_job(manifest(resources={"nodes": 2, "gpusPerNode": 8})).spec
    return command(spec, 1_800_000_000_000_003, Settings(), Launch(contract, None if contract == FIRST else DIGEST))


def golden(contract: int) -> list[str]:
    return (GOLDEN / f"contract-{contract}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_what_its_file_says(contract: int) -> None:
    assert words(contract) == golden(contract)


def test_every_contract_has_a_file_and_the_constant_beginning() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"contract-{number}.txt" for number in CONTRACTS}
    assert max(CONTRACTS) == NEWEST
    assert {tuple(golden(contract)[: len(PREFIX)]) for contract in CONTRACTS} == {PREFIX}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_this_trainer_reads_every_contract(contract: int) -> None:
    """An image of this version may be used with an operator that is older, or by a job that is."""
    read = command_line().parse_args(golden(contract)[3:])
    assert (read.command, read.attempt, read.processes) == ("launch", 1_800_000_000_000_003, 8)
    assert read.spec_digest == (None if contract == FIRST else DIGEST)


def trainer_command(cluster: SimCluster, child: str) -> list[str]:
    template = cluster.children[child]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    found: list[str] = template["spec"]["containers"][0]["command"]
    return found


def test_a_new_job_gets_the_newest_contract_and_keeps_it() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    assert cluster.status["launchContract"] == NEWEST
    (pinned,) = cluster.config_maps.values()
    assert pinned["data"]["launchContract"] == str(NEWEST)
    cluster.lose_attempt(1)
    for child in ("job-1", "job-2"):
        assert trainer_command(cluster, child)[-2:] == ["--spec-digest", cluster.status["acceptedSpecDigest"]]


def accepted_by_0_1_0() -> SimCluster:
    """A running job whose status and ConfigMap are of version 0.1.0."""
    cluster = SimCluster()
    cluster.run_to("Running")
    assert cluster.job is not None
    for field in ("launchContract", "acceptedSpecDigest"):
        del cluster.job["status"][field]
    for attempt in cluster.job["status"]["attempts"]:
        attempt.pop("imageIDs", None)
    (pinned,) = cluster.config_maps.values()
    del pinned["data"]["launchContract"]
    return cluster


def test_a_job_that_0_1_0_accepted_keeps_its_contract_to_the_end() -> None:
    cluster = accepted_by_0_1_0()
    calls = len(cluster.calls)
    cluster.settle()
    assert len(cluster.calls) == calls, "the new operator writes nothing about it"
    cluster.lose_attempt(1)
    assert "--spec-digest" not in trainer_command(cluster, "job-2")
    assert not {"launchContract", "acceptedSpecDigest"} & cluster.status.keys()


def test_a_job_that_0_1_0_accepted_with_a_field_that_was_removed_goes_on() -> None:
    """Under a CRD of 0.1.0; a newer one drops the field from the DPOJob."""
    cluster = accepted_by_0_1_0()
    assert cluster.job is not None
    (pinned,) = cluster.config_maps.values()
    text = json.loads(pinned["data"]["spec.json"])
    for holder in (cluster.job, text):
        holder["spec"]["transformerEngine"] = {"attention": False}
    pinned["data"]["spec.json"] = json.dumps(text)
    cluster.lose_attempt(1)
    assert "job-2" in cluster.children
    del cluster.job["status"]
    cluster.settle()
    assert cluster.status["launchContract"] == FIRST
    assert json.loads(pinned["data"]["spec.json"]) == text


@pytest.mark.parametrize("gone", ["status", "ConfigMap"])
def test_a_job_that_0_1_0_accepted_keeps_its_contract_after_a_loss(gone: str) -> None:
    cluster = accepted_by_0_1_0()
    assert cluster.job is not None
    before = json.dumps([*cluster.config_maps.values()])
    if gone == "status":
        del cluster.job["status"]
        cluster.settle()
        assert cluster.status["launchContract"] == FIRST
    else:
        cluster.config_maps.clear()
    cluster.lose_attempt(1)
    assert "--spec-digest" not in trainer_command(cluster, "job-2")
    assert json.dumps([*cluster.config_maps.values()]) == before


@pytest.mark.parametrize("status", ["kept", "lost"])
def test_the_image_of_0_1_0_gets_no_certificate(status: str) -> None:
    """Its trainer knows plain HTTP only: a probe by HTTPS would kill its pod."""
    cluster = accepted_by_0_1_0()
    assert cluster.job is not None
    if status == "lost":
        del cluster.job["status"]
        cluster.settle()
    cluster.settings = replace(cluster.settings, trainer_metrics_secret="trainer-metrics")
    cluster.lose_attempt(1)
    cluster.advance(60)
    cluster.run_to("Running")
    assert cluster.decision.scrape is not None
    assert (cluster.decision.scrape.child, cluster.decision.scrape.https) == ("job-2", False)


def test_a_job_of_a_newer_operator_is_left_alone() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    assert cluster.job is not None
    cluster.job["status"]["launchContract"] = NEWEST + 1
    cluster.touch()
    cluster.end_pod("job-1-worker-0", code=1)
    cluster.settle()
    assert cluster.condition("Progressing") == ("False", "SpecUnreadable")
    assert f"launch contract {NEWEST + 1}" in cluster.status["message"]
    assert cluster.created == ["job-1"]


# -- the ConfigMap, whose digest the status has


def pinned_by(cluster: SimCluster) -> dict[str, Any]:
    (found,) = cluster.config_maps.values()
    return found


def test_a_deleted_config_map_is_made_again() -> None:
    cluster = SimCluster()
    cluster.run_to("Running")
    before = json.dumps(pinned_by(cluster))
    cluster.config_maps.clear()
    cluster.lose_attempt(1)
    assert json.dumps(pinned_by(cluster)) == before


def test_a_config_map_that_pods_wait_for_is_made_again() -> None:
    cluster = SimCluster()
    cluster.settle()
    before = pinned_by(cluster)
    cluster.config_maps.clear()
    name = before["metadata"]["name"]
    words = f'MountVolume.SetUp failed for volume "spec" : configmap "{name}" not found'
    about = {"kind": "Pod", "name": "job-1-worker-0"}
    cluster.cluster_events = [{"metadata": {}, "involvedObject": about, "reason": "FailedMount", "message": words}]
    cluster.settle()
    assert pinned_by(cluster) == before
    calls = len(cluster.calls)
    cluster.settle()
    assert len(cluster.calls) == calls
    cluster.run_to("Running")


def test_a_config_map_with_another_spec_starts_nothing_and_charges_nothing() -> None:
    cluster = SimCluster(manifest(runPolicy={"maxRestarts": 1}))
    cluster.run_to("Running")
    good = pinned_by(cluster)["data"]["spec.json"]
    pinned_by(cluster)["data"]["spec.json"] = good.replace("s3://prefs", "s3://other")
    cluster.end_pod("job-1-worker-0", code=1)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    for _ in range(5):
        cluster.sleep()
    assert cluster.condition("Progressing") == ("False", "PinnedSpecChanged")
    assert "does not hold the accepted spec" in cluster.status["message"]
    assert (cluster.created, cluster.status["chargedRestarts"]) == (["job-1"], 1)
    cluster.config_maps.clear()
    cluster.sleep()
    assert cluster.created == ["job-1", "job-2"]
    assert pinned_by(cluster)["data"]["spec.json"] == good


def test_a_config_map_that_cannot_be_made_again_is_reported() -> None:
    """Somebody has changed the stored spec, as with a CRD without its rules."""
    cluster = SimCluster()
    cluster.run_to("Running")
    cluster.config_maps.clear()
    cluster.edit_spec(dpo={"beta": 0.3})
    cluster.end_pod("job-1-worker-0", code=1)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.sleep()
    assert cluster.condition("Progressing") == ("False", "PinnedSpecChanged")
    assert "no longer gives the accepted spec" in cluster.status["message"]
    assert cluster.created == ["job-1"]
    assert not cluster.config_maps


# -- which image ran


def images(cluster: SimCluster, **ids: str) -> None:
    """Let all pods run, the named ones with these image IDs: master, worker."""
    cluster.settle()
    cluster.run_pods()
    for pod in cluster.pods.values():
        role = pod["metadata"]["labels"]["training.kubeflow.org/replica-type"]
        if pod["status"]["phase"] == "Running":
            pod["status"]["containerStatuses"][0]["imageID"] = ids[role]
    cluster.settle()


A, B = ("registry.example.com/trainer@sha256:" + digit * 64 for digit in "ab")
MIRRORED = A.replace("registry.example.com", "mirror.example.com")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((A, A), (A, MIRRORED), None),
        ((A, B), None, f"Pods of attempt 1 run different images: {A}, {B}."),
        ((A, A), (B, B), f"Attempt 2 runs image {B}; attempt 1 ran {A}."),
        ((A, A), (A, B), f"Pods of attempt 2 run different images: {A}, {B}."),
    ],
)
def test_images_that_differ_are_an_event(
    first: tuple[str, str], second: tuple[str, str] | None, says: str | None
) -> None:
    cluster = SimCluster()
    images(cluster, master=first[0], worker=first[1])
    if second is not None:
        cluster.end_pod("job-1-worker-0", code=1)
        cluster.settle()
        cluster.kill_leaving()
        cluster.settle()
        cluster.sleep_out()
        images(cluster, master=second[0], worker=second[1])
    said = [event["message"] for event in cluster.events.values() if event["reason"] == "ImagesDiffer"]
    assert said == ([says] if says else [])
    assert cluster.attempts[0]["imageIDs"] == list(dict.fromkeys(first))


def test_the_image_of_an_attempt_that_never_ran_as_a_whole() -> None:
    cluster = SimCluster()
    cluster.settle()
    pod = cluster.pods["job-1-worker-0"]
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": ""}}
    pod["status"] = {"phase": "Failed", "containerStatuses": [{"name": "pytorch", "imageID": B, "state": ended}]}
    cluster.settle()
    assert cluster.attempts[0]["imageIDs"] == [B]
