"""The status of a DPOJob, which `kubectl get`, `describe` and `wait` show. Only the operator writes it.

Unknown fields are ignored, so that each version can read what another version wrote.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from dpo_api.progress import Phase

MESSAGE_MAX = 4096
IMAGE_IDS_MAX = 4
REVISIONS_MAX = 8

Time = Annotated[
    str,
    StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$", max_length=40),
    Field(json_schema_extra={"format": "date-time"}),
]
"""A moment as RFC 3339 in UTC."""

Message = Annotated[str, StringConstraints(max_length=MESSAGE_MAX)]
Name = Annotated[str, StringConstraints(max_length=253)]
Layout = Annotated[str, StringConstraints(max_length=64)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
Reason = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", min_length=1, max_length=256)
]


class ConditionType(Enum):
    """The types of conditions. Each member's value is the type; ``description`` says what True means."""

    description: str

    def __new__(cls, name: str, description: str) -> ConditionType:  # noqa: PYI034 - Self is no Enum to mypy
        """Create the member with the value ``name``."""
        member = object.__new__(cls)
        member._value_ = name
        member.description = description
        return member

    Accepted = (
        "Accepted",
        "The spec is valid; the image and the values are fixed. If False, the message names field, value and fix.",
    )
    Progressing = "Progressing", "The job is queued, starting, running or restarting."
    Suspended = "Suspended", "The job holds no nodes, because runPolicy.suspend is true."
    Finished = "Finished", "The job has succeeded, failed or was rejected. Wait for this, then test Succeeded."
    Succeeded = "Succeeded", "The run finished and its model was exported."
    Failed = "Failed", "The job ended without a model or could not push it, or was rejected; the message says why."
    ProgressAvailable = "ProgressAvailable", "The trainer responds to the operator's requests for its progress."
    LayoutVerified = (
        "LayoutVerified",
        "A layout that divides the model computes what one process does. Unknown: it was not compared.",
    )
    ReferenceConsistent = (
        "ReferenceConsistent",
        "The first loss has the value for policy = reference (ln 2 for dpo). False: wrong reference or data.",
    )
    Finite = "Finite", "Losses and gradients are finite."
    Learning = "Learning", "Accuracy and margin have risen above chance."
    TrainingStalled = "TrainingStalled", "There has been no progress for too long."
    SlowRank = "SlowRank", "One process has been much slower than the others for several steps: see its node."
    Stalled = "Stalled", "The job has failed or was rejected: it does not go on by itself. Flux and Helm read it."
    NetworkRestricted = (
        "NetworkRestricted",
        "The job's NetworkPolicy exists. This is shown only if False: that of a running job cannot be created.",
    )


State = Literal[
    "Pending",
    "Rejected",
    "Queued",
    "Starting",
    "Running",
    "Checkpointing",
    "Restarting",
    "Suspended",
    "Succeeded",
    "Failed",
]

STATES: dict[State, str] = {
    "Pending": "The operator has not processed the job yet, or cannot create its objects yet.",
    "Rejected": "The spec cannot run; the condition Accepted says why. Correct it by editing the job.",
    "Queued": "The job waits until its queue admits it.",
    "Starting": "Pods are being created or scheduled, or are pulling their image.",
    "Running": "All pods run: the trainer is loading, training or exporting.",
    "Checkpointing": "The job was asked to stop and is writing a checkpoint.",
    "Restarting": "An attempt has ended and the next one will follow.",
    "Suspended": "The job holds no nodes, because runPolicy.suspend is true.",
    "Succeeded": "The model is exported.",
    "Failed": "The job ended without a model, or could not push it: then `status.modelURI` says where it is.",
}
"""The values of the column STATE, a summary of the conditions in one word."""


