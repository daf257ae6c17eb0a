"""One rank's part of the tests that run Megatron-Core in several CPU processes."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_api.learning import Lora
from dpo_testing.models import load_model, local_store, plain_pack, token_stream
from dpo_testing.pairs import pack_of
from dpo_trainer import bridge
from dpo_trainer.checkpoint import store
from dpo_trainer.checkpoint.state import collect, restore
from dpo_trainer.distributed import World
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import adapter_tensors
from dpo_trainer.logprobs import response_log_probs
from dpo_trainer.model.forward import head_weight, hidden_rows, logits
from dpo_trainer.model.lora import adapters, attach_lora, merged_value
from dpo_trainer.model.pack import Pack
from dpo_trainer.rundir import RunDirectory

Position = Literal["pre", "post"]
POSITIONS: tuple[Position, ...] = ("pre", "post")
LORA = Lora(rank=4, alpha=6.0, target_modules=("all",))


def join(tensor: int = 1, pipeline: int = 1) -> None:
    """Megatron-Core's groups over the process group that ``run_ranks`` made."""
    bridge.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)


class Trainee:
    """A model in Megatron-Core's data parallelism with its distributed optimizer: bf16 weights, fp32 masters."""

    def __init__(self, folder: Path) -> None:
        with bridge.construction():
            self.bare = load_model(folder, precision="bf16")
            config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self.model = DistributedDataParallel(self.bare.config, config, self.bare)
            settings = OptimizerConfig(
                optimizer="adam", lr=1e-3, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
            )  # fmt: skip
            self.optimizer: Any = get_megatron_optimizer(settings, [self.model], use_gloo_process_groups=False)

    def step(self, rank: int, number: int) -> float:
        """One update on this rank's own tokens; the gradient's norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        pack = plain_pack([token_stream(20, seed=10 * number + rank)])
        rows = hidden_rows(self.model, pack)
        torch.autograd.backward(-response_log_probs(rows, head_weight(self.model), pack.labels).mean())
        self.model.finish_grad_sync()
        done, norm, _ = self.optimizer.step()
        assert done
        return float(norm)

    def save(self, world: World, run: RunDirectory, step: int) -> None:
        """Save weights and optimizer."""
        marker = store.Marker(step=step, attempt=1, identity={})
        store.save(run, world, collect(self.bare, self.optimizer), marker)

    def restore(self, world: World, run: RunDirectory) -> None:
        """Load what ``save`` saved."""
        (saved,) = run.checkpoints()
        restore(
            self.bare,
            self.optimizer,
            saved.step,
            lambda boxes: store.load(run, world, boxes, saved, store.FORMAT),
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy of every parameter."""
        return {name: p.detach().clone() for name, p in self.bare.named_parameters()}


def check_training(rank: int, folder: Path, checkpoints: Path) -> None:
    """Three steps; saved after the second, a fresh process state resumes to the same third."""
    join()
    first = Trainee(folder)
    start = first.weights()
    norms = [first.step(rank, number) for number in (1, 2)]
    assert all(norm > 0.1 for norm in norms)
    world = World(rank, torch.distributed.get_world_size(), rank, torch.device("cpu"))
    run = RunDirectory(local_store(), str(checkpoints), attempt=1)
    first.save(world, run, 2)
    first.step(rank, 3)
    second = Trainee(folder)
    second.restore(world, run)
    steps = [
        moments["step"] for part in second.optimizer.chained_optimizers for moments in part.optimizer.state.values()
    ]
    assert len({step.data_ptr() for step in steps}) == len(steps) > 1, (
        "parameters share one step and would each raise it"
    )
    assert {float(step) for step in steps} == {2.0}
    second.step(rank, 3)
    ours, again = first.weights(), second.weights()
    for name, weight in ours.items():
        assert torch.equal(weight, again[name]), name
    assert any(not torch.equal(weight, start[name]) for name, weight in ours.items())
    gathered = [
        torch.empty_like(ours["decoder.final_layernorm.weight"])
        for _ in range(parallel_state.get_data_parallel_world_size())
    ]
    torch.distributed.all_gather(gathered, ours["decoder.final_layernorm.weight"])
    assert all(torch.equal(gathered[0], other) for other in gathered)


def randomise_adapters(model: Any) -> None:
    """Give B values that do not depend on how it is split: each whole row's from its own index."""
    with torch.no_grad():
        for adapter in adapters(model):
            a, b = adapter.matrices()
            adapter.linear_in.weight.mul_(3.0)
            whole = (
                torch.randn(b.shape, generator=torch.Generator().manual_seed(a.shape[1] + adapter.place.layer)) * 0.2
            )
            size = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            if adapter.place.module == "mlp_fc1":
                gate, up = whole.chunk(2)
                mine = torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
            else:
                mine = whole.chunk(size)[rank]
            adapter.linear_out.weight.copy_(mine)


def gradients(model: Any, pack: Pack | None = None, dropout_seed: int | None = None) -> dict[str, Tensor]:
    """Whole gradients of the adapters' matrices for a fixed loss, by PEFT's names."""
    pack = pack or plain_pack([token_stream(25, seed=4)])
    group = parallel_state.get_tensor_model_parallel_group()
    size = parallel_state.get_tensor_model_parallel_world_size()
    rows = hidden_rows(model, pack, dropout_seed)
    log_probs = response_log_probs(rows, head_weight(model), pack.labels, tp_group=group if size > 1 else None)
    torch.autograd.backward(log_probs.sum())
    with torch.no_grad():
        for adapter in adapters(model):
            for matrix in (adapter.linear_in, adapter.linear_out):
                assert matrix.weight.grad is not None
                matrix.weight.copy_(matrix.weight.grad)
    return adapter_tensors(model)


def dropout_gradients(folder: Path, position: Position, *, sequence_parallel: bool) -> dict[str, Tensor]:
    """Whole gradients of adapters with dropout, over a pack of pairs that share their prompts."""
    model = load_model(folder, sequence_parallel=sequence_parallel)
    lora = Lora(rank=4, dropout=0.3, dropout_position=position, target_modules=("all",))
    attach_lora(model, lora, seed=3)
    randomise_adapters(model)
    return gradients(model.train(), pack_of(0, 1, 2), dropout_seed=5)


def check_dropout(rank: int, folder: Path, out: Path) -> None:
    """Save the gradients of two tensor-parallel ranks, for each position, without and with sequence parallelism."""
    join(tensor=2)
    for position in POSITIONS:
        for name, sequence_parallel in ((position, False), (f"{position}-sequence", True)):
            found = dropout_gradients(folder, position, sequence_parallel=sequence_parallel)
            if rank == 0:
                save_file(found, out / f"{name}.safetensors")


def check_tensor_parallel(rank: int, size: int, folders: list[Path], expected: Path, out: Path) -> None:
    """Logits, exported weights, adapters and their gradients with the model split over ``size`` ranks."""
    join(tensor=size)
    for folder in folders:
        name = folder.name
        with torch.no_grad():
            model = load_model(folder)
            part = logits(model, plain_pack([token_stream(25, seed=4)]))
            parts = [torch.empty_like(part) for _ in range(size)]
            torch.distributed.all_gather(parts, part.contiguous())
            whole = load_file(expected)[name]
            assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5, name
            export(model, local_store(), str(folder), out / name)
        attach_lora(model, LORA, seed=3)
        randomise_adapters(model)
        with torch.no_grad():
            export(model, local_store(), str(folder), out / f"{name}-merged", value_of=merged_value(model))
        found = gradients(model)
        if rank == 0:
            save_file(found, out / f"{name}-gradients.safetensors")
