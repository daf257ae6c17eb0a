"""The training loop: steps, validations and checkpoints as planned, and a stop that all ranks agree on."""

import time
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from dpo_api.blend import mean_weights
from dpo_api.errors import StoppedError
from dpo_api.plan import Plan
from dpo_api.sizing import utilization
from dpo_api.spec import DPOJobSpec
from dpo_trainer.batches import Ahead, DataSet, Packer
from dpo_trainer.checkpoint import store as checkpoints
from dpo_trainer.checkpoint.identity import Identity, check_identity
from dpo_trainer.checkpoint.saving import Saver
from dpo_trainer.checkpoint.state import collect, restore
from dpo_trainer.choosing import Chooser
from dpo_trainer.data.packs.order import Blend, batch_pairs, validation_batches
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.layouts import product_here
from dpo_trainer.metrics.sums import loss_at_start, means
from dpo_trainer.model.dropout import key_of
from dpo_trainer.reference import Pairs
from dpo_trainer.reporting import Reporter
from dpo_trainer.rundir import RunDirectory, SavedCheckpoint
from dpo_trainer.schedule import learning_rate
from dpo_trainer.stopping import StopRequest


@dataclass(frozen=True)
class Inputs:
    """The data of a run, and the settings that turn it into batches and packs."""

    train: DataSet
    validation: tuple[DataSet, ...]
    packer: Packer
    plan: Plan
    seed: int
    drop_last: bool
    blend: Blend

    def epoch(self, epoch: int) -> list[Pairs]:
        """Return an epoch's global batches. They depend on seed, epoch and data only."""
        n, size = self.train.index.n, self.plan.global_batch_size
        batches = batch_pairs(n, size, self.seed, epoch, drop_last=self.drop_last, blend=self.blend)
        return batches[: self.plan.steps_per_epoch]

    def training_pairs(self) -> Pairs:
        """Return every pair that the run trains on, in ascending order."""
        plan = self.plan
        used = np.zeros(self.train.index.n, dtype=np.bool_)
        for epoch in range(plan.epochs):
            for batch in self.epoch(epoch)[: plan.total_steps - epoch * plan.steps_per_epoch]:
                used[batch] = True
            if used.all():
                break
        return np.flatnonzero(used)

    def validation_batches(self) -> list[tuple[DataSet, list[Pairs]]]:
        """Return each validation source with its batches."""
        size = self.plan.global_batch_size
        return [
            (data, validation_batches(data.index.n, size)[:count])
            for data, count in zip(self.validation, self.plan.validation_batches, strict=True)
        ]


