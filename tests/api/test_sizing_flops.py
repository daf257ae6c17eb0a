"""FLOPs of a step and their share of the peak, against rows computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpo_api.models import ModelFacts
from dpo_api.sizing import Work, product_named, seen_keys, step_flops, utilization
from dpo_api.sizing.flops import forward_flops
from dpo_testing.sizes import LLAMA_8B, sized

# Two layers of 32 (q, k, v) + 16 (output) + 72 (gate, up, down) = 120 parameters.
TINY = ModelFacts(2, 2, 1, 4, 6, 10, 64, "llama")
WORK = Work(tokens=5, rows=3, seen=30)
# Layers 2*2*120*5 = 2400, LM head 2*10*4*3 = 240, attention 4*4*30 = 480.
FORWARD = 3120


def test_a_forward_pass() -> None:
    assert forward_flops(TINY, WORK) == FORWARD


def test_an_mlp_without_a_gate_and_its_adapter() -> None:
    """Two layers of 32 + 16 + 48 (up, down); adapters of 2 x (4 + 6) a layer."""
    model = replace(TINY, gated=False)
    assert forward_flops(model, WORK) == FORWARD - 2 * 2 * 24 * 5
    lora = sized(lora={"rank": 2, "targetModules": ["mlp_fc1"]}).lora
    assert step_flops(model, WORK, lora) == 2 * (2400 - 480) + 2 * 240 + 3 * 480 + 6 * 2 * 20 * 5


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (None, 3 * FORWARD),
        # The layers and the LM head twice, attention three times; adapters of 2*(4 + 8) = 24: 6*2*24*5.
        ({}, 2 * 2400 + 2 * 240 + 3 * 480 + 1440),
        # Layer 0 is below the adapters and has no backward pass: 1.5 times, 2 times; adapters: 6*24*5.
        ({"layers": [1]}, 1.5 * 2400 + 2 * 240 + 2 * 480 + 720),
        # An A for each of q, k and v: 2*(3*4 + 8) = 40.
        ({"continueAdapter": True}, 2 * 2400 + 2 * 240 + 3 * 480 + 2400),
    ],
)
def test_a_step(lora: dict[str, Any] | None, expected: float) -> None:
    changes = {} if lora is None else {"lora": {"rank": 2, "targetModules": ["attention_qkv"], **lora}}
    changes["model.adapter"] = {"uri": "/sft"}
    assert step_flops(TINY, WORK, sized(**changes).lora) == expected


def test_a_token_of_llama_8b_takes_six_times_its_parameters() -> None:
    """218,103,808 parameters in each of 32 layers, and 128,256 x 4,096 in the LM head."""
    assert step_flops(LLAMA_8B, Work(1, 0, 0), None) == 6 * 32 * 218_103_808
    assert step_flops(LLAMA_8B, Work(0, 1, 0), None) == 6 * 128_256 * 4096


@pytest.mark.parametrize(
    ("length", "before", "window", "expected"),
    [
        (3, 0, None, 1 + 2 + 3),
        (3, 2, None, 3 + 4 + 5),
        (3, 0, 2, 1 + 2 + 2),
        (3, 2, 4, 3 + 4 + 4),
        (3, 9, 4, 4 + 4 + 4),
        (0, 5, None, 0),
    ],
)
def test_what_a_query_sees(length: int, before: int, window: int | None, expected: int) -> None:
    assert seen_keys(length, before, window) == expected


def test_the_share_of_the_peak() -> None:
    """An H100 has 989 TFLOP/s in bf16: eight of them, 3,956e12 FLOPs in a second."""
    h100 = product_named("NVIDIA H100 80GB HBM3")
    assert utilization(sized(), 3956e12, 1.0, 8, h100) == pytest.approx(0.5)
    assert utilization(sized(), 3956e12, 2.0, 8, h100) == pytest.approx(0.25)


def test_a_share_of_an_unknown_peak_is_not_computed() -> None:
    assert utilization(sized(), 1e12, 1.0, 1, None) is None
    assert utilization(sized(**{"training.precision": "fp32"}), 1e12, 1.0, 1, product_named("h100")) is None
