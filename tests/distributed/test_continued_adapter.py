"""A run that trains the adapter of its start model on: it starts as the sum of both, and leaves as one PEFT adapter."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from dpo_testing.adapters import logits, write_adapter
from dpo_testing.runs import Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_testing.trajectories import checkpoints_in, differences
from dpo_trainer.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("continued-adapter")]

TARGETS = r".*layers\.(0\.self_attn\.[qv]_proj|1\.self_attn\.k_proj|1\.mlp\.(gate|down)_proj)"
"""Other projections in each layer, and none in some of the fused layers."""
CHANGES = {
    "lora": {"continueAdapter": True},
    "training": {"maxSteps": 5, "learningRate": 5e-3},
    "checkpoint": {"everySteps": 2, "keep": 3},
}


@pytest.fixture(scope="module")
def sft(world: Path) -> Path:
    """The adapter's folder; the model, the data and the merged model are beside it."""
    make(world, pairs=13, validation=3)
    return write_adapter(world / "model", world / "sft", r=4, target_modules=TARGETS)


@pytest.fixture(scope="module")
def spec(sft: Path, world: Path) -> dict[str, Any]:
    base = make(world / "data", pairs=13, validation=3)
    source = {"huggingFace": {"uri": str(world / "model")}, "adapter": {"uri": str(sft)}}
    return merged(base, {**CHANGES, "model": source})


@pytest.fixture(scope="module")
def whole(spec: dict[str, Any], world: Path) -> Finished:
    """The run in one process, undisturbed."""
    return run_here(spec, world / "whole")


def test_it_starts_as_the_merged_model(spec: dict[str, Any], whole: Finished, sft: Path, tmp_path: Path) -> None:
    """The reference log-probs, the first loss and the first validation are those of the model that PEFT merges."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def look(run: Run) -> None:
            assert run.training is not None
            table = run.training.inputs.train.reference
            assert table is not None
            found[name] = torch.as_tensor(table.sums).clone()

        return look

    plain = {"model": {"huggingFace": {"uri": str(sft / "merged")}, "adapter": None}, "lora": None}
    one = {"training": {"maxSteps": 1}}
    spec = merged(spec, {"reference": {"cacheURI": str(tmp_path / "reference")}})
    ours = run_here(merged(spec, one), tmp_path / "ours", keep("ours"))
    other = run_here(merged(merged(spec, one), plain), tmp_path / "merged", keep("merged"))
    base = {"model": {"adapter": None}, "lora": None}
    run_here(merged(merged(spec, one), base), tmp_path / "base", keep("base"))
    assert found["ours"].isfinite().sum() == 2 * 8, "the pairs of the one step"
    torch.testing.assert_close(found["ours"], found["merged"], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (found["ours"] - found["base"]).nan_to_num().abs().max() > 0.1, "the adapter does something"
    for run in (ours, other, whole):
        assert run.series("train/preference_loss")[0] == pytest.approx(0.6931472, abs=1e-6)
        assert run.series("train/rewards_chosen_mean")[0] == pytest.approx(0.0, abs=1e-6)
        assert run.series("train/rewards_margin")[0] == pytest.approx(0.0, abs=1e-6)


def test_it_leaves_as_an_adapter_of_the_original_model(whole: Finished, sft: Path, world: Path) -> None:
    """With the rank and the places that it had; PEFT computes the trained model with it."""
    folder = whole.folder / "model" / "adapter"
    before, after = (load_file(path / "adapter_model.safetensors") for path in (sft, folder))
    assert {name: value.shape for name, value in before.items()} == {n: value.shape for n, value in after.items()}
    assert all((before[name] - value).abs().max() > 1e-3 for name, value in after.items()), "each matrix has learnt"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 5, TARGETS)
    assert config["base_model_name_or_path"] == str(world / "model")
    trained = logits(whole.folder / "model")
    assert (trained - logits(sft / "merged")).abs().max() > 1e-3
    torch.testing.assert_close(logits(world / "model", folder), trained, rtol=1e-5, atol=1e-5)
    assert "| lora.rank | 4 |" in (folder / "README.md").read_text()


def log_prob(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Σ log π of a response, one sequence by itself through transformers; fp64."""
    ids = torch.tensor([prompt + response])
    rows = log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double(), -1)
    return rows.gather(1, ids[0, len(prompt) :, None]).sum()


