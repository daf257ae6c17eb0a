"""The trainer's pod, one per node. It always satisfies the restricted Pod Security level."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from dpo_api.pods import Toleration
from dpo_api.spec import DPOJobSpec
from dpo_operator.backend.launch import TERMINATION_LOG, Launch, command
from dpo_operator.backend.volumes import Mounts, metrics_credentials, mounts_of
from dpo_operator.config import Settings
from dpo_operator.labels import HTTPS, METRICS

CONTAINER = "pytorch"
"""Name of the trainer's container; PyTorchJob requires this name."""
METRICS_PORT = "metrics"

LIVENESS_PERIOD = 30
LIVENESS_FAILURES = 20
"""Ten minutes without a response: longer than any pause of a healthy trainer."""

NODE_FAILURE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}

AVOIDED_NODES_MAX = 16


def processes(spec: DPOJobSpec) -> int:
    """Return the training processes of each pod."""
    return spec.resources.processes()


def priority_class(spec: DPOJobSpec, settings: Settings) -> str:
    """Return the PriorityClass of the pods: the job's own, else the installation's; empty: the cluster's."""
    return spec.pod_template.priority_class_name or settings.trainer_priority_class


def pod_template(
    spec: DPOJobSpec,
    *,
    image: str,
    config_map: str,
    labels: dict[str, str],
    fence: int,
    launch: Launch,
    settings: Settings,
    leads: bool,
    avoid: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a pod template. ``leads``: for rank 0's pod, which serves HTTP. ``avoid``: nodes to avoid if possible."""
    overlay = spec.pod_template
    mounts = mounts_of(spec, config_map, settings)
    if leads:
        metrics_credentials(settings, mounts)
        if settings.trainer_metrics_secret:
            labels = {**labels, METRICS: HTTPS}
    metadata: dict[str, Any] = {"labels": {**dict(settings.labels), **overlay.labels, **labels}}
    if annotations := {**dict(settings.trainer_annotations), **overlay.annotations}:
        metadata["annotations"] = annotations
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "containers": [_container(spec, image, mounts, command(spec, fence, settings, launch), settings, leads=leads)],
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "securityContext": _pod_security(spec),
        "terminationGracePeriodSeconds": spec.checkpoint.grace_period_seconds,
        "tolerations": _tolerations(spec, settings),
        "volumes": [*mounts.volumes, *copy.deepcopy(list(overlay.volumes))],
    }
    own_secrets = [secret.name for secret in overlay.image_pull_secrets]
    optional = {
        "affinity": _affinity(spec, avoid),
        "imagePullSecrets": [{"name": name} for name in own_secrets or settings.trainer_image_pull_secrets],
        "initContainers": [_sidecar(sidecar) for sidecar in overlay.sidecars],
        "nodeSelector": {**dict(settings.trainer_node_selector), **overlay.node_selector},
        "priorityClassName": priority_class(spec, settings),
        "runtimeClassName": overlay.runtime_class_name or settings.trainer_runtime_class,
        "schedulerName": overlay.scheduler_name,
        "serviceAccountName": spec.service_account_name,
        "topologySpreadConstraints": copy.deepcopy(list(overlay.topology_spread_constraints)),
    }
    pod |= {name: value for name, value in optional.items() if value}
    return {"metadata": metadata, "spec": dict(sorted(pod.items()))}


def _container(
    spec: DPOJobSpec, image: str, mounts: Mounts, words: list[str], settings: Settings, *, leads: bool
) -> dict[str, Any]:
    overlay = spec.pod_template
    user_mounts = [
        {"name": mount.name, "mountPath": mount.mount_path}
        | ({"subPath": mount.sub_path} if mount.sub_path else {})
        | ({"readOnly": True} if mount.read_only else {})
        for mount in overlay.volume_mounts
    ]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image,
        "command": words,
        "env": _environment(spec, mounts, settings),
        "ports": [{"name": "pytorchjob-port", "containerPort": settings.rendezvous_port}],
        "resources": _resources(spec),
        "securityContext": copy.deepcopy(CONTAINER_SECURITY),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*mounts.mounts, *user_mounts],
    }
    if spec.image_pull_policy is not None:
        container["imagePullPolicy"] = spec.image_pull_policy
    if leads:
        container["ports"].append({"name": METRICS_PORT, "containerPort": settings.trainer_port})
        container |= _probes(spec, settings)
    return container


def _probes(spec: DPOJobSpec, settings: Settings) -> dict[str, Any]:
    """Only rank 0 serves HTTP, after the rendezvous of all processes. It has neither a readiness nor a startup probe.

    Workers resolve the master's name before they start, and its Service publishes only ready pods. A pod is not ready
    until its startup probe has passed, so a master that waits for its workers would wait forever.
    """
    meeting = (
        spec.run_policy.start_timeout_seconds + 1800
    )  # the imports and the rendezvous follow the start of the last pod
    # The kubelet does not check the certificate, and /healthz needs no token.
    scheme = {"scheme": "HTTPS"} if settings.trainer_metrics_secret else {}
    probe = {
        "httpGet": {"path": "/healthz", "port": METRICS_PORT, **scheme},
        "initialDelaySeconds": meeting,
        "periodSeconds": LIVENESS_PERIOD,
        "timeoutSeconds": 10,
        "failureThreshold": LIVENESS_FAILURES,
    }
    return {"livenessProbe": probe}


