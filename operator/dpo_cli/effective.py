"""Describes what a valid job will do: model, data, loss, steps, schedule, intervals, output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_api.manifest import DPOJob
from dpo_api.plan import Plan, RatePlan, plan_rates
from dpo_api.spec import DPOJobSpec, Loss
from dpo_api.texts import counted, number, numbers, size
from dpo_cli.survey import SourceSeen, Survey

Row = tuple[str, str]


def rows(
    job: DPOJob, seen: Survey, plan: Plan | None, *, exact: bool, counts: Mapping[str, Any] | None = None
) -> list[Row]:
    """Return (label, text) of every line. `exact` says that the plan's pairs were counted, not estimated.

    counts: what the index pass printed.
    """
    spec = seen.settled(job.spec)
    return [
        ("job", job.metadata.name),
        *_model(spec, seen),
        *_data(spec, seen, exact),
        *_weights(spec, counts),
        *_learning(spec),
        *_steps(spec, plan, exact),
        *_results(job, spec),
    ]


def _model(spec: DPOJobSpec, seen: Survey) -> Iterator[Row]:
    weights = f" ({size(seen.model_bytes)} of weights)" if seen.model_bytes else ""
    adapter = f" + adapter {spec.model.adapter.uri}" if spec.model.adapter is not None else ""
    yield "model", f"{spec.model.source.uri}{weights}{adapter}"
    facts = seen.facts
    if facts is not None:
        groups = f" ({facts.kv_heads} key-value)" if facts.kv_heads != facts.heads else ""
        shape = f"{facts.family} · {facts.layers} layers · {facts.heads} heads{groups} · hidden {facts.hidden:,}"
        yield "", f"{shape} · vocabulary {facts.vocab:,} · {facts.max_positions:,} positions"


def _seen(source: SourceSeen, *, exact: bool) -> str:
    lines = f", ≈ {source.lines:,} lines" if source.lines is not None and not exact else ""
    return f"{source.uri} ({counted(source.objects, 'object')}, {size(source.size)}{lines})"


def _data(spec: DPOJobSpec, seen: Survey, exact: bool) -> Iterator[Row]:
    if not seen.train:
        yield from (("train", source.uri) for source in spec.data.train)
        yield from (("validation", source.uri) for source in spec.data.validation)
    yield from (("train", _seen(source, exact=exact)) for source in seen.train)
    yield from (("validation", _seen(source, exact=exact)) for source in seen.validation)
    rule = {"drop": "longer pairs are dropped", "truncate": "longer ones are cut", "error": "a longer one is an error"}
    yield "length", f"at most {spec.data.max_length:,} tokens of prompt and response; {rule[spec.data.over_length]}"


def _weights(spec: DPOJobSpec, counts: Mapping[str, Any] | None) -> Iterator[Row]:
    """Yield how often an epoch uses the pairs of each source, if their weights differ."""
    if len({source.weight for source in spec.data.train}) == 1:
        return
    if counts is None:
        yield "weights", "relative to each other · --deep counts what an epoch uses"
        return
    sources = counts["train"]["sources"]
    total = sum(source["uses"] for source in sources)
    for position, source in enumerate(sources):
        share = f"{source['uses'] / total:.1%} of an epoch"
        text = f"{source['name']}: {source['uses']:,} uses of {source['pairs']:,} pairs, {share}"
        yield "" if position else "weights", text


def _learning(spec: DPOJobSpec) -> Iterator[Row]:
    dpo, lora, training = spec.dpo, spec.lora, spec.training
    if not dpo.has_preference:
        yield "loss", "SFT on the chosen responses alone, without a reference"
    else:
        sft = f" + {number(dpo.sft_weight)} × SFT" if dpo.sft_weight else ""
        weight = f"{number(dpo.preference_weight)} × " if dpo.preference_weight != 1 else ""
        mean = ", log-probs averaged over tokens" if dpo.averages else ""
        own = f", label smoothing {number(dpo.label_smoothing)}" if dpo.label_smoothing else ""
        own += f", LD alpha {number(dpo.ld_alpha)}" if dpo.ld_alpha is not None else ""
        own += f", gamma {number(dpo.margin)}" if dpo.has_loss(Loss.SIMPO) else ""
        names = " + ".join(f"{number(part)} × {loss}" if part != 1 else str(loss) for loss, part in dpo.parts)
        if weight and len(dpo.parts) > 1:
            names = f"({names})"
        yield "loss", f"{weight}{names}, beta {number(dpo.beta)}{own}{mean}{sft}"
    if lora is None:
        yield "trains", f"all parameters, {training.precision}"
    else:
        alpha = lora.alpha if lora.alpha is not None else lora.rank
        layers = f" of {counted(len(lora.layers), 'layer')}" if lora.layers is not None else ""
        modules = ", ".join(lora.target_modules)
        kind = "rsLoRA" if lora.rslora else "LoRA"
        if lora.continue_adapter:
            if "rank" not in lora.model_fields_set:
                yield "trains", f"the adapter itself, {training.precision}"
                return
            kind = f"the adapter itself, {kind}"
        yield "trains", f"{kind} rank {lora.rank}, alpha {number(alpha)}, on {modules}{layers}, {training.precision}"


def _steps(spec: DPOJobSpec, plan: Plan | None, exact: bool) -> Iterator[Row]:
    training = spec.training
    about = "" if exact else "≈ "
    if plan is not None:
        left = f", {plan.dropped_per_epoch:,} pairs left over an epoch" if plan.dropped_per_epoch and exact else ""
        source = "" if exact else " · estimated from file sizes; --deep counts"
        total = f"{plan.total_steps:,}" if training.max_steps is not None or exact else f"{about}{plan.total_steps:,}"
        run = f"{total} of {plan.global_batch_size:,} pairs = {epochs(plan)} of {about}{plan.train_pairs:,} pairs"
        yield "steps", f"{run} ({about}{plan.steps_per_epoch:,} steps an epoch{left}){source}"
        yield "rate", _rate(plan)
    elif training.max_steps is not None:
        yield "steps", f"{training.max_steps:,} of {training.global_batch_size:,} pairs"
        rates = plan_rates(training, training.max_steps)
        yield "rate", _rate(rates)
    else:
        epochs_of = counted(training.epochs, "epoch")
        yield "steps", f"{epochs_of} in batches of {training.global_batch_size:,} pairs · --deep counts them"
        yield (
            "rate",
            f"warm-up of {training.schedule.warmup_steps:,} steps to {number(training.learning_rate)}, then cosine",
        )
    if spec.data.validation:
        yield "validates", _validations(spec, plan, about)
    yield (
        "checkpoint",
        f"every {counted(spec.checkpoint.every_steps, 'step')} and at the end, the newest {spec.checkpoint.keep} kept",
    )


def epochs(plan: Plan) -> str:
    """Return how many epochs a plan's steps are, as text."""
    count = plan.total_steps / plan.steps_per_epoch
    return f"{number(count, 3)} epoch{'' if count == 1 else 's'}"


