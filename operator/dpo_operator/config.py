"""Settings of the operator: what an installation decides and no DPOJob can."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_api.version import VERSION


@dataclass(frozen=True)
class Settings:
    """Frozen at start; flags and environment are read by the process."""

    trainer_image: str = f"dpo-operator/trainer:{VERSION}"
    """Image of jobs that name none; pinned at acceptance."""
    trainer_port: int = 9400
    """Port of rank 0's /metrics, /status and /healthz."""
    rendezvous_port: int = 23456
    """Port of torchrun's rendezvous on rank 0."""
    default_shm: str = "2Gi"
    """Size of /dev/shm where ``resources.shm`` is not set, on CPU; with GPUs ``default_gpu_shm``."""
    default_gpu_shm: str = "16Gi"
    node_failure_toleration_seconds: int = 30
    """How long pods stay on a node that is not ready or unreachable."""
    gang_scheduling: bool = True
    """Write schedulingPolicy.minAvailable; without a gang scheduler in training-operator it changes nothing."""
    kueue: bool = True
    """Write Kueue's labels on children of jobs with a queue."""
    default_queue: str = ""
    """Kueue's LocalQueue of jobs that name none; empty: they start at once."""
    extra_env: tuple[tuple[str, str], ...] = ()
    """Environment of every trainer, such as the cluster's NCCL settings; a job's own env wins."""
    trainer_image_pull_secrets: tuple[str, ...] = ()
    """Pull secrets of jobs whose podTemplate names none; each must be in the job's namespace."""
    identity_audience: str = "sts.amazonaws.com"
    """Audience of the projected identity token for jobs with a serviceAccountName; empty: none is mounted here, and
    the cloud's own webhook (IRSA, workload identity) does it."""
    identity_token_seconds: int = 86_400
    backoff_base_seconds: float = 10.0
    """First wait before another attempt; doubles with each failure in a row that made no progress."""
    backoff_max_seconds: float = 600.0
    infrastructure_restarts_without_progress: int = 20
    """Infrastructure failures in a row, without a further step, after which a job fails."""
    unreachable_margin_seconds: float = 30.0
    """After grace period plus this much, a pod that is being deleted on a silent node counts as gone."""
    progress_write_seconds: float = 60.0
    """Least time between status writes that only bring progress."""
    stalled_after_seconds: float = 600.0
    """Without a step for this long, TrainingStalled becomes True; ``stallTimeoutSeconds`` alone ends an attempt."""
    learning_after_steps: int = 100
    """Steps after which the condition Learning is judged."""
    resync_seconds: float = 300.0
    """A pass over an unfinished job is due at least this often."""
    component: str = "dpo-operator"
    labels: tuple[tuple[str, str], ...] = field(default=())
    """Further labels of every object that the operator creates."""
