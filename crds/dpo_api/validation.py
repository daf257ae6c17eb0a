"""Checks a spec as a whole, and reports every impossible or doubtful combination at once.

Types and single sections are checked when a manifest is read. The rules here compare sections with each other, with
the model and with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from dpo_api import cluster
from dpo_api.errors import DPOError, InvalidSpecError
from dpo_api.fields import count
from dpo_api.findings import Finding, Level
from dpo_api.learning import LORA_GROUPS
from dpo_api.models import ModelFacts
from dpo_api.plan import make_plan, plan_rates
from dpo_api.sizing.parameters import group_width, query_width
from dpo_api.sizing.products import product_of
from dpo_api.spec import FP8_MULTIPLE, Dpo, DPOJobSpec, Loss
from dpo_api.texts import number, numbers

__all__ = ["Finding", "Level", "ModelFacts", "check", "errors", "refuse_errors"]


def check(
    spec: DPOJobSpec,
    model: ModelFacts | None = None,
    train_pairs: int | None = None,
    *,
    validation_pairs: Sequence[int] | None = None,
    on_cluster: bool = False,
) -> list[Finding]:
    """Return all findings about a spec: errors first, then warnings, then notes.

    Rules about unknown values (None) are skipped. ``on_cluster`` adds the rules that only apply on a cluster.
    """
    found: list[Finding] = [finding for rule in SPEC_RULES for finding in rule(spec)]
    if model is not None:
        for model_rule in MODEL_RULES:
            found += model_rule(spec, model)
    found += _steps(spec, train_pairs, validation_pairs)
    if on_cluster:
        found += cluster.check(spec)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(dict.fromkeys(found), key=lambda finding: order[finding.level])


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that prevent a job from running."""
    return [finding for finding in findings if finding.level == "error"]


def refuse_errors(spec: DPOJobSpec, model: ModelFacts | None = None) -> None:
    """Raise InvalidSpecError with every error that ``check`` finds in the spec."""
    if found := errors(check(spec, model)):
        raise InvalidSpecError("; ".join(f"{finding.field}: {finding.message}" for finding in found))


def _error(field: str, message: str) -> Finding:
    return Finding("error", f"spec.{field}", message)


def _warning(field: str, message: str) -> Finding:
    return Finding("warning", f"spec.{field}", message)


def _note(field: str, message: str) -> Finding:
    return Finding("note", f"spec.{field}", message)


def _steps(spec: DPOJobSpec, train_pairs: int | None, validation_pairs: Sequence[int] | None) -> Iterator[Finding]:
    """Check the schedule and the intervals against the number of steps, if it is known."""
    training = spec.training
    if train_pairs is None:
        if training.max_steps is not None:
            yield from plan_rates(training, training.max_steps).warnings
        total, per_epoch = training.max_steps, None
    else:
        try:
            plan = make_plan(spec, train_pairs, validation_pairs or ())
        except DPOError as error:
            field, _, message = str(error).partition(": ")
            yield Finding("error", field, message)
            return
        yield from plan.warnings
        total, per_epoch = plan.total_steps, plan.steps_per_epoch
    interval = training.validation_interval
    if total is not None and spec.data.validation and (per_epoch is not None or isinstance(interval, int)):
        every = count(interval, per_epoch or 1)
        if every > total:
            yield _note(
                "training.validationInterval",
                f"{every} steps are more than the run's {total}; it validates only at its end",
            )
    for index, pairs in enumerate(validation_pairs or ()):
        if pairs == 0:
            yield _error(f"data.validation[{index}]", "has no usable pairs; remove the source or fix its data")


