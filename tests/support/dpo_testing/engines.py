"""An engine with a tiny model, in this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo_api.models import ModelConfig
from dpo_testing.models import VOCABULARY
from dpo_testing.runs import job_of
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.model.build import Precision, build_model
from dpo_trainer.model.lora import attach_lora


@contextmanager
def tiny_engine(
    *,
    qkv_bias: bool = False,
    tied: bool = False,
    precision: Precision = "fp32",
    lora: bool = False,
    **built: Any,
) -> Iterator[Engine]:
    """An engine that is not yet prepared for training; two layers of random weights. built: for ``build_model``."""
    data, training = {"train": [{"uri": "d"}]}, {"precision": precision}
    sections: dict[str, Any] = {"model": {"huggingFace": {"uri": "m"}}, "data": data, "training": training}
    if lora:
        sections["lora"] = {"rank": 4, "targetModules": ["all"]}
    spec = job_of(sections).spec
    config = ModelConfig(
        "llama", VOCABULARY, 32, 48, num_layers=2, num_attention_heads=4, num_query_groups=2, head_dim=8,
        qkv_bias=qkv_bias, tied_embeddings=tied,
    )  # fmt: skip
    world = World.join()
    try:
        model = build_model(config, precision=precision, **built)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
        if spec.lora is not None:
            attach_lora(model, spec.lora, seed=1)
        yield Engine(model, spec, world)
    finally:
        world.leave()
