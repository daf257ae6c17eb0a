"""Sections that say where and how a run happens: processes, checkpoints, output, life cycle, logging."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from dpo_api.fields import (
    HTTP_URL_PATTERN,
    SECONDS_MAX,
    Bool,
    DnsName,
    Int,
    LabelKey,
    Quantity,
    Rule,
    SecretKeyRef,
    Section,
    Uri,
)
from dpo_api.inputs import URI_FORMS, StorageAccess

OutputFormat = Literal["huggingFace", "peft", "megatron"]
ShortText = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=253)]
HttpUrl = Annotated[str, StringConstraints(strict=True, pattern=HTTP_URL_PATTERN, max_length=512)]


class Parallelism(Section):
    """How one model is spread over processes. What is left over is data parallelism."""

    tensor: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share each matrix; it divides the model's attention heads. Default 1.",
    )
    pipeline: Int = Field(default=1, ge=1, le=64, description="Processes that share the model's layers. Default 1.")
    context: Int = Field(default=1, ge=1, le=64, description="Processes that share each row of tokens. Default 1.")
    sequence: Bool = Field(
        default=False, description="Share norms and dropout along the tokens too; needs tensor above 1. Default false."
    )
    distributed_optimizer: Bool = Field(
        default=True,
        description="Spread optimizer state over data-parallel processes. Default true.",
    )


class Resources(Section):
    """Nodes and what each one gives."""

    nodes: Int = Field(default=1, ge=1, le=1024, description="Pods, one a node; `dpo run`: this machine. Default 1.")
    gpus_per_node: Int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs of each pod; 0 trains on CPU. Must be set on a cluster. `dpo run` takes this machine's.",
    )
    gpu_resource: LabelKey = Field(
        default="nvidia.com/gpu", description="Name of the extended resource. Default nvidia.com/gpu."
    )
    processes_per_node: Int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Training processes of each pod. Not set: one a GPU, or one on CPU.",
    )
    cpu: Quantity | None = Field(default=None, description="CPU of each pod, such as 32. Not set: no request.")
    memory: Quantity | None = Field(default=None, description="Memory of each pod, such as 256Gi. Not set: no request.")
    shm: Quantity | None = Field(
        default=None, description="Size of /dev/shm, counted as memory. Not set: the operator's default."
    )
    scratch: Quantity | None = Field(
        default=None,
        description="Size of the scratch volume for tokens, reference log-probs and downloads. Not set: no limit.",
    )
    extended: dict[LabelKey, Quantity] = Field(
        default={}, max_length=16, description="Further extended resources of each pod, such as rdma/ib: 1."
    )

    def processes(self, gpus: int | None = None) -> int:
        """Return the training processes of each node: what is stated, else one a GPU, else one.

        ``gpus``: those that a node really has; None: what the spec asks for. No GPU is shared.
        """
        if gpus is None:
            return self.processes_per_node or self.gpus_per_node or 1
        stated = self.processes_per_node or gpus or 1
        return min(stated, gpus) if gpus else stated


class Reference(Section):
    """The reference model's log-probs: computed once, kept, reused."""

    cache_uri: Uri | None = Field(
        default=None,
        alias="cacheURI",
        description="Folder that keeps the reference's log-probs for other runs with the same model and data:"
        f" {URI_FORMS}. Not set: the machine's cache folder.",
    )
    storage: StorageAccess | None = Field(default=None, description="Access to it, if not `spec.storage`.")


class Checkpoint(Section):
    """The run directory and what is saved in it."""

    uri: Uri | None = Field(
        default=None,
        description=f"The run directory: {URI_FORMS}. Must be set on a cluster. `dpo run` defaults to runs/<name>.",
    )
    storage: StorageAccess | None = Field(default=None, description="Access to it, if not `spec.storage`.")
    every_steps: Int = Field(
        default=100,
        ge=1,
        le=100_000_000,
        description="Steps between checkpoints. One more is written at the end and when asked to stop. Default 100.",
    )
    keep: Int = Field(default=3, ge=1, le=10_000, description="Newest checkpoints that are kept. Default 3.")
    monitor: Literal["val/loss", "val/acc", "val/preference_loss"] | None = Field(
        default=None, description="Keep the best checkpoint by this metric too. Not set: the newest only."
    )
    async_save: Bool = Field(
        default=False, alias="async", description="Write checkpoints while training goes on. Default false."
    )
    resume: Bool = Field(
        default=True,
        description="Continue from the run directory's newest complete checkpoint. false: refuse a run directory that"
        " holds one. Default true.",
    )
    grace_period_seconds: Int = Field(
        default=600,
        ge=30,
        le=86_400,
        description="Seconds a run gets to write a checkpoint after it is asked to stop. Default 600.",
    )