def _parallelism(spec: DPOJobSpec) -> Iterator[Finding]:
    sizes, resources = spec.parallelism, spec.resources
    processes = resources.processes_per_node
    gpus = resources.gpus_per_node
    if gpus and processes and processes > gpus:
        yield _error(
            "resources.processesPerNode", f"{processes} processes cannot share {gpus} GPUs; use {gpus} or leave it out"
        )
    elif gpus and processes and processes < gpus:
        yield _warning(
            "resources.processesPerNode", f"{processes} processes leave {gpus - processes} of {gpus} GPUs idle"
        )
    if processes is None and gpus is None:
        return  # `dpo run` uses the machine's GPUs
    local = resources.processes()
    world, model_size = local * resources.nodes, sizes.tensor * sizes.pipeline * sizes.context
    if world % model_size:
        yield _error(
            "parallelism",
            f"tensor {sizes.tensor} x pipeline {sizes.pipeline} x context {sizes.context} = {model_size} does not"
            f" divide the {world} processes ({resources.nodes} nodes x {local}); change one of them",
        )
    elif sizes.tensor > local:
        yield _warning(
            "parallelism.tensor",
            f"{sizes.tensor} is more than a node's {local} processes, so each layer waits for the"
            " network between nodes; use pipeline across nodes",
        )


def _loss(spec: DPOJobSpec) -> Iterator[Finding]:
    dpo = spec.dpo
    rewards = {"gt_reward_scale", "default_chosen_reward", "default_rejected_reward"}
    if spec.reference.cache_uri is not None and not dpo.needs_reference:
        why = f"loss {dpo.loss_name} needs no reference" if dpo.has_preference else "dpo.preferenceWeight is 0"
        yield _warning("reference.cacheURI", f"has no effect, because {why}")
    if not dpo.has_preference:
        unused = {"loss", "losses", "beta", "average_log_probs", "label_smoothing", "simpo_gamma", "ld_alpha"} | rewards
        yield from _unused(spec, unused, "because preferenceWeight is 0")
        return
    if dpo.needs_rewards:
        yield from _rewards(spec)
    else:
        *some, last = (loss for loss in Loss if loss.row.needs_rewards)
        yield from _unused(spec, rewards, f"with loss {dpo.loss_name}; {', '.join(some)} and {last} use rewards")
    if dpo.has_loss(Loss.IPO) and not dpo.average_log_probs:
        yield _note(
            "dpo.averageLogProbs",
            "ipo sums log-probs over tokens, as NeMo-Aligner does; TRL averages them: set true to match TRL",
        )
    if dpo.sft_weight == 0:
        yield from _unused(spec, {"sft_average_log_probs"}, "because sftWeight is 0")
    if dpo.rewards_are_means:
        yield from _unused(spec, {"average_log_probs"}, f"with loss {dpo.loss_name}, which always averages")
    if dpo.has_loss(Loss.ROBUST) and dpo.label_smoothing == 0:
        yield _warning("dpo.labelSmoothing", "0 makes robust the same as dpo; set the share of wrong labels")
    yield from _beta(dpo)


def _beta(dpo: Dpo) -> Iterator[Finding]:
    """Compare beta with the values that papers use."""
    if dpo.has_loss(Loss.SIMPO):
        beta, _ = numbers(dpo.beta, 2)
        if dpo.beta < 1 or dpo.beta > 20:
            default = "" if "beta" in dpo.model_fields_set else " (the default)"
            yield _warning("dpo.beta", f"{beta}{default} is far outside simpo's usual 2 to 10; start with 2")
    elif dpo.beta > 5 or dpo.beta < 0.001:
        beta, _ = numbers(dpo.beta, 5)
        yield _warning("dpo.beta", f"{beta} is far outside the usual 0.01 to 5; start with 0.1")


def _unused(spec: DPOJobSpec, attributes: set[str], why: str) -> Iterator[Finding]:
    for name in sorted(attributes & spec.dpo.model_fields_set):
        yield _warning(f"dpo.{_alias(spec.dpo, name)}", f"has no effect {why}")


