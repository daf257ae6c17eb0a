"""Transformer Engine's layers: the arguments that they get, and what a run computes with them, also in FP8.

The library needs a GPU. A substitute has the signatures of its published versions (dpo_testing.transformer_engine).
"""

import json
import os
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import torch

from dpo_api.errors import InvalidSpecError
from dpo_api.plan import make_plan
from dpo_testing.runs import ROOT, job_of
from dpo_testing.transformer_engine import FUSED, GOLDEN, VERSIONS, rounded, signature
from dpo_trainer import bridge
from dpo_trainer.batches import Packer
from dpo_trainer.model import build
from dpo_trainer.model.build import FP8_CAPABILITY, refuse_fp8
from dpo_trainer.selfcheck import OLDEST_ENGINE

FP8_LOG_PROBS, FP8_LOSSES = 5e-2, 2e-2
"""docs/training.md states the first, relative to fp32; the second is absolute, of a few steps."""


@pytest.fixture(scope="module", params=VERSIONS)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a run with this version's signatures printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", "dpo_testing.transformer_engine_run", request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_oldest_version_that_is_supported_is_held() -> None:
    oldest = min(tuple(map(int, version.split("."))) for version in VERSIONS)[:2]
    assert oldest == OLDEST_ENGINE
    (extra,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert ">={}.{},".format(*oldest) in extra


@pytest.mark.slow
def test_every_call_fits_its_signature(result: dict[str, Any]) -> None:
    """The run has bound each call. These were made."""
    ends = (
        "Linear.__init__",
        "Linear.forward",
        "FusedAdam.__init__",
        "fp8_autocast",
        "Float8CurrentScaling",
        "checkpoint",
    )
    for end in ends:
        assert any(name.endswith(f".{end}") for name in result["calls"]), end
    assert FUSED in result["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["", ", LoRA", ", bf16"])
def test_its_layers_give_the_numbers_of_ours(result: dict[str, Any], case: str) -> None:
    ours = result["cases"][f"local{case}"]
    its = result["cases"]["bf16" if case == ", bf16" else f"transformer engine{case}"]
    bound = 2e-3 if case == ", bf16" else 1e-5
    for name, values in ours.items():
        assert its[name] == pytest.approx(values, rel=bound), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hybrid", "e4m3", "hybrid, LoRA"])
def test_fp8_stays_within_its_bounds(result: dict[str, Any], case: str) -> None:
    exact = result["cases"]["local, LoRA" if "LoRA" in case else "local"]
    found = result["cases"][case]
    assert found["log_probs"] == pytest.approx(exact["log_probs"], rel=FP8_LOG_PROBS)
    assert found["losses"] == pytest.approx(exact["losses"], abs=FP8_LOSSES)
    assert found["norms"] == pytest.approx(exact["norms"], rel=FP8_LOG_PROBS)
    assert found["log_probs"] != pytest.approx(result["cases"]["bf16"]["log_probs"], rel=1e-4), "it is not FP8 at all"


@pytest.mark.slow
def test_recomputation_does_not_change_fp8(result: dict[str, Any]) -> None:
    kept = result["cases"]["hybrid"]
    for recomputation in ("selective", "full"):
        assert result["cases"][f"hybrid, {recomputation}"] == kept


def test_an_argument_that_a_version_does_not_know_is_an_error() -> None:
    words = signature(
        json.loads((GOLDEN / "2.9.0.json").read_text()), "transformer_engine.common.recipe.Float8CurrentScaling"
    )
    words.bind(fp8_format=1, fp8_dpa=False)
    with pytest.raises(TypeError, match="backward_override"):
        words.bind(backward_override=None)


def test_fp8_rounds_to_three_bits_after_scaling() -> None:
    """1/7 · 448 = 64, and 0.3/7 · 448 = 19.2 between 18 and 20."""
    assert rounded(torch.tensor([7.0, 1.0, 0.3]), torch.float8_e4m3fn).tolist() == pytest.approx([7.0, 1.0, 20 / 64])


@pytest.mark.parametrize(
    ("capability", "engine", "backend", "says"),
    [
        (None, True, "auto", "there is no GPU"),
        ((8, 0), True, "auto", "NVIDIA A100 has compute capability 8.0, and FP8 needs 8.9 or later"),
        ((9, 0), False, "auto", "Transformer Engine is not installed"),
        ((9, 0), True, "local", "Transformer Engine is not used"),
        (FP8_CAPABILITY, True, "auto", None),
    ],
)
def test_fp8_is_refused_where_it_cannot_be_computed(
    capability: tuple[int, int] | None, engine: bool, backend: Any, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "needed", lambda: capability is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(build, "use_transformer_engine", lambda asked, _precision: engine and asked != "local")
    refuse_fp8(None, backend)
    if says is None:
        refuse_fp8("hybrid", backend)
        return
    with pytest.raises(InvalidSpecError, match=rf"spec.transformerEngine.fp8 is hybrid, but {says}; leave it out"):
        refuse_fp8("hybrid", backend)


@pytest.mark.parametrize(
    ("fp8", "tensor", "multiple"), [(None, 1, 1), (None, 2, 2), ("hybrid", 1, 16), ("e4m3", 2, 32)]
)
def test_packs_have_a_length_that_fp8_can_multiply(fp8: str | None, tensor: int, multiple: int) -> None:
    """Each part of the sequence, where tensor parallelism divides it too."""
    spec = job_of(
        {
            "model": {"huggingFace": {"uri": "m"}},
            "data": {"train": [{"uri": "d"}]},
            "parallelism": {"tensor": tensor, "sequence": tensor > 1},
            "transformerEngine": {"fp8": fp8} if fp8 else {},
        }
    ).spec
    assert Packer.of(spec, make_plan(spec, 64), torch.device("cuda")).pad_to_multiple == multiple
