"""Sections for learning: the loss, the adapter, the optimizer and the schedule."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, Strict

from dpo_api.fields import Bool, CountOrPercent, Float, Int, Rule, Section, whole
from dpo_api.loss import Loss, described, one_of
from dpo_api.metrics import Monitored

Reward = Annotated[float, Strict(), Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Beta = Annotated[float, Strict(), Field(allow_inf_nan=False, ge=0, lt=1)]
LayerIndex = Annotated[int, BeforeValidator(whole), Strict(), Field(ge=0, le=4095)]
LoraModule = Literal["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "attention", "mlp", "all"]
LoraLinear = Literal["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]
LORA_GROUPS: dict[str, tuple[LoraLinear, ...]] = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
}
"""Value of ``lora.targetModules`` that selects several linear layers → those, in a layer's order."""


SMOOTHED = [loss for loss in Loss if loss.row.smooths]
"""Losses that use ``labelSmoothing``."""


def _has_loss(*losses: Loss) -> str:
    """Return the CEL expression for: the loss, or one of a mixture, is one of these.

    The schema refuses a part without a loss; the guard keeps this rule from adding an error of its own.
    """
    default = "!has(self.loss) || " if Loss.DPO in losses else "has(self.loss) && "
    names = [str(loss) for loss in losses]
    return (
        f"(has(self.losses) ? self.losses.exists(p, has(p.loss) && p.loss in {names}) : {default}self.loss in {names})"
    )


class LossPart(Section):
    """One loss of a mixture."""

    loss: Loss = Field(description="Name of the loss; see `spec.dpo.loss`.")
    weight: Float = Field(default=1.0, gt=0, le=1000, description="Factor of this loss in the sum. Default 1.")


