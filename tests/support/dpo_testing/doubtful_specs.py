"""Specs that are impossible or doubtful as a whole, and the finding that each must lead to."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any

from dpo_api.validation import ModelFacts

LLAMA = ModelFacts(
    layers=32, heads=32, kv_heads=32, hidden=4096, ffn=11008, vocab=32000, max_positions=4096, family="llama"
)
GROUPED = ModelFacts(
    layers=32, heads=32, kv_heads=8, hidden=4096, ffn=14336, vocab=128256, max_positions=8192, family="llama"
)


@dataclass(frozen=True)
class Case:
    """A change to the smallest valid spec, and the finding that it must lead to."""

    name: str
    changes: dict[str, Any]
    level: str
    field: str
    says: str
    removed: tuple[str, ...] = ()
    known: dict[str, Any] = attribute(default_factory=dict)


RPO = {"dpo.loss": "rpo_sq"}
SFT = {"dpo.preferenceWeight": 0, "dpo.sftWeight": 1}
VALID = {"data.validation": [{"uri": "s3://prefs/valid.jsonl"}]}
ON_CLUSTER = {"on_cluster": True}

CASES = [
    # --- processes ---
    Case(
        "more processes than GPUs",
        {"resources.processesPerNode": 16},
        "error",
        "spec.resources.processesPerNode",
        "16 processes cannot share 8 GPUs; use 8",
    ),
    Case("idle GPUs", {"resources.processesPerNode": 6}, "warning", "spec.resources.processesPerNode", "leave 2 of 8"),
    Case(
        "model parallelism does not divide",
        {"parallelism.tensor": 4, "parallelism.pipeline": 3},
        "error",
        "spec.parallelism",
        "tensor 4 x pipeline 3 x context 1 = 12 does not divide the 8 processes (1 nodes x 8)",
    ),
    Case(
        "on one CPU",
        {"resources.gpusPerNode": 0, "parallelism.tensor": 2},
        "error",
        "spec.parallelism",
        "does not divide the 1 processes",
    ),
    Case(
        "tensor over nodes",
        {"resources.nodes": 2, "parallelism.tensor": 16},
        "warning",
        "spec.parallelism.tensor",
        "16 is more than a node's 8 processes",
    ),
    # --- the loss ---
    Case("beta without a preference", {**SFT, "dpo.beta": 0.2}, "warning", "spec.dpo.beta", "preferenceWeight is 0"),
    Case("loss without a preference", {**SFT, "dpo.loss": "ipo"}, "warning", "spec.dpo.loss", "preferenceWeight is 0"),
    Case(
        "reference without a preference",
        {**SFT, "reference.cacheURI": "s3://cache/x"},
        "warning",
        "spec.reference.cacheURI",
        "preferenceWeight is 0",
    ),
    Case(
        "reward scale without rpo",
        {"dpo.gtRewardScale": 2},
        "warning",
        "spec.dpo.gtRewardScale",
        "no effect with loss dpo",
    ),
    Case(
        "default reward without rpo",
        {"dpo.loss": "ipo", "dpo.defaultChosenReward": 2},
        "warning",
        "spec.dpo.defaultChosenReward",
        "no effect with loss ipo; rpo_sq, rpo_bwd_kl and rpo_fwd_kl use rewards",
    ),
    Case("rpo of no gap", {**RPO, "dpo.gtRewardScale": 0}, "warning", "spec.dpo.gtRewardScale", "every reward gap 0"),
    Case(
        "rpo of a wrong gap",
        {**RPO, "dpo.defaultRejectedReward": 1},
        "warning",
        "spec.dpo.defaultChosenReward",
        "1 is not above defaultRejectedReward 1",
    ),
    Case("rpo's defaults", RPO, "note", "spec.dpo.loss", "without chosen_reward and rejected_reward get 1 and 0"),
    Case(
        "rpo's defaults in a mixture",
        {"dpo.losses": [{"loss": "dpo"}, {"loss": "rpo_sq"}]},
        "note",
        "spec.dpo.losses",
        "dpo + rpo_sq learns each record's reward gap",
    ),
    Case(
        "reward scale of a mixture without rpo",
        {"dpo.losses": [{"loss": "dpo"}, {"loss": "hinge"}], "dpo.gtRewardScale": 2},
        "warning",
        "spec.dpo.gtRewardScale",
        "no effect with loss dpo + hinge",
    ),
    Case("ipo sums", {"dpo.loss": "ipo"}, "note", "spec.dpo.averageLogProbs", "TRL averages"),
    Case(
        "sft average without sft",
        {"dpo.sftAverageLogProbs": True},
        "warning",
        "spec.dpo.sftAverageLogProbs",
        "no effect because sftWeight is 0",
    ),
    Case(
        "simpo averages",
        {"dpo.loss": "simpo", "dpo.beta": 2, "dpo.averageLogProbs": True},
        "warning",
        "spec.dpo.averageLogProbs",
        "no effect with loss simpo, which always averages",
    ),
    Case(
        "simpo with dpo's beta",
        {"dpo.loss": "simpo"},
        "warning",
        "spec.dpo.beta",
        "0.1 (the default) is far outside simpo's usual 2 to 10",
    ),
    Case(
        "a reference cache without a reference",
        {"dpo.loss": "simpo", "dpo.beta": 2, "reference.cacheURI": "s3://cache/x"},
        "warning",
        "spec.reference.cacheURI",
        "no effect, because loss simpo needs no reference",
    ),
    Case("robust without noise", {"dpo.loss": "robust"}, "warning", "spec.dpo.labelSmoothing", "the same as dpo"),
    Case(
        "smoothing without a preference",
        {**SFT, "dpo.labelSmoothing": 0.1},
        "warning",
        "spec.dpo.labelSmoothing",
        "preferenceWeight is 0",
    ),
    Case("beta far up", {"dpo.beta": 50}, "warning", "spec.dpo.beta", "50 is far outside the usual"),
    Case("beta far down", {"dpo.beta": 1e-4}, "warning", "spec.dpo.beta", "0.0001 is far outside the usual"),
    # --- the adapter ---
    Case(
        "module twice",
        {"lora.targetModules": ["all", "mlp_fc1"]},
        "warning",
        "spec.lora.targetModules",
        "all already holds mlp_fc1",
    ),
    Case(
        "module in its group",
        {"lora.targetModules": ["attention_qkv", "attention"]},
        "warning",
        "spec.lora.targetModules",
        "attention already holds attention_qkv",
    ),
    Case(
        "adapter that starts elsewhere", {"lora.rowInit": "normal"}, "warning", "spec.lora.rowInit", "not the reference"
    ),
    Case("merging no adapter", {"output.merge": False}, "warning", "spec.output.merge", "no effect without lora"),
    Case(
        "layer beyond",
        {"lora.layers": [0, 32]},
        "error",
        "spec.lora.layers",
        "32 is not a layer of the model, which has 32, counted from 0 to 31",
        known={"model": LLAMA},
    ),
    Case(
        "rank of the whole",
        {"lora.rank": 4096},
        "warning",
        "spec.lora.rank",
        "hidden size 4096",
        known={"model": LLAMA},
    ),
    Case(
        "rank that tensor parallelism does not divide",
        {"lora.rank": 6, "parallelism.tensor": 4},
        "error",
        "spec.lora.rank",
        "6 is not divisible by parallelism.tensor 4: each process has a part of it",
    ),
    Case(
        "rank of an adapter that tensor parallelism does not divide",
        {"lora": {"rank": 6, "continueAdapter": True}, "model.adapter": {"uri": "/sft"}, "parallelism.tensor": 4},
        "error",
        "spec.lora.rank",
        "6 of model.adapter is not divisible by parallelism.tensor 4",
    ),
    # --- batches and packs ---
    Case(
        "pack budget without packing",
        {"training.packing": {"enabled": False, "maxTokens": 9000}},
        "warning",
        "spec.training.packing.maxTokens",
        "packing.enabled is false",
    ),
    Case(
        "pack smaller than a pair",
        {"training.packing.maxTokens": 8191},
        "error",
        "spec.training.packing.maxTokens",
        "which may have 2 x data.maxLength 4096; set it to 8192 or more, or maxLength to 4095 or less",
    ),
    Case(
        "micro batch without packing",
        {"training.packing.enabled": False, "training.microBatchSize": 2},
        "warning",
        "spec.training.microBatchSize",
        "packing.enabled is false",
    ),
    Case(
        "micro batch above the batch",
        {"training.microBatchSize": 65},
        "warning",
        "spec.training.microBatchSize",
        "65 is above globalBatchSize 64",
    ),
    Case(
        "four epochs",
        {"training.epochs": 4},
        "warning",
        "spec.training.epochs",
        "4 epochs usually overfit; use 3 or fewer",
    ),
    Case(
        "epochs and steps",
        {"training.epochs": 2, "training.maxSteps": 50},
        "note",
        "spec.training.epochs",
        "because maxSteps 50 is set",
    ),
    Case(
        "rate for all parameters",
        {"training.learningRate": 2e-4},
        "warning",
        "spec.training.learningRate",
        "5e-7 to 1e-5",
    ),
    Case(
        "rate for an adapter",
        {"lora": {}, "training.learningRate": 2e-3},
        "warning",
        "spec.training.learningRate",
        "0.002 is far above the usual range for DPO, 1e-6 to 1e-4 with lora",
    ),
    # --- steps ---
    Case(
        "fewer pairs than a batch",
        {},
        "warning",
        "spec.training.globalBatchSize",
        "40 pairs are fewer",
        known={"train_pairs": 40},
    ),
    Case("no pairs", {}, "error", "spec.data.train", "no usable pair", known={"train_pairs": 0}),
    Case(
        "the schedule of known steps",
        {"training.maxSteps": 100, "training.schedule.constantSteps": 1000},
        "warning",
        "spec.training.schedule",
        "100 steps are fewer than warm-up 10 + constant 1000",
    ),
    Case(
        "the schedule of counted steps",
        {"training.schedule.constantSteps": 1000},
        "warning",
        "spec.training.schedule",
        "100 steps are fewer than",
        known={"train_pairs": 6400},
    ),
    Case(
        "warm-up without end",
        {"training.maxSteps": 8},
        "warning",
        "spec.training.schedule.warmupSteps",
        "8 steps end within the warm-up of 10",
    ),
    Case(
        "interval beyond the run",
        {**VALID, "training.maxSteps": 50, "training.validationInterval": 51},
        "note",
        "spec.training.validationInterval",
        "51 steps are more than the run's 50",
    ),
    Case(
        "empty validation source",
        VALID,
        "error",
        "spec.data.validation[0]",
        "has no usable pairs",
        known={"train_pairs": 6400, "validation_pairs": [0]},
    ),
    # --- validation data ---
    Case(
        "interval without data",
        {"training.validationInterval": 5},
        "warning",
        "spec.training.validationInterval",
        "data.validation is empty",
    ),
    Case(
        "limit without data",
        {"training.limitValidationBatches": 5},
        "warning",
        "spec.training.limitValidationBatches",
        "data.validation is empty",
    ),
    Case(
        "validating on what was learnt",
        {"data.validation": [{"uri": "s3://prefs/train.jsonl"}]},
        "warning",
        "spec.data.validation[0].uri",
        "is also data.train[0]",
    ),
    # --- the best checkpoint, and the end of a run ---
    Case(
        "nothing to choose the best by",
        {"checkpoint.monitor": "val/acc"},
        "error",
        "spec.checkpoint.monitor",
        "val/acc needs data.validation, which is empty; add it or leave monitor out",
    ),
    Case(
        "nothing to wait for",
        {"training.earlyStopping": {}},
        "error",
        "spec.training.earlyStopping",
        "val/loss needs data.validation, which is empty; add it or leave earlyStopping out",
    ),
    Case(
        "the best accuracy of SFT",
        {**SFT, **VALID, "checkpoint.monitor": "val/acc"},
        "error",
        "spec.checkpoint.monitor",
        "a run without a preference loss has no val/acc; use val/loss",
    ),
    Case(
        "an end by the margin of SFT",
        {**SFT, **VALID, "training.earlyStopping": {"monitor": "val/rewards_margin"}},
        "error",
        "spec.training.earlyStopping.monitor",
        "a run without a preference loss has no val/rewards_margin; use val/loss",
    ),
    # --- what is written over what is read ---
    Case(
        "output over the model",
        {"output.uri": "s3://models/tiny"},
        "error",
        "spec.output.uri",
        "is also model, which would be overwritten",
    ),
    Case(
        "output over the adapter",
        {"model.adapter": {"uri": "s3://models/sft"}, "output.uri": "s3://models/sft/"},
        "error",
        "spec.output.uri",
        "is also model.adapter, which would be overwritten",
    ),
    Case(
        "run over the data",
        {"checkpoint.uri": "s3://prefs/train.jsonl"},
        "error",
        "spec.checkpoint.uri",
        "is also data.train[0]",
    ),
    Case(
        "run over the validation data",
        {"checkpoint.uri": "s3://prefs/v/", "data.validation": [{"uri": "s3://prefs/v/"}]},
        "error",
        "spec.checkpoint.uri",
        "is also data.validation[0]",
    ),
    Case(
        "output over the run",
        {"output.uri": "s3://runs/job"},
        "error",
        "spec.output.uri",
        "where the run keeps its checkpoints; use s3://runs/job/model",
    ),
    Case(
        "output among checkpoints",
        {"output.uri": "s3://runs/job/checkpoints/x"},
        "error",
        "spec.output.uri",
        "where the run keeps",
    ),
    # --- kernels ---
    Case(
        "kernels without GPUs",
        {"resources.gpusPerNode": 0, "transformerEngine.enabled": True},
        "error",
        "spec.transformerEngine.enabled",
        "resources.gpusPerNode is 0",
    ),
    Case(
        "Transformer Engine with fp32",
        {"transformerEngine.enabled": True, "training.precision": "fp32"},
        "warning",
        "spec.transformerEngine.enabled",
        "fp32 products are rounded to TF32 there",
    ),
    Case(
        "a switch of attention that is not used",
        {"transformerEngine.flashAttention": False},
        "note",
        "spec.transformerEngine.flashAttention",
        "attention is the trainer's own",
    ),
    Case(
        "FP8 in fp32",
        {"transformerEngine.fp8": "hybrid", "training.precision": "fp32"},
        "error",
        "spec.transformerEngine.fp8",
        "hybrid needs training.precision bf16, and it is fp32",
    ),
    Case(
        "FP8 on a CPU",
        {"resources.gpusPerNode": 0, "transformerEngine.fp8": "e4m3"},
        "error",
        "spec.transformerEngine.fp8",
        "needs GPUs, but resources.gpusPerNode is 0",
    ),
    Case(
        "FP8 on an A100",
        {"resources.gpuProduct": "A100-80GB", "transformerEngine.fp8": "hybrid"},
        "error",
        "spec.transformerEngine.fp8",
        "A100-80GB has no FP8",
    ),
    # --- the model ---
    Case(
        "a width that FP8 cannot multiply",
        {"transformerEngine.fp8": "hybrid"},
        "error",
        "spec.transformerEngine.fp8",
        "the model's feed-forward size, divided by parallelism.tensor, is 60, not a multiple of 16; leave it out",
        known={"model": ModelFacts(2, 12, 4, 48, 60, 99, 0, "llama")},
    ),
    Case(
        "tensor does not divide heads",
        {"parallelism.tensor": 3},
        "error",
        "spec.parallelism.tensor",
        "3 does not divide the model's 32 attention heads; use 1, 2, 4, 8, 16 or 32",
        known={"model": LLAMA},
    ),
    Case(
        "tensor neither divides groups nor is a multiple",
        {"parallelism.tensor": 6, "resources.nodes": 3},
        "error",
        "spec.parallelism.tensor",
        "6 neither divides the model's 4 key-value heads nor is a multiple of them; use 1, 2, 4 or 12",
        known={"model": ModelFacts(2, 12, 4, 48, 60, 99, 0, "llama")},
    ),
    Case(
        "tensor does not divide the feed-forward layer",
        {"parallelism.tensor": 2},
        "error",
        "spec.parallelism.tensor",
        "feed-forward size 63",
        known={"model": ModelFacts(2, 2, 2, 32, 63, 99, 0, "llama")},
    ),
    Case(
        "more stages than layers",
        {"parallelism.pipeline": 4},
        "error",
        "spec.parallelism.pipeline",
        "4 stages need as many layers, and the model has 2; use 2 or less",
        known={"model": ModelFacts(2, 12, 4, 48, 60, 99, 0, "llama")},
    ),
    Case(
        "longer than the model's positions",
        {"data.maxLength": 4097},
        "error",
        "spec.data.maxLength",
        "4097 is above the 4096 positions of the model; set it to 4096 or less",
        known={"model": LLAMA},
    ),
    # --- a cluster ---
    Case(
        "no run directory",
        {},
        "error",
        "spec.checkpoint.uri",
        "must be set on a cluster",
        removed=("checkpoint",),
        known=ON_CLUSTER,
    ),
    Case(
        "GPUs unsaid",
        {},
        "error",
        "spec.resources.gpusPerNode",
        "must be set on a cluster",
        removed=("resources",),
        known=ON_CLUSTER,
    ),
    Case(
        "a path on a cluster",
        {"model.huggingFace.uri": "./llama"},
        "error",
        "spec.model.huggingFace.uri",
        "./llama is not mounted in the pods",
        known=ON_CLUSTER,
    ),
    Case(
        "a file address on a cluster",
        {"output.uri": "file:///out"},
        "error",
        "spec.output.uri",
        "is not mounted in the pods",
        known=ON_CLUSTER,
    ),
    Case(
        "access to what is not in S3",
        {"data.train": [{"uri": "pvc://prefs/x", "storage": {"region": "x"}}]},
        "warning",
        "spec.data.train[0].storage",
        "has no effect, because pvc://prefs/x is not in S3",
        known=ON_CLUSTER,
    ),
    Case(
        "no credentials",
        {},
        "warning",
        "spec.storage.credentialsSecretRef",
        "no credentials for S3",
        removed=("storage",),
        known=ON_CLUSTER,
    ),
    Case(
        "credentials of another endpoint",
        {"model.huggingFace.storage": {"endpoint": "https://other.example.com"}},
        "warning",
        "spec.storage.credentialsSecretRef",
        "for each endpoint",
        known=ON_CLUSTER,
    ),
    Case(
        "priority without a queue",
        {"runPolicy.priorityClass": "high"},
        "warning",
        "spec.runPolicy.priorityClass",
        "no effect without queueName",
        known=ON_CLUSTER,
    ),
    Case(
        "restart priority without a queue",
        {"runPolicy.restartPriorityClass": "high"},
        "warning",
        "spec.runPolicy.restartPriorityClass",
        "no effect without queueName",
        known=ON_CLUSTER,
    ),
    Case(
        "time limit behind the deadline",
        {"training.maxRunSeconds": 3600, "runPolicy.activeDeadlineSeconds": 3600},
        "warning",
        "spec.training.maxRunSeconds",
        "3600 s is not below runPolicy.activeDeadlineSeconds 3600 s",
        known=ON_CLUSTER,
    ),
    Case(
        "wandb without a key",
        {"logging.wandb": {"project": "p"}},
        "error",
        "spec.logging.wandb.apiKeySecretRef",
        "must be set for mode online",
        known=ON_CLUSTER,
    ),
    Case(
        "push without a token",
        {"output.hub": {"repository": "org/name"}},
        "error",
        "spec.storage.hub.tokenSecretRef",
        "must be set with output.hub on a cluster",
        known=ON_CLUSTER,
    ),
    Case(
        "token without a use",
        {"storage.hub": {"tokenSecretRef": {"name": "hub", "key": "token"}}},
        "warning",
        "spec.storage.hub.tokenSecretRef",
        "has no effect, because the job neither reads from the hub nor pushes to it",
        known=ON_CLUSTER,
    ),
]
