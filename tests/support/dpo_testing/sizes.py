"""Models and jobs for tests of the memory model and of the choice of a layout."""

from __future__ import annotations

from typing import Any

from dpo_api.models import ModelFacts
from dpo_api.sizing import Hardware, product_named
from dpo_api.spec import DPOJobSpec
from dpo_testing.manifests import spec

LLAMA_1B = ModelFacts(16, 32, 8, 2048, 8192, 128_256, 131_072, "llama", head_dim=64, tied_embeddings=True)
LLAMA_8B = ModelFacts(32, 32, 8, 4096, 14_336, 128_256, 8192, "llama")
LLAMA_70B = ModelFacts(80, 64, 8, 8192, 28_672, 128_256, 8192, "llama")
LLAMA_405B = ModelFacts(126, 128, 8, 16_384, 53_248, 128_256, 131_072, "llama")
MISTRAL_7B = ModelFacts(32, 32, 8, 4096, 14_336, 32_000, 32_768, "mistral")
QWEN_05B = ModelFacts(24, 14, 2, 896, 4864, 151_936, 32_768, "qwen2", head_dim=64, tied_embeddings=True, qkv_bias=True)
QWEN_32B = ModelFacts(64, 64, 8, 5120, 25_600, 151_936, 40_960, "qwen3", head_dim=128, qk_norm=True)
QWEN_72B = ModelFacts(80, 64, 8, 8192, 29_568, 152_064, 131_072, "qwen2", qkv_bias=True)

MODELS = {
    "Llama 3.2 1B": LLAMA_1B,
    "Mistral 7B": MISTRAL_7B,
    "Llama 3 8B": LLAMA_8B,
    "Qwen3 32B": QWEN_32B,
    "Llama 3 70B": LLAMA_70B,
    "Qwen2.5 72B": QWEN_72B,
    "Llama 3.1 405B": LLAMA_405B,
}


def sized(**changes: Any) -> DPOJobSpec:
    """Return the smallest valid spec with changes, whose keys are paths in the spec."""
    return spec(changes)


def gpus(product: str, per_node: int = 8, nodes: int = 1, *, known: bool = True) -> Hardware:
    """Return GPUs of a product."""
    found = product_named(product)
    assert found is not None
    return Hardware(nodes, per_node, found, known)