class Dpo(Section):
    """The loss of a pair of responses, and the term for fine-tuning on the chosen ones."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "preferenceWeight",
            "preferenceWeight and sftWeight are both 0, so nothing would be trained; set one above 0",
            "!(has(self.preferenceWeight) && self.preferenceWeight == 0.0)"
            " || (has(self.sftWeight) && self.sftWeight > 0.0)",
            lambda s: s.preference_weight > 0 or s.sft_weight > 0,
        ),
        Rule(
            "losses",
            "set loss or losses, not both",
            "!(has(self.loss) && has(self.losses))",
            lambda s: s.losses is None or "loss" not in s.model_fields_set,
        ),
        Rule(
            "losses",
            "losses names a loss twice; add its weights",
            "!has(self.losses) || self.losses.all(a, !has(a.loss)"
            " || self.losses.exists_one(b, has(b.loss) && a.loss == b.loss))",
            lambda s: s.losses is None or len(s.losses) == len({part.loss for part in s.losses}),
        ),
        Rule(
            "losses",
            "simpo cannot be mixed with other losses, which compare with a reference and it does not; use it alone",
            f"!has(self.losses) || size(self.losses) == 1 || !{_has_loss(Loss.SIMPO)}",
            lambda s: s.losses is None or len(s.losses) == 1 or not s.has_loss(Loss.SIMPO),
        ),
        Rule(
            "labelSmoothing",
            f"the loss has no label smoothing; leave labelSmoothing out, or set loss to {one_of(SMOOTHED)}",
            f"!has(self.labelSmoothing) || self.labelSmoothing == 0.0 || {_has_loss(*SMOOTHED)}",
            lambda s: s.label_smoothing == 0 or any(loss.row.smooths for loss, _ in s.parts),
        ),
        Rule(
            "labelSmoothing",
            "exo_pair needs labelSmoothing above 0, because it is infinite for labels that are certain; 0.001 is usual",
            f"!{_has_loss(Loss.EXO_PAIR)} || (has(self.labelSmoothing) && self.labelSmoothing > 0.0)",
            lambda s: not s.has_loss(Loss.EXO_PAIR) or s.label_smoothing > 0,
        ),
        Rule(
            "ldAlpha",
            "ldAlpha weighs sums of log-probs, but this loss averages them; leave out ldAlpha, or averageLogProbs and"
            " simpo",
            f"!has(self.ldAlpha) || !({_has_loss(Loss.SIMPO)} || (has(self.averageLogProbs) && self.averageLogProbs))",
            lambda s: s.ld_alpha is None or not s.averages,
        ),
        Rule(
            "simpoGamma",
            "only the loss simpo has a margin; leave simpoGamma out, or set loss to simpo",
            f"!has(self.simpoGamma) || {_has_loss(Loss.SIMPO)}",
            lambda s: s.simpo_gamma is None or s.has_loss(Loss.SIMPO),
        ),
    )

    loss: Loss = Field(default=Loss.DPO, description=f"Preference loss of a pair. {described()}. Default dpo.")
    losses: tuple[LossPart, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=8,
        description="Several losses instead of `loss`: the preference loss is the sum of each times its weight."
        " `sftWeight` adds the term for the chosen responses as usual.",
    )
    label_smoothing: Float = Field(
        default=0.0,
        ge=0,
        le=0.49,  # not below 0.5: the API server rounds the bound of a whole number, and would refuse 0
        description="Probability that a pair's responses are exchanged by mistake: with dpo the loss is then"
        " conservative DPO, with robust an unbiased estimate of the loss without mistakes. exo_pair needs it, and 0.001"
        " is usual."
        f" Used by {one_of(SMOOTHED)}. Default 0.",
    )
    simpo_gamma: Float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Margin by which simpo wants the chosen response's reward above the rejected one's. Not set: 0.5.",
    )
    ld_alpha: Float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of the log-probs of the tokens that only the longer response of a pair has (LD-DPO), in the"
        " preference loss and the rewards: 1 counts them as others, 0 not at all. Not set: as others.",
    )
    beta: Float = Field(
        default=0.1,
        gt=0,
        le=1000,
        description="Weight of the distance from the reference model (NeMo's ref_policy_kl_penalty): the higher it is,"
        " the closer the model stays to the reference. 0.1 to 1.0 is usual. Default 0.1.",
    )
    preference_weight: Float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Weight of the preference loss. 0: fine-tune on the chosen responses alone, without a reference."
        " Default 1.",
    )
    sft_weight: Float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight of the chosen response's negative log-prob, summed over its tokens or averaged"
        " (`sftAverageLogProbs`). Default 0: not used.",
    )
    average_log_probs: Bool = Field(
        default=False,
        description="Average a response's log-probs over its tokens instead of summing them, in the preference loss."
        " Default false.",
    )
    sft_average_log_probs: Bool | None = Field(
        default=None,
        description="The same for the term of `sftWeight`. Not set: as in the preference loss; with"
        " `preferenceWeight: 0`, true, averaged over the tokens of the whole batch.",
    )
    gt_reward_scale: Float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Factor of the reward gap, chosen minus rejected, in the rpo losses. Default 1.",
    )
    default_chosen_reward: Reward = Field(
        default=1.0, description="Reward of the chosen response if a record has none. Default 1."
    )
    default_rejected_reward: Reward = Field(
        default=0.0, description="Reward of the rejected response if a record has none. Default 0."
    )

    @property
    def parts(self) -> tuple[tuple[Loss, float], ...]:
        """The losses whose weighted sum is the preference loss, with their weights; usually one of weight 1."""
        if self.losses is None:
            return ((self.loss, 1.0),)
        return tuple((part.loss, part.weight) for part in self.losses)

    def has_loss(self, loss: Loss) -> bool:
        """Return whether a loss is used."""
        return any(part is loss for part, _ in self.parts)

    @property
    def loss_name(self) -> str:
        """The loss in words: its name, or those of a mixture."""
        return " + ".join(str(loss) for loss, _ in self.parts)

    @property
    def margin(self) -> float:
        """The margin of simpo."""
        return 0.5 if self.simpo_gamma is None else self.simpo_gamma

    @property
    def rewards_are_means(self) -> bool:
        """Whether a reward is beta times a per-token mean, as the loss itself has it."""
        return any(loss.row.averages for loss, _ in self.parts)

    @property
    def averages(self) -> bool:
        """Whether the preference loss divides each response's log-probs by its number of tokens."""
        return self.average_log_probs or self.rewards_are_means

    @property
    def splits_tails(self) -> bool:
        """Whether tokens beyond the shorter response have a weight of their own."""
        return self.has_preference and self.ld_alpha is not None

    @property
    def has_preference(self) -> bool:
        """Whether the run compares responses. If not, it is supervised fine-tuning on the chosen ones alone."""
        return self.preference_weight > 0

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model's log-probs are used."""
        return self.has_preference and any(loss.row.needs_reference for loss, _ in self.parts)

    @property
    def needs_rewards(self) -> bool:
        """Whether the rewards in the data are used."""
        return self.has_preference and any(loss.row.needs_rewards for loss, _ in self.parts)


