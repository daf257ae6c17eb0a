"""The values that follow from a spec and the number of pairs, in one frozen object.

Steps, intervals and the schedule depend only on the spec and the number of pairs, not on the number of processes, so
that a run can continue on other hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_api.errors import InvalidDataError
from dpo_api.fields import count
from dpo_api.findings import Finding
from dpo_api.spec import DPOJobSpec, Training
from dpo_api.texts import number, numbers

CONSTANT_STEPS_MAX = 1000
"""Maximum steps at the minimum rate if ``constantSteps`` is not set: NeMo's fixed value."""


@dataclass(frozen=True)
class RatePlan:
    """The learning rate's schedule in steps: W warm-up, D decay, C constant; W + D + C = all steps if D > 0."""

    warmup_steps: int
    constant_steps: int
    decay_steps: int
    learning_rate: float
    min_learning_rate: float
    warnings: tuple[Finding, ...]


@dataclass(frozen=True)
class Plan:
    """Derived values of one run."""

    train_pairs: int
    """Usable training pairs."""
    global_batch_size: int
    """Pairs per step: the spec's value, or all pairs if there are fewer."""
    steps_per_epoch: int
    """Optimizer steps of a whole epoch, after ``dropLast`` and ``limitTrainBatches``."""
    total_steps: int
    """Optimizer steps of the run (M)."""
    epochs: int
    """Epochs started; the last may be incomplete."""
    dropped_per_epoch: int
    """Pairs that an epoch leaves out because of ``dropLast`` or ``limitTrainBatches``; different ones each epoch."""
    validation_every: int
    """Steps between validations; at least 1, even without validation data."""
    validate_at_start: bool
    """Whether there is a validation before the first step."""
    checkpoint_every: int
    """Steps between checkpoints."""
    warmup_steps: int
    constant_steps: int
    decay_steps: int
    learning_rate: float
    min_learning_rate: float
    validation_pairs: tuple[int, ...]
    """Usable pairs of each validation source."""
    validation_batches: tuple[int, ...]
    """Batches of each validation source; the last may be smaller and is never dropped."""
    pack_max_tokens: int
    """Token budget of a pack."""
    pack_max_pairs: int | None
    """Maximum pairs in a pack; None if only the token budget limits it."""
    with_rejected: bool
    """Whether rejected responses are computed. If not, there are no reward metrics either."""
    needs_reference: bool
    """Whether the reference model's log-probs are used."""
    starts_at_reference: bool
    """Whether the policy equals the reference model before step 1, so that the first loss is known in advance."""
    warnings: tuple[Finding, ...]
    """What the user should know about these values."""

    def validates_after(self, step: int) -> bool:
        """Return whether a validation follows optimizer step ``step``, counted from 1; step 0 is the start."""
        if not any(self.validation_batches):
            return False
        if step == 0:
            return self.validate_at_start
        return step % self.validation_every == 0 or step == self.total_steps

    def checkpoints_after(self, step: int) -> bool:
        """Return whether a checkpoint follows optimizer step ``step``, counted from 1."""
        return step > 0 and (step % self.checkpoint_every == 0 or step == self.total_steps)


def batches_per_epoch(pairs: int, global_batch_size: int, *, drop_last: bool) -> int:
    """Return the global batches in an epoch. Fewer pairs than one batch make one smaller batch in any case."""
    full, rest = divmod(pairs, global_batch_size)
    if full == 0:
        return 1 if rest else 0
    return full if drop_last or rest == 0 else full + 1


