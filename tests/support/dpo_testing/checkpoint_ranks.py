"""One of the processes that save a state in each layout and load it in each other one.

`python -m dpo_testing.checkpoint_ranks FOLDER`, with RANK, of as many processes as the largest layout has. FOLDER has
``plan.json`` (a list of `Case`, as JSON). A process leaves FOLDER/rank-N.json: what it found wrong, and the bytes that
it handed over and held while saving.

A state is a value for each Hugging Face tensor and each state of the optimizer, drawn from their names. It reaches the
ranks by `dpo_trainer.formats.layout`, which loads models, and which checkpoints do not use.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_trainer.engine import Engine

STEP = 7


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and the spec's parallelism."""

    processes: int
    parallelism: dict[str, Any]


LAYOUTS = {
    "one": Layout(1, {}),
    "one, plain": Layout(1, {"distributedOptimizer": False}),
    "TP2": Layout(2, {"tensor": 2}),
    "TP4 of 2 groups": Layout(4, {"tensor": 4}),
    "PP2": Layout(2, {"pipeline": 2}),
    "PP3 of 4 layers": Layout(3, {"pipeline": 3}),
    "TP2 PP2": Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "DP2, plain": Layout(2, {"distributedOptimizer": False}),
    "DP3": Layout(3, {}),
    "DP2 TP2": Layout(4, {"tensor": 2}),
    "DP2 PP2": Layout(4, {"pipeline": 2}),
    "CP2": Layout(2, {"context": 2}),
    "DP2 CP2": Layout(4, {"context": 2}),
}


@dataclass(frozen=True)
class Case:
    """A model folder, the rest of the spec, the layouts that save, and those that load."""

    name: str
    spec: dict[str, Any]
    saving: list[str] = field(default_factory=lambda: list(LAYOUTS))
    loading: list[str] = field(default_factory=lambda: list(LAYOUTS))
    format_1: bool = False  #: save as Megatron-Core did


def plan(folder: Path, cases: list[Case]) -> None:
    """Write the plan of the processes."""
    (folder / "plan.json").write_text(json.dumps([asdict(case) for case in cases]))


def drawn(state: str, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of one tensor in one state, with a -0 and a subnormal number in it."""
    import hashlib

    import torch

    key = hashlib.sha256(f"{seed}/{state}/{name}".encode()).digest()
    value = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7])))
    value.view(-1)[0], value.view(-1)[-1] = -0.0, 1e-41
    return value.abs() if state == "exp_avg_sq" else value


class Ranks:
    """What one process does in turn."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.wrong: list[str] = []
        self.handed_over: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.shares: dict[str, float] = {}

    def in_layout(self, case: Case, name: str, purpose: str, work: Callable[[Engine], None]) -> None:
        """Do something in a layout, if this process is one of it."""
        import torch.distributed as dist

        from dpo_testing.runs import job_of, merged
        from dpo_trainer.distributed import World
        from dpo_trainer.engine import Engine

        layout = LAYOUTS[name]
        if self.rank >= layout.processes:
            return
        spec = job_of(merged(case.spec, {"parallelism": layout.parallelism})).spec
        os.environ.update({"RANK": str(self.rank), "WORLD_SIZE": str(layout.processes), "LOCAL_RANK": str(self.rank)})
        store = self.folder / f"{purpose} {case.name} {name}"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=self.rank, world_size=layout.processes)
        sizes = spec.parallelism
        world = World.join(tensor=sizes.tensor, pipeline=sizes.pipeline, context=sizes.context)
        try:
            engine = Engine(_model(spec), spec, world)
            engine.prepare_training()
            work(engine)
            world.barrier()
        finally:
            world.leave()

    def save(self, case: Case, name: str) -> None:
        """Save the drawn state in a layout."""
        from dpo_testing.format_1 import save_format_1
        from dpo_trainer import torch_adam
        from dpo_trainer.checkpoint import store
        from dpo_trainer.checkpoint.saving import Saver
        from dpo_trainer.checkpoint.state import collect

        def work(engine: Engine) -> None:
            torch_adam.allocate(engine.optimizer, STEP)
            _fill(engine, seed=1)
            if case.format_1:
                save_format_1(engine, self.directory(case, name), STEP)
                return
            boxes = collect(engine.model, engine.optimizer)
            key = f"{case.name}: {name}"
            self.handed_over[key] = sum(box.values.nbytes for box in boxes)
            self.shares[key] = _share(engine)
            before = _held()
            with _at_the_last_box(lambda: self.held.update({key: _held() - before})):
                saver = Saver(self.directory(case, name), engine.world, background=True)
                saver.begin(boxes, store.Marker(step=STEP, attempt=1, identity={}))
                saver.wait_for_copy()
                saver.complete()

        self.in_layout(case, name, "save", work)

    def load(self, case: Case, name: str) -> None:
        """Load what each layout has saved, and compare it with the drawn state."""
        from dpo_trainer import torch_adam
        from dpo_trainer.checkpoint import store
        from dpo_trainer.checkpoint.state import restore

        def work(engine: Engine) -> None:
            for saved in case.saving:
                if case.saving == case.loading and saved == name and name != "DP3":
                    continue
                torch_adam.allocate(engine.optimizer, 1)
                _fill(engine, seed=2)
                directory = self.directory(case, saved)
                (found,) = directory.checkpoints()
                marker = store.read_marker(directory, found)
                restore(
                    engine.model,
                    engine.optimizer,
                    marker.step,
                    lambda boxes: store.load(directory, engine.world, boxes, found, marker.format),  # noqa: B023 - called at once
                )
                said = f"{case.name}: saved in {saved}, loaded in {name} on rank {self.rank}"
                self.wrong += [f"{said}: {what}" for what in _differences(engine)]
                steps = {
                    float(moments["step"])
                    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
                    if part.optimizer is not None
                    for moments in part.optimizer.state.values()
                }
                if steps - {float(STEP)}:
                    self.wrong.append(f"{said}: the steps are {steps}")

        self.in_layout(case, name, "load", work)

    def directory(self, case: Case, name: str) -> Any:
        """The run directory that a layout saves into."""
        from dpo_testing.models import local_store
        from dpo_trainer.rundir import RunDirectory

        return RunDirectory(local_store(), str(self.folder / "runs" / case.name / name), attempt=1)