def test_it_ends_where_peft_would(spec: dict[str, Any], sft: Path, world: Path, tmp_path: Path) -> None:
    """Four steps over all pairs, clipped and with weight decay: PEFT's adapter and torch's AdamW, by DPO's formula."""
    training = {"globalBatchSize": 13, "maxSteps": 4, "gradientClip": 0.5, "weightDecay": 0.5, "eps": 1e-4}
    pairs: list[list[list[int]]] = []

    def look(run: Run) -> None:
        assert run.training is not None
        index = run.training.inputs.train.index
        pairs.extend([part.tolist() for part in index.tokens(pair)] for pair in range(index.n))

    found = run_here(merged(spec, {"training": training, "dpo": {"beta": 0.3}}), tmp_path / "run", look)
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, sft, is_trainable=True).eval()
    matrices = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(matrices.values(), betas=(0.9, 0.98), eps=1e-4, weight_decay=0.5)
    start: list[torch.Tensor] = []
    norms = []
    for step, rate in enumerate(found.series("train/lr")):
        ratios = torch.stack([log_prob(model, x, good) - log_prob(model, x, bad) for x, good, bad in pairs])
        start = start or [ratios.detach()]
        loss = -logsigmoid(0.3 * (ratios - start[0])).mean()
        assert found.series("train/preference_loss")[step] == pytest.approx(loss.item(), rel=1e-5)
        adam.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(matrices.values(), 0.5).item())
        assert found.series("train/grad_norm")[step] == pytest.approx(norms[-1], rel=1e-4)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    assert min(norms) > 0.5, "the clip has done something"
    ours = load_file(found.folder / "model/adapter/adapter_model.safetensors")
    assert ours.keys() == matrices.keys()
    for name, matrix in matrices.items():
        torch.testing.assert_close(ours[name], matrix.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_one_trajectory_in_every_layout(
    sizes: dict[str, Any], spec: dict[str, Any], whole: Finished, tmp_path: Path
) -> None:
    divided = merged(spec, {"parallelism": sizes})
    found = run_processes(divided, tmp_path / "run", processes=2, scratch=tmp_path / "scratch")
    assert differences(whole, found) == []
    ours, expected = (load_file(run.folder / "model/adapter/adapter_model.safetensors") for run in (found, whole))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_an_adapter_on_the_last_layer_alone(sizes: dict[str, Any], tmp_path: Path) -> None:
    """The layers in which the layout is compared have none; of two stages, only one trains."""
    spec = merged(make(tmp_path, pairs=13, validation=3, num_hidden_layers=3), CHANGES)
    sft = write_adapter(tmp_path / "model", tmp_path / "sft", r=2, layers_to_transform=[2])
    spec = merged(spec, {"model": {"adapter": {"uri": str(sft)}}, "lora": {"dropout": 0.1}})
    one = run_here(spec, tmp_path / "one")
    divided = merged(spec, {"parallelism": sizes})
    two = run_processes(divided, tmp_path / "two", processes=2, scratch=tmp_path / "scratch")
    assert differences(one, two) == []
    if "tensor" in sizes:  # where no gradient was compared, the difference would be 0
        verdict = re.search(r"layout verified: .* gradients (\S+)\)", (tmp_path / "scratch" / "log").read_text())
        assert verdict is not None
        assert float(verdict[1]) > 0
    adapter = two.folder / "model" / "adapter"
    torch.testing.assert_close(logits(tmp_path / "model", adapter), logits(two.folder / "model"), rtol=1e-5, atol=1e-5)


def test_a_resumed_run_keeps_its_reference(spec: dict[str, Any], whole: Finished, tmp_path: Path) -> None:
    """Even if the cache is lost: the reference is the adapter as given, not as trained so far."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    assert checkpoints_in(folder) == [2, 4, 5]
    for step in (4, 5):
        shutil.rmtree(folder / f"checkpoints/step-{step:06d}")
    shutil.rmtree(folder / "model")
    (folder / "export.json").unlink()
    elsewhere = merged(spec, {"reference": {"cacheURI": str(tmp_path / "empty")}})
    assert differences(whole, run_here(elsewhere, folder)) == []


def test_the_masters_of_bf16_start_from_the_adapter_s_own_values(
    spec: dict[str, Any], sft: Path, tmp_path: Path
) -> None:
    """At a rate of almost 0 the result has the bits of what came in; the reference is what bf16 computes with it.

    A run of the merged weights rounds elsewhere. It comes first, and its cached reference must not be used.
    """
    settings = {"precision": "bf16", "learningRate": 1e-30, "weightDecay": 0.0, "maxSteps": 1}
    run_here(merged(spec, {"training": settings, "lora": None}), tmp_path / "merged")
    found = run_here(merged(spec, {"training": settings}), tmp_path / "bf16")
    given = load_file(sft / "adapter_model.safetensors")
    written = load_file(found.folder / "model/adapter/adapter_model.safetensors")
    assert all(torch.equal(given[name], written[name]) for name in given)
    assert found.series("train/rewards_margin")[0] == pytest.approx(0.0, abs=1e-6)
