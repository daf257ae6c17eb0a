"""The linear layers' weight gradients are added to Megatron-Core's gradient buffer by the GEMM itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_testing.engines import tiny_engine
from dpo_testing.pairs import pack_of
from dpo_trainer.products import add_product

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", [False, True])
def test_a_product_is_added_in_fp32(dtype: torch.dtype, first: bool) -> None:
    torch.manual_seed(1)
    matrix, rows = torch.randn(37, 24).to(dtype), torch.randn(37, 16).to(dtype)
    total = torch.randn(24, 16)
    wanted = matrix.double().t() @ rows.double() + (0 if first else total.double())
    add_product(total, matrix, rows, first=first)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("tied", [False, True])
def test_the_buffer_gets_the_sum_of_all_packs_and_no_layer_makes_a_gradient_beside_it(tied: bool) -> None:
    """A tied weight's buffer has the LM head's part, and Megatron-Core adds the embedding's."""
    packs = [pack_of(0, 1), pack_of(2)]

    def consume(_pack: Any, sums: Tensor, _counts: Tensor) -> tuple[Tensor, Tensor]:
        return sums.sum(), torch.tensor(1, dtype=torch.int32)

    with tiny_engine(qkv_bias=True, tied=tied) as engine:
        model = engine.model
        engine.accumulate_gradients(packs, consume)
        wanted = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            wanted[name], parameter.grad = parameter.grad, None
        engine.prepare_training()
        for _ in range(2):  # the second step starts from zero
            engine._wrapped.zero_grad_buffer()
            engine.accumulate_gradients(packs, consume)
        for name, parameter in model.named_parameters():
            # Megatron-Core divides by the sum of the packs' denominators.
            torch.testing.assert_close(parameter.main_grad * len(packs), wanted[name], rtol=1e-5, atol=1e-5, msg=name)
            by_gemm = (
                "linear_qkv.weight",
                "linear_proj.weight",
                "linear_fc1.weight",
                "linear_fc2.weight",
                "output_layer.weight",
            )
            assert parameter.grad_added_to_main_grad is name.endswith(by_gemm), name