def _rewards(spec: DPOJobSpec) -> Iterator[Finding]:
    dpo = spec.dpo
    chosen, rejected = numbers(dpo.default_chosen_reward, dpo.default_rejected_reward)
    if dpo.gt_reward_scale == 0:
        yield _warning(
            "dpo.gtRewardScale", "0 makes every reward gap 0, so both responses are trained to be equally likely"
        )
    elif dpo.default_chosen_reward <= dpo.default_rejected_reward:
        text = f"{chosen} is not above defaultRejectedReward {rejected}: records without rewards would"
        yield _warning("dpo.defaultChosenReward", f"{text} teach nothing or the opposite; set it higher")
    else:
        text = f"{dpo.loss_name} learns each record's reward gap; records without chosen_reward and rejected_reward get"
        yield _note("dpo.losses" if dpo.losses else "dpo.loss", f"{text} {chosen} and {rejected}")


def _alias(section: object, attribute: str) -> str:
    field = type(section).model_fields[attribute]  # type: ignore[attr-defined]
    return str(field.alias or attribute)


def _lora(spec: DPOJobSpec) -> Iterator[Finding]:
    lora = spec.lora
    if lora is None:
        if "merge" in spec.output.model_fields_set:
            yield _warning("output.merge", "has no effect without lora")
        return
    for group, linears in LORA_GROUPS.items():
        parts = (*linears, "attention", "mlp") if group == "all" else linears
        doubled = [part for part in parts if part in lora.target_modules]
        if group in lora.target_modules and doubled:
            yield _warning("lora.targetModules", f"{group} already holds {', '.join(doubled)}; name it once")
    if lora.row_init != "zero":
        yield _warning(
            "lora.rowInit", f"{lora.row_init} starts from a policy that is not the reference; zero is the usual value"
        )
    tensor = spec.parallelism.tensor
    known = "rank" in lora.model_fields_set or not lora.continue_adapter
    if known and lora.rank % tensor:
        default = "" if "rank" in lora.model_fields_set else " (the default)"
        whose = " of model.adapter" if lora.continue_adapter else default
        yield _error(
            "lora.rank",
            f"{lora.rank}{whose} is not divisible by parallelism.tensor {tensor}: each process has a part of it",
        )


def _batches(spec: DPOJobSpec) -> Iterator[Finding]:
    training, data = spec.training, spec.data
    packing = training.packing
    if packing.max_tokens is not None and not packing.enabled:
        yield _warning("training.packing.maxTokens", "has no effect, because packing.enabled is false")
    elif packing.max_tokens is not None and packing.max_tokens < 2 * data.max_length:
        yield _error(
            "training.packing.maxTokens",
            f"{packing.max_tokens} cannot hold every pair, which may have 2 x data.maxLength {data.max_length};"
            f" set it to {2 * data.max_length} or more, or maxLength to {max(2, packing.max_tokens // 2)} or less",
        )
    micro = training.micro_batch_size
    if micro is not None and micro > 1 and not packing.enabled:
        yield _warning("training.microBatchSize", f"{micro} has no effect, because packing.enabled is false")
    elif micro is not None and micro > training.global_batch_size:
        yield _warning(
            "training.microBatchSize",
            f"{micro} is above globalBatchSize {training.global_batch_size} and bounds nothing",
        )
    if training.epochs > 3 and training.max_steps is None:
        yield _warning("training.epochs", f"{training.epochs} epochs usually overfit; use 3 or fewer")
    if training.max_steps is not None and "epochs" in training.model_fields_set:
        yield _note(
            "training.epochs", f"has no effect on the length of the run, because maxSteps {training.max_steps} is set"
        )
    highest = 1e-3 if spec.lora is not None else 1e-4
    if training.learning_rate > highest and spec.dpo.has_preference:
        usual = "1e-6 to 1e-4 with lora" if spec.lora is not None else "5e-7 to 1e-5"
        yield _warning(
            "training.learningRate", f"{number(training.learning_rate)} is far above the usual range for DPO, {usual}"
        )


