"""What each rank of a tensor-parallel pair does in the tests of the layout check."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core
from dpo_api.errors import DPOError
from dpo_api.models import read_config
from dpo_store import open_store
from dpo_testing.models import token_stream
from dpo_testing.runs import job_of
from dpo_trainer import run
from dpo_trainer.distributed import World
from dpo_trainer.formats.huggingface import Checkpoint, load_weights
from dpo_trainer.layout_check import Verdict, compare
from dpo_trainer.model.build import Precision, build_model
from dpo_trainer.stopping import StopRequest

PAIRS = 5


class Pairs:
    """Random pairs of unlike lengths; one is longer than what the check uses."""

    def tokens(self, pair: int) -> tuple[Any, Any, Any]:
        sizes = (400, 300, 200) if pair == 1 else (9 + pair, 5, 3 + pair)
        prompt, chosen, rejected = (
            token_stream(size, seed=3 * pair + part).numpy().astype("int32") for part, size in enumerate(sizes)
        )
        return prompt, chosen, rejected


def swap_gate_and_up(model: Any) -> None:
    """Cut the first layer's fused matrix in the wrong order."""
    weight = model.get_parameter("decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = weight.detach().clone().chunk(2)
    with torch.no_grad():
        weight.copy_(torch.cat((up, gate)))


def check(rank: int, folder: str, results: str) -> None:
    """Write what the check says: in fp32, in bf16, and in fp32 after the wrong cut on the last rank alone."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    world = World.join(tensor=2)
    said = [str(_verdict(world, folder, "fp32")), str(_verdict(world, folder, "bf16"))]
    said.append(str(_verdict(world, folder, "fp32", harm=rank == 1)))
    Path(results, str(rank)).write_text("\n".join(said))


def _verdict(world: World, folder: str, precision: Precision, *, harm: bool = False) -> Verdict:
    spec = job_of(
        {
            "model": {"huggingFace": {"uri": folder}},
            "data": {"train": [{"uri": "unused.jsonl"}]},
            "parallelism": {"tensor": 2},
            "training": {"precision": precision},
        }
    ).spec
    store = open_store()
    model = build_model(read_config(store, folder), precision=precision)
    source = Checkpoint.open(store, folder)
    load_weights(model, store, folder, checkpoint=source)
    if harm:
        swap_gate_and_up(model)
    return compare(spec, world, model, source, Pairs(), PAIRS, "auto")


def run_wrongly(rank: int, spec: dict[str, Any], out: str, results: str) -> None:
    """Train with a weight that the last rank alone cuts wrongly; write the outcome of the error and its message."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    world = World.join(tensor=2)

    def load_wrongly(model: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load_weights(model, *args, **kwargs)
        if rank == 1:
            swap_gate_and_up(model)
        return loaded

    with patch.object(run, "load_weights", load_wrongly):
        try:
            run.Run(job_of(spec), world, StopRequest(), run.RunOptions(run_dir=out)).execute()
        except DPOError as error:
            Path(results, str(rank)).write_text(f"{error.outcome.value}\n{error}")
