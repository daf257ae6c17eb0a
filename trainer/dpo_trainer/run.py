"""One attempt on one rank: claim the run directory, index, load, compute the reference, train, export."""

import argparse
import json
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dpo_api.errors import DPOError, IncompatibleCheckpointError, Outcome, StoppedError, WrongLayoutError
from dpo_api.manifest import DPOJob
from dpo_api.models import read_config
from dpo_api.models.megatron.outgoing import check_formats
from dpo_api.plan import make_plan
from dpo_api.sizing import layout_of
from dpo_api.validation import refuse_errors
from dpo_store import Store
from dpo_store.cache import cache_folder
from dpo_store.revisions import REVISIONS, at_commits, repositories, saved
from dpo_trainer.batches import DataSet, Packer
from dpo_trainer.card import Trained, write_cards
from dpo_trainer.checkpoint.identity import Identity, check_identity, identity_of
from dpo_trainer.checkpoint.store import read_marker
from dpo_trainer.data.index.build import IndexProgress, Listener, blend_of, build_indexes
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.exporting import Result, export_model, is_there
from dpo_trainer.formats.adapter import AdapterMatrices, MergedWeights, with_adapter
from dpo_trainer.formats.huggingface import load_weights, open_checkpoint
from dpo_trainer.formats.start import StartWeights
from dpo_trainer.heap import trim
from dpo_trainer.layout_check import compare, too_large
from dpo_trainer.layouts import Decision
from dpo_trainer.links import judge, measure
from dpo_trainer.model.attend import form_of
from dpo_trainer.model.build import Backend, build_model, refuse_fp8, use_transformer_engine
from dpo_trainer.model.lora import adapters_disabled, attach_lora, exact_values
from dpo_trainer.pushing import prepare, push, pushed_before
from dpo_trainer.reference import Compute, Pairs, ReferenceCache, ReferenceTable, complete, reference_key
from dpo_trainer.reporting import Reporter
from dpo_trainer.results import RankResult
from dpo_trainer.rundir import EXPORT, LAYOUT, Finished, RunDirectory, SavedCheckpoint
from dpo_trainer.sources import model_source, open_adapter, open_tokenizer, settled, store_for
from dpo_trainer.stopping import StopRequest
from dpo_trainer.training import Inputs, Training

REFERENCE_SAVE_SECONDS = 300.0
"""Time between two saves of an unfinished reference table."""


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line that the spec does not have."""

    run_dir: str | None = None
    attempt: int | None = None
    events: Path | None = None
    port: int | None = None
    host: str = ""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """From the worker's arguments, which have the same names."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


def directory_of(job: DPOJob, options: RunOptions) -> RunDirectory:
    """Return the job's run directory: the command line's, the spec's, or one under runs/."""
    uri = options.run_dir or job.spec.checkpoint.uri or f"runs/{job.metadata.name}"
    return RunDirectory(store_for(job.spec, job.spec.checkpoint.storage), uri.rstrip("/"))


def at_first_commits(job: DPOJob, world: World, directory: RunDirectory) -> DPOJob:
    """Return the job with each input on the Hugging Face Hub at the commit that the first attempt found.

    Rank 0 finds those that the run directory does not hold yet. A collective if there is such an input. Raises on rank
    0 what the hub's answers mean.
    """
    wanted = repositories(job.spec)
    if not wanted:
        return job

    def on_main() -> dict[str, str]:
        known = saved(directory.store, directory.uri)
        store = store_for(job.spec)
        new = {name: store.commit(name) for name in wanted if name not in known}
        if new:
            directory.write_json(REVISIONS, {**known, **new})
        return {**known, **new}

    commits = world.from_main(on_main() if world.is_main else None)
    assert commits is not None  # noqa: S101 - rank 0 ends if it has none
    return job.model_copy(update={"spec": at_commits(job.spec, commits)})


