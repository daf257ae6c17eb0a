"""A whole run on one rank: index, reference, training with validation and checkpoints, export."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dpo_api.errors import IncompatibleCheckpointError, Outcome
from dpo_api.manifest import DPOJob
from dpo_api.plan import Plan, make_plan
from dpo_store import Store
from dpo_trainer import bridge
from dpo_trainer.batches import DataSet, Packer
from dpo_trainer.checkpoint import store as checkpoints
from dpo_trainer.checkpoint.identity import check_identity, identity_of
from dpo_trainer.checkpoint.state import collect, restore
from dpo_trainer.data.cache import cache_folder
from dpo_trainer.data.index import IndexProgress, Listener, build_indexes
from dpo_trainer.data.order import batch_pairs, validation_batches
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.exporting import export_model
from dpo_trainer.formats.huggingface import load_weights, read_config
from dpo_trainer.launch import RankResult
from dpo_trainer.metrics.sums import means
from dpo_trainer.model.build import build_model, use_transformer_engine
from dpo_trainer.reference import Pairs, ReferenceCache, ReferenceTable, complete, reference_key
from dpo_trainer.reporting import Reporter
from dpo_trainer.rundir import RunDirectory, SavedCheckpoint
from dpo_trainer.schedule import learning_rate
from dpo_trainer.sources import model_source, open_tokenizer, store_for
from dpo_trainer.stopping import StopRequest
from dpo_api.errors import StoppedError


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to the spec."""

    run_dir: str | None = None
    attempt: int | None = None
    events: Path | None = None
    port: int | None = None
    host: str = ""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """From the worker's arguments, which have the same names."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


class Run:
    """One attempt. ``execute`` does everything; ``result`` says how far it came."""

    def __init__(self, job: DPOJob, world: World, stop: StopRequest, options: RunOptions) -> None:
        self.job, self.spec, self.world, self.stop = job, job.spec, world, stop
        uri = options.run_dir or job.spec.checkpoint.uri or f"runs/{job.metadata.name}"
        self.directory = RunDirectory(store_for(job.spec, job.spec.checkpoint.storage), uri.rstrip("/"))
        self.reporter = Reporter.open(job, world, options.events, options.port, options.host)
        self.step = 0
        self.total = 0
        self.model_uri: str | None = None
        self._options = options

    def result(self, rank: int, outcome: Outcome, message: str) -> RankResult:
        """This rank's result in the launcher's form."""
        return RankResult(
            rank=rank,
            outcome=outcome.name,
            message=message,
            at=time.time(),
            step=self.step,
            total=self.total,
            metrics=self.reporter.latest,
            run_dir=self.directory.uri,
            model_uri=self.model_uri,
            attempt=self.directory.attempt,
        )

    def failed(self, outcome: Outcome, message: str) -> None:
        """Tell whoever watches that the run ended."""
        self.reporter.phase("failed" if outcome is not Outcome.Stopped else "done", message=message)
        self.reporter.close()

    def execute(self) -> None:
        """Run to the end, or raise the DPOError that ends it."""
        self._claim()
        self._index()
        if self._finished_before():
            return
        self._build()
        self._reference()
        self.engine.prepare_training()
        self._resume()
        self._train()
        self._export()
        self.reporter.phase("done", message=f"model: {self.model_uri}")
        self.reporter.close()

    # -- before training

    def _claim(self) -> None:
        claimed = self.directory.claim(self._options.attempt) if self.world.is_main else None
        self.directory.attempt = self.world.from_main(claimed)
        self.reporter.attempt = self.directory.attempt
        if self.world.is_main:
            self.directory.write_json("spec.json", json.loads(self.job.to_json()))
        self.reporter.phase("starting")

    def _index(self) -> None:
        """Read the config, tokenise all data, derive the plan."""
        self.reporter.phase("index")
        self.model_store, self.model_folder = model_source(self.spec)
        self.config = read_config(self.model_store, self.model_folder)
        tokenizer = open_tokenizer(self.spec)
        seen = {"pairs": 0}

        def progress(at: IndexProgress) -> None:
            seen["pairs"] = at.pairs
            self.reporter.phase("index", done=at.pairs, message=f"{at.name}: {at.tokens:,} tokens")

        listener = Listener(message=self.reporter.note, progress=progress) if self.world.is_main else Listener()
        indexes = build_indexes(
            self.spec,
            tokenizer,
            lambda source: store_for(self.spec, source.storage),
            vocabulary=self.config.vocab_size,
            listener=listener,
        )
        self.train_set = DataSet("train", indexes.train, self.spec.dpo)
        self.validation_sets = [DataSet(name, index, self.spec.dpo) for name, index in indexes.validation.items()]
        self.plan: Plan = make_plan(self.spec, indexes.train.n, [data.index.n for data in self.validation_sets])
        self.total = self.plan.total_steps
        self.packer = Packer.of(self.spec, self.plan)
        self.reporter.indexed(self.plan, indexes.train.stats)
        self.stop.leave_before_training(self.world, "the index pass")

    def _build(self) -> None:
        """Build the model with the start model's weights, and LoRA's adapters beside them."""
        self.reporter.phase("starting", message="loading the model")
        engine = self.spec.transformer_engine.enabled
        self.backend = "auto" if engine is None else "transformer_engine" if engine else "local"
        training = self.spec.training
        self.model = build_model(
            self.config,
            precision=training.precision,
            backend=self.backend,
            deterministic=training.deterministic,
        )
        self.fingerprint = load_weights(self.model, self.model_store, self.model_folder)
        if self.spec.lora is not None:
            from dpo_trainer.model.lora import attach_lora
            attach_lora(self.model, self.spec.lora, seed=training.seed)
        self.engine = Engine(self.model, self.spec, self.world)
        self.identity = identity_of(self.spec, model=self.fingerprint, data=self._data_fingerprint())
        self.stop.leave_before_training(self.world, "loading")

    def _data_fingerprint(self) -> str:
        index = self.train_set.index
        return f"{index.fingerprint}:{index.rewards_fingerprint}"

    def _reference(self) -> None:
        """The start model's log-probabilities of every pair that this run will see."""
        if self.plan.sft_only:
            return
        uri = self.spec.reference.cache_uri or str(cache_folder() / "reference")
        cache = ReferenceCache(store_for(self.spec, self.spec.reference.storage), uri)
        form = "transformer-engine" if use_transformer_engine(self.backend) else "local"
        needed = [(self.train_set, self._training_pairs())]
        for data, batches in zip(self.validation_sets, self.plan.validation_batches, strict=True):
            needed.append((data, np.arange(min(data.index.n, batches * self.plan.global_batch_size))))
        for data, pairs in needed:
            key = reference_key(
                model=self.fingerprint, data=data.index.fingerprint, precision=self.spec.training.precision, form=form
            )
            self._reference_of(data, pairs, cache, key)

    def _training_pairs(self) -> Pairs:
        """Every pair of the run's batches."""
        plan, n = self.plan, self.train_set.index.n
        if plan.total_steps >= plan.steps_per_epoch and plan.dropped_per_epoch == 0:
            return np.arange(n)
        batches = [self._batch(step) for step in range(plan.total_steps)]
        return np.unique(np.concatenate(batches))

    def _batch(self, step: int) -> Pairs:
        """The pairs of the update that follows ``step`` updates: arithmetic on (seed, epoch, data) alone."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._epoch_batches = batch_pairs(
                self.train_set.index.n,
                self.plan.global_batch_size,
                self.spec.training.seed,
                epoch,
                drop_last=self.spec.training.drop_last,
            )
        return self._epoch_batches[k]

    def _reference_of(self, data: DataSet, pairs: Pairs, cache: ReferenceCache, key: str) -> None:
        table = cache.read(key, data.index.n) if self.world.is_main else ReferenceTable.empty(data.index.n)
        table.sums = self.world.broadcast(table.sums)
        data.reference = table
        missing = len(table.missing(pairs))
        total = len(np.unique(pairs))
        self.reporter.phase("reference", done=total - missing, of=total, message=f"{data.name} (key {key[:8]})")
        if not missing:
            return

        def compute(chunk: Pairs) -> torch.Tensor:
            packs, _ = self.packer.packs(data, chunk, self.world)
            off = None
            sums = torch.zeros(data.index.n, 2, dtype=torch.float64)
            for ids, values in self.engine.log_prob_sums(packs, adapters=off):
                real = ids >= 0
                sums[ids[real]] = values[real]
            return self.world.sum_over_data(sums[torch.from_numpy(chunk)])

        def after(done: int, of: int) -> None:
            self.reporter.phase("reference", done=total - of + done, of=total, message=f"{data.name} (key {key[:8]})")
            if done < of and self.stop.agreed(self.world):
                if self.world.is_main:
                    cache.write(key, table)
                raise StoppedError("asked to stop during the reference pass; what was computed is kept in the cache")

        complete(table, pairs, compute, step=max(64, self.plan.global_batch_size), after_step=after)
        if self.world.is_main:
            cache.write(key, table)
        self.world.barrier()

    # -- resuming

    def _finished_before(self) -> bool:
        """Whether this run directory already holds the finished run of the same spec: nothing is left to do."""
        done = self.directory.read_json("export.json")
        if done is None or not self.spec.checkpoint.resume:
            return False
        if done.get("spec") != json.loads(self.job.to_json())["spec"]:
            return False
        self.step, self.model_uri = int(done["step"]), str(done["model"])
        self.reporter.finished_before(done)
        self.reporter.close()
        return True

    def _newest(self) -> SavedCheckpoint | None:
        found = self.directory.checkpoints() if self.world.is_main else []
        newest = self.world.from_main((found[-1] if found else None,))[0]
        if newest is not None and not self.spec.checkpoint.resume:
            raise IncompatibleCheckpointError(
                f"{self.directory.uri} holds a checkpoint of step {newest.step} and spec.checkpoint.resume is false: "
                "give this run a directory of its own, delete that one, or leave resume out"
            )
        return newest

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, or start at step 0."""
        newest = self._newest()
        if newest is not None:
            marker = checkpoints.read_marker(self.directory, newest)
            check_identity(marker.identity, self.identity, newest.uri)
            self.reporter.note(f"resuming from step {newest.step} ({newest.uri})")
            restore(self.engine, lambda sharded: checkpoints.load(self.directory, self.world, sharded, newest))
            self.step = newest.step
            self.reporter.checkpointed(newest.step)
        self.reporter.start_training(self.directory, self.step, self.plan)

    # -- training

    def _train(self) -> None:
        plan = self.plan
        if self.step == 0 and plan.validates_after(0):
            self._validate()
        while self.step < plan.total_steps:
            if self.stop.agreed(self.world):
                self._stop_here()
            self._one_step()
            if plan.validates_after(self.step):
                self._validate()
            if plan.checkpoints_after(self.step):
                self._checkpoint()

    def _one_step(self) -> None:
        plan, training, step = self.plan, self.spec.training, self.step
        began = time.monotonic()
        pairs = self._batch(step)
        packs, tokens = self.packer.packs(self.train_set, pairs, self.world)
        waited = time.monotonic() - began
        rate = learning_rate(
            step,
            max_learning_rate=plan.learning_rate,
            min_learning_rate=plan.min_learning_rate,
            warmup_steps=plan.warmup_steps,
            constant_steps=plan.constant_steps,
            total_steps=plan.total_steps,
        )
        # Dropout differs by step and rank and is the same after a resume.
        seed = hash((training.seed, step, self.world.data_rank)) & 0x7FFFFFFF
        result = self.engine.train_step(
            packs,
            None if plan.sft_only else self.train_set.reference_sums,
            self.train_set.rewards,
            rate=rate,
            seed=seed,
        )
        self.step += 1
        self.reporter.stepped(
            self.step,
            {
                **result,
                "lr": rate,
                "consumed_samples": float(self._consumed(self.step)),
                "epoch": self.step / plan.steps_per_epoch,
                "step_time": time.monotonic() - began,
            },
            tokens=tokens,
            pairs=len(pairs),
            waited=waited,
        )

    def _consumed(self, steps: int) -> int:
        """Pairs seen after ``steps`` updates."""
        epochs, rest = divmod(steps, self.plan.steps_per_epoch)
        sizes = [len(self._batch(epochs * self.plan.steps_per_epoch + k)) for k in (0,)] if rest else [0]
        per_epoch = self.plan.train_pairs - self.plan.dropped_per_epoch
        return epochs * per_epoch + min(rest * (sizes[0] or 0), per_epoch)

    def _validate(self) -> None:
        """All validation sources with the current weights; their means over all pairs together, and each source's own."""
        began = time.monotonic()
        whole: torch.Tensor | None = None
        values: dict[str, float] = {}
        done, of = 0, sum(self.plan.validation_batches)
        for data, count in zip(self.validation_sets, self.plan.validation_batches, strict=True):
            table: torch.Tensor | None = None
            for batch in validation_batches(data.index.n, self.plan.global_batch_size)[:count]:
                packs, _ = self.packer.packs(data, batch, self.world)
                sums = self.engine.evaluate(
                    packs, None if self.plan.sft_only else data.reference_sums, data.rewards
                )
                table = sums if table is None else table + sums
                done += 1
                self.reporter.phase("validate", done=done, of=of)
            if table is None:
                continue
            whole = table if whole is None else whole + table
            if len(self.validation_sets) > 1:
                values |= {f"{data.name}/{name}": value for name, value in means(table).items()}
        if whole is not None:
            values |= means(whole)
            values["validation_step_time"] = time.monotonic() - began
            self.reporter.validated(self.step, values)

    def _checkpoint(self) -> None:
        self.reporter.phase("checkpoint", message=f"step {self.step}")
        marker = checkpoints.Marker(
            step=self.step, attempt=self.directory.attempt, identity=self.identity, metrics=self.reporter.finite_latest
        )
        self.reporter.flush()
        checkpoints.save(self.directory, self.world, collect(self.engine), marker)
        if self.world.is_main:
            checkpoints.keep_newest(self.directory, self.spec.checkpoint.keep)
        self.reporter.checkpointed(self.step)

    def _stop_here(self) -> None:
        """Save, unless this step is saved already, and leave."""
        reason = self.world.from_main(self.stop.reason or "asked to stop" if self.world.is_main else None)
        if self.step == 0:
            raise StoppedError(f"{reason} before the first step; the same command starts again")
        if self.reporter.last_checkpoint != self.step:
            self._checkpoint()
        raise StoppedError(
            f"{reason} after step {self.step} of {self.plan.total_steps}; checkpoint: "
            f"{self.directory.checkpoint_uri(self.step)}; the same command continues from there"
        )

    # -- the result

    def _export(self) -> None:
        self.reporter.phase("export")
        if self.world.is_main:
            self.directory.check_fence()
        store: Store = store_for(self.spec, self.spec.output.storage or self.spec.checkpoint.storage)
        uri = (self.spec.output.uri or self.directory.path("model")).rstrip("/")
        export_model(self.model, self.spec, self.world, (self.model_store, self.model_folder), (store, uri))
        self.model_uri = uri
        if self.world.is_main:
            self.directory.check_fence()
            done: dict[str, Any] = {
                "step": self.step,
                "attempt": self.directory.attempt,
                "model": uri,
                "metrics": self.reporter.finite_latest,
                "spec": json.loads(self.job.to_json())["spec"],
            }
            self.directory.write_json("export.json", done)
        bridge.needed()
        self.world.barrier()