def _resources(spec: DPOJobSpec) -> dict[str, Any]:
    """Requests equal limits, so that all pods of a run have the same priority in an eviction."""
    resources = spec.resources
    amounts: dict[str, str] = {}
    if resources.cpu is not None:
        amounts["cpu"] = resources.cpu
    if resources.memory is not None:
        amounts["memory"] = resources.memory
    if resources.gpus_per_node:
        amounts[resources.gpu_resource] = str(resources.gpus_per_node)
    amounts |= dict(sorted(resources.extended.items()))
    return {"limits": dict(amounts), "requests": dict(amounts)} if amounts else {}


def _environment(spec: DPOJobSpec, mounts: Mounts, settings: Settings) -> list[dict[str, Any]]:
    """The variables of the installation, the operator and the job, in this order; the last one of a name wins."""
    values: dict[str, dict[str, Any]] = {name: {"name": name, "value": value} for name, value in settings.extra_env}
    for variable in [*_collectives(spec), *mounts.env, *_limits(spec), *_logging(spec)]:
        values[variable["name"]] = variable
    for own in spec.pod_template.env:
        values[own.name] = (
            {"name": own.name, "valueFrom": copy.deepcopy(own.value_from)}
            if own.value_from is not None
            else {"name": own.name, "value": own.value or ""}
        )
    return list(values.values())


def _collectives(spec: DPOJobSpec) -> list[dict[str, Any]]:
    """Make NCCL record the last collectives; a time-out writes the record to scratch space and to the log.

    What Transformer Engine and cuBLAS read from the environment is not here: the trainer's launcher sets it.
    """
    if not spec.resources.gpus_per_node:
        return []
    values = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    return [{"name": name, "value": value} for name, value in values.items()]


def _limits(spec: DPOJobSpec) -> list[dict[str, Any]]:
    """What the trainer needs of runPolicy, which may change and so is not in the pinned spec."""
    seconds = spec.run_policy.stall_timeout_seconds
    return [] if seconds is None else [{"name": "DPO_STALL_TIMEOUT_SECONDS", "value": str(seconds)}]


def _logging(spec: DPOJobSpec) -> list[dict[str, Any]]:
    found = Mounts()
    wandb, mlflow = spec.logging.wandb, spec.logging.mlflow
    if wandb is not None and wandb.api_key_secret_ref is not None:
        found.from_secret("WANDB_API_KEY", wandb.api_key_secret_ref.name, wandb.api_key_secret_ref.key)
    if mlflow is not None and mlflow.token_secret_ref is not None:
        found.from_secret("MLFLOW_TRACKING_TOKEN", mlflow.token_secret_ref.name, mlflow.token_secret_ref.key)
    return found.env


def _pod_security(spec: DPOJobSpec) -> dict[str, Any]:
    chosen = spec.pod_template.security
    context: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if chosen.fs_group is not None:
        # Ownership changes only if that of the top folder is wrong: a volume of checkpoints would take minutes.
        context |= {"fsGroup": chosen.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    if chosen.run_as_user is not None:
        context["runAsUser"] = chosen.run_as_user
    if chosen.run_as_group is not None:
        context["runAsGroup"] = chosen.run_as_group
    if chosen.supplemental_groups:
        context["supplementalGroups"] = list(chosen.supplemental_groups)
    return dict(sorted(context.items()))


def _tolerations(spec: DPOJobSpec, settings: Settings) -> list[dict[str, Any]]:
    """The operator's tolerations of failed nodes (Kubernetes' default is 300 s), the job's, then the installation's.

    If several match a taint, the first one decides how long a pod stays. After an ``operator: Exists``, which matches
    all taints without a time limit, the operator's would have no effect.
    """
    more = [_toleration(each) for each in (*spec.pod_template.tolerations, *settings.trainer_tolerations)]
    keys = {toleration.get("key") for toleration in more if toleration.get("effect") in (None, "NoExecute")}
    ours = [
        {
            "key": taint,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": settings.node_failure_toleration_seconds,
        }
        for taint in NODE_FAILURE_TAINTS
        if taint not in keys
    ]
    return [*ours, *(each for index, each in enumerate(more) if each not in more[:index])]


def _toleration(toleration: Toleration) -> dict[str, Any]:
    values = {
        "key": toleration.key,
        "operator": toleration.operator,
        "value": toleration.value,
        "effect": toleration.effect,
        "tolerationSeconds": toleration.toleration_seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


def _affinity(spec: DPOJobSpec, avoid: Sequence[str]) -> dict[str, Any]:
    """The job's affinity, and a preference for nodes on which no attempt has failed."""
    affinity: dict[str, Any] = copy.deepcopy(spec.pod_template.affinity or {})
    if not avoid:
        return affinity
    # The API accepts one value per field requirement; all requirements of a term must hold.
    fields = [
        {"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in list(avoid)[:AVOIDED_NODES_MAX]
    ]
    node_affinity = affinity.setdefault("nodeAffinity", {})
    wishes = node_affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", [])
    wishes.append({"weight": 100, "preference": {"matchFields": fields}})
    return affinity


def _sidecar(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Return a sidecar as an init container with restartPolicy Always, which never keeps a finished pod running."""
    container = copy.deepcopy(sidecar)
    context = {**CONTAINER_SECURITY, **container.get("securityContext", {})}
    return {**container, "restartPolicy": "Always", "securityContext": copy.deepcopy(context)}
