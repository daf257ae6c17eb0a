"""The child, field by field: what each part of a spec becomes, and what no spec can take away."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dpo_api.manifest import parse_job
from dpo_api.pods import Toleration
from dpo_operator import names
from dpo_operator.backend.pytorchjob import Identity, build_child, build_config_map, digest, spec_json
from dpo_operator.config import Settings
from dpo_testing.simcluster import SimCluster, manifest
from dpo_trainer.metrics.credentials import CERTIFICATE, KEY, TOKEN, VARIABLE

IDENTITY = Identity("job", "team", "uid-1", created=1_800_000_000)
Object = dict[str, Any]


def child(attempt: int = 1, settings: Settings | None = None, identity: Identity = IDENTITY, **spec: Any) -> Object:
    job = parse_job(manifest(**spec))
    return build_child(job, identity, attempt, "trainer:1", settings or Settings(), ())


def pod(body: Object, role: str = "Master") -> Object:
    found: Object = body["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]
    return found


def trainer(body: Object, role: str = "Master") -> Object:
    found: Object = pod(body, role)["containers"][0]
    return found


def env(body: Object, role: str = "Master") -> Object:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in trainer(body, role)["env"]}


@pytest.mark.parametrize(("nodes", "workers"), [(1, None), (2, 1), (5, 4)])
def test_one_master_and_the_rest_workers(nodes: int, workers: int | None) -> None:
    body = child(resources={"nodes": nodes, "gpusPerNode": 8})
    replicas = body["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert replicas.get("Worker", {}).get("replicas") == workers
    assert body["spec"]["nprocPerNode"] == "8"
    assert body["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "schedulingPolicy": {"minAvailable": nodes}}
    assert all(r["restartPolicy"] == r["template"]["spec"]["restartPolicy"] == "Never" for r in replicas.values())


@pytest.mark.parametrize(
    ("resources", "processes"),
    [({"gpusPerNode": 4}, 4), ({"gpusPerNode": 0}, 1), ({"gpusPerNode": 0, "processesPerNode": 3}, 3)],
)
def test_processes_per_node(resources: Object, processes: int) -> None:
    body = child(resources=resources)
    assert body["spec"]["nprocPerNode"] == str(processes)
    command = trainer(body)["command"]
    assert command[command.index("--processes") + 1] == str(processes)


def test_command() -> None:
    resources = {"nodes": 2, "gpusPerNode": 0}
    body, job = child(attempt=3, resources=resources), parse_job(manifest(resources=resources))
    for role in ("Master", "Worker"):
        assert trainer(body, role)["command"] == [
            *("python", "-m", "dpo_trainer", "launch", "--spec", "/etc/dpo/spec/spec.json"),
            *("--run-dir", "s3://runs/job/", "--attempt", "1800000000000003", "--last-words", "/dev/termination-log"),
            *("--processes", "1", "--port", "9400", "--grace-seconds", "30", "--spec-digest", digest(spec_json(job))),
        ]
        assert "args" not in trainer(body, role)


def test_attempts_of_a_recreated_job_come_after_all_former_ones() -> None:
    former = [names.fence(1_800_000_000, attempt) for attempt in (1, 2, 999_999)]
    again = names.fence(1_800_000_001, 1)
    assert former == sorted(former)
    assert again > former[-1]
    assert again < 2**53, "survives any JSON reader"


def test_resources_requests_are_limits() -> None:
    resources = {
        "gpusPerNode": 8,
        "gpuResource": "amd.com/gpu",
        "cpu": 32,
        "memory": "256Gi",
        "extended": {"rdma/ib": 1},
        "shm": "64Gi",
        "scratch": "1Ti",
    }
    body = child(resources=resources)
    amounts = {"cpu": "32", "memory": "256Gi", "amd.com/gpu": "8", "rdma/ib": "1"}
    assert trainer(body)["resources"] == {"limits": amounts, "requests": amounts}
    volumes = {volume["name"]: volume for volume in pod(body)["volumes"]}
    assert volumes["shm"] == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}
    assert volumes["scratch"] == {"name": "scratch", "emptyDir": {"sizeLimit": "1Ti"}}


def test_nothing_asked_nothing_requested() -> None:
    body = child(resources={"gpusPerNode": 0})
    assert trainer(body)["resources"] == {}


def test_pods_are_always_restricted() -> None:
    body = child(podTemplate={"security": {"runAsUser": 1000, "runAsGroup": 0, "fsGroup": 2000}})
    assert pod(body)["automountServiceAccountToken"] is False
    assert pod(body)["securityContext"] == {
        "fsGroup": 2000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "runAsGroup": 0,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert trainer(body)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_a_read_only_root_has_a_place_to_write() -> None:
    values = env(child())
    assert (values["HOME"], values["TMPDIR"], values["DPO_CACHE_DIR"]) == ("/tmp", "/tmp", "/tmp/cache")
    mounts = {mount["mountPath"]: mount for mount in trainer(child())["volumeMounts"]}
    assert "readOnly" not in mounts["/tmp"]
    assert "readOnly" not in mounts["/dev/shm"]
    assert mounts["/etc/dpo/spec"]["readOnly"] is True


def test_only_rank_zero_serves_and_nothing_waits_for_readiness() -> None:
    """The master's Service names ready pods alone, and workers look it up before they start.

    A pod is not ready before its startup probe has passed either, as the real cluster showed.
    """
    body = child(resources={"nodes": 2, "gpusPerNode": 0}, runPolicy={"startTimeoutSeconds": 100})
    master, worker = trainer(body), trainer(body, "Worker")
    assert "readinessProbe" not in master
    assert master["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert "startupProbe" not in master
    assert master["livenessProbe"]["initialDelaySeconds"] >= 1900
    assert {"name": "metrics", "containerPort": 9400} in master["ports"]
    assert not {"livenessProbe", "startupProbe", "readinessProbe"} & set(worker)
    assert [port["name"] for port in worker["ports"]] == ["pytorchjob-port"]


def test_a_certificate_and_a_token_for_rank_zero_alone() -> None:
    settings = Settings(trainer_metrics_secret="trainer-metrics")
    body = child(settings=settings, resources={"nodes": 2, "gpusPerNode": 0})
    mount = {"name": "metrics", "mountPath": "/etc/dpo/metrics", "readOnly": True}
    assert mount in trainer(body)["volumeMounts"]
    (volume,) = [volume for volume in pod(body)["volumes"] if volume["name"] == "metrics"]
    keys = [{"key": key, "path": key} for key in (CERTIFICATE, KEY, TOKEN)]
    assert volume["secret"] == {"secretName": "trainer-metrics", "items": keys}, "a missing key must stop the pod"
    assert env(body)[VARIABLE] == "/etc/dpo/metrics"
    probe = trainer(body)["livenessProbe"]["httpGet"]
    assert probe == {"path": "/healthz", "port": "metrics", "scheme": "HTTPS"}
    replicas = body["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"]["metadata"]["labels"]["dpo-operator.dev/metrics"] == "https"
    assert "dpo-operator.dev/metrics" not in replicas["Worker"]["template"]["metadata"]["labels"]
    assert not {volume["name"] for volume in pod(body, "Worker")["volumes"]} & {"metrics"}
    assert VARIABLE not in env(body, "Worker")


def test_termination_message_and_grace_period() -> None:
    body = child(checkpoint={"uri": "s3://runs/job/", "gracePeriodSeconds": 1200})
    assert trainer(body)["terminationMessagePath"] == "/dev/termination-log"
    assert trainer(body)["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert pod(body)["terminationGracePeriodSeconds"] == 1200


def test_pods_leave_dead_nodes_soon() -> None:
    tolerations = pod(child())["tolerations"]
    assert {(t["key"], t["effect"], t["tolerationSeconds"]) for t in tolerations} == {
        ("node.kubernetes.io/not-ready", "NoExecute", 30),
        ("node.kubernetes.io/unreachable", "NoExecute", 30),
    }


@pytest.mark.parametrize(
    ("own", "stays"),
    [
        ({"operator": "Exists"}, 30),
        ({"operator": "Exists", "effect": "NoExecute"}, 30),
        ({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoSchedule"}, 30),
        ({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 5}, 5),
        (
            {
                "key": "node.kubernetes.io/unreachable",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 900,
            },
            900,
        ),
    ],
)
def test_the_first_toleration_that_fits_a_dead_nodes_taint_decides(own: Object, stays: int) -> None:
    """As in the taint manager: a job that endures every taint leaves a dead node in time too."""
    found = pod(child(podTemplate={"tolerations": [own]}))["tolerations"]
    assert own in found
    fits = [
        toleration
        for toleration in found
        if toleration.get("key") in (None, "node.kubernetes.io/unreachable")
        and toleration.get("effect") in (None, "NoExecute")
    ]
    assert fits[0].get("tolerationSeconds") == stays


def test_claims_are_mounted_once_and_inputs_read_only() -> None:
    body = child(
        model={"huggingFace": {"uri": "pvc://models/llama/"}},
        data={"train": [{"uri": "pvc://data.v1/train/"}, {"uri": "pvc://data.v1/more.jsonl"}]},
        checkpoint={"uri": "pvc://models/runs/job/"},
        storage={"cache": {"claim": "cache"}},
    )
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: volume["name"]
        for volume in pod(body)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    mounts = {mount["name"]: mount for mount in trainer(body)["volumeMounts"]}
    assert sorted(claims) == ["cache", "data.v1", "models"]
    assert mounts[claims["data.v1"]] == {
        "name": claims["data.v1"],
        "mountPath": "/mnt/claims/data.v1",
        "readOnly": True,
    }
    assert "readOnly" not in mounts[claims["models"]], "the run directory is on it too"
    assert mounts["cache"] == {"name": "cache", "mountPath": "/cache"}
    assert (env(body)["DPO_PVC_ROOT"], env(body)["DPO_CACHE_DIR"]) == ("/mnt/claims", "/cache")


def test_a_cache_with_a_size_has_a_volume_of_its_own() -> None:
    body = child(storage={"cache": {"size": "10Gi"}})
    volumes = {volume["name"]: volume for volume in pod(body)["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {"sizeLimit": "10Gi"}}
    assert {"name": "cache", "mountPath": "/cache"} in trainer(body)["volumeMounts"]
    assert env(body)["DPO_CACHE_DIR"] == "/cache"
    assert env(child())["DPO_CACHE_DIR"] == "/tmp/cache"  # in the scratch volume


def test_common_credentials_are_environment_and_never_values() -> None:
    values = env(child())
    assert values["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "s3-credentials", "key": "AWS_ACCESS_KEY_ID"}}
    assert values["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert "DPO_CREDENTIALS_DIR" not in values


def test_a_sources_own_credentials_are_files() -> None:
    own = {"credentialsSecretRef": {"name": "vendor"}}
    same = {"credentialsSecretRef": {"name": "s3-credentials"}}
    data = {"train": [{"uri": "s3://aaa/b", "storage": own}, {"uri": "s3://ccc/d", "storage": same}]}
    body = child(data=data)
    assert env(body)["DPO_CREDENTIALS_DIR"] == "/etc/dpo/credentials"
    secrets = {v["secret"]["secretName"]: v["name"] for v in pod(body)["volumes"] if "secret" in v}
    assert list(secrets) == ["vendor"]
    mounts = {mount["name"]: mount["mountPath"] for mount in trainer(body)["volumeMounts"]}
    assert mounts[secrets["vendor"]] == "/etc/dpo/credentials/vendor"


@pytest.mark.parametrize(
    ("bundle", "path"),
    [
        ({"configMapRef": {"name": "ca"}}, "/etc/dpo/ca/configmap/ca/ca.crt"),
        ({"secretRef": {"name": "ca"}, "key": "tls.pem"}, "/etc/dpo/ca/secret/ca/tls.pem"),
        ({"path": "/usr/share/ca.pem"}, "/usr/share/ca.pem"),
    ],
)
def test_certificates(bundle: Object, path: str) -> None:
    values = env(child(storage={"endpoint": "https://s3.example.com", "caBundle": bundle}))
    assert values["DPO_CA_BUNDLE"] == values["AWS_CA_BUNDLE"] == path


def test_identity_token_is_the_clouds_alone() -> None:
    body = child(serviceAccountName="trainer", storage={})
    assert pod(body)["serviceAccountName"] == "trainer"
    assert pod(body)["automountServiceAccountToken"] is False
    identity = next(v for v in pod(body)["volumes"] if v["name"] == "identity")
    token = identity["projected"]["sources"][0]["serviceAccountToken"]
    assert token == {"audience": "sts.amazonaws.com", "expirationSeconds": 86400, "path": "token"}
    assert "AWS_WEB_IDENTITY_TOKEN_FILE" not in env(body), "the cloud's own webhook would step back"
    role = {"env": [{"name": "AWS_ROLE_ARN", "value": "arn:aws:iam::1:role/x"}]}
    assert env(child(serviceAccountName="t", storage={}, podTemplate=role))["AWS_WEB_IDENTITY_TOKEN_FILE"].endswith(
        "/token"
    )


def test_no_service_account_no_token() -> None:
    assert "identity" not in {volume["name"] for volume in pod(child())["volumes"]}
    assert "serviceAccountName" not in pod(child())


def test_collective_settings() -> None:
    """What kernels read from the environment is the trainer's to set: see tests/distributed/test_pod_command.py."""
    body = child(
        resources={"gpusPerNode": 1},
        transformerEngine={"flashAttention": False, "fusedAttention": True},
        training={"deterministic": True},
        podTemplate={"env": [{"name": "NCCL_DEBUG", "value": "WARN"}]},
        settings=Settings(extra_env=(("NCCL_DEBUG", "INFO"), ("NCCL_IB_HCA", "mlx5"))),
    )
    values = env(body)
    assert not [name for name in values if name.startswith(("NVTE_", "CUBLAS_"))]
    assert (values["NCCL_DEBUG"], values["NCCL_IB_HCA"]) == ("WARN", "mlx5"), "the job's own word counts last"
    assert values["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    listed = [e["name"] for e in trainer(body)["env"]]
    assert len(listed) == len(set(listed))


TAINTED = Toleration(key="gpu", operator="Exists")


def test_the_installations_defaults_are_in_every_pod_and_a_jobs_own_take_precedence() -> None:
    settings = Settings(
        trainer_annotations=(("karpenter.sh/do-not-disrupt", "true"), ("a", "installation")),
        trainer_node_selector=(("gpu", "h100"), ("zone", "a")),
        trainer_tolerations=(TAINTED,),
        trainer_runtime_class="nvidia",
        trainer_priority_class="low",
    )
    own = {
        "annotations": {"a": "job"},
        "nodeSelector": {"zone": "b"},
        "tolerations": [{"key": "own", "value": "x"}],
        "runtimeClassName": "kata",
        "priorityClassName": "high",
    }
    cases: tuple[Any, ...] = ((own, "job", "b", ("kata", "high")), ({}, None, "a", ("nvidia", "low")))
    for template, annotation, zone, classes in cases:
        body = child(resources={"nodes": 2}, podTemplate=template, settings=settings)
        assert body["spec"]["runPolicy"]["schedulingPolicy"]["priorityClass"] == classes[1]
        for role in ("Master", "Worker"):
            made = body["spec"]["pytorchReplicaSpecs"][role]["template"]
            expected = {"karpenter.sh/do-not-disrupt": "true", "a": annotation or "installation"}
            assert made["metadata"]["annotations"] == expected
            assert made["spec"]["nodeSelector"] == {"gpu": "h100", "zone": zone}
            assert (made["spec"]["runtimeClassName"], made["spec"]["priorityClassName"]) == classes
            after = [t for t in made["spec"]["tolerations"] if not t["key"].startswith("node.kubernetes.io/")]
            listed = [{"key": "own", "operator": "Equal", "value": "x"}] if template else []
            assert after == [*listed, {"key": "gpu", "operator": "Exists"}]


def test_a_toleration_that_job_and_installation_name_is_listed_once() -> None:
    tolerations = pod(
        child(
            podTemplate={"tolerations": [{"key": "gpu", "operator": "Exists"}]},
            settings=Settings(trainer_tolerations=(TAINTED,)),
        )
    )["tolerations"]
    assert [t for t in tolerations if t["key"] == "gpu"] == [{"key": "gpu", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("own", "installation", "used"),
    [
        ([], (), None),
        ([], ("all", "more"), [{"name": "all"}, {"name": "more"}]),
        ([{"name": "mine"}], ("all",), [{"name": "mine"}]),
    ],
)
def test_pull_secrets_of_the_installation_serve_jobs_that_name_none(
    own: list[Object], installation: tuple[str, ...], used: list[Object] | None
) -> None:
    settings = Settings(trainer_image_pull_secrets=installation)
    body = child(resources={"nodes": 2}, podTemplate={"imagePullSecrets": own}, settings=settings)
    assert [pod(body, role).get("imagePullSecrets") for role in ("Master", "Worker")] == [used, used]


def test_overlay_merges() -> None:
    template = {
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [
            {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 5},
        ],
        "affinity": {"podAffinity": {"x": 1}},
        "topologySpreadConstraints": [{"maxSkew": 1}],
        "priorityClassName": "high",
        "schedulerName": "volcano",
        "runtimeClassName": "nvidia",
        "imagePullSecrets": [{"name": "pull"}],
        "volumes": [{"name": "extra", "emptyDir": {}}],
        "volumeMounts": [{"name": "extra", "mountPath": "/extra", "subPath": "a", "readOnly": True}],
        "sidecars": [{"name": "proxy", "image": "proxy:1", "securityContext": {"runAsUser": 7}}],
    }
    body = child(podTemplate=template, imagePullPolicy="Always")
    metadata = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["labels"]["dpo-operator.dev/job"] == "job"
    assert metadata["annotations"] == {"note": "b"}
    found = pod(body)
    assert [t["key"] for t in found["tolerations"][:-2]] == ["node.kubernetes.io/not-ready"]
    assert found["tolerations"][-2:] == template["tolerations"]
    assert found["affinity"] == template["affinity"]
    assert body["spec"]["runPolicy"]["schedulingPolicy"]["priorityClass"] == "high"
    for name in ("nodeSelector", "topologySpreadConstraints", "priorityClassName", "schedulerName", "imagePullSecrets"):
        assert found[name] == template[name]
    assert found["runtimeClassName"] == "nvidia"
    assert trainer(body)["imagePullPolicy"] == "Always"
    assert {"name": "extra", "mountPath": "/extra", "subPath": "a", "readOnly": True} in trainer(body)["volumeMounts"]
    assert [c["name"] for c in found["containers"]] == ["pytorch"], "a container beside it would keep the pod alive"
    (sidecar,) = found["initContainers"]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("proxy", "Always")
    assert sidecar["securityContext"]["runAsUser"] == 7
    assert sidecar["securityContext"]["allowPrivilegeEscalation"] is False
    assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_failed_nodes_are_avoided_not_forbidden() -> None:
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {}}]}}
    job = parse_job(manifest(podTemplate={"affinity": affinity}))
    before = copy.deepcopy(job.spec.pod_template.affinity)
    body = build_child(job, IDENTITY, 2, "trainer:1", Settings(), ["gpu-7", "gpu-9"])
    node = pod(body)["affinity"]["nodeAffinity"]
    wishes = node["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wishes[0] == {"weight": 1, "preference": {}}
    fields = wishes[1]["preference"]["matchFields"]
    assert [f["values"] for f in fields] == [["gpu-7"], ["gpu-9"]], "the API takes one value a requirement"
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in node
    assert job.spec.pod_template.affinity == before, "builders never touch their input"


@pytest.mark.parametrize(
    ("attempt", "policy", "identity", "labels"),
    [
        (1, {}, {}, {}),
        (1, {"queueName": "team-a"}, {}, {"queue-name": "team-a"}),
        (1, {}, {"queue": "team-b"}, {"queue-name": "team-b"}),
        (1, {"queueName": "team-a"}, {"queue": "team-b"}, {"queue-name": "team-a"}),
        (1, {"queueName": "q", "priorityClass": "p"}, {}, {"queue-name": "q", "priority-class": "p"}),
        (1, {"queueName": "q", "restartPriorityClass": "r"}, {}, {"queue-name": "q"}),
        (
            2,
            {"queueName": "q", "priorityClass": "p", "restartPriorityClass": "r"},
            {},
            {"queue-name": "q", "priority-class": "r"},
        ),
        (2, {"queueName": "q", "priorityClass": "p"}, {}, {"queue-name": "q", "priority-class": "p"}),
        (1, {"priorityClass": "p"}, {}, {}),
    ],
)
def test_only_the_pytorchjob_has_kueues_labels(attempt: int, policy: Object, identity: Object, labels: Object) -> None:
    body = child(attempt, identity=Identity("job", "team", "uid-1", **identity), runPolicy=policy)
    own = {k: v for k, v in body["metadata"]["labels"].items() if "kueue" in k}
    assert own == {f"kueue.x-k8s.io/{name}": value for name, value in labels.items()}
    template = body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert not any("kueue" in key for key in template["metadata"]["labels"])
    assert "suspend" not in body["spec"]["runPolicy"], "that field is the queue's alone"


def test_owned_but_holding_nothing_up() -> None:
    job = parse_job(manifest())
    for body in (child(), build_config_map(job, IDENTITY, "trainer:1", Settings())):
        (owner,) = body["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("uid-1", True, False)
        assert "finalizers" not in body["metadata"]


def test_names_fit() -> None:
    longest = "j" * 45
    assert max(len(f"{names.child(longest, 99_999)}-worker-1022"), len(names.config_map(longest, "u"))) <= 63


def test_secrets_never_appear_in_the_pinned_spec() -> None:
    mlflow = {"trackingURI": "https://mlflow", "tokenSecretRef": {"name": "m", "key": "t"}}
    wandb = {"project": "p", "apiKeySecretRef": {"name": "w", "key": "k"}}
    job = parse_job(manifest(logging={"wandb": wandb, "mlflow": mlflow}))
    body = build_config_map(job, IDENTITY, "trainer:1", Settings())
    assert body["immutable"] is True
    assert body["data"]["image"] == "trainer:1"
    hub = {"hub": {"tokenSecretRef": {"name": "h", "key": "k"}}}
    variables = env(child(logging=job.to_dict()["spec"]["logging"], storage=hub))
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "h", "key": "k"}}
    assert "HF_TOKEN" not in env(child())
    assert variables["WANDB_API_KEY"] == {"secretKeyRef": {"name": "w", "key": "k"}}
    assert variables["MLFLOW_TRACKING_TOKEN"] == {"secretKeyRef": {"name": "m", "key": "t"}}


def test_annotations_for_an_autoscaler_and_a_topology_reach_kueue() -> None:
    """The former on the PyTorchJob, which is what Kueue queues; the latter on each of its pod templates."""
    topology = {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-rack"}
    body = manifest(podTemplate={"annotations": topology}, resources={"nodes": 2, "gpusPerNode": 0})
    request = {"provreq.kueue.x-k8s.io/maxRunDurationSeconds": "7200"}
    body["metadata"]["annotations"] = {**request, "example.com/own": "x"}
    cluster = SimCluster(body)
    cluster.settle()
    (made,) = cluster.children.values()
    assert made["metadata"]["annotations"] == request
    replicas = made["spec"]["pytorchReplicaSpecs"]
    assert [replicas[role]["template"]["metadata"]["annotations"] for role in ("Master", "Worker")] == [topology] * 2
    assert "annotations" not in child()["metadata"]
