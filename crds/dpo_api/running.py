"""Sections for the execution of a run: processes, checkpoints, output, life cycle and logging."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from dpo_api.fields import (
    BRANCH_PATTERN,
    HTTP_URL_PATTERN,
    REPOSITORY_PATTERN,
    SECONDS_MAX,
    Bool,
    DnsName,
    Int,
    LabelKey,
    Quantity,
    Removed,
    Rule,
    SecretKeyRef,
    Section,
    Uri,
)
from dpo_api.inputs import URI_FORMS, StorageAccess
from dpo_api.metrics import Monitored

GpuProduct = Literal["B200", "H200", "H100-NVL", "H100-80GB", "A100-80GB", "A100-40GB", "L40S", "L4", "A10G"]
"""The names of the table in ``dpo_api.sizing.products``."""

OutputFormat = Literal["huggingFace", "peft", "megatron", "nemo"]
ShortText = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=253)]
HttpUrl = Annotated[str, StringConstraints(strict=True, pattern=HTTP_URL_PATTERN, max_length=512)]


class Parallelism(Section):
    """How one model is split over processes. The remaining processes are data parallel. See docs/parallelism.md."""

    tensor: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share each matrix; must divide the model's number of attention heads. Default 1:"
        " on GPUs it is chosen where it is left out.",
    )
    pipeline: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share the model's layers. Default 1: on GPUs it is chosen where it is left out.",
    )
    context: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share the tokens of each pack, for very long texts. Default 1: it is not chosen.",
    )
    sequence: Bool = Field(
        default=False,
        description="Also split norms and dropout by tokens; needs tensor above 1. Default false: on GPUs, where it is"
        " left out, true with tensor above 1.",
    )
    distributed_optimizer: Bool = Field(
        default=True,
        description="Split the optimizer state over data- and context-parallel processes. Default true.",
    )
    verify: Bool = Field(
        default=True,
        description="Before training, compare a model-parallel layout with one process: log-probs and gradients of a"
        " few pairs on a few layers. A difference ends the run. Default true.",
    )

    @property
    def sequence_parts(self) -> int:
        """The number of equal parts that sequence parallelism cuts a pack's stream of tokens into."""
        return self.tensor if self.sequence else 1


class Resources(Section):
    """Nodes and the resources of each."""

    nodes: Int = Field(default=1, ge=1, le=1024, description="Pods, each on its own node. Default 1.")
    gpus_per_node: Int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs of each pod; 0 trains on CPU. Must be set on a cluster. `dpo run` uses this machine's.",
    )
    gpu_resource: LabelKey = Field(
        default="nvidia.com/gpu", description="Name of the extended resource. Default nvidia.com/gpu."
    )
    gpu_product: GpuProduct | None = Field(
        default=None,
        description="The GPU, for the choice of a layout before pods exist. Not set: what `podTemplate.nodeSelector`"
        " names, else unknown until the pods start.",
    )
    processes_per_node: Int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Training processes of each pod. Not set: one per GPU, or one on CPU.",
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
        default={}, max_length=16, description="Additional extended resources of each pod, such as rdma/ib: 1."
    )

    def processes(self, gpus: int | None = None) -> int:
        """Return the training processes of each node: the spec's value, else one per GPU, else one.

        ``gpus``: the GPUs that a node has; None: those that the spec asks for. Processes do not share a GPU.
        """
        if gpus is None:
            return self.processes_per_node or self.gpus_per_node or 1
        stated = self.processes_per_node or gpus or 1
        return min(stated, gpus) if gpus else stated


class Reference(Section):
    """The reference model's log-probs, which are computed once and reused."""

    cache_uri: Uri | None = Field(
        default=None,
        alias="cacheURI",
        description="Folder that stores the reference log-probs for other runs with the same model and data:"
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
        description="Steps between checkpoints. Another is written at the end and when the run is asked to stop."
        " Default 100.",
    )
    keep: Int = Field(default=3, ge=1, le=10_000, description="Number of newest checkpoints to keep. Default 3.")
    monitor: Monitored | None = Field(
        default=None,
        description="Write a checkpoint after each validation that is the best so far by this metric (lowest loss,"
        " highest accuracy or margin), and keep the best one in addition to the newest. The validation before the"
        " first step does not count. Not set: only the newest.",
    )
    async_save: Bool = Field(
        default=False,
        alias="async",
        description="Write checkpoints while training goes on. Takes host memory: 12 bytes for each trained parameter,"
        " divided by the processes. Default false.",
    )
    resume: Bool = Field(
        default=True,
        description="Continue from the run directory's newest complete checkpoint. false: fail if the run directory"
        " has one. Default true.",
    )
    grace_period_seconds: Int = Field(
        default=600,
        ge=30,
        le=86_400,
        description="Seconds that a run has to write a checkpoint after it is asked to stop. Default 600.",
    )