class Run:
    """One attempt. ``execute`` runs it; ``result`` reports how far it got."""

    def __init__(
        self, job: DPOJob, world: World, stop: StopRequest, options: RunOptions, decision: Decision | None = None
    ) -> None:
        """Open the reporter and read the run directory. Raises FencedError, PortInUseError.

        decision: the layout that ``world`` was divided by; None: that of the spec, nothing being chosen.
        """
        self.job, self.world, self.stop = job, world, stop
        self._decision = decision or Decision(layout_of(job.spec, world.size))
        self.spec = self._decision.runs(job.spec)
        self.reporter = Reporter(job, world, events=options.events, port=options.port, host=options.host)
        self.directory = directory_of(job, options)
        self._asked_attempt = options.attempt
        self.directory.attempt = self._on_main(lambda: self.directory.look(options.attempt))
        self.reporter.begin(self.directory, self._decision.layout.short)
        self.reporter.predicted_memory = self._decision.predicted_memory
        if world.size > 1:
            self.reporter.hosts = world.from_main(world.to_main(socket.gethostname()))
        if self._decision.said:
            self.reporter.note(self._decision.said)
        self._settled = False
        self.training: Training | None = None
        self.model_uri: str | None = None
        self.hub_uri: str | None = None
        self._model_step: int | None = None
        self._finished: Finished | None = None  #: what the directory held already
        self._total = 0

    def result(self, rank: int, outcome: Outcome, message: str) -> RankResult:
        """Return this rank's result for the launcher."""
        done, training = self._finished, self.training
        chooser = None if training is None else training.chooser
        return RankResult(
            rank=rank,
            outcome=outcome.name,
            message=message,
            at=time.time(),
            step=done.step if done else training.step if training else 0,
            total=self._total,
            metrics=self.reporter.finite_latest,
            run_dir=self.directory.uri,
            model_uri=self.model_uri,
            hub_uri=self.hub_uri,
            attempt=self.directory.attempt,
            last_checkpoint_step=self.reporter.last_checkpoint,
            already_complete=done is not None,
            best=done.best if done else chooser.best.model_dump() if chooser and chooser.best else None,
            model_step=self._model_step,
            stopped_early=done.stopped_early if done else training.stopped_early if training else "",
        )

    def take_runner_up(self) -> str | None:
        """After this rank's GPU ran out of memory: record the runner-up for the next attempt, and return what to say.

        None if the layout was not chosen, if there is no runner-up, if one was taken before, or if this run does not
        own the directory yet. Any rank may call it; several that do write the same.
        """
        instead = self._decision.runner_up()
        if instead is None or not self._settled:
            return None
        try:
            if not self.directory.is_newest:
                return None
            self.directory.write_json(LAYOUT, instead.record)
        except (OSError, DPOError) as error:
            self.reporter.note(f"the runner-up could not be recorded: {error}")
            return None
        return f"the layout that was chosen ran out of memory; the next attempt uses {instead.said}"

    def failed(self, outcome: Outcome, message: str) -> None:
        """Report that the run ended, and close the reporter. Errors while closing are only logged."""
        try:
            self.reporter.phase("done" if outcome is Outcome.Stopped else "failed", message=message)
            self.reporter.close(outcome)
        except (OSError, DPOError) as error:
            self.reporter.note(f"while closing: {error}")

    def execute(self) -> None:
        """Run to the end, or raise the DPOError that ends it."""
        if self._finished_before():
            return
        self.reporter.phase("starting")
        self._check_push()
        refuse_fp8(self.spec.transformer_engine.fp8, self._backend)
        self._check_links()
        inputs = self._index()
        model, fingerprint, form = self._load()
        trim()
        index = inputs.train.index
        data = f"{index.fingerprint}:{index.rewards_fingerprint}"
        if not inputs.blend.is_even:
            data = f"{data}, {inputs.blend} pairs of the sources"
        identity = identity_of(self.spec, model=fingerprint, data=data)
        self._settle(identity)
        self._check_layout(model, inputs)
        engine = Engine(model, self.spec, self.world)
        if inputs.plan.needs_reference:
            self._reference(engine, inputs, fingerprint, form)
            self.stop.leave_before_training(self.world, "the reference pass")
            trim()
        newest = self._newest_checkpoint()
        engine.prepare_training()
        if newest is None:
            self._start_masters(engine)
        self.training = Training(
            self.spec, self.world, engine, inputs, self.directory, self.reporter, self.stop, identity
        )
        self.training.resume_from(newest)
        self.training.run()
        if self.training.stopped_early:
            self.reporter.note(f"stopping early after step {self.training.step}: {self.training.stopped_early}")
        self._model_step, metrics = self._take_weights(self.training)
        self._export(engine, self.training, Trained.of(inputs, self.training.step, self._model_step, metrics))
        self._push()
        self.reporter.phase("done", message=f"model: {self.model_uri}")
        self.reporter.close()

    def _on_main[T](self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 only and return its value on every rank. A failure ends rank 0 and so the run.

        The value travels as JSON.
        """
        return self.world.from_main(action() if self.world.is_main else None)

    def _finished_before(self) -> bool:
        """Return whether the directory holds the finished run of the same spec, so that there is nothing to do."""
        found = self._on_main(lambda: _fields(self.directory.finished()))
        done = None if found is None else Finished(**found)
        if done is None or not self.spec.checkpoint.resume or not _is_same_run(done.spec, _spec_of(self.job)):
            return False
        if not self._on_main(lambda: is_there(self.spec, self._output(done.model))):
            self.reporter.note(
                f"{self.directory.uri} holds this run and it is complete, but its model at {done.model} is missing: "
                "exporting it again from the newest checkpoint, or training again if there is none"
            )
            return False
        self._finished, self._total, self.model_uri = done, done.total or done.step, done.model
        self._model_step = done.step if done.model_step is None else done.model_step
        self.reporter.finished_before(done.step, done.metrics)
        self.reporter.note(f"{self.directory.uri} holds this run and it is complete; nothing to do")
        self._push()
        self.reporter.phase("done", message=f"already complete; model: {self.model_uri}")
        self.reporter.close()
        return True

    @property
    def _backend(self) -> Backend:
        """Whose linear layers the spec asks for."""
        asked = self.spec.transformer_engine.enabled
        return "auto" if asked is None else "transformer_engine" if asked else "local"

    def _check_links(self) -> None:
        """Name slow links between GPUs. On CPU a run is too short, and too slow, for it to matter."""
        if self.world.size == 1 or self.world.device.type != "cuda":
            return
        self.reporter.phase("starting", message="measuring the links between GPUs")
        links = measure(self.world, self.reporter.hosts)
        if links:
            found = judge(links, self.reporter.hosts)
            self.reporter.note(found.summary)
            self.reporter.warn(*found.warnings)

    def _index(self) -> Inputs:
        """Read the model's config, tokenise all data, derive the plan."""
        self.reporter.phase("index")
        store, folder = model_source(self.spec)
        self.config = read_config(store, folder)
        self.spec = settled(self.spec, self.config)
        refuse_errors(self.spec, self.config.facts)
        check_formats(self.config, self.spec.output.converted)
        self._adapter = open_adapter(self.spec, self.config)

        def progress(at: IndexProgress) -> None:
            if self.stop.wanted:  # no collective: others wait for this one, or read alone
                raise StoppedError(f"{self.stop.reason()} during the index pass; the same command starts it again")
            self.reporter.phase("index", done=at.pairs, message=f"{at.name}: {at.tokens:,} tokens")

        indexes = build_indexes(
            self.spec,
            open_tokenizer(self.spec),
            lambda source: store_for(self.spec, source.storage),
            vocabulary=self.config.vocab_size,
            listener=Listener(message=self.reporter.note, progress=progress),
        )
        plan = make_plan(self.spec, indexes.train.n, [index.n for index in indexes.validation.values()])
        blend = blend_of(self.spec.data, indexes.train)
        if not blend.is_even:
            self.reporter.note(f"weights: an epoch uses {blend} pairs of the training sources")
        self._total = plan.total_steps
        doubts = [text for index in (indexes.train, *indexes.validation.values()) for text in index.stats["warnings"]]
        self.reporter.indexed(plan, indexes.train.stats, doubts)
        self.stop.leave_before_training(self.world, "the index pass")
        settings = self.spec.dpo
        return Inputs(
            train=DataSet("train", indexes.train, settings),
            validation=tuple(
                DataSet(name, index, settings, source.weight)
                for (name, index), source in zip(indexes.validation.items(), self.spec.data.validation, strict=True)
            ),
            packer=Packer.of(self.spec, plan, self.world.device),
            plan=plan,
            seed=self.spec.training.seed,
            drop_last=self.spec.training.drop_last,
            blend=blend,
        )

    def _load(self) -> tuple[Any, str, str]:
        """Return the start model with LoRA's adapters, its fingerprint, and what computes its layers."""
        self.reporter.phase("starting", message="loading the model")
        training, fp8, backend = self.spec.training, self.spec.transformer_engine.fp8, self._backend
        if training.deterministic:
            torch.use_deterministic_algorithms(mode=True)
        else:  # for which that function would import torch's compiler: two seconds, 130 MiB
            torch.set_deterministic_debug_mode("default")
        # Nothing here reads memory before it is written, and filling each new tensor takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a property
        model = build_model(
            self.config,
            precision=training.precision,
            backend=backend,
            recomputation=training.activation_recomputation,
            sequence_parallel=self.spec.parallelism.sequence,
            deterministic=training.deterministic,
            fp8=fp8,
        )
        store, folder = model_source(self.spec)
        source, digest = open_checkpoint(store, folder, self.config), ""
        if self._adapter is not None:
            digest = self._on_main(self._adapter.digest)
            if self._continued is None:
                source = MergedWeights(source, self._adapter)
        self._source = source
        loaded = load_weights(model, store, folder, checkpoint=source)
        self.reporter.loaded(loaded.bytes, loaded.seconds)
        self._start_weights = StartWeights(model, source)
        if self.spec.lora is not None:
            attach_lora(model, self.spec.lora, seed=training.seed, start=self._continued)
        self.stop.leave_before_training(self.world, "loading")
        linears = "transformer-engine" if use_transformer_engine(backend, training.precision) else "local"
        linears += f" {fp8}" if fp8 else ""
        attention = form_of(self.world.device, model.config.params_dtype, self.config.head_dim)
        return model, with_adapter(loaded.fingerprint, digest), f"{linears} linears, {attention} attention"

    @property
    def _continued(self) -> AdapterMatrices | None:
        """The start model's adapter if it is what is trained; it is then not merged into the weights."""
        return self._adapter if self.spec.lora is not None and self.spec.lora.continue_adapter else None

    def _check_layout(self, model: Any, inputs: Inputs) -> None:
        """Compare the layout with one rank. Raises WrongLayoutError if they disagree."""
        if self.world.size == self.world.data_size or not self.spec.parallelism.verify:
            return
        self.reporter.phase("starting", message="comparing the layout with one rank")
        index = inputs.train.index
        verdict = None
        if self._decision.predicted_memory is not None:  # of a GPU: host memory is not so scarce
            verdict = too_large(self.spec, self.config.facts, self._decision.layout)
        if verdict is None:
            verdict = compare(
                self.spec, self.world, model, self._source, index, index.n, self._backend, self._continued
            )
        self.reporter.verified(verdict.verified, str(verdict))
        if verdict.verified is False:
            raise WrongLayoutError(
                f"this layout does not compute what one rank does: {verdict.reason}; use another spec.parallelism or "
                "image, and please report it"
            )

    # -- the reference

    def _reference(self, engine: Engine, inputs: Inputs, fingerprint: str, form: str) -> None:
        """Get the reference log-probs of every pair that this run uses, from the cache or by computing them."""
        uri = self.spec.reference.cache_uri or str(cache_folder() / "reference")
        cache = ReferenceCache(store_for(self.spec, self.spec.reference.storage), uri)
        needed = [(inputs.train, inputs.training_pairs())]
        needed += [(data, _joined(batches)) for data, batches in inputs.validation_batches()]
        if self.spec.dpo.splits_tails:
            form += f", LD alpha {self.spec.dpo.ld_alpha!r}"
        if self._continued is not None:  # rounded in other places than a merged one
            form += ", adapter beside the weights"
        for data, pairs in needed:
            key = reference_key(
                model=fingerprint, data=data.index.fingerprint, precision=self.spec.training.precision, form=form
            )
            self._reference_of(data, pairs, cache, key, self._reference_pass(engine, inputs.packer, data))

    def _reference_pass(self, engine: Engine, packer: Packer, data: DataSet) -> Compute:
        """Return the forward pass of the start model; with LoRA, the same weights with the new adapters disabled.

        An adapter that is continued is a part of the start model, and nothing has trained it yet.
        """

        def compute(chunk: Pairs) -> torch.Tensor:
            packs, _ = packer.packs(data, chunk, self.world)
            with adapters_disabled(engine.model) if self._continued is None else nullcontext():
                return engine.log_prob_sums(chunk, packs)

        return compute

    def _reference_of(self, data: DataSet, pairs: Pairs, cache: ReferenceCache, key: str, compute: Compute) -> None:
        empty = ReferenceTable.empty(data.index.n)
        table = cache.read(key, data.index.n) if self.world.is_main else empty
        table.sums = self.world.broadcast(table.sums)
        data.reference = table
        missing, total = len(table.missing(pairs)), len(pairs)
        message = f"{data.name}, {'cached' if not missing else 'key'} {key[:8]}"
        self.reporter.phase("reference", done=total - missing, of=total, message=message)
        if not missing:
            return

        kept = time.monotonic()

        def after(done: int, of: int) -> None:
            nonlocal kept
            self.reporter.phase("reference", done=total - of + done, of=total, message=message)
            if self.world.is_main and time.monotonic() - kept > REFERENCE_SAVE_SECONDS:
                cache.write(key, table)  # a crash then loses minutes, not the whole pass
                kept = time.monotonic()
            if done < of and self.stop.agreed(self.world):
                self._on_main(lambda: cache.write(key, table))
                raise StoppedError("asked to stop during the reference pass; the cache keeps what was computed")

        complete(table, pairs, compute, step=max(64, 4 * self.spec.training.global_batch_size), after_step=after)
        self._on_main(lambda: cache.write(key, table))

    # -- the ends of training

    def _settle(self, identity: Identity) -> None:
        """Claim the run directory, unless its newest checkpoint is of another run.

        Runs before the reference pass, so that a wrong directory is found early.
        """
        newest = self._newest_checkpoint()

        def take_over() -> int:
            if newest is not None:
                check_identity(read_marker(self.directory, newest).identity, identity, newest.uri)
            attempt = self.directory.claim(self._asked_attempt)
            self.directory.write_json("spec.json", json.loads(self.job.to_json()))
            if self._decision.record is not None:
                self.directory.write_json(LAYOUT, self._decision.record)
            return attempt

        self.directory.attempt = self._on_main(take_over)
        self._settled = True
        self.reporter.begin(self.directory, self._decision.layout.short)

    def _newest_checkpoint(self) -> SavedCheckpoint | None:
        found = self._on_main(lambda: _fields(next(reversed(self.directory.checkpoints()), None)))
        newest = None if found is None else SavedCheckpoint(**found)
        if newest is not None and not self.spec.checkpoint.resume:
            raise IncompatibleCheckpointError(
                f"{self.directory.uri} holds a checkpoint of step {newest.step} and spec.checkpoint.resume is false: "
                "use another run directory, delete that checkpoint, or remove resume"
            )
        if newest is not None and newest.step > self._total:
            raise IncompatibleCheckpointError(
                f"{newest.uri} is of step {newest.step}, beyond this run's last step {self._total}: raise "
                "training.maxSteps (or epochs), or use another run directory (checkpoint.uri, or --output)"
            )
        return newest

    def _start_masters(self, engine: Engine) -> None:
        """Set the masters to the start model's exact values; Megatron-Core takes the weights rounded to bf16."""
        rounded = {
            name: parameter
            for name, parameter in engine.model.named_parameters()
            if parameter.requires_grad and self._start_weights.rounded(name)
        }
        masters = engine.masters
        self._start_weights.deliver(rounded, lambda name, value: masters.fill(rounded[name], value))
        if self._continued is not None:
            for matrix, value in exact_values(engine.model, self._continued):
                masters.fill(matrix, value)

    def _output(self, uri: str) -> tuple[Store, str]:
        """Return the store for an address of the result, and the address."""
        return store_for(self.spec, self.spec.output.storage or self.spec.checkpoint.storage), uri

    def _take_weights(self, training: Training) -> tuple[int, dict[str, float]]:
        """Let the engine have the weights to export. Returns their step and the metrics then."""
        if self.spec.output.from_checkpoint == "last":
            return training.step, self.reporter.finite_latest
        self.reporter.phase("export", message="taking the weights of the best checkpoint")
        if training.chooser.best is None:
            self.reporter.warn(f"no validation had a finite {self.spec.checkpoint.monitor}: exporting the last step")
        return training.take_best()

    def _export(self, engine: Engine, training: Training, trained: Trained) -> None:
        """Write the model and its card, then export.json, which marks it as complete."""
        self.reporter.phase("export")
        store, uri = self._output((self.spec.output.uri or self.directory.path("model")).rstrip("/"))
        if self.world.is_main:
            self.directory.check_fence()
            self.directory.store.delete(self.directory.path(EXPORT))  # of a shorter run in this directory
        lora = self.spec.lora is not None
        engine.settle_parameters()
        result = Result(engine.model, engine.masters, self._start_weights, lora=lora)
        export_model(result, self.spec, self.world, model_source(self.spec), (store, uri), self._adapter)
        if self.world.is_main:
            settled_job = self.job.model_copy(
                update={"spec": self.job.spec.model_copy(update={"lora": self.spec.lora})}
            )
            write_cards(settled_job, trained, model_source(self.spec), (store, uri))
            self.directory.check_fence()
            best = training.chooser.best
            done = {
                "step": training.step,
                "total": self._total,
                "attempt": self.directory.attempt,
                "model": uri,
                "model_step": self._model_step,
                "metrics": self.reporter.finite_latest,
                "best": None if best is None else best.model_dump(),
                "stopped_early": training.stopped_early,
                "spec": _spec_of(self.job),
            }
            self.directory.write_json(EXPORT, done)
        self.model_uri = uri
        self.world.barrier()

    # -- the push to the hub

    def _check_push(self) -> None:
        """Find out whether the model can be pushed at the end, if the spec asks for it."""
        hub = self.spec.output.hub
        if hub is not None and self.world.is_main:
            self.reporter.phase("starting", message=f"checking {hub.uri}")
            prepare(hub, self.reporter.warn)

    def _push(self) -> None:
        """Push the exported model, if the spec asks for it and it is not done. By rank 0: the others need not wait.

        The export is whole, so a push that fails is repeated by an attempt that only pushes.
        """
        hub, uri = self.spec.output.hub, self.model_uri
        if hub is None or not self.world.is_main:
            return
        assert uri is not None  # noqa: S101 - it was exported
        self.hub_uri = pushed_before(self.directory, hub)
        if self.hub_uri is not None:
            self.reporter.note(f"the model is on the hub already: {self.hub_uri}")
            return

        def progress(path: str) -> None:
            if self.stop.signalled:  # maxRunSeconds limits the training, which is over
                raise StoppedError(self.stop.reason())
            self.directory.check_fence()
            self.reporter.phase("export", message=f"pushing to {hub.uri}: {path}")

        title = f"{self.job.metadata.name}, step {self._model_step}"
        try:
            self.hub_uri = push(self.directory, self.spec, self._output(uri), title=title, progress=progress)
        except DPOError as error:
            text = f"the model is whole in {uri}, but it was not pushed: {error}; starting the run again only pushes it"
            raise type(error)(text) from error
        self.reporter.note(f"pushed to {hub.uri}: {self.hub_uri}")


def _fields(value: Finished | SavedCheckpoint | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _spec_of(job: DPOJob) -> Any:
    """Return the spec as in the manifest, for comparison."""
    return json.loads(job.to_json())["spec"]


def _is_same_run(one: Any, other: Any) -> bool:
    """Return whether two specs give the same model in the same folder: they may push it to other places."""
    return bool(_without_hub(one) == _without_hub(other))


def _without_hub(spec: Any) -> Any:
    """Return a copy of a manifest's spec without ``output.hub`` and ``storage.hub``."""
    if not isinstance(spec, dict):
        return spec
    kept = dict(spec)
    for section in ("output", "storage"):
        if isinstance(kept.get(section), dict):
            kept[section] = {name: value for name, value in kept[section].items() if name != "hub"}
            if not kept[section]:
                del kept[section]
    return kept


def _joined(batches: list[Pairs]) -> Pairs:
    """Return the pairs of validation batches, which are in file order and disjoint."""
    return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)