class StatusSection(BaseModel):
    """A part of the status: camelCase in JSON, frozen, unknown fields ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class Condition(StatusSection):
    """One observed fact, as a Kubernetes condition."""

    type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9]*$", min_length=1, max_length=316)] = Field(
        description="What the condition is about."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that the condition was observed for."
    )
    last_transition_time: Time = Field(description="When the status last changed.")
    reason: Reason = Field(description="One word in CamelCase for machines.")
    message: Annotated[str, StringConstraints(max_length=32_768)] = Field(description="One sentence for people.")


class PodRecord(StatusSection):
    """The state of one pod of an attempt."""

    name: Name = Field(description="Name of the pod.")
    node: Name | None = Field(default=None, description="Node that it ran on.")
    exit_code: int | None = Field(default=None, ge=0, le=255, description="Exit code of the trainer.")
    reason: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        default=None, description="Kubernetes' reason, such as OOMKilled or Evicted."
    )


class Attempt(StatusSection):
    """One try of the job, with its own PyTorchJob."""

    number: int = Field(ge=1, le=1_000_000, description="Number of the attempt, from 1.")
    child: Name = Field(description="Name of the attempt's PyTorchJob.")
    start_time: Time | None = Field(default=None, description="When its PyTorchJob was created.")
    running_time: Time | None = Field(default=None, description="When all its pods were running.")
    end_time: Time | None = Field(default=None, description="When its last pod ended.")
    from_step: int | None = Field(default=None, ge=0, description="Step of the checkpoint that it continued from.")
    last_step: int | None = Field(default=None, ge=0, description="Last observed step.")
    result: Literal["Succeeded", "Failed", "Stopped"] | None = Field(default=None, description="How it ended.")
    failure_class: Literal["infrastructure", "retryable", "permanent"] | None = Field(
        default=None, description="Whether another attempt can help, and whether it counts against maxRestarts."
    )
    reason: Reason | None = Field(default=None, description="Cause in one word, such as NodeLost or InvalidData.")
    message: Message | None = Field(default=None, description="Cause in one sentence.")
    image_ids: tuple[Annotated[str, StringConstraints(max_length=512)], ...] = Field(
        default=(),
        alias="imageIDs",
        max_length=IMAGE_IDS_MAX,
        description="IDs of the image that its pods ran, rank 0's first; more than one means that its tag has moved.",
    )
    pods: tuple[PodRecord, ...] = Field(
        default=(), max_length=64, description="Pods of the attempt, those that failed first; at most 64."
    )
    pods_omitted: int | None = Field(
        default=None, ge=0, description="Records of pods that were dropped: only the newest attempts keep them."
    )


class BestValidation(StatusSection):
    """The best validation so far by `checkpoint.monitor`, whose checkpoint is kept."""

    metric: Annotated[str, StringConstraints(max_length=128)] = Field(
        description="Key of the metric, such as val/loss."
    )
    step: int = Field(ge=0, description="Optimizer steps before it.")
    value: float = Field(description="The metric's value.")


class StatusProgress(StatusSection):
    """The trainer's last report of its progress."""

    phase: Phase = Field(description="What the run is doing.")
    step: int = Field(default=0, ge=0, description="Optimizer steps done.")
    total: int = Field(default=0, ge=0, description="Optimizer steps planned; 0 while unknown.")
    epoch: float | None = Field(default=None, ge=0, description="Epochs done, with a fraction.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated seconds until the last step.")
    tokens_per_second: float | None = Field(default=None, ge=0, description="Tokens trained per second.")
    done: int | None = Field(default=None, ge=0, description="Units of the phase that are done.")
    of: int | None = Field(default=None, ge=0, description="Total units of the phase.")
    message: Message | None = Field(default=None, description="One sentence, or empty.")
    metrics: dict[str, float] = Field(
        default={}, max_length=128, description="Newest value of each metric, by its key in metrics.jsonl."
    )
    last_checkpoint_step: int | None = Field(default=None, ge=0, description="Step of the newest complete checkpoint.")
    best: BestValidation | None = Field(
        default=None, description="The best validation so far by `checkpoint.monitor`, whose checkpoint is kept."
    )
    layout: Layout | None = Field(
        default=None, description="Sizes of tensor, pipeline and data parallelism, such as T8 P2 D2."
    )
    revisions: tuple[Annotated[str, StringConstraints(max_length=256)], ...] | None = Field(
        default=None,
        max_length=REVISIONS_MAX,
        description="Repositories of the Hugging Face Hub that the run reads, each at its commit.",
    )
    observed_at: Time | None = Field(default=None, description="When this was observed.")
    changed_at: Time | None = Field(default=None, description="When phase, step or units done last changed.")