class OutputHub(Section):
    """A repository of the Hugging Face Hub that the exported model is pushed to."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "repository",
            "repository holds -- or .., or ends with .git, which the hub refuses; choose another name",
            "!self.repository.contains('--') && !self.repository.contains('..') && !self.repository.endsWith('.git')",
            lambda s: "--" not in s.repository and ".." not in s.repository and not s.repository.endswith(".git"),
        ),
        Rule(
            "revision",
            "revision is a commit, and commits do not change; name a branch",
            "!has(self.revision) || !self.revision.matches('^[0-9a-f]{40}$')",
            lambda s: re.fullmatch(r"[0-9a-f]{40}", s.revision) is None,
        ),
    )

    repository: Annotated[str, StringConstraints(strict=True, pattern=REPOSITORY_PATTERN, max_length=193)] = Field(
        description="The repository, as org/name. It is created if it does not exist."
    )
    revision: Annotated[str, StringConstraints(strict=True, pattern=BRANCH_PATTERN, max_length=128)] = Field(
        default="main", description="The branch. It is created if it does not exist. Default main."
    )
    private: Bool = Field(
        default=True,
        description="Whether a repository that the run creates is private; one that exists stays as it is. Default"
        " true.",
    )

    @property
    def uri(self) -> str:
        """The address of the branch: ``hf://org/name@revision``."""
        return f"hf://{self.repository}@{self.revision}"


