"""Compares the run's layout with one rank before training: the same log-probs, the same gradients.

Both sides run the engine's own code on a cut model: max(2, pipeline size) of the model's layers with their real
weights, its embedding and its head, at their real widths, and on a few of the run's own pairs. So a wrong kernel, a
wrong cut of a weight or a collective that is missing shows on the user's own hardware before step 1.

Gradients are compared by their products with fixed random directions of ±1: for a difference d of two gradients,
E[(d·r)²] = |d|², so √(mean (d·r)²) estimates |d| without a copy of the other's gradient.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.models import ModelConfig, ModelFacts
from dpo_api.models.stages import layers_of_stages
from dpo_api.sizing import Layout, comparison_bytes, cut_layers, memory_of_stage, stages
from dpo_api.spec import DPOJobSpec
from dpo_api.texts import size
from dpo_trainer.data.packs.collate import PairTokens, TokenIds, make_pack
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.formats.adapter import AdapterMatrices
from dpo_trainer.formats.export import exported, tensors_of
from dpo_trainer.formats.layout import Slot, assemble, slots, target
from dpo_trainer.formats.weights import Weights
from dpo_trainer.model.build import Backend, Precision, build_model
from dpo_trainer.model.context import share_of
from dpo_trainer.model.forward import unwrap
from dpo_trainer.model.lora import adapters, attach_lora
from dpo_trainer.model.pack import Pack

PAIRS = 4
LONGEST = 512
"""Most tokens of a pair that are used: half for the prompt, a quarter for each response."""
DIRECTIONS = 64
"""The estimate of a distance has a standard deviation of 1/√(2 · 64) = 9 %, far less than BF16_FACTOR allows."""
TOLERANCE = 1e-4
"""Largest relative difference in fp32."""
BF16_FACTOR = 3.0
"""In bf16: how many times the distance of one rank's bf16 from its fp32 the layout may be away."""
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Verdict:
    """What the comparison found. ``verified`` is None if it was not made; ``reason`` says why, or what differs."""

    verified: bool | None
    reason: str
    log_probs: float = math.nan
    """Largest relative difference of a response's log-probability."""
    gradients: float = math.nan
    """Largest relative difference of a weight's gradient."""

    def __str__(self) -> str:
        if self.verified is None:
            return f"not verified: {self.reason}"
        figures = f"largest relative differences: log-probs {self.log_probs:.1e}, gradients {self.gradients:.1e}"
        return f"{'verified' if self.verified else 'wrong'}: {self.reason} ({figures})"


def too_large(spec: DPOJobSpec, model: ModelFacts, layout: Layout) -> Verdict | None:
    """Return the verdict that nothing was compared, if that takes more of rank 0's GPU than training; else None.

    The limit is what training will take beside the weights, so that a run that fits is never ended by its check.
    """
    needed = comparison_bytes(model, spec)
    first = memory_of_stage(model, spec, layout, stages(model.layers, layout.pipeline)[0])
    allowed = first.total - first.weights
    if needed <= allowed:
        return None
    return Verdict(
        None,
        f"the comparison takes {size(needed)} of rank 0's GPU, and training only {size(allowed)} beside the weights",
    )


def compare(
    spec: DPOJobSpec,
    world: World,
    model: Any,
    source: Weights,
    pairs: PairTokens,
    count: int,
    backend: Backend,
    continued: AdapterMatrices | None = None,
) -> Verdict:
    """Compare the layout of ``model``, which ranks share, with one rank. A collective; the same verdict on all ranks.

    pairs: the training data, of ``count`` pairs. continued: the adapter that is trained on, if one is. Memory beside
    ``model``: the cut model with its fp32 gradients; on rank 0 it whole and, in bf16, once more in fp32.
    """
    began = time.monotonic()
    cut = _Cut(spec, world, _Short(pairs), min(PAIRS, count), unwrap(model).dpo_config, backend, continued)
    alone = cut.alone(source, spec.training.precision)
    in_layout = cut.in_layout(model, list(alone.gradients))
    if spec.training.precision == "fp32":
        return judge(in_layout, alone, None)
    if world.any(time.monotonic() - began > LIMIT_SECONDS / 2):
        return Verdict(None, f"the comparison would take more than {LIMIT_SECONDS:.0f} s")
    return judge(in_layout, alone, cut.alone(source, "fp32"))


@dataclass(frozen=True)
class Numbers:
    """What one side computed; equal on all ranks."""

    log_probs: Tensor
    """[pairs, 2] float64."""
    gradients: dict[str, Tensor]
    """Parameter → [1 + DIRECTIONS] float64: its norm, and its products with the directions."""