class Summary(StatusSection):
    """The columns of `kubectl get`, formatted for display."""

    step: Annotated[str, StringConstraints(max_length=32)] | None = Field(
        default=None, description="Steps done and planned, such as 412/1190."
    )
    accuracy: Annotated[str, StringConstraints(max_length=16)] | None = Field(
        default=None, description="Newest accuracy: of validation once there is one, else of training."
    )
    margin: Annotated[str, StringConstraints(max_length=16)] | None = Field(
        default=None, description="Newest reward margin, from the same data as the accuracy."
    )
    loss: Annotated[str, StringConstraints(max_length=16)] | None = Field(
        default=None, description="Newest training loss."
    )
    eta: Annotated[str, StringConstraints(max_length=32)] | None = Field(
        default=None, description="Time left, such as 3h12m."
    )
    layout: Layout | None = Field(
        default=None, description="How the GPUs share the model, such as T8 P2 D2; see `progress.layout`."
    )


class DPOJobStatus(StatusSection):
    """The observed state of a DPOJob."""

    observed_generation: int | None = Field(default=None, ge=0, description="Generation of the spec seen last.")
    state: State | None = Field(default=None, description="The job's state in one word: " + ", ".join(STATES) + ".")
    message: Message | None = Field(default=None, description="One sentence about the state.")
    conditions: tuple[Condition, ...] = Field(
        default=(),
        max_length=32,
        description="Observed facts: " + ", ".join(kind.value for kind in ConditionType) + ".",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    summary: Summary = Field(default=Summary(), description="The columns of `kubectl get`.")
    progress: StatusProgress | None = Field(default=None, description="The trainer's last report of its progress.")
    attempts: tuple[Attempt, ...] = Field(
        default=(),
        max_length=128,
        description="Attempts, oldest first. If there are too many, only the first and the newest are kept.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number"]},
    )
    attempt: int | None = Field(default=None, ge=0, description="Number of the current or last attempt.")
    restarts: int | None = Field(default=None, ge=0, description="Attempts after the first.")
    charged_restarts: int | None = Field(
        default=None, ge=0, description="Restarts that count against runPolicy.maxRestarts."
    )
    retried: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        default=None, description="Value of the annotation `dpo-operator.dev/retry` that was seen last."
    )
    retried_attempt: int | None = Field(
        default=None, ge=0, description="Last attempt before the newest retry. Later failures alone count."
    )
    nodes: int | None = Field(default=None, ge=0, description="Nodes of an attempt.")
    queue: Annotated[str, StringConstraints(max_length=253)] | None = Field(
        default=None, description="Kueue LocalQueue of the attempts, from `runPolicy.queueName` or the job's label."
    )
    image: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        default=None, description="Trainer image, fixed at acceptance."
    )
    config_map: Name | None = Field(default=None, description="ConfigMap with the accepted spec; it never changes.")
    accepted_spec_digest: Digest | None = Field(
        default=None,
        description="SHA-256 of the accepted spec as the trainer reads it. From then on only runPolicy can be changed.",
    )
    network_policy: Name | None = Field(
        default=None, description="NetworkPolicy that restricts who reaches the job's pods."
    )
    launch_contract: int | None = Field(
        default=None,
        ge=1,
        le=999,
        description="Version of the trainer's command line, fixed at acceptance. Not set: 1, of version 0.1.0.",
    )
    run_directory: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        default=None, description="URI of the run directory."
    )
    model_uri: Annotated[str, StringConstraints(max_length=1100)] | None = Field(
        default=None, alias="modelURI", description="URI of the exported model."
    )
    hub_uri: Annotated[str, StringConstraints(max_length=1100)] | None = Field(
        default=None,
        alias="hubURI",
        description="Commit on the Hugging Face Hub that the model was pushed to: hf://org/name@<commit>.",
    )
    model_step: int | None = Field(default=None, ge=0, description="Step whose weights the exported model has.")
    final_metrics: dict[str, float] = Field(
        default={}, max_length=128, description="Last value of each metric when the run ended."
    )
    start_time: Time | None = Field(default=None, description="When the first attempt was created.")
    admitted_seconds: int | None = Field(
        default=None,
        ge=0,
        description="Seconds that attempts have been admitted, which count against activeDeadlineSeconds.",
    )
    starting_seconds: int | None = Field(
        default=None,
        ge=0,
        description="Seconds that earlier attempts have been admitted since all pods of one were running, which count"
        " against startTimeoutSeconds.",
    )
    admitted_since: Time | None = Field(
        default=None,
        description="When the current attempt was admitted; not set while it is queued or after it has ended.",
    )
    next_attempt_time: Time | None = Field(
        default=None, description="Earliest time at which the next attempt is created."
    )
    completion_time: Time | None = Field(default=None, description="When the job ended.")

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the newest checkpoint that was reported; None: none was."""
        return self.progress.last_checkpoint_step if self.progress is not None else None