class Training:
    """The training loop of one attempt, from the newest checkpoint or from step 0 to the last step."""

    def __init__(
        self,
        spec: DPOJobSpec,
        world: World,
        engine: Engine,
        inputs: Inputs,
        directory: RunDirectory,
        reporter: Reporter,
        stop: StopRequest,
        identity: Identity,
    ) -> None:
        self.spec, self.world, self.engine, self.inputs = spec, world, engine, inputs
        self.directory, self.reporter, self.stop, self.identity = directory, reporter, stop, identity
        self.plan = inputs.plan
        self.step = 0
        self.chooser = Chooser(spec)
        self._epoch: tuple[int, list[Pairs]] = (-1, [])
        self._consumed = 0
        self._validated = True  #: whether the validation due at this step has been done
        self._marker: checkpoints.Marker | None = None  #: of the checkpoint that was saved or read last
        self.saver = Saver(directory, world, background=spec.checkpoint.async_save)
        self._product = product_here()
        self._ahead = Ahead(lambda step: inputs.packer.packs(inputs.train, self._batch(step), world))
        engine.before_update = self._before_update

    def resume_from(self, newest: SavedCheckpoint | None) -> None:
        """Continue from a complete checkpoint, or start at step 0.

        Raises IncompatibleCheckpointError if it belongs to another run.
        """
        saved_at = None
        if newest is not None:
            marker = checkpoints.read_marker(self.directory, newest)
            check_identity(marker.identity, self.identity, newest.uri)
            self.reporter.note(f"resuming from step {newest.step} ({newest.uri})")
            self._load(newest, marker)
            self.step = newest.step
            self.reporter.latest |= marker.metrics
            self._validated = marker.validated
            self._marker = marker
            saved_at = marker.saved_at
            there = [saved.step for saved in self.directory.checkpoints()] if self.world.is_main else None
            self.reporter.warn(*self.chooser.restore(marker.choice, self.world.from_main(there)))
        epochs, rest = divmod(self.step, self.plan.steps_per_epoch)
        whole = sum(len(batch) for batch in self.inputs.epoch(0)) if epochs else 0
        self._consumed = epochs * whole + sum(len(batch) for batch in self.inputs.epoch(epochs)[:rest])
        self.reporter.start_training(self.step, self.plan, resumed=newest is not None, saved_at=saved_at)
        self.reporter.best(self.chooser.best)

    def _load(self, saved: SavedCheckpoint, marker: checkpoints.Marker) -> None:
        restore(
            self.engine.model,
            self.engine.optimizer,
            saved.step,
            lambda boxes: checkpoints.load(self.directory, self.world, boxes, saved, marker.format),
        )

    def take_best(self) -> tuple[int, dict[str, float]]:
        """Load the best checkpoint's weights, if those of the last step are not the best. A collective.

        Returns their step and the metrics then. Without a best checkpoint, the last step stays.
        """
        best = self.chooser.best
        if best is None or best.step == self.step:
            return self.step, self.reporter.finite_latest
        saved = SavedCheckpoint(best.step, self.directory.checkpoint_uri(best.step))
        marker = checkpoints.read_marker(self.directory, saved)
        self._load(saved, marker)
        return best.step, marker.metrics

    @property
    def stopped_early(self) -> str:
        """Why the run ended before its last planned step, or will; empty if it did not."""
        return self.chooser.stops_early if self.step < self.plan.total_steps else ""

    def run(self) -> None:
        """Train to the last step, or until validations no longer improve.

        If asked to stop, saves a checkpoint and raises StoppedError.
        """
        with closing(self._ahead):
            self._run()

    def _run(self) -> None:
        plan = self.plan
        if plan.validates_after(self.step) and (self.step == 0 or not self._validated):
            self._validate_or_stop()
            if self._marker is not None:  # else it would be due again, and what it decided would be unknown
                metrics, choice = self.reporter.finite_latest, self.chooser.state()
                self._marker = replace(self._marker, validated=True, metrics=metrics, choice=choice)
                checkpoints.change_marker(self.directory, self.world, self._marker)
        while self.step < plan.total_steps and not self.stopped_early:
            stop, saving = self.stop.agreed_with(self.world, self.saver.busy)
            if not saving:
                self._complete_checkpoint()
            if stop:
                self._stop_here()
            self.reporter.stepping(self.step + 1)
            self._one_step()
            if plan.validates_after(self.step):
                self._validate_or_stop()
            best = self.chooser.best
            is_best = best is not None and best.step == self.step
            if plan.checkpoints_after(self.step) or is_best or self.stopped_early:
                self.checkpoint()
        self._complete_checkpoint()

    def _batch(self, step: int) -> Pairs:
        """Return the pairs of the update after ``step`` updates."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        known = self._epoch
        if known[0] != epoch:
            known = self._epoch = (epoch, self.inputs.epoch(epoch))
        return known[1][k]

    def _one_step(self) -> None:
        plan, step = self.plan, self.step
        began = time.monotonic()
        pairs = self._batch(step)
        packs, tokens = self._ahead.packs(step)
        waited = time.monotonic() - began
        if step + 1 < plan.total_steps:
            self._ahead.start(step + 1)
        rate = learning_rate(
            step,
            max_learning_rate=plan.learning_rate,
            min_learning_rate=plan.min_learning_rate,
            warmup_steps=plan.warmup_steps,
            constant_steps=plan.constant_steps,
            total_steps=plan.total_steps,
        )
        values, at_start = self.engine.train_step(
            pairs,
            packs,
            self.inputs.train.reference_sums if plan.needs_reference else None,
            self.inputs.train.rewards,
            rate=rate,
            seed=key_of("dropout", self.spec.training.seed, step),
            prepared=waited,
        )
        self.step += 1
        self._consumed += len(pairs)
        seconds = time.monotonic() - began
        values |= {
            "lr": rate,
            "consumed_samples": float(self._consumed),
            "epoch": self.step / plan.steps_per_epoch,
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
        }
        share = utilization(self.spec, self.engine.flops, seconds, self.world.size, self._product)
        if share is not None:
            values["mfu"] = share
        self.reporter.stepped(
            self.step,
            values,
            seconds=seconds,
            tokens=tokens,
            pairs=len(pairs),
            waited=waited,
            at_start=at_start if plan.starts_at_reference else None,
        )

    def _validate_or_stop(self) -> None:
        """Validate. If asked to stop meanwhile, save a checkpoint whose validation is still due, and stop."""
        self._validated = False
        self._validated = self.validate()
        if not self._validated:
            self._stop_here()

    def validate(self) -> bool:
        """Validate the current weights on all sources: means over all pairs, and by source if there are several.

        In the means over all, each pair counts as much as the weight of its source.

        Returns False, and reports nothing, if asked to stop before the end.
        """
        of = sum(self.plan.validation_batches)
        self.reporter.phase("validate", done=0, of=of)
        began = time.monotonic()
        tables: dict[str, torch.Tensor] = {}
        done = 0
        for data, batches in self.inputs.validation_batches():
            for batch in batches:
                packs, _ = self.inputs.packer.packs(data, batch, self.world)
                reference = data.reference_sums if self.plan.needs_reference else None
                sums = self.engine.evaluate(batch, packs, reference, data.rewards)
                tables[data.name] = tables[data.name] + sums if data.name in tables else sums
                done += 1
                self.reporter.phase("validate", done=done, of=of)
                if done < of and self.stop.agreed(self.world):
                    return False
        total = torch.stack([tables[data.name] * weight for data, weight in self._weighted(tables)]).sum(0)
        values = means(total)
        if len(tables) > 1:
            values |= {f"{name}/{key}": value for name, table in tables.items() for key, value in means(table).items()}
        values["validation_step_time"] = time.monotonic() - began
        at_start = loss_at_start(total) if self.plan.starts_at_reference else None
        self.reporter.validated(self.step, values, at_start=at_start)
        self.chooser.validated(self.step, {f"val/{name}": value for name, value in values.items()})
        self.reporter.best(self.chooser.best)
        return True

    def _weighted(self, tables: dict[str, torch.Tensor]) -> list[tuple[DataSet, float]]:
        """Return each source that was validated, with the factor of its sums."""
        found = [(data, batches) for data, batches in self.inputs.validation_batches() if data.name in tables]
        pairs = [sum(len(batch) for batch in batches) for _, batches in found]
        factors = mean_weights(pairs, [data.weight for data, _ in found])
        return [(data, factor) for (data, _), factor in zip(found, factors, strict=True)]

    def checkpoint(self) -> None:
        """Save this step on all ranks; with ``checkpoint.async``, begin to."""
        self._complete_checkpoint()  # there is one at a time
        began = time.monotonic()
        self.reporter.phase("checkpoint", message=f"step {self.step}")
        self.reporter.flush()
        marker = checkpoints.Marker(
            step=self.step,
            attempt=self.directory.attempt,
            identity=self.identity,
            metrics=self.reporter.finite_latest,
            validated=self._validated,
            choice=self.chooser.state(),
        )
        self._marker = marker
        self.saver.begin(collect(self.engine.model, self.engine.optimizer), marker)
        self.reporter.waited_for_checkpoint(time.monotonic() - began)
        if not self.saver.background:
            self._complete_checkpoint()

    def _complete_checkpoint(self) -> None:
        """Wait for the checkpoint that is being saved, if any, and delete the oldest ones. A collective."""
        began = time.monotonic()
        if self.saver.busy:
            self.reporter.phase("checkpoint")
        saved = self.saver.complete()
        if saved is None:
            return
        if self.world.is_main:
            # The best by this checkpoint's marker: that of a later validation is not saved yet.
            best = None if self._marker is None else Chooser.best_step(self._marker.choice)
            checkpoints.keep_newest(self.directory, self.spec.checkpoint.keep, best)
        # All ranks must reach this point together: torchrun gives the others 30 s after one process has exited.
        self.world.barrier()
        self.reporter.checkpointed(saved.step, time.time())
        self.reporter.waited_for_checkpoint(time.monotonic() - began)

    def _before_update(self) -> None:
        began = time.monotonic()
        self.saver.wait_for_copy()
        self.reporter.waited_for_checkpoint(time.monotonic() - began)

    def _stop_here(self) -> None:
        """Save this step unless it is saved already or there is no time for it, and raise StoppedError."""
        reason = self.stop.reason(self.world)
        if self.step == 0:
            raise StoppedError(f"{reason} before the first step; the same command starts again")
        self._complete_checkpoint()
        newest = self.reporter.last_checkpoint
        if newest != self.step:
            if newest is not None and self.world.any(self._is_late()):
                raise StoppedError(
                    f"{reason} after step {self.step} of {self.plan.total_steps}; the rest of "
                    "checkpoint.gracePeriodSeconds is too short for another checkpoint, so the newest is "
                    f"{self.directory.checkpoint_uri(newest)}; the same command continues from there"
                )
            self.checkpoint()
            self._complete_checkpoint()
        raise StoppedError(
            f"{reason} after step {self.step} of {self.plan.total_steps}; checkpoint: "
            f"{self.directory.checkpoint_uri(self.step)}; the same command continues from there"
        )

    def _is_late(self) -> bool:
        """Whether a checkpoint that takes this rank as long as the last one would outlast the grace period."""
        if self.stop.asked_at is None or self.saver.seconds is None:
            return False
        left = self.stop.asked_at + self.spec.checkpoint.grace_period_seconds - time.monotonic()
        return self.saver.seconds > left