def _model(spec: Any) -> Any:
    from dpo_testing.models import load_model
    from dpo_trainer.model.lora import attach_lora

    model = load_model(
        Path(spec.model.hugging_face.uri),
        precision=spec.training.precision,
        sequence_parallel=spec.parallelism.sequence,
    )
    if spec.lora is not None:
        attach_lora(model, spec.lora, seed=0)
    return model


def _tensors(engine: Engine, seed: int) -> Iterator[tuple[str, Tensor, Callable[[str], Tensor]]]:
    """(name, parameter, state → the value of this rank's part) of each trainable parameter."""
    from functools import partial

    from megatron.core import parallel_state

    from dpo_trainer.formats.huggingface import stage_slots
    from dpo_trainer.formats.layout import assemble, target
    from dpo_trainer.model.lora import adapters

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    config = engine.model.dpo_config

    def whole_weight(slot: Any, state: str) -> Tensor:
        shapes = dict(zip(slot.sources, slot.shapes, strict=True))

        def read(name: str, rows: tuple[int, int] | None) -> Tensor:
            value = drawn(state, name, shapes[name], seed)
            return value if rows is None else value[rows[0] : rows[1]]

        return assemble(slot, config, read, rank, size)

    def matrix(name: str, shape: tuple[int, ...], parameter: Tensor, gated: bool, state: str) -> Tensor:
        value = drawn(state, name, shape, seed)
        axis = next((axis for axis in (0, 1) if shape[axis] != parameter.shape[axis]), None)
        if axis is None:
            return value
        if gated:
            return _concatenated([half.chunk(size)[rank] for half in value.chunk(2)])
        part: Tensor = value.chunk(size, dim=axis)[rank]
        return part

    for slot in stage_slots(engine.model):
        parameter = target(engine.model, slot)
        if parameter.requires_grad:
            yield slot.parameter, parameter, partial(whole_weight, slot)
    for adapter in adapters(engine.model):
        shapes = [tuple(value.shape) for value in adapter.matrices()]
        parts = (("A", adapter.linear_in.weight), ("B", adapter.linear_out.weight))
        for (kind, parameter), shape in zip(parts, shapes, strict=True):
            name = f"layer {adapter.place.layer} {adapter.place.module} {kind}"
            gated = kind == "B" and adapter.place.module == "mlp_fc1"
            yield name, parameter, partial(matrix, name, shape, parameter, gated)


def _concatenated(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)


def _fill(engine: Engine, seed: int) -> None:
    import torch

    from dpo_trainer.checkpoint.state import held

    with torch.no_grad():
        for _, parameter, value in _tensors(engine, seed):
            parameter.copy_(value("master"))
            start, end, states = held(engine.optimizer, parameter)
            for state, values in states.items():
                values.copy_(value(state).reshape(-1)[start:end])


def _differences(engine: Engine) -> Iterator[str]:
    import torch

    from dpo_trainer.checkpoint.state import held

    for name, parameter, value in _tensors(engine, seed=1):
        if not torch.equal(parameter.detach(), value("master").to(parameter.dtype)):
            yield f"parameter {name}"
        start, end, states = held(engine.optimizer, parameter)
        for state, values in states.items():
            expected = value(state).reshape(-1)[start:end]
            if not torch.equal(values.view(torch.int32), expected.view(torch.int32)):
                yield f"{state} of {name}"


def _held() -> int:
    """Bytes of memory that this process's tensors take."""
    import torch

    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = sorted((s.data_ptr(), s.nbytes()) for s in (tensor.untyped_storage() for tensor in tensors))
    total = end = 0
    for start, size in storages:  # some are parts of others
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


@contextmanager
def _at_the_last_box(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` when torch's writer has written all boxes of a file but the last."""
    from dpo_trainer.checkpoint import files

    resolve = files._Source.resolve_data
    left: dict[files._Source, int] = {}

    def watched(source: files._Source, write_item: Any) -> Tensor:
        found = resolve(source, write_item)
        left[source] = left.get(source, len(source._places)) - 1
        if not left[source]:
            look()
        return found

    files._Source.resolve_data = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        files._Source.resolve_data = resolve  # type: ignore[method-assign]


def _share(engine: Engine) -> float:
    """The parameters of this stage, divided by the ranks that share them; what is not divided, and padding, added."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_world_size()
    ranks = tensor * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    total = alone = count = 0
    for _, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            divided = getattr(parameter, "tensor_model_parallel", False)
            total += parameter.numel() * (tensor if divided else 1)
            alone += 0 if divided else parameter.numel()
            count += 1
    alignment = 64 * count  # elements between the parameters of Megatron-Core's buffers
    return float(total / ranks + alone + alignment)


def _main(folder: Path) -> None:
    import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

    # isort: split
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cases = [Case(**given) for given in json.loads((folder / "plan.json").read_text())]
    mine = Ranks(folder, rank)
    for case in cases:
        for name in case.saving:
            mine.save(case, name)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'between'}", rank=rank, world_size=ranks)
    dist.barrier()
    dist.destroy_process_group()
    for case in cases:
        for name in case.loading:
            mine.load(case, name)
    found = {"wrong": mine.wrong, "handed over": mine.handed_over, "held": mine.held, "shares": mine.shares}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