class Lora(Section):
    """A low-rank adapter on frozen weights. The reference model is the same weights without it.

    With `continueAdapter` the reference is the same weights with `model.adapter` as it was given.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "rowInit",
            "columnInit and rowInit are both zero, so the adapter could never learn; leave columnInit at xavier",
            "!(has(self.columnInit) && self.columnInit == 'zero') || (has(self.rowInit) && self.rowInit != 'zero')",
            lambda s: s.column_init != "zero" or s.row_init != "zero",
        ),
        Rule(
            "layers",
            "layers names a layer twice",
            "!has(self.layers) || self.layers.all(a, self.layers.exists_one(b, a == b))",
            lambda s: s.layers is None or len(s.layers) == len(set(s.layers)),
        ),
        Rule(
            "continueAdapter",
            "continueAdapter starts from the values of model.adapter, so columnInit and rowInit have no effect; leave"
            " them out",
            "!(has(self.continueAdapter) && self.continueAdapter) || (!has(self.columnInit) && !has(self.rowInit))",
            lambda s: not s.continue_adapter or not {"column_init", "row_init"} & s.model_fields_set,
        ),
    )

    @property
    def modules(self) -> tuple[LoraLinear, ...]:
        """The linear layers that get an adapter, each once, in a layer's order; groups are resolved."""
        chosen = {module for name in self.target_modules for module in LORA_GROUPS.get(name, (name,))}
        return tuple(module for module in LORA_GROUPS["all"] if module in chosen)

    rank: Int = Field(default=32, ge=1, le=4096, description="Inner dimension (NeMo's adapter_dim). Default 32.")
    alpha: Float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Scale: the adapter's output is multiplied by alpha / rank. Not set: rank, a factor of 1.",
    )
    rslora: Bool = Field(
        default=False,
        description="Scale by alpha / √rank instead of alpha / rank, as PEFT's use_rslora (rank-stabilised LoRA), so"
        " that a high rank learns as fast as a low one. Default false.",
    )
    dropout: Float = Field(
        default=0.0, ge=0, lt=1, description="Share of values dropped while training, 0 to below 1. Default 0."
    )
    dropout_position: Literal["pre", "post"] = Field(
        default="pre",
        description="Drop the adapter's input (`pre`, as PEFT does) or its output (`post`, as NeMo does). Default pre.",
    )
    target_modules: tuple[LoraModule, ...] = Field(
        default=("attention_qkv",),
        min_length=1,
        max_length=7,
        description="Linear layers that get an adapter: attention_qkv, attention_dense, mlp_fc1, mlp_fc2; `attention`"
        " and `mlp` select two each, `all` selects all four. Default [attention_qkv].",
    )
    layers: tuple[LayerIndex, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Transformer layers that get adapters, counted from 0 (NeMo's layer_selection counts from 1)."
        " Not set: all.",
    )
    column_init: Literal["xavier", "kaiming", "normal", "zero"] = Field(
        default="xavier", description="Initial values of the first matrix (input to rank). Default xavier."
    )
    row_init: Literal["zero", "xavier", "kaiming", "normal"] = Field(
        default="zero",
        description="Initial values of the second matrix (rank to output). Default zero: the policy starts equal to"
        " the reference.",
    )
    continue_adapter: Bool = Field(
        default=False,
        description="Train the matrices of `model.adapter` themselves instead of new ones: the result is an adapter of"
        " the same rank for the same model. rank, alpha, rslora, targetModules and layers are then the adapter's; leave"
        " them out. Default false: a new adapter.",
    )


class Packing(Section):
    """Several pairs in one row of tokens, so that no computation is spent on padding."""

    enabled: Bool = Field(default=True, description="Pack pairs. false: one pair per pack. Default true.")
    max_tokens: Int | None = Field(
        default=None,
        ge=4,
        le=4_194_304,
        description="Maximum tokens in a pack, which is the size of one forward pass. Not set: chosen on GPUs, at least"
        " twice `data.maxLength`, the smallest value that any pair fits into; on CPU that value, but no more than"
        " 1,024, and a pair that is longer is a pack of its own.",
    )


class Schedule(Section):
    """Learning rate by step: linear warm-up, cosine decay, then constant at the minimum."""

    warmup_steps: Int = Field(
        default=10, ge=0, le=100_000_000, description="Steps from rate 0 to `learningRate`. 0: no warm-up. Default 10."
    )
    constant_steps: Int | None = Field(
        default=None,
        ge=0,
        le=100_000_000,
        description="Steps at `minLearningRate` at the end of the run. Not set: a tenth of all steps, at most 1000.",
    )
    min_learning_rate: Float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Rate at the end of the decay. Not set: a tenth of `learningRate`.",
    )