def _validation_data(spec: DPOJobSpec) -> Iterator[Finding]:
    data, training = spec.data, spec.training
    if not data.validation:
        unused = {"validation_interval", "limit_validation_batches", "validate_at_start"}
        for name in sorted(unused & training.model_fields_set):
            yield _warning(f"training.{_alias(training, name)}", "has no effect, because data.validation is empty")
    train = {source.uri: index for index, source in enumerate(data.train)}
    for index, source in enumerate(data.validation):
        if source.uri in train:
            yield _warning(
                f"data.validation[{index}].uri",
                f"{source.uri} is also data.train[{train[source.uri]}]: accuracy on training pairs says little;"
                " use other pairs for validation",
            )


def _monitored(spec: DPOJobSpec) -> Iterator[Finding]:
    """Refuse to wait for a metric that no validation computes."""
    early = spec.training.early_stopping
    asked: list[tuple[str, str, str]] = []
    if spec.checkpoint.monitor is not None:
        asked.append(("checkpoint.monitor", spec.checkpoint.monitor, "monitor"))
    if early is not None:
        field = "training.earlyStopping" + (".monitor" if early.monitor else "")
        asked.append((field, early.monitor or spec.checkpoint.monitor or "val/loss", "earlyStopping"))
    for field, metric, section in asked:
        if not spec.data.validation:
            yield _error(field, f"{metric} needs data.validation, which is empty; add it or leave {section} out")
        elif not spec.dpo.has_preference and metric != "val/loss":
            yield _error(field, f"a run without a preference loss has no {metric}; use val/loss")


def _uris(spec: DPOJobSpec) -> Iterator[Finding]:
    """Refuse an output that would overwrite an input."""
    source = spec.model.hugging_face or spec.model.nemo or spec.model.megatron
    inputs = {"model": source.uri} if source is not None else {}
    if spec.model.adapter is not None:
        inputs["model.adapter"] = spec.model.adapter.uri
    inputs |= {f"data.train[{i}]": s.uri for i, s in enumerate(spec.data.train)}
    inputs |= {f"data.validation[{i}]": s.uri for i, s in enumerate(spec.data.validation)}
    for field, uri in (("checkpoint.uri", spec.checkpoint.uri), ("output.uri", spec.output.uri)):
        for name, read in inputs.items():
            if uri is not None and uri.rstrip("/") == read.rstrip("/"):
                yield _error(field, f"{uri} is also {name}, which would be overwritten; choose another folder")
    run, model = spec.checkpoint.uri, spec.output.uri
    if run is not None and model is not None:
        inside = model.rstrip("/").removeprefix(run.rstrip("/"))
        if inside != model.rstrip("/") and (inside == "" or inside.startswith("/checkpoints")):
            yield _error("output.uri", f"{model} is where the run keeps its checkpoints; use {run.rstrip('/')}/model")


def _transformer_engine(spec: DPOJobSpec) -> Iterator[Finding]:
    engine = spec.transformer_engine
    if engine.enabled and spec.resources.gpus_per_node == 0:
        yield _error(
            "transformerEngine.enabled", "true needs GPUs, but resources.gpusPerNode is 0; leave one of them out"
        )
    if engine.enabled and spec.training.precision == "fp32":
        yield _warning(
            "transformerEngine.enabled", "fp32 products are rounded to TF32 there; leave it out to avoid that"
        )
    if engine.fp8 is not None:
        yield from _fp8(spec)
    for name in sorted(engine.model_fields_set - {"enabled", "fp8"}):
        yield _note(f"transformerEngine.{_alias(engine, name)}", "has no effect: attention is the trainer's own")