def _rate(plan: Plan | RatePlan) -> str:
    peak, lowest = numbers(plan.learning_rate, plan.min_learning_rate)
    parts = [f"warm-up of {plan.warmup_steps:,} steps to {peak}"] if plan.warmup_steps else [peak]
    if plan.decay_steps:
        parts.append(f"cosine over {plan.decay_steps:,} to {lowest}")
    if plan.constant_steps:
        parts.append(f"the last {plan.constant_steps:,} at {lowest}")
    return ", ".join(parts)


def _validations(spec: DPOJobSpec, plan: Plan | None, about: str) -> str:
    interval = spec.training.validation_interval
    moments: Sequence[str] = ["before the first step"] if spec.training.validate_at_start else []
    if isinstance(interval, int):
        every = f"every {counted(interval, 'step')}"
    else:
        steps = f" ({about}{counted(plan.validation_every, 'step')})" if plan is not None else ""
        every = f"every {interval} of an epoch{steps}"
    return ", ".join([every, *moments, "at the end"])


def _results(job: DPOJob, spec: DPOJobSpec) -> Iterator[Row]:
    run_dir = spec.checkpoint.uri or f"runs/{job.metadata.name}"
    yield "run", run_dir + ("" if spec.checkpoint.uri else " (for `dpo run`, as checkpoint.uri is not set)")
    lora, output = spec.lora is not None, spec.output
    forms = [form for form in output.formats if form != "huggingFace" or not lora or output.merge]
    if lora and "formats" not in output.model_fields_set:
        forms.append("peft")
    yield "model to", f"{output.uri or run_dir.rstrip('/') + '/model'} ({', '.join(forms)})"
    if output.hub is not None:
        yield "push to", output.hub.uri