def judge(layout: Numbers, alone: Numbers, exact: Numbers | None) -> Verdict:
    """Return the verdict on a layout; ``exact``: one rank's numbers in fp32, if the run is in bf16."""
    worst_log_prob = _relative(layout.log_probs, alone.log_probs)
    allowed = TOLERANCE if exact is None else BF16_FACTOR * _relative(alone.log_probs, exact.log_probs)
    wrong = [] if worst_log_prob <= allowed else [f"log-probs differ by {worst_log_prob:.1e} of {allowed:.1e} allowed"]
    worst_gradient = 0.0
    for name, own in alone.gradients.items():
        found = _distance(layout.gradients[name], own)
        may = TOLERANCE if exact is None else BF16_FACTOR * _distance(own, exact.gradients[name])
        worst_gradient = max(worst_gradient, found)
        if not found <= may:  # NaN is wrong too
            wrong.append(f"the gradient of {name} differs by {found:.1e} of {may:.1e} allowed")
    if not wrong:
        return Verdict(True, "log-probs and gradients are those of one rank", worst_log_prob, worst_gradient)
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Verdict(False, f"{wrong[0]}{more}", worst_log_prob, worst_gradient)


def _relative(one: Tensor, other: Tensor) -> float:
    gap = (one - other).abs() / other.abs().clamp(min=1.0)
    return math.nan if bool(gap.isnan().any()) else float(gap.max())


def _distance(one: Tensor, other: Tensor) -> float:
    """√(mean (d·r)²) / |g| of two gradients, see the module's text; 0 if both are 0."""
    scale = float(other[0])
    gap = float((one[1:] - other[1:]).square().mean().sqrt())
    return gap / scale if scale > 0 else gap


