"""What starting each process imports: nothing heavy that the process does not use, and the same functions as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_testing.corpora import llama_tokenizer
from dpo_testing.runs import PACKAGES, finish, merged, start
from dpo_testing.training_world import make
from dpo_trainer.startup import lazily_compiled

pytestmark = pytest.mark.slow

SINKS = {"wandb", "tensorboard", "torch.utils.tensorboard", "mlflow"}
STORAGE = {"boto3", "botocore"}
COMPILER = {"torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd"}
FOR_GPUS = {"triton", "sympy", "torch.fx.experimental.symbolic_shapes"}
TOKENIZERS = {"transformers", "tokenizers"}
ARITHMETIC = {"torch", "megatron", "numpy", "triton"}


def imported(code: str) -> set[str]:
    """Return the names of all modules that are loaded after this code has run in a new interpreter."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        env={**os.environ, "PYTHONPATH": PACKAGES, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
        capture_output=True,
        check=True,
        text=True,
    )
    return set(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("module", "used", "unused"),
    [
        ("dpo_trainer.worker", {"torch", "megatron.core"}, SINKS | STORAGE | COMPILER | TOKENIZERS | FOR_GPUS),
        ("dpo_trainer.launch", {"dpo_api.validation"}, SINKS | STORAGE | COMPILER | TOKENIZERS | ARITHMETIC),
        ("dpo_trainer.agent", {"dpo_trainer.results"}, SINKS | STORAGE | COMPILER | TOKENIZERS | ARITHMETIC),
        ("dpo_trainer.entry", set(), SINKS | STORAGE | COMPILER | TOKENIZERS | ARITHMETIC | {"pydantic"}),
        ("dpo_cli.app", set(), SINKS | STORAGE | COMPILER | TOKENIZERS | ARITHMETIC),
    ],
)
def test_a_process_imports_only_what_it_uses(module: str, used: set[str], unused: set[str]) -> None:
    found = imported(f"import {module}")
    assert used <= found
    assert not found & unused


def test_a_whole_run_needs_no_more(tmp_path: Path) -> None:
    spec = merged(make(tmp_path / "world", pairs=4), {"training": {"maxSteps": 1}})
    variables = {"PYTHONPROFILEIMPORTTIME": "1", "CUDA_VISIBLE_DEVICES": ""}
    scratch = tmp_path / "scratch"
    finish(start(spec, tmp_path / "run", processes=1, scratch=scratch, environment=variables, preloaded=False), scratch)
    lines = (scratch / "log").read_text().splitlines()
    found = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"megatron.core.tensor_parallel", "dpo_trainer.worker"} <= found
    # Of what is hidden, the attempts to import it are listed, too, but nothing that is in it.
    assert not found & (STORAGE | COMPILER | {"sympy", "torch.fx.experimental.symbolic_shapes", "triton.runtime"})


def test_a_tokenizer_is_loaded_without_what_models_of_transformers_need(tmp_path: Path) -> None:
    folder = llama_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = imported(
        "import pathlib, dpo_trainer.worker\nfrom dpo_trainer.data.tokens.tokenizer import load_tokenizer\n"
        f"load_tokenizer(pathlib.Path({str(folder)!r}))"
    )
    assert found >= {"transformers.models.auto.tokenization_auto"}
    assert not found & (COMPILER | STORAGE | SINKS | {"accelerate"})


@pytest.mark.nightly
def test_what_was_hidden_can_be_imported_afterwards() -> None:
    found = imported(
        "import torch; compile_ = torch.compile\n"
        "import dpo_trainer.worker\n"
        "assert torch.compile is compile_\n"
        "import torch.utils.tensorboard, triton, wandb\n"
        "from megatron.core.transformer.moe.ops.paged_stash import paged_stash_copy_kernel\n"
        "assert isinstance(paged_stash_copy_kernel, triton.JITFunction)\n"
        "from torch.distributed.tensor._collective_utils import guard_or_false\n"
        "assert guard_or_false(True) and not guard_or_false(a=False)"
    )
    assert {"wandb", "torch.utils.tensorboard", "triton"} <= found


def test_what_is_loaded_already_is_left_alone() -> None:
    found = imported("import wandb\nimport dpo_trainer.worker\nimport sys; assert sys.modules['wandb'] is wandb")
    assert "wandb" in found


def test_a_fused_function_is_compiled_at_its_first_call() -> None:
    """With ``torch.compile`` itself, once, and with the options that the decorator was given."""
    asked: list[dict[str, object]] = []

    def compile_(function: object, **options: object) -> object:
        asked.append(options)
        return torch.compile(function, backend="eager", **options)  # type: ignore[call-overload]

    lazily = lazily_compiled(compile_)

    @lazily
    def double(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        """Multiply."""
        return x * times

    @lazily(dynamic=True)
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    assert asked == []
    assert double.__doc__ == "Multiply."
    x = torch.arange(3.0)
    for _ in range(2):
        assert torch.equal(double(x, times=3), x * 3)
    assert asked == [{}]
    assert torch.equal(add(x, x), x * 2)
    assert asked == [{}, {"dynamic": True}]


def test_a_module_is_compiled_at_once() -> None:
    module = torch.nn.Linear(2, 2)
    assert lazily_compiled(lambda model, **_: (model, "compiled"))(module) == (module, "compiled")
