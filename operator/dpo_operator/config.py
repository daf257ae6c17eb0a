"""Settings of the operator.

Most have a flag, by which an installation sets them (``runtime.options``). The others are the same for every
installation; they are fields so that tests can set them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_api.pods import Toleration
from dpo_api.version import VERSION


@dataclass(frozen=True)
class Settings:
    """Frozen at start."""

    trainer_image: str = f"dpo-operator/trainer:{VERSION}"
    """Trainer image of jobs without spec.image; pinned at acceptance."""
    trainer_port: int = 9400
    """Port of rank 0's /metrics, /status and /healthz."""
    trainer_metrics_secret: str = ""
    """Secret in each namespace of jobs with tls.crt, tls.key and token: rank 0 then serves HTTPS and needs the token.
    Empty: plain HTTP, open to all that reach the pod."""
    rendezvous_port: int = 23456
    """Port of torchrun's rendezvous on rank 0."""
    default_shm: str = "2Gi"
    """Size of /dev/shm where ``resources.shm`` is not set, on CPU. With GPUs it is ``default_gpu_shm``."""
    default_gpu_shm: str = "16Gi"
    node_failure_toleration_seconds: int = 30
    """How long pods stay on a node that is not ready or unreachable."""
    gang_scheduling: bool = True
    """Write schedulingPolicy.minAvailable; it has no effect unless training-operator uses a gang scheduler."""
    kueue: bool = True
    """Write Kueue's labels on the PyTorchJobs of jobs with a queue."""
    default_queue: str = ""
    """Kueue's LocalQueue of jobs that name none; empty: they start immediately."""
    extra_env: tuple[tuple[str, str], ...] = ()
    """Environment of every trainer, such as the cluster's NCCL settings; a job's own env takes precedence."""
    trainer_image_pull_secrets: tuple[str, ...] = ()
    """Pull secrets of jobs whose podTemplate names none; each must be in the job's namespace."""
    trainer_annotations: tuple[tuple[str, str], ...] = ()
    """Annotations of every trainer pod; a job's own of the same name takes precedence."""
    trainer_node_selector: tuple[tuple[str, str], ...] = ()
    """Labels that the node of every trainer pod must have; a job's own of the same name takes precedence."""
    trainer_tolerations: tuple[Toleration, ...] = ()
    """Tolerations of every trainer pod, after the job's own."""
    trainer_runtime_class: str = ""
    """RuntimeClass of jobs that name none; empty: the cluster's."""
    trainer_priority_class: str = ""
    """PriorityClass of jobs that name none; empty: the cluster's."""
    trainer_pod_patch: Mapping[str, Any] = field(default_factory=dict)
    """A partial pod template that is merged into every trainer pod (``backend.podpatch``), already checked."""
    default_ttl_seconds_after_finished: int | None = None
    """Seconds after the end until a DPOJob that sets no ttlSecondsAfterFinished is deleted; None: never."""
    identity_audience: str = "sts.amazonaws.com"
    """Audience of the projected identity token for jobs with a serviceAccountName; empty: none is mounted, for
    clouds whose own webhook does it (IRSA, workload identity)."""
    identity_token_seconds: int = 86_400
    backoff_base_seconds: float = 10.0
    """Back-off before the next attempt; doubles with each consecutive failure without progress."""
    backoff_max_seconds: float = 600.0
    infrastructure_restarts_without_progress: int = 20
    """Consecutive infrastructure failures without a new checkpoint after which a job fails."""
    unreachable_margin_seconds: float = 30.0
    """A pod that is being deleted on a node that does not respond counts as gone after its grace period plus this."""
    progress_write_seconds: float = 60.0
    """Minimum time between status writes that only update progress."""
    stalled_after_seconds: float = 600.0
    """Without a step for this long, TrainingStalled becomes True; ``stallTimeoutSeconds`` alone ends an attempt."""
    learning_after_steps: int = 100
    """Steps after which the condition Learning is evaluated."""
    resync_seconds: float = 300.0
    """Maximum time between two passes over an unfinished job."""
    network_policies: bool = True
    """Create a NetworkPolicy for each job: its pods accept connections from each other alone, and for metrics."""
    operator_namespace: str = ""
    """Namespace of the operator's pod, which may ask trainers for progress; empty: it runs outside the cluster."""
    operator_labels: tuple[tuple[str, str], ...] = ()
    """Labels of the operator's pod; empty: any pod of its namespace."""
    metrics_from: tuple[Mapping[str, Any], ...] = ()
    """Other clients of the trainers' ``trainer_port``: peers as in ``from`` of a NetworkPolicy."""
    component: str = "dpo-operator"
    labels: tuple[tuple[str, str], ...] = field(default=())
    """Additional labels of every object that the operator creates."""