class Output(Section):
    """The aligned model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "formats",
            "formats names a format twice",
            "!has(self.formats) || self.formats.all(a, self.formats.exists_one(b, a == b))",
            lambda s: len(s.formats) == len(set(s.formats)),
        ),
    )

    uri: Uri | None = Field(
        default=None, description=f"Folder of the aligned model: {URI_FORMS}. Not set: <run directory>/model."
    )
    storage: StorageAccess | None = Field(default=None, description="Access to it, if not `spec.storage`.")
    formats: tuple[OutputFormat, ...] = Field(
        default=("huggingFace",),
        min_length=1,
        max_length=3,
        description="Forms of the model: `huggingFace` a folder that transformers loads; `peft` the adapter alone, with"
        " `lora`, in the subfolder adapter/; `megatron` a Megatron-Core checkpoint. With `lora` also peft where"
        " this is left out. Default [huggingFace].",
    )
    merge: Bool = Field(
        default=True,
        description="With `lora`: fold the adapter into the weights, computed in fp32. false: write the adapter only,"
        " as the format peft. Default true.",
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        default=None, description="Number type of the model's files. Not set: the source's."
    )


class RunPolicy(Section):
    """Life cycle on a cluster. The only section that may be changed after creation."""

    max_restarts: Int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Further attempts after failures that may pass. Lost or drained nodes are not charged. Default 3.",
    )
    active_deadline_seconds: Int | None = Field(
        default=None,
        ge=1,
        le=SECONDS_MAX,
        description="Seconds of admitted time after which the job fails. Not set: no limit.",
    )
    ttl_seconds_after_finished: Int | None = Field(
        default=None,
        ge=0,
        le=SECONDS_MAX,
        description="Seconds after the end when the DPOJob is deleted; the run directory stays. Not set: never.",
    )
    queue_name: DnsName | None = Field(default=None, description="Kueue LocalQueue. Not set: not queued.")
    priority_class: DnsName | None = Field(
        default=None, description="Kueue WorkloadPriorityClass. Not set: what `podTemplate.priorityClassName` says."
    )
    restart_priority_class: DnsName | None = Field(
        default=None,
        description="Kueue WorkloadPriorityClass of later attempts, which queue again. Not set: `priorityClass`.",
    )
    suspend: Bool = Field(
        default=False, description="Write a checkpoint and give the nodes back; false continues. Default false."
    )
    start_timeout_seconds: Int = Field(
        default=1800,
        ge=10,
        le=SECONDS_MAX,
        description="Seconds from admission until every pod must run; then the attempt is torn down and retried."
        " Default 1800.",
    )
    stall_timeout_seconds: Int | None = Field(
        default=None,
        ge=60,
        le=SECONDS_MAX,
        description="Seconds without a step (or a pair of the index or reference, or a batch of a validation) after"
        " which an attempt is ended and retried; loading, checkpoints and exports are not judged. Not set: only the"
        " condition TrainingStalled tells.",
    )
    attempts_history_limit: Int = Field(
        default=3, ge=0, le=100, description="Failed attempts whose pods stay for kubectl logs. Default 3."
    )


class TensorBoard(Section):
    """Event files for TensorBoard."""

    enabled: Bool = Field(default=False, description="Write event files. Default false.")
    uri: Uri | None = Field(
        default=None, description=f"Folder of the event files: {URI_FORMS}. Not set: <run directory>/tensorboard."
    )


class Wandb(Section):
    """Weights & Biases."""

    project: ShortText = Field(description="Project that the run belongs to.")
    entity: ShortText | None = Field(default=None, description="User or team. Not set: the API key's default.")
    name: ShortText | None = Field(default=None, description="Name of the run. Not set: the DPOJob's.")
    tags: tuple[ShortText, ...] = Field(default=(), max_length=32, description="Tags of the run.")
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="`offline` writes into the run directory, for `wandb sync`. Default online.",
    )
    base_url: HttpUrl | None = Field(
        default=None, alias="baseURL", description="URL of a self-hosted server. Not set: the public service."
    )
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Key of a Secret that holds the API key; needed online on a cluster. `dpo run`: $WANDB_API_KEY or"
        " `wandb login`.",
    )


class Mlflow(Section):
    """MLflow tracking."""

    tracking_uri: HttpUrl = Field(alias="trackingURI", description="URL of the tracking server.")
    experiment: ShortText | None = Field(default=None, description="Experiment. Not set: the server's default.")
    run_name: ShortText | None = Field(default=None, description="Name of the run. Not set: the DPOJob's.")
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="Key of a Secret that holds the token.")


class Logging(Section):
    """Where metrics go besides metrics.jsonl and Prometheus."""

    tensorboard: TensorBoard = Field(default=TensorBoard(), description="Event files for TensorBoard.")
    wandb: Wandb | None = Field(default=None, description="Weights & Biases. Not set: not used.")
    mlflow: Mlflow | None = Field(default=None, description="MLflow. Not set: not used.")


class TransformerEngine(Section):
    """NVIDIA's kernels, on GPUs that have them."""

    enabled: Bool | None = Field(
        default=None,
        description="Use its linear layers and norms. Not set: where it and a GPU are present.",
    )
    attention: Bool = Field(
        default=False, description="Use its attention instead of ours, which shares prompts. Default false."
    )
    fp8: Literal["e4m3", "hybrid"] | None = Field(default=None, description="8-bit matrix products. Not set: none.")
    masked_softmax_fusion: Bool | None = Field(
        default=None, description="NVTE_MASKED_SOFTMAX_FUSION; false avoids a missing kernel. Not set: its own choice."
    )
    flash_attention: Bool | None = Field(
        default=None, description="NVTE_FLASH_ATTN; false avoids a missing kernel. Not set: its own choice."
    )
    fused_attention: Bool | None = Field(
        default=None, description="NVTE_FUSED_ATTN; false avoids a missing kernel. Not set: its own choice."
    )