class EarlyStopping(Section):
    """Ends a run before its last step once validations no longer improve. The run succeeds and exports its model."""

    monitor: Monitored | None = Field(
        default=None, description="The metric that has to improve. Not set: `checkpoint.monitor`, else val/loss."
    )
    patience: Int = Field(
        default=3,
        ge=1,
        le=1_000_000,
        description="Validations in a row without an improvement after which the run ends. Default 3.",
    )
    min_delta: Float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="An improvement is a value that is better than the last improvement by more than this. Default 0.",
    )


class Training(Section):
    """Batches, steps, optimizer, validation and numerical precision."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "schedule.minLearningRate",
            "schedule.minLearningRate is above learningRate; the rate decays towards it, so set it below",
            "!(has(self.schedule) && has(self.schedule.minLearningRate)) || self.schedule.minLearningRate <="
            " (has(self.learningRate) ? self.learningRate : 0.000009)",
            lambda s: s.schedule.min_learning_rate is None or s.schedule.min_learning_rate <= s.learning_rate,
        ),
    )

    global_batch_size: Int = Field(
        default=64,
        ge=1,
        le=1_048_576,
        description="Pairs per optimizer step, over all processes. It need not be a multiple of the number of"
        " processes. 256 to 512 is recommended. Default 64.",
    )
    micro_batch_size: Int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Maximum pairs in one forward pass of a process. Not set: as many as fit into `packing.maxTokens`.",
    )
    packing: Packing = Field(default=Packing(), description="Several pairs in one row of tokens.")
    prefix_sharing: Bool = Field(
        default=True,
        description="Compute a pair's prompt once for both responses; the results are the same. Default true.",
    )
    epochs: Int = Field(
        default=1, ge=1, le=1000, description="Passes over the training pairs. More than 3 rarely help. Default 1."
    )
    max_steps: Int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Total optimizer steps; overrides `epochs`. Not set: as many as `epochs` needs.",
    )
    drop_last: Bool = Field(
        default=True,
        description="Leave out the pairs that do not fill the last batch of an epoch (different ones each epoch)."
        " false: use a smaller last batch. Default true.",
    )
    learning_rate: Float = Field(
        default=9e-6, gt=0, le=1, description="Highest learning rate, after the warm-up. Default 9e-6."
    )
    schedule: Schedule = Field(default=Schedule(), description="Learning rate by step.")
    weight_decay: Float = Field(default=0.1, ge=0, le=10, description="Decoupled weight decay of Adam. Default 0.1.")
    betas: tuple[Beta, ...] = Field(
        default=(0.9, 0.98),
        min_length=2,
        max_length=2,
        description="Decay rates of Adam's two moments, each from 0 to below 1. Default [0.9, 0.98].",
    )
    eps: Float = Field(default=1e-8, gt=0, le=1, description="Adam's term against division by zero. Default 1e-8.")
    gradient_clip: Float = Field(
        default=1.0, ge=0, le=1_000_000, description="Highest norm of the whole gradient. 0: no clipping. Default 1."
    )
    validation_interval: CountOrPercent = Field(
        default="10%",
        description="Steps between validations, or a percentage of an epoch's steps (at least one step). Default 10%.",
    )
    validate_at_start: Bool = Field(default=True, description="Validate before the first step too. Default true.")
    limit_train_batches: CountOrPercent | None = Field(
        default=None,
        description="Maximum global batches per epoch, or a percentage of them. Not set: all.",
    )
    limit_validation_batches: CountOrPercent | None = Field(
        default=None,
        description="Maximum batches of each validation source, or a percentage of them. Not set: all.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="End the run once validations no longer improve. Not set: it runs to its last step."
    )
    seed: Int = Field(
        default=1234,
        ge=0,
        le=2_147_483_647,
        description="Random seed for the order of pairs, the adapter's initial values and dropout. Default 1234.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16",
        description="Precision of the weights in computation. With bf16, master weights, optimizer state, gradients"
        " and log-probs are still fp32. Default bf16.",
    )
    activation_recomputation: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Recompute activations in the backward pass to save memory: those of the MLP (`selective`) or of"
        " each layer (`full`). Default none: on GPUs it is chosen where it is left out.",
    )
    max_run_seconds: Int | None = Field(
        default=None,
        ge=1,
        le=315_360_000,
        description="Seconds after which a run writes a checkpoint and stops, so that it can be continued later. Not"
        " set: no limit.",
    )
    deterministic: Bool = Field(
        default=False,
        description="Use only deterministic kernels, which are slower. Default false.",
    )