class _Short:
    """Pairs cut to LONGEST tokens: the end of the prompt, the beginning of the responses."""

    def __init__(self, pairs: PairTokens) -> None:
        self._pairs = pairs

    def tokens(self, pair: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        prompt, chosen, rejected = self._pairs.tokens(pair)
        return prompt[-(LONGEST // 2) :], chosen[: LONGEST // 4], rejected[: LONGEST // 4]


@dataclass(frozen=True)
class _Cut:
    """The cut model and its data, built in the run's layout or on one rank."""

    spec: DPOJobSpec
    world: World
    pairs: PairTokens
    count: int
    config: ModelConfig
    backend: Backend
    continued: AdapterMatrices | None

    @property
    def layers(self) -> list[int]:
        """The model's layers that take part: the first of each stage; with one stage, the first two."""
        stages = self.spec.parallelism.pipeline
        if stages == 1:
            return list(range(cut_layers(self.config.num_layers, stages)))
        return [span[0] for span in layers_of_stages(self.config.num_layers, stages)]

    def in_layout(self, model: Any, names: Sequence[str]) -> Numbers:
        """Return the layout's numbers for the weights that ``model`` has. A collective; equal on all ranks."""
        small = self._build(self.spec.training.precision, in_layout=True)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        held = self._slots(stage)
        loaded = unwrap(model)
        with torch.no_grad():
            for slot in held:  # its layers are the first of the stage in both models, so the names agree
                target(unwrap(small), slot).copy_(loaded.get_parameter(slot.parameter))
        self._adapt(small)
        engine = Engine(small, self.spec, self.world)
        engine.prepare_gradients()
        mine = list(range(self.world.data_rank, self.count, self.world.data_size))
        numbers = self._numbers(engine, exported(held), mine, lambda parameter: parameter.main_grad)
        return self._from_owners(numbers, names)

    def alone(self, source: Weights, precision: Precision) -> Numbers:
        """Return one rank's numbers: rank 0 reads the weights from their files. A collective; equal on all ranks."""
        numbers = None
        with _one_rank_each():
            if self.world.is_main:
                small = self._build(precision, in_layout=False)
                held = self._slots(None)
                with torch.no_grad():
                    for slot in held:
                        target(unwrap(small), slot).copy_(assemble(slot, self.config, source.read, 0, 1))
                self._adapt(small)
                engine = Engine(small, self.spec, self.world)
                numbers = self._numbers(
                    engine, held, list(range(self.count)), lambda parameter: parameter.grad / self.count
                )
        message: dict[str, Any] = {}
        if numbers is not None:
            message["sums"] = numbers.log_probs[:, :2].tolist()
            message["gradients"] = {name: row.tolist() for name, row in numbers.gradients.items()}
        message = self.world.from_main(message)
        gradients = {name: _float64(row) for name, row in message["gradients"].items()}
        return Numbers(_float64(message["sums"]), gradients)

    def _build(self, precision: Precision, *, in_layout: bool) -> Any:
        return build_model(
            replace(self.config, num_layers=len(self.layers)),
            precision=precision,
            backend=self.backend,
            recomputation=self.spec.training.activation_recomputation if in_layout else "none",
            sequence_parallel=self.spec.parallelism.sequence and in_layout,
            deterministic=self.spec.training.deterministic,
        )

    def _slots(self, stage: int | None) -> list[Slot]:
        """Return the slots of a stage of the cut model, None: of all, with the names of the real layers' tensors."""
        stages = self.spec.parallelism.pipeline
        alone = stage is None or stages == 1
        layers = self.layers if alone else [self.layers[stage or 0]]
        return list(slots(self.config, layers, first=alone or stage == 0, last=alone or stage == stages - 1))

    def _adapt(self, small: Any) -> None:
        if self.spec.lora is not None:  # the dropout is compared elsewhere: here it would only add noise to bf16
            lora = self.spec.lora.model_copy(update={"layers": None, "dropout": 0.0})
            held = self.spec.lora.layers  # a layer without an adapter to continue gets that of another
            numbers = [layer if held is None or layer in held else held[0] for layer in self.layers]
            attach_lora(small, lora, seed=self.spec.training.seed, start=self.continued, numbers=numbers)

    def _numbers(
        self, engine: Engine, held: Sequence[Slot], mine: Sequence[int], gradient: Callable[[Any], Tensor]
    ) -> Numbers:
        """Run forward and backward over the pairs of this rank; return its own numbers, log-probs with their count."""
        sums = torch.zeros(self.count, 3, dtype=torch.float64)

        def consume(pack: Pack, found: Tensor, _counts: Tensor, **_tails: Tensor) -> tuple[Tensor, Tensor]:
            real = pack.pairs >= 0
            for pair, value in zip(pack.pairs.tolist(), found.detach().cpu(), strict=True):
                if pair >= 0:
                    sums[pair, :2] = value
                    sums[pair, 2] += 1
            return ((found[:, 0] - found[:, 1]) * real).sum(), real.sum().int()

        multiple = self.spec.parallelism.sequence_parts
        pack = make_pack(
            self.pairs,
            mine,
            share=self.spec.training.prefix_sharing,
            pad_to_multiple=multiple,
            with_rejected=self.spec.dpo.has_preference,
        )
        share = share_of(pack, self.world.context_rank, self.world.context_size, multiple)
        engine.accumulate_gradients([share], consume)
        whole = self._whole(engine.model, held, gradient)
        return Numbers(sums, {name: _products(name, value) for name, value in whole})

    def _whole(
        self, small: Any, held: Sequence[Slot], gradient: Callable[[Any], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients by name, one at a time. A collective over tensor-parallel ranks."""
        if self.spec.lora is None:
            yield from tensors_of(unwrap(small), held, lambda _name, parameter: gradient(parameter))
            return
        for adapter in adapters(small):
            for letter, matrix in zip("AB", adapter.matrices(gradient), strict=True):
                yield f"layer {adapter.place.layer}, {adapter.place.module}, {letter}", matrix

    def _from_owners(self, numbers: Numbers, names: Sequence[str]) -> Numbers:
        """Return the numbers of the ranks that have them; NaN where there is not exactly one."""
        sums = self.world.sum_of_owners(numbers.log_probs)
        table = torch.zeros(len(names), DIRECTIONS + 2, dtype=torch.float64)
        if self.world.data_rank == 0 and self.world.is_first_of_pack:
            for row, name in enumerate(names):
                if name in numbers.gradients:
                    table[row] = torch.cat((numbers.gradients[name], torch.ones(1)))
        table = self.world.sum_of_all(table)
        table = torch.where(table[:, -1:] == 1, table[:, :-1], torch.nan)
        return Numbers(
            torch.where(sums[:, 2:] == 1, sums[:, :2], torch.nan), dict(zip(names, table.unbind(), strict=True))
        )


def _products(name: str, gradient: Tensor) -> Tensor:
    """Return [1 + DIRECTIONS] float64: the norm of a gradient, [m] or [m, n], and its products with the directions.

    A direction is an outer product of two vectors of ±1, whose elements are uncorrelated, as the estimate needs.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    draw = np.random.default_rng(seed)
    flat = gradient.detach().float()
    flat = flat.unsqueeze(1) if flat.dim() == 1 else flat
    left, right = (
        torch.from_numpy(draw.choice([-1.0, 1.0], (DIRECTIONS, size)).astype(np.float32)).to(flat.device)
        for size in flat.shape
    )
    found = ((left @ flat).double() * right).sum(1)
    return torch.cat((flat.norm().double().view(1), found)).cpu()


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def _one_rank_each() -> Iterator[None]:
    """Within this context, Megatron-Core sees a layout of one rank a model. A collective."""
    names = [name for name in vars(parallel_state) if name.startswith("_") and name[1:].isupper()]
    saved = {name: getattr(parallel_state, name) for name in names}
    for name in names:
        setattr(parallel_state, name, None)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        for name, value in saved.items():
            setattr(parallel_state, name, value)