class Output(Section):
    """The aligned model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "formats",
            "formats names a format twice",
            "!has(self.formats) || self.formats.all(a, self.formats.exists_one(b, a == b))",
            lambda s: len(s.formats) == len(set(s.formats)),
        ),
        Rule(
            "formats",
            "formats names megatron or nemo, which are made from the Hugging Face folder; add huggingFace to formats",
            "!has(self.formats) || self.formats.exists(f, f == 'huggingFace')"
            " || !self.formats.exists(f, f == 'megatron' || f == 'nemo')",
            lambda s: "huggingFace" in s.formats or not s.converted,
        ),
    )

    uri: Uri | None = Field(
        default=None, description=f"Folder of the aligned model: {URI_FORMS}. Not set: <run directory>/model."
    )
    storage: StorageAccess | None = Field(default=None, description="Access to it, if not `spec.storage`.")
    from_checkpoint: Literal["last", "best"] = Field(
        default="last",
        alias="from",
        description="The weights that are exported: those after the last step, or those of the best checkpoint by"
        " `checkpoint.monitor`. Default last.",
    )
    formats: tuple[OutputFormat, ...] = Field(
        default=("huggingFace",),
        min_length=1,
        max_length=4,
        description="Formats of the model. `huggingFace`: a folder that transformers loads; `peft`: the adapter alone,"
        " with `lora`, in the subfolder adapter/; `megatron`: a Megatron-Core checkpoint, in megatron/; `nemo`: a .nemo"
        " archive, model.nemo. The last two are made from the folder when it is written. Not set and with `lora`: peft"
        " too. Default [huggingFace].",
    )
    merge: Bool = Field(
        default=True,
        description="With `lora`: merge the adapter into the weights, computed in fp32. false: write only the adapter,"
        " in the format peft. Default true.",
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        default=None, description="Data type of the weights in the model's files. Not set: that of the source."
    )
    hub: OutputHub | None = Field(
        default=None,
        description="Push the exported model to the Hugging Face Hub, with `storage.hub`, once it is whole in `uri`:"
        " the Hugging Face folder with adapter/, or with `merge: false` the adapter alone. Not set: it is not pushed.",
    )

    @property
    def converted(self) -> tuple[OutputFormat, ...]:
        """The formats that are made from the Hugging Face folder."""
        return tuple(form for form in self.formats if form in ("megatron", "nemo"))


class RunPolicy(Section):
    """Life cycle on a cluster. The only section that can be changed after acceptance."""

    max_restarts: Int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Restarts after failures that may be temporary. Lost or drained nodes do not count. Default 3.",
    )
    active_deadline_seconds: Int | None = Field(
        default=None,
        ge=1,
        le=SECONDS_MAX,
        description="Seconds after which the job fails; time queued or suspended does not count. Not set: no limit.",
    )
    ttl_seconds_after_finished: Int | None = Field(
        default=None,
        ge=0,
        le=SECONDS_MAX,
        description="Seconds after the end until the DPOJob is deleted; the run directory is kept. Not set: the"
        " installation's default (the chart's is 30 days).",
    )
    queue_name: DnsName | None = Field(default=None, description="Kueue LocalQueue. Not set: not queued.")
    priority_class: DnsName | None = Field(
        default=None, description="Kueue WorkloadPriorityClass. Not set: `podTemplate.priorityClassName`."
    )
    restart_priority_class: DnsName | None = Field(
        default=None,
        description="Kueue WorkloadPriorityClass of later attempts, which queue again. Not set: `priorityClass`.",
    )
    suspend: Bool = Field(
        default=False, description="true: write a checkpoint and release the nodes; false: continue. Default false."
    )
    start_timeout_seconds: Int = Field(
        default=1800,
        ge=10,
        le=SECONDS_MAX,
        description="Seconds from admission until all pods of an attempt run; after that it is deleted and retried."
        " Attempts that end earlier without having run do not start the time again. Default 1800.",
    )
    stall_timeout_seconds: Int | None = Field(
        default=None,
        ge=60,
        le=SECONDS_MAX,
        description="Seconds without progress (a step, an indexed or reference pair, a validation batch) after which"
        " an attempt is ended and retried. Loading, checkpoints and exports are not timed. Not set: a stall only sets"
        " the condition TrainingStalled. Where the processes wait for one of them in a step, the trainer itself ends"
        " the attempt after three quarters of this time, or 1800 s if that is less or this is not set, and names it.",
    )
    attempts_history_limit: Int = Field(
        default=3, ge=0, le=100, description="Failed attempts whose pods are kept for kubectl logs. Default 3."
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
        description="`offline`: write to the run directory, for `wandb sync`. Default online.",
    )
    base_url: HttpUrl | None = Field(
        default=None, alias="baseURL", description="URL of a self-hosted server. Not set: the public service."
    )
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Key of a Secret that holds the API key; required on a cluster in mode online. `dpo run` uses"
        " $WANDB_API_KEY or `wandb login`.",
    )


class Mlflow(Section):
    """MLflow tracking. Each run directory has one run, which all attempts continue."""

    tracking_uri: HttpUrl = Field(
        alias="trackingURI",
        description="URL of the tracking server. Training goes on while it is away; what was measured follows later.",
    )
    experiment: ShortText | None = Field(
        default=None, description="Experiment, which is created if it does not exist. Not set: the server's `Default`."
    )
    run_name: ShortText | None = Field(default=None, description="Name of the run. Not set: the DPOJob's.")
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Key of a Secret that holds a bearer token for the server. Not set: no token. `dpo run` uses"
        " $MLFLOW_TRACKING_TOKEN.",
    )


class Logging(Section):
    """Where metrics are written in addition to metrics.jsonl and Prometheus."""

    tensorboard: TensorBoard = Field(default=TensorBoard(), description="Event files for TensorBoard.")
    wandb: Wandb | None = Field(default=None, description="Weights & Biases. Not set: not used.")
    mlflow: Mlflow | None = Field(default=None, description="MLflow. Not set: not used.")


FP8_MULTIPLE = 16
"""What the sides of matrices are multiples of if their products are computed in FP8."""


class TransformerEngine(Section):
    """NVIDIA Transformer Engine, on GPUs that support it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "fp8",
            "fp8 needs Transformer Engine, but enabled is false; leave one of them out",
            "!has(self.fp8) || !has(self.enabled) || self.enabled",
            lambda s: s.fp8 is None or s.enabled is not False,
        ),
    )
    removed: ClassVar[tuple[Removed, ...]] = (
        Removed("attention", False, "attention is the trainer's own with every setting; remove the field"),
    )

    enabled: Bool | None = Field(
        default=None,
        description="Use its linear layers. Not set: use them with bf16 if it is installed and there is a GPU.",
    )
    fp8: Literal["e4m3", "hybrid"] | None = Field(
        default=None,
        description="Matrix products of the layers in 8-bit floating point, which is not exact: `e4m3`, or `hybrid` "
        "with E5M2 for gradients. Needs GPUs of compute capability 8.9 or later. Not set: none.",
    )
    masked_softmax_fusion: Bool | None = Field(
        default=None,
        description="NVTE_MASKED_SOFTMAX_FUSION. No effect: attention is the trainer's own. Not set: not exported.",
    )
    flash_attention: Bool | None = Field(
        default=None, description="NVTE_FLASH_ATTN. No effect: attention is the trainer's own. Not set: not exported."
    )
    fused_attention: Bool | None = Field(
        default=None, description="NVTE_FUSED_ATTN. No effect: attention is the trainer's own. Not set: not exported."
    )
