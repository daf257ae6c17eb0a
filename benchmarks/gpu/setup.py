"""Versions, what the machine can do at best, and what attention's first call of a new length costs."""

import platform
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation

from dpo_api.sizing import product_named
from dpo_trainer import bridge
from dpo_trainer.launch import allocator
from gpu.report import Report
from gpu.timing import seconds


def run(report: Report, small: bool) -> None:
    """Report them; nothing here can be wrong but the GPU itself."""
    report.add(python=platform.python_version(), **versions())
    place = bridge.device()
    gpu = place.type == "cuda"
    if gpu:
        facts = torch.cuda.get_device_properties(place)
        product = product_named(facts.name)
        report.add(
            gpu=facts.name,
            memory_gib=facts.total_memory / 2**30,
            capability=[facts.major, facts.minor],
            peak_tflops=product.tflops if product else None,
            cudnn=torch.backends.cudnn.version(),
            allocator=allocator({}),
        )
    ceilings(report, place, small)
    if gpu:
        try:
            plans(report, place)
        except RuntimeError as error:  # cuDNN's attention, which the trainer does not use
            report.add(plans=str(error)[:300])


def versions() -> dict[str, str | None]:
    """The versions of the libraries that compute."""
    found: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("megatron-core", "transformers", "triton", "transformer-engine"):
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return found


def ceilings(report: Report, place: torch.device, small: bool) -> None:
    """The best GEMM rate in bf16 and in fp32, and the rate of copies."""
    size = 256 if small else 8192
    rates: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
        product = a @ b
        took = seconds(lambda a=a, b=b: torch.mm(a, b), 3 if small else 10)  # type: ignore[misc]
        rates[f"gemm_{name}_tflops"] = 2 * size**3 / took / 1e12
        exact = a[:8].double() @ b.double()
        error = float((product[:8].double() - exact).abs().max() / exact.abs().max())
        report.within(f"the error of a {name} product", error, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    source = torch.empty(2**20 if small else 2**31, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), 3)
    report.add(**rates, copy_gb_per_s=2 * source.numel() / took / 1e9)


def plans(report: Report, place: torch.device) -> None:
    """First call minus second of 20 unlike lengths: with cuDNN's attention, and as the trainer has it."""
    found: dict[str, Any] = {}
    for name, enabled in (("with_cudnn", True), ("without_cudnn", False)):
        torch.backends.cuda.enable_cudnn_sdp(enabled=enabled)
        first = again = 0.0
        for number in range(20):
            length = 300 + 17 * number + (7 if enabled else 0)
            q = torch.randn(1, 32, length, 128, device=place, dtype=torch.bfloat16, requires_grad=True)

            def call(q: torch.Tensor = q) -> None:
                F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

            first += seconds(call)
            again += seconds(call)
        found[name] = 1000 * (first - again) / 20
    report.add(milliseconds_per_new_length=found)
