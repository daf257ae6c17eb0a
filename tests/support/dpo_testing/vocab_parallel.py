"""One rank's part of the test that a vocabulary split over ranks gives what one rank gives."""

import torch
import torch.distributed as dist
from torch import Tensor

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
    """Compare this rank's slice with the whole, chunked in three ways; AssertionError at a difference."""
    for chunk in (1, 7, 13):
        check_chunk(rank, chunk)


def check_chunk(rank: int, chunk: int) -> None:
    """Compare this rank's slice with the whole for one size of chunks."""
    rows, weight, labels, upstream = numbers(rows=13, hidden=6, vocabulary=20)
    expected, expected_rows_grad, expected_weight_grad = whole(rows, weight, labels, upstream)
    group = dist.group.WORLD
    assert group is not None
    size = weight.shape[0] // group.size()
    mine = slice(rank * size, (rank + 1) * size)
    features, part = rows.clone().requires_grad_(), weight[mine].clone().requires_grad_()
    log_probs = response_log_probs(features, part, labels, chunk=chunk, tp_group=group)
    torch.testing.assert_close(log_probs.detach(), expected)
    rows_grad, part_grad = torch.autograd.grad(log_probs, (features, part), upstream)
    torch.testing.assert_close(rows_grad, expected_rows_grad)
    torch.testing.assert_close(part_grad, expected_weight_grad[mine])