def _fp8(spec: DPOJobSpec) -> Iterator[Finding]:
    if spec.training.precision != "bf16":
        yield _error(
            "transformerEngine.fp8",
            f"{spec.transformer_engine.fp8} needs training.precision bf16, and it is {spec.training.precision}",
        )
    if spec.resources.gpus_per_node == 0:
        yield _error("transformerEngine.fp8", "it needs GPUs, but resources.gpusPerNode is 0; leave one of them out")
    product = product_of(spec)
    if product is not None and not product.fp8:
        yield _error(
            "transformerEngine.fp8", f"{product.name} has no FP8; leave it out, or use a GPU of Ada, Hopper or later"
        )


def _fp8_fits_model(spec: DPOJobSpec, model: ModelFacts) -> Iterator[Finding]:
    """FP8 products read matrices whose sides are multiples of 16 on each rank."""
    tensor = spec.parallelism.tensor
    if spec.transformer_engine.fp8 is None:
        return
    sides = {
        "hidden size": model.hidden,
        "feed-forward size, divided by parallelism.tensor,": model.ffn / tensor,
        "width of the queries, divided by parallelism.tensor,": query_width(model) / tensor,
        "width of a key-value head": group_width(model) / model.kv_heads,
    }
    for name, width in sides.items():
        if width % FP8_MULTIPLE:
            yield _error(
                "transformerEngine.fp8",
                f"the model's {name} is {number(width)}, not a multiple of {FP8_MULTIPLE}; leave it out",
            )


def _divides(spec: DPOJobSpec, model: ModelFacts) -> Iterator[Finding]:
    tensor, pipeline = spec.parallelism.tensor, spec.parallelism.pipeline
    # With more ranks than key-value heads, several ranks share a head.
    shares = [t for t in range(1, model.heads + 1) if model.kv_heads % t == 0 or t % model.kv_heads == 0]
    usable = [t for t in shares if model.heads % t == 0]
    if model.heads % tensor:
        yield _error(
            "parallelism.tensor",
            f"{tensor} does not divide the model's {model.heads} attention heads; use {_or(usable)}",
        )
    elif tensor not in shares:
        yield _error(
            "parallelism.tensor",
            f"{tensor} neither divides the model's {model.kv_heads} key-value heads nor is a multiple of them;"
            f" use {_or(usable)}",
        )
    if model.ffn % tensor and model.heads % tensor == 0:
        yield _error("parallelism.tensor", f"{tensor} does not divide the model's feed-forward size {model.ffn}")
    if pipeline > model.layers:
        yield _error(
            "parallelism.pipeline",
            f"{pipeline} stages need as many layers, and the model has {model.layers}; use {model.layers} or less",
        )


def _or(counts: Sequence[int]) -> str:
    words = [str(count) for count in counts]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _fits_model(spec: DPOJobSpec, model: ModelFacts) -> Iterator[Finding]:
    if model.max_positions and spec.data.max_length > model.max_positions:
        default = "" if "max_length" in spec.data.model_fields_set else " (the default)"
        yield _error(
            "data.maxLength",
            f"{spec.data.max_length}{default} is above the {model.max_positions} positions of the model;"
            f" set it to {model.max_positions} or less",
        )
    lora = spec.lora
    if lora is None:
        return
    beyond = [layer for layer in lora.layers or () if layer >= model.layers]
    if beyond:
        yield _error(
            "lora.layers",
            f"{beyond[0]} is not a layer of the model, which has {model.layers}, counted from 0 to {model.layers - 1}",
        )
    if lora.rank >= model.hidden:
        yield _warning(
            "lora.rank", f"{lora.rank} is not below the model's hidden size {model.hidden}, so it is not low rank"
        )


SPEC_RULES: tuple[Callable[[DPOJobSpec], Iterator[Finding]], ...] = (
    _parallelism,
    _loss,
    _lora,
    _batches,
    _validation_data,
    _monitored,
    _uris,
    _transformer_engine,
)
"""Rules that need the spec alone."""

MODEL_RULES: tuple[Callable[[DPOJobSpec, ModelFacts], Iterator[Finding]], ...] = (
    _divides,
    _fits_model,
    _fp8_fits_model,
)
"""Rules that need the model too."""
