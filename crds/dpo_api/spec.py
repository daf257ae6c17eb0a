"""The spec of a DPOJob: one class for the operator, the CLI and the trainer.

The sections are defined in the modules of each topic and re-exported here; import them from here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from dpo_api.fields import (
    IMAGE_PATTERN,
    ConfigMapRef,
    DnsName,
    OpenObject,
    Rule,
    SecretKeyRef,
    SecretRef,
    Section,
    Text,
    count,
)
from dpo_api.inputs import (
    AdapterSource,
    CABundle,
    Columns,
    Data,
    DataSource,
    HubAccess,
    HuggingFaceSource,
    MegatronSource,
    Model,
    NemoSource,
    Storage,
    StorageAccess,
    StorageCache,
    Tokenizer,
)
from dpo_api.learning import Dpo, EarlyStopping, Lora, LoraModule, LossPart, Packing, Schedule, Training
from dpo_api.loss import Loss
from dpo_api.pods import EnvVar, PodSecurity, PodTemplate, Toleration, VolumeMount
from dpo_api.running import (
    FP8_MULTIPLE,
    Checkpoint,
    Logging,
    Mlflow,
    Output,
    OutputFormat,
    OutputHub,
    Parallelism,
    Reference,
    Resources,
    RunPolicy,
    TensorBoard,
    TransformerEngine,
    Wandb,
)

__all__ = [
    "FP8_MULTIPLE",
    "AdapterSource",
    "CABundle",
    "Checkpoint",
    "Columns",
    "ConfigMapRef",
    "DPOJobSpec",
    "Data",
    "DataSource",
    "Dpo",
    "EarlyStopping",
    "EnvVar",
    "HubAccess",
    "HuggingFaceSource",
    "Logging",
    "Lora",
    "LoraModule",
    "Loss",
    "LossPart",
    "MegatronSource",
    "Mlflow",
    "Model",
    "NemoSource",
    "OpenObject",
    "Output",
    "OutputFormat",
    "OutputHub",
    "Packing",
    "Parallelism",
    "PodSecurity",
    "PodTemplate",
    "Reference",
    "Resources",
    "RunPolicy",
    "Schedule",
    "SecretKeyRef",
    "SecretRef",
    "Section",
    "Storage",
    "StorageAccess",
    "StorageCache",
    "TensorBoard",
    "Tokenizer",
    "Toleration",
    "Training",
    "TransformerEngine",
    "VolumeMount",
    "Wandb",
    "count",
]


Image = Annotated[str, StringConstraints(strict=True, pattern=IMAGE_PATTERN, min_length=1, max_length=512)]


class DPOJobSpec(Section):
    """What to train, on what, how and where."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "lora.continueAdapter",
            "lora.continueAdapter is true, but there is no adapter to continue; set model.adapter, or leave it out",
            "!(has(self.lora) && has(self.lora.continueAdapter) && self.lora.continueAdapter)"
            " || has(self.model.adapter)",
            lambda s: s.lora is None or not s.lora.continue_adapter or s.model.adapter is not None,
        ),
        Rule(
            "output.formats",
            "output.formats names peft, the adapter alone, but lora is not set; set lora or leave peft out",
            "has(self.lora) || !(has(self.output) && has(self.output.formats)"
            " && self.output.formats.exists(f, f == 'peft'))",
            lambda s: s.lora is not None or "peft" not in s.output.formats,
        ),
        Rule(
            "output.merge",
            "output.merge is false and output.formats has no peft, so no model would be written; add peft to formats",
            "!has(self.lora) || !(has(self.output) && has(self.output.merge) && !self.output.merge"
            " && has(self.output.formats)) || self.output.formats.exists(f, f == 'peft')",
            lambda s: (
                s.lora is None
                or s.output.merge
                or "formats" not in s.output.model_fields_set
                or "peft" in s.output.formats
            ),
        ),
        Rule(
            "output.formats",
            "output.merge is false, so there is no whole model to write as megatron or nemo; leave them out of formats",
            "!has(self.lora) || !(has(self.output) && has(self.output.merge) && !self.output.merge"
            " && has(self.output.formats)) || !self.output.formats.exists(f, f == 'megatron' || f == 'nemo')",
            lambda s: s.lora is None or s.output.merge or not s.output.converted,
        ),
        Rule(
            "output.from",
            "output.from is best, but no metric says which checkpoint is; set checkpoint.monitor, or leave from out",
            "!(has(self.output) && has(self.output.from) && self.output.from == 'best')"
            " || (has(self.checkpoint) && has(self.checkpoint.monitor))",
            lambda s: s.output.from_checkpoint == "last" or s.checkpoint.monitor is not None,
        ),
        Rule(
            "parallelism.sequence",
            "parallelism.sequence shares work among tensor-parallel processes; set parallelism.tensor above 1",
            "!(has(self.parallelism) && has(self.parallelism.sequence) && self.parallelism.sequence)"
            " || (has(self.parallelism.tensor) && self.parallelism.tensor > 1)",
            lambda s: not s.parallelism.sequence or s.parallelism.tensor > 1,
        ),
    )

    image: (
        Annotated[str, StringConstraints(strict=True, pattern=IMAGE_PATTERN, min_length=1, max_length=512)] | None
    ) = Field(
        default=None, description="Image of the trainer. Not set: the operator's default when it accepts the job."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="When to pull the image. Not set: Kubernetes' default."
    )
    service_account_name: DnsName | None = Field(
        default=None,
        description="Service account whose identity the pods use for cloud storage (IRSA, workload identity). The pods"
        " get no token for the cluster's API. Not set: `default`.",
    )
    model: Model = Field(description="The start model, which is also the reference: exactly one source.")
    tokenizer: Tokenizer | None = Field(default=None, description="A tokenizer to use instead of the model's own.")
    chat_template: Text | None = Field(
        default=None,
        min_length=1,
        max_length=65_536,
        description="Jinja template that renders message lists. Not set: the tokenizer's own.",
    )
    data: Data = Field(description="Preference data for training and validation.")
    dpo: Dpo = Field(default=Dpo(), description="The loss.")
    lora: Lora | None = Field(default=None, description="Train an adapter. Not set: all parameters are trained.")
    training: Training = Field(default=Training(), description="Batches, steps, optimizer, validation, precision.")
    parallelism: Parallelism = Field(default=Parallelism(), description="How one model is split over processes.")
    resources: Resources = Field(default=Resources(), description="Nodes and the resources of each.")
    reference: Reference = Field(default=Reference(), description="Where the reference log-probs are stored.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="The run directory and what is saved in it.")
    output: Output = Field(default=Output(), description="The aligned model.")
    storage: Storage = Field(default=Storage(), description="How to reach S3, and the local cache.")
    run_policy: RunPolicy = Field(
        default=RunPolicy(),
        description="Life cycle on a cluster; the only section that can be changed after acceptance.",
    )
    logging: Logging = Field(
        default=Logging(), description="Where metrics are written in addition to metrics.jsonl and Prometheus."
    )
    transformer_engine: TransformerEngine = Field(
        default=TransformerEngine(), description="NVIDIA Transformer Engine, on GPUs that support it."
    )
    pod_template: PodTemplate = Field(
        default=PodTemplate(), description="Fields that are merged into the trainer's pods."
    )

    @property
    def pack_multiple(self) -> int:
        """What the tokens of a pack are a multiple of: the parts of sequence parallelism, each as FP8 needs it."""
        return self.parallelism.sequence_parts * (1 if self.transformer_engine.fp8 is None else FP8_MULTIPLE)
