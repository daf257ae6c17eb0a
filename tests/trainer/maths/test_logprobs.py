"""The LM head's log-probabilities against plain autograd: values, gradients, GEMMs, memory, hooks on the weight."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dpo_api.sizing.head import HeadChunks, head_bytes, head_chunks
from dpo_testing import vocab_parallel
from dpo_testing.gloo import run_ranks
from dpo_trainer.logprobs import _Shard, _softmax, response_log_probs, sums_by_owner

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "logprob_memory.py"


def again(size: int) -> HeadChunks:
    """Chunks of which none is kept."""
    return HeadChunks(kept=0, size=size)


def ours(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor,
    chunks: HeadChunks | None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight = rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    log_probs = response_log_probs(rows, weight, labels, chunks=chunks, vocabulary=vocabulary)
    rows_grad, weight_grad = torch.autograd.grad(log_probs, (rows, weight), upstream.to(log_probs.dtype))
    return log_probs.detach(), rows_grad, weight_grad


DIVISIONS = [*map(again, (1, 5, 16, 17, 64)), HeadChunks(17, 0), HeadChunks(64, 0), HeadChunks(6, 4), HeadChunks(16, 1)]


@pytest.mark.parametrize("chunks", [*DIVISIONS, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_plain_autograd(dtype: torch.dtype, chunks: HeadChunks | None) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=17, hidden=8, vocabulary=40)
    rows, weight = rows.to(dtype), weight.to(dtype)
    got, wanted = ours(rows, weight, labels, upstream, chunks), vocab_parallel.whole(rows, weight, labels, upstream)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == got[2].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_what_is_kept_and_what_is_recomputed_are_equal(dtype: torch.dtype, tolerance: float) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=17, hidden=8, vocabulary=40)
    numbers = rows.to(dtype), weight.to(dtype), labels, upstream
    wanted = ours(*numbers, HeadChunks(kept=17, size=0))
    for chunks in DIVISIONS:
        for mine, theirs in zip(ours(*numbers, chunks), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("chunks", [HeadChunks(5, 0), HeadChunks(2, 2), again(2)], ids=str)
def test_gradcheck(chunks: HeadChunks) -> None:
    rows, weight, labels, _ = vocab_parallel.numbers(rows=5, hidden=3, vocabulary=7)
    rows.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: response_log_probs(r, w, labels, chunks=chunks), (rows, weight))


@pytest.mark.parametrize("chunks", [HeadChunks(2, 0), again(1)], ids=str)
def test_large_logits_do_not_overflow(chunks: HeadChunks) -> None:
    rows = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    got, rows_grad, weight_grad = ours(rows, weight, torch.tensor([0, 0]), torch.ones(2), chunks)
    assert got.tolist() == [0.0, -2e4]
    assert bool(rows_grad.isfinite().all())
    assert bool(weight_grad.isfinite().all())


@pytest.mark.parametrize("chunks", [HeadChunks(1, 0), again(1)], ids=str)
def test_a_label_that_is_nearly_certain_has_a_gradient_in_bf16(chunks: HeadChunks) -> None:
    """p = 0.99909: in bf16 it is 1, and so is the mass."""
    rows, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    _, rows_grad, weight_grad = ours(rows, weight, torch.tensor([0]), torch.ones(1), chunks)
    other = 1 / (1 + math.exp(7))
    assert rows_grad.item() == pytest.approx(7 * other, rel=1e-2)
    assert weight_grad.flatten().tolist() == pytest.approx([other, -other], rel=1e-2)


def test_a_label_that_no_rank_holds_gives_nan() -> None:
    """On an accelerator, which does not look at the labels before."""
    found, _, _ = _softmax(torch.randn(2, 8), torch.tensor([3, 4]), _Shard(first=0, columns=4, group=None), slope=False)
    assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("chunks", [HeadChunks(17, 0), HeadChunks(6, 4), again(5)], ids=str)
@pytest.mark.parametrize("vocabulary", [40, 39, 33])
def test_padding_of_the_vocabulary_takes_no_part(vocabulary: int, chunks: HeadChunks) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=17, hidden=8, vocabulary=40)
    labels %= vocabulary
    got = ours(rows, weight, labels, upstream, chunks, vocabulary)
    wanted = vocab_parallel.whole(rows, weight[:vocabulary], labels, upstream)
    torch.testing.assert_close(got[:2], wanted[:2])
    torch.testing.assert_close(got[2][:vocabulary], wanted[2])
    assert not got[2][vocabulary:].any()


@pytest.mark.slow
def test_vocabulary_split_over_two_ranks() -> None:
    run_ranks(2, vocab_parallel.check_rank)


def test_frozen_weight_and_frozen_rows() -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=9, hidden=4, vocabulary=12)
    _, rows_grad, weight_grad = vocab_parallel.whole(rows, weight, labels, upstream)
    features = rows.clone().requires_grad_()
    response_log_probs(features, weight, labels, chunks=again(4)).backward(upstream)
    torch.testing.assert_close(features.grad, rows_grad)
    head = weight.clone().requires_grad_()
    response_log_probs(rows, head, labels, chunks=again(4)).backward(upstream)
    torch.testing.assert_close(head.grad, weight_grad)
    head.grad = None
    response_log_probs(rows, head, labels, chunks=HeadChunks(5, 2)).backward(upstream)
    torch.testing.assert_close(head.grad, weight_grad)
    assert not response_log_probs(rows, weight, labels).requires_grad
    with torch.no_grad():
        assert not response_log_probs(features, head, labels).requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_gives_the_same(frozen: bool) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=9, hidden=4, vocabulary=12)
    leaves = [rows.requires_grad_()] if frozen else [rows.requires_grad_(), weight.requires_grad_()]
    log_probs = response_log_probs(rows, weight, labels, chunks=HeadChunks(5, 2))
    first = torch.autograd.grad(log_probs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(log_probs, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weight_gradient_is_summed_in_fp32() -> None:
    """600 chunks that each add the same small number: a bf16 sum stops growing at 256 times it."""
    rows = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    labels = torch.zeros(600, dtype=torch.int64)
    _, _, weight_grad = ours(rows, weight, labels, torch.ones(600), again(1))
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
    for chunks in (again(2), again(3), HeadChunks(4, 0), HeadChunks(2, 1)):
        response_log_probs(torch.tanh(table[tokens]), table, labels, chunks=chunks).sum().backward()
    assert calls == [torch.bfloat16] * 4
    double = table.detach().double().requires_grad_()
    peer = (torch.tanh(double[tokens]) @ double.t()).log_softmax(-1).gather(1, labels.unsqueeze(1)).sum()
    (expected,) = torch.autograd.grad(4 * peer, double)
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
    with pytest.raises(ValueError, match="a chunk has 0 rows"):
        response_log_probs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0]), chunks=again(0))


class Watch(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, and the FLOPs of all GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        if "mm" in func.__name__:
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


def test_no_tensor_holds_all_rows_by_all_words() -> None:
    rows, weight = torch.randn(96, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    labels = torch.randint(0, 1000, (96,))
    with Watch() as largest:
        response_log_probs(rows, weight, labels, chunks=again(8)).sum().backward()
    assert largest.elements == 8 * 1000
    with Watch() as naive:
        (rows @ weight.t()).log_softmax(-1).gather(1, labels.unsqueeze(1)).sum().backward()
    assert naive.elements == 96 * 1000, "the measure itself sees the whole matrix when there is one"


@pytest.mark.parametrize(
    ("chunks", "frozen", "products"),
    [
        (HeadChunks(24, 0), False, 3.0),  # logits, and the gradients of rows and of the head
        (HeadChunks(12, 6), False, 3.5),  # the logits of the half that is not kept, again
        (again(8), False, 4.0),
        (again(8), True, 2.0),
        (None, False, 3.0),
    ],
    ids=str,
)
def test_only_what_is_not_kept_costs_a_second_gemm(chunks: HeadChunks | None, frozen: bool, products: float) -> None:
    rows, weight = torch.randn(24, 4, requires_grad=True), torch.randn(56, 4, requires_grad=not frozen)
    labels = torch.randint(0, 56, (24,))
    with Watch() as watch:
        response_log_probs(rows, weight, labels, chunks=chunks).sum().backward()
    assert watch.flops == products * 2 * 24 * 4 * 56
    with Watch() as alone, torch.no_grad():
        response_log_probs(rows, weight, labels, chunks=chunks)
    assert alone.flops == 2 * 24 * 4 * 56


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """Yield the list of what autograd saves for backward."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fitting", [1, 7, 8, 23, 24, 100])
def test_what_is_saved_for_backward_keeps_the_budget(fitting: int, dtype: torch.dtype) -> None:
    """Saved of 24 rows, of which 1 to 100 fit: one matrix of whole rows, the inputs, and two numbers for each row.

    Each row of the matrix begins at a multiple of 8 values.
    """
    rows, weight = torch.randn(24, 4).to(dtype).requires_grad_(), torch.randn(53, 4).to(dtype).requires_grad_()
    budget = fitting * 56 * rows.element_size()
    chunks = head_chunks(24, 53, rows.element_size(), budget, keep=True)
    assert head_bytes(chunks, 53, rows.element_size()) <= budget
    with saving() as saved:
        response_log_probs(rows, weight, torch.randint(0, 53, (24,)), chunks=chunks).sum().backward()
    matrices = [x for x in saved if x.dim() == 2 and x.shape[1] == 53]
    assert {x.stride() for x in matrices} <= {(56, 1)}
    assert sum(x.untyped_storage().nbytes() for x in matrices) == chunks.kept * 56 * rows.element_size() <= budget
    others = [x for x in saved if x.dim() == 1 and x.dtype.is_floating_point]
    assert [tuple(x.shape) for x in others] == [(24,)] * 2
    assert len(saved) == len(matrices) + len(others) + 3


def test_a_frozen_head_saves_no_matrix() -> None:
    rows, weight = torch.randn(24, 4, requires_grad=True), torch.randn(56, 4)
    with saving() as saved:
        response_log_probs(rows, weight, torch.randint(0, 56, (24,)))
    assert sorted(tuple(x.shape) for x in saved) == [(24,), (24, 4)]


@pytest.mark.slow
@pytest.mark.nightly  # the elements of the largest tensor are counted above
def test_peak_memory_is_under_a_third_of_the_naive_form() -> None:
    flags = ["--vocabulary=32000", "--hidden=64", "--rows=1024", "--budget=32"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    out = subprocess.run([sys.executable, str(BENCHMARK), *flags], check=True, capture_output=True, text=True, env=env)
    result = json.loads(out.stdout.splitlines()[-1])
    assert result[0]["memory_ratio"] > 3, out.stdout


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