def make_plan(spec: DPOJobSpec, train_pairs: int, validation_pairs: Sequence[int] = ()) -> Plan:
    """Derive a run's values. ``validation_pairs`` has one number for each source of ``data.validation``.

    Raises InvalidDataError if there are no training pairs.
    """
    if train_pairs < 1:
        raise InvalidDataError("spec.data.train: no usable pair is left, so there is nothing to train on")
    training = spec.training
    warnings: list[Finding] = []
    batch = min(training.global_batch_size, train_pairs)
    if batch < training.global_batch_size:
        pairs = "1 pair is" if train_pairs == 1 else f"{train_pairs} pairs are"
        text = (
            f"{pairs} fewer than one global batch of {training.global_batch_size}; each step uses all of the data, so"
            f" an epoch is one step; set globalBatchSize: {train_pairs} or less"
        )
        warnings.append(Finding("warning", "spec.training.globalBatchSize", text))
    batches = batches_per_epoch(train_pairs, batch, drop_last=training.drop_last)
    steps_per_epoch = _limited(batches, training.limit_train_batches)
    total = training.max_steps or training.epochs * steps_per_epoch
    rates = plan_rates(training, total)
    return Plan(
        train_pairs=train_pairs,
        global_batch_size=batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        epochs=-(-total // steps_per_epoch),
        dropped_per_epoch=train_pairs - min(train_pairs, steps_per_epoch * batch),
        validation_every=count(training.validation_interval, steps_per_epoch),
        validate_at_start=training.validate_at_start,
        checkpoint_every=spec.checkpoint.every_steps,
        warmup_steps=rates.warmup_steps,
        constant_steps=rates.constant_steps,
        decay_steps=rates.decay_steps,
        learning_rate=rates.learning_rate,
        min_learning_rate=rates.min_learning_rate,
        validation_pairs=tuple(validation_pairs),
        validation_batches=tuple(
            _limited(batches_per_epoch(pairs, batch, drop_last=False), training.limit_validation_batches)
            for pairs in validation_pairs
        ),
        pack_max_tokens=training.packing.max_tokens or 2 * spec.data.max_length,
        pack_max_pairs=training.micro_batch_size if training.packing.enabled else 1,
        with_rejected=spec.dpo.has_preference,
        needs_reference=spec.dpo.needs_reference,
        starts_at_reference=spec.dpo.needs_reference and (spec.lora is None or spec.lora.row_init == "zero"),
        warnings=(*warnings, *rates.warnings),
    )


def _limited(batches: int, limit: int | str | None) -> int:
    """Return ``batches``, or fewer by a count or a percentage; at least 1 unless there are none."""
    return batches if limit is None else min(batches, count(limit, batches))


def plan_rates(training: Training, total_steps: int) -> RatePlan:
    """Derive the schedule of ``total_steps`` steps (M), with a warning if no steps are left for the decay."""
    schedule, peak = training.schedule, training.learning_rate
    lowest = schedule.min_learning_rate if schedule.min_learning_rate is not None else peak / 10
    usual = min(CONSTANT_STEPS_MAX, total_steps // 10)
    warmup = schedule.warmup_steps
    constant = schedule.constant_steps if schedule.constant_steps is not None else usual
    decay = total_steps - warmup - constant
    warnings: list[Finding] = []
    if warmup >= total_steps:
        fix = max(0, min(10, total_steps // 10))
        text = (
            f"{'1 step ends' if total_steps == 1 else f'{total_steps} steps end'} within the warm-up of {warmup}: the"
            f" rate would never stay at {number(peak)};"
            f" set warmupSteps: {fix}"
        )
        warnings.append(Finding("warning", "spec.training.schedule.warmupSteps", text))
    elif decay <= 0 and lowest < peak:
        high, low = numbers(peak, lowest)
        room = f"{total_steps} steps are {'fewer than' if decay < 0 else 'no more than'}"
        fall = f"the rate would fall from {high} to {low} at step {warmup + 1}"
        fix = min(usual, total_steps - warmup - 1)
        text = f"{room} warm-up {warmup} + constant {constant}: {fall}; set constantSteps: {fix}"
        warnings.append(Finding("warning", "spec.training.schedule", text))
    return RatePlan(warmup, constant, max(0, decay), peak, lowest, tuple(warnings))
