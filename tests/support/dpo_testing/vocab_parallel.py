"""One rank's part of the test that a vocabulary split over ranks gives what one rank gives."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_api.sizing.head import HeadChunks
from dpo_trainer import logprobs
from dpo_trainer.logprobs import response_log_probs


def whole(rows: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, rows' gradient and weight's gradient by plain autograd: the peer of the tests."""
    rows, weight = rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    softmax_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    log_probs = (rows @ weight.t()).to(softmax_dtype).log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    rows_grad, weight_grad = torch.autograd.grad(log_probs, (rows, weight), upstream.to(log_probs.dtype))
    return log_probs.detach(), rows_grad, weight_grad


def numbers(rows: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [R, H], weight [V, H], labels [R], upstream gradient [R], the same in every process; logits' std ≈ 4.

    The rows' largest logits lie far apart between the vocabulary's parts: a maximum that is not shared shows.
    """
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    weight[vocabulary // 2 :] += 2.0
    features = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return features, weight, labels, torch.randn(rows, generator=generator, dtype=torch.float64)


def check_rank(rank: int) -> None:
    """Compare this rank's slice with the whole in several divisions and vocabularies; AssertionError at a difference.

    Of a vocabulary of 10 or less, the second rank's part is padding alone.
    """
    for chunks in (HeadChunks(0, 1), HeadChunks(0, 7), HeadChunks(13, 0), HeadChunks(5, 3)):
        for vocabulary in (20, 17, 10, 9):
            check_chunks(rank, chunks, vocabulary, frozen=False)
            check_chunks(rank, chunks, vocabulary, frozen=True)


def check_kernels(rank: int) -> None:
    """Do the same in fp32 with Triton's kernels, which their interpreter runs."""
    logprobs.computes = lambda _logits: True  # type: ignore[assignment, attr-defined]
    logprobs._exponentiate = logprobs._subtract_mass = None  # type: ignore[assignment]
    for vocabulary in (20, 17, 10, 9):
        for frozen in (False, True):
            check_chunks(rank, HeadChunks(5, 3), vocabulary, frozen=frozen, dtype=torch.float32)


def check_chunks(
    rank: int, chunks: HeadChunks, vocabulary: int, *, frozen: bool, dtype: torch.dtype = torch.float64
) -> None:
    """Compare this rank's slice with the whole for one division and one size of the vocabulary."""
    rows, weight, labels, upstream = (
        x if x.dtype == torch.int64 else x.to(dtype) for x in numbers(rows=13, hidden=6, vocabulary=20)
    )
    weight[:vocabulary] += torch.linspace(0, 40, vocabulary, dtype=dtype).unsqueeze(1)  # far apart
    labels %= vocabulary
    expected, expected_rows_grad, expected_weight_grad = whole(rows, weight[:vocabulary], labels, upstream)
    group = dist.group.WORLD
    assert group is not None
    size = weight.shape[0] // group.size()
    mine = slice(rank * size, (rank + 1) * size)
    features, part = rows.clone().requires_grad_(), weight[mine].clone().requires_grad_(not frozen)
    log_probs = response_log_probs(features, part, labels, chunks=chunks, tp_group=group, vocabulary=vocabulary)
    close = (
        partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        if dtype == torch.float32
        else torch.testing.assert_close
    )
    close(log_probs.detach(), expected)
    rows_grad, *weight_grad = torch.autograd.grad(log_probs, (features,) if frozen else (features, part), upstream)
    close(rows_grad, expected_rows_grad)
    padded = torch.zeros_like(weight)
    padded[:vocabulary] = expected_weight_grad
    close(weight_grad, [] if frozen else [padded[mine]])
