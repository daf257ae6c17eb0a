"""How fast the trainer is, beside what the machine could do: three models, repeated and new lengths.

Packs are those of a run: 8,192 tokens, prompts shared, lengths like those of chat preferences. FLOPs are counted by
dpo_api.sizing, each once; the reference's pass is timed by itself.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpo_api.models import ModelConfig
from dpo_api.sizing import product_named
from dpo_trainer.distributed import World
from dpo_trainer.model.build import use_transformer_engine
from dpo_trainer.reference import ReferenceTable
from gpu.parity import no_fp8
from gpu.report import Report
from gpu.timing import seconds, synchronize
from gpu.world import Trained, alone, conversation_lengths, llama, spec_of

LORA = {"lora": {"rank": 16, "alpha": 32, "targetModules": ["all"]}}


@dataclass(frozen=True)
class Case:
    """One model, and how it is trained."""

    name: str
    config: ModelConfig
    sections: dict[str, Any]
    packs: int = 2
    """Packs of a step, about."""
    transformer_engine: bool = False


def eight_billion(layers: int) -> ModelConfig:
    """Llama 3 8B's shapes, with some or all of its 32 layers."""
    return llama(4096, 14336, layers, 32, 8, 128_256)


ONE_BILLION = llama(2048, 8192, 16, 32, 8, 128_256, head_dim=64, tie_word_embeddings=True)
"""Llama 3.2 1B's shapes."""


def cases(small: bool) -> list[Case]:
    """What is measured, the most telling first."""
    if small:
        tiny = llama(64, 128, 2, 4, 2, 500)
        return [Case("tiny, full", tiny, {}, packs=1), Case("tiny, LoRA", tiny, LORA, packs=1)]
    found = [
        Case("1B, full", ONE_BILLION, {}, packs=4),
        Case("8B, LoRA", eight_billion(32), LORA),
        Case("8 of 32 layers of 8B, full", eight_billion(8), {}),
    ]
    if use_transformer_engine("auto", "bf16"):
        found.append(Case("1B, full, Transformer Engine", ONE_BILLION, {}, packs=4, transformer_engine=True))
    if no_fp8() is None:
        eight = {"transformerEngine": {"fp8": "hybrid"}}
        found.append(Case("1B, full, FP8", ONE_BILLION, eight, packs=4, transformer_engine=True))
    return found


def run(report: Report, small: bool) -> None:
    """Measure each case; what is measured is reported at once."""
    results: dict[str, Any] = {}
    with alone() as world:
        gemm = gemm_rate(world.device, small)
        report.add(gemm_bf16_tflops=gemm / 1e12)
        for case in cases(small):
            try:
                results[case.name] = measure(case, world, gemm, small)
            except torch.OutOfMemoryError as error:  # the other cases may fit
                results[case.name] = {"out_of_memory": str(error)[:300]}
            report.add(cases=results)
            finite = results[case.name].get("finite", True)
            report.require(finite, f"{case.name}: a loss or a gradient's norm is not finite")
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


def gemm_rate(place: torch.device, small: bool) -> float:
    """FLOP/s of a large bf16 product here and now."""
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), 5)


def measure(case: Case, world: World, gemm: float, small: bool) -> dict[str, Any]:
    """One case's figures."""
    most = 256 if small else 8192
    training = {"precision": "bf16", "packing": {"maxTokens": most}}
    sections = {**case.sections, "data": {"train": [{"uri": "data"}], "maxLength": most // 2}, "training": training}
    each = 3 if small else 11 * case.packs  # a pair has about 700 tokens
    lengths = conversation_lengths(6 * each, 1, 40 if small else 1024)
    gpu = world.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    backend = "transformer_engine" if case.transformer_engine else "local"
    trained = Trained.of(case.config, spec_of(**sections), world, lengths, exact=False, backend=backend)
    batches = [range(each * number, each * (number + 1)) for number in range(6)]
    table = ReferenceTable.empty(len(lengths))
    reference = [seconds(lambda b=batch: _fill(table, trained, b)) for batch in batches]  # type: ignore[misc]
    trained.engine.prepare_training()
    values = [trained.step(batches[0], table)]  # the first step allocates the optimizer's state
    repeated = [seconds(lambda: values.append(trained.step(batches[0], table))) for _ in range(2 if small else 3)]
    flops, tokens = trained.engine.flops, _tokens(trained, batches[0])
    fresh: list[tuple[float, float]] = []
    for batch in batches[1:4]:
        took = seconds(lambda b=batch: values.append(trained.step(b, table)))  # type: ignore[misc]
        fresh.append((took, trained.engine.flops))
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    best, new = min(repeated), min(took / work for took, work in fresh)
    product = product_named(torch.cuda.get_device_name()) if gpu else None
    found = {
        "pairs_per_second": each / best,
        "pairs_per_second_with_reference": each / (best + min(reference[0], reference[-1])),
        "tokens_per_second": tokens / best,
        "mfu": flops / best / product.tflops / 1e12 if product else None,
        "share_of_gemm": flops / best / gemm,
        "share_of_gemm_with_new_lengths": 1 / new / gemm,
        "first_reference_pass_seconds": reference[0],
        "peak_gib": peak,
        "predicted_gib": trained.predicted_bytes() / 2**30,
        "finite": all(_is_finite(value["loss"]) and _is_finite(value["grad_norm"]) for value in values),
    }
    if gpu:
        found |= {"syncs_of_a_step": syncs(lambda: trained.step(batches[4], table))}
    found |= profile(lambda: trained.step(batches[5][: max(1, each // case.packs)], table), gpu)
    return found


def _fill(table: ReferenceTable, trained: Trained, batch: range) -> None:
    table.sums[torch.as_tensor(batch)] = trained.reference(batch)


def _tokens(trained: Trained, batch: range) -> int:
    return sum(pack.used for pack in trained.packs(batch))


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def syncs(step: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in a step, as torch counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def profile(step: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """Kernels started by a step of one pack, and the twelve that take the most time. On a CPU, operations."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU] if gpu else [kinds.CPU]) as seen:
        step()
        synchronize()
    rows = seen.key_averages()
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    kernels = [row for row in rows if getattr(row, name) > 0 and (not gpu or row.device_type.name == "CUDA")]
    kernels.sort(key=lambda row: getattr(row, name), reverse=True)
    launches = sum(row.count for row in rows if "LaunchKernel" in row.key) if gpu else None
    top = [[row.key[:70], row.count, round(getattr(row, name) / 1000, 3)] for row in kernels[:12]]
    return {"launches_of_a_pack": launches, "top_kernels_ms": top}
