"""Chunked log-probabilities against plain autograd: values, gradients, memory, and what may listen to the weight."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dpo_testing import vocab_parallel
from dpo_testing.gloo import run_ranks
from dpo_trainer.logprobs import CHUNK_BYTES, default_chunk, response_log_probs, sums_by_owner

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "logprob_memory.py"


def ours(
    rows: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight = rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    log_probs = response_log_probs(rows, weight, labels, chunk=chunk)
    rows_grad, weight_grad = torch.autograd.grad(log_probs, (rows, weight), upstream.to(log_probs.dtype))
    return log_probs.detach(), rows_grad, weight_grad


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 64, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_plain_autograd(dtype: torch.dtype, chunk: int | None) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=17, hidden=8, vocabulary=40)
    rows, weight = rows.to(dtype), weight.to(dtype)
    got, wanted = ours(rows, weight, labels, upstream, chunk), vocab_parallel.whole(rows, weight, labels, upstream)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == got[2].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_gradcheck() -> None:
    rows, weight, labels, _ = vocab_parallel.numbers(rows=5, hidden=3, vocabulary=7)
    rows.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: response_log_probs(r, w, labels, chunk=2), (rows, weight))


def test_large_logits_do_not_overflow() -> None:
    rows = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    got, rows_grad, weight_grad = ours(rows, weight, torch.tensor([0, 0]), torch.ones(2), chunk=1)
    assert got.tolist() == [0.0, -2e4]
    assert bool(rows_grad.isfinite().all())
    assert bool(weight_grad.isfinite().all())


@pytest.mark.slow
def test_vocabulary_split_over_two_ranks() -> None:
    run_ranks(2, vocab_parallel.check_rank)


def test_frozen_weight_and_frozen_rows() -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=9, hidden=4, vocabulary=12)
    _, rows_grad, weight_grad = vocab_parallel.whole(rows, weight, labels, upstream)
    features = rows.clone().requires_grad_()
    response_log_probs(features, weight, labels, chunk=4).backward(upstream)
    torch.testing.assert_close(features.grad, rows_grad)
    head = weight.clone().requires_grad_()
    response_log_probs(rows, head, labels, chunk=4).backward(upstream)
    torch.testing.assert_close(head.grad, weight_grad)
    assert not response_log_probs(rows, weight, labels).requires_grad
    with torch.no_grad():
        assert not response_log_probs(features, head, labels).requires_grad


def test_weight_gradient_is_summed_in_fp32() -> None:
    """600 chunks that each add the same small number: a bf16 sum stops growing at 256 times it."""
    rows = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    labels = torch.zeros(600, dtype=torch.int64)
    _, _, weight_grad = ours(rows, weight, labels, torch.ones(600), chunk=1)
    assert weight_grad.flatten().tolist() == [300.0, -300.0]


def test_tied_weight_gives_its_hooks_one_ordinary_gradient() -> None:
    """As Megatron-Core's DDP: a hook on the parameter's accumulator moves ``grad`` into an fp32 ``main_grad``."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(12, 4).to(torch.bfloat16))
    main_grad, calls = torch.zeros(12, 4), []
    accumulator = table.expand_as(table).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def collect(*_: Any) -> None:
        assert table.grad is not None
        calls.append(table.grad.dtype)
        main_grad.add_(table.grad.float())
        table.grad = None

    accumulator.register_hook(collect)  # type: ignore[union-attr]
    tokens, labels = torch.tensor([3, 1, 7, 1]), torch.tensor([1, 7, 1, 0])
    for chunk in (2, 3):
        response_log_probs(torch.tanh(table[tokens]), table, labels, chunk=chunk).sum().backward()
    assert calls == [torch.bfloat16] * 2
    double = table.detach().double().requires_grad_()
    peer = (torch.tanh(double[tokens]) @ double.t()).log_softmax(-1).gather(1, labels.unsqueeze(1)).sum()
    (expected,) = torch.autograd.grad(2 * peer, double)
    torch.testing.assert_close(main_grad.double(), expected, rtol=5e-2, atol=5e-2)


def test_no_rows() -> None:
    rows, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    result = response_log_probs(rows, weight, torch.zeros(0, dtype=torch.int64))
    assert result.shape == (0,)
    result.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("label", [-1, 4])
def test_label_outside_the_vocabulary(label: int) -> None:
    with pytest.raises(IndexError, match=rf"{label}.*from 0 to 3"):
        response_log_probs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([label]))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"rows \[1, 2\], weight \[4, 3\]"):
        response_log_probs(torch.zeros(1, 2), torch.zeros(4, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="bfloat16"):
        response_log_probs(torch.zeros(1, 2), torch.zeros(4, 2, dtype=torch.bfloat16), torch.tensor([0]))
    with pytest.raises(ValueError, match="chunk is 0"):
        response_log_probs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0]), chunk=0)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 10), (1024, 128_256), (131, 128_256), (5000, 32_000), (3, 2**30)])
def test_default_chunk_keeps_its_bound_and_is_even(rows: int, vocabulary: int) -> None:
    chunk = default_chunk(rows, vocabulary)
    assert 1 <= chunk <= rows
    assert chunk == 1 or 4 * chunk * vocabulary <= CHUNK_BYTES
    chunks = math.ceil(rows / chunk)
    assert chunk * chunks - rows < chunks, "the last chunk is shorter by less than one row a chunk"
    if chunk > 1:
        assert chunks == math.ceil(rows / (CHUNK_BYTES // (4 * vocabulary))), "no more chunks than the bound asks for"


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_no_tensor_holds_all_rows_by_all_words() -> None:
    rows, weight = torch.randn(96, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    labels = torch.randint(0, 1000, (96,))
    with Largest() as largest:
        response_log_probs(rows, weight, labels, chunk=8).sum().backward()
    assert largest.elements == 8 * 1000
    with Largest() as naive:
        (rows @ weight.t()).log_softmax(-1).gather(1, labels.unsqueeze(1)).sum().backward()
    assert naive.elements == 96 * 1000, "the measure itself sees the whole matrix when there is one"


@pytest.mark.slow
@pytest.mark.nightly  # the elements of the largest tensor are counted above
def test_peak_memory_is_under_a_third_of_the_naive_form() -> None:
    flags = ["--vocabulary=32000", "--hidden=64", "--rows=1024"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    out = subprocess.run([sys.executable, str(BENCHMARK), *flags], check=True, capture_output=True, text=True, env=env)
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["memory_ratio"] > 3, out.stdout


def test_sums_by_owner() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    sums, counts = sums_by_owner(log_probs, torch.tensor([2, 0, 2, 3, 2]), 5)
    assert sums.tolist() == [-2.0, 0.0, -21.0, -8.0, 0.0]
    assert sums.dtype == torch.float64
    assert counts.tolist() == [1, 0, 3, 1, 0]
    assert counts.dtype == torch.int64
    (gradient,) = torch.autograd.grad(sums, log_probs, torch.tensor([10.0, 20, 30, 40, 50], dtype=torch.float64))
    assert gradient.tolist() == [30.0, 10.0, 30.0, 40.0, 30.0]
    with pytest.raises((IndexError, RuntimeError)):
        sums_by_owner(log_probs, torch.tensor([0, 1, 2, 3, 5]), 5)
