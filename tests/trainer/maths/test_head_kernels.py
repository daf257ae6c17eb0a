"""The LM head's kernels, which Triton's interpreter runs here, against torch's operations."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError

from dpo_api.sizing.head import ALIGNMENT, HeadChunks
from dpo_testing import vocab_parallel
from dpo_testing.gloo import run_ranks
from dpo_trainer import logprobs
from dpo_trainer.kernels import head
from dpo_trainer.kernels.usable import usable, why_not
from dpo_trainer.logprobs import _Shard, _slope, _softmax, response_log_probs

DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK", 64)


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute the softmax, and torch's operations cannot."""
    monkeypatch.setattr(logprobs, "computes", lambda _logits: True)
    monkeypatch.setattr(logprobs, "_exponentiate", None)
    monkeypatch.setattr(logprobs, "_subtract_mass", None)


def wide(values: Tensor) -> Tensor:
    """The same in rows that begin at multiples of ALIGNMENT values; what is between them is NaN."""
    columns = values.shape[1]
    whole = torch.full((values.shape[0], columns + -columns % ALIGNMENT), NAN, dtype=values.dtype)
    whole[:, :columns] = values
    return whole[:, :columns]


def both(logits: Tensor, labels: Tensor, shard: _Shard) -> Iterator[tuple[Tensor, ...]]:
    """(log-probs, peak, mass, the matrix, the matrix from peak and mass) by torch, and by the kernels."""
    for kernels in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logprobs, "computes", lambda _logits, found=kernels: found)
            matrix, again = wide(logits), wide(logits)
            log_probs, peak, mass = _softmax(matrix, labels, shard, slope=True)
            _slope(again, labels, shard, peak, mass)
            unchanged = wide(logits)
            for one, other in zip(
                _softmax(unchanged, labels, shard, slope=False), (log_probs, peak, mass), strict=True
            ):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
            assert not kernels or torch.equal(unchanged.nan_to_num(7.0), logits.nan_to_num(7.0))
            yield log_probs, peak, mass, matrix, again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 128, 200])
def test_rows_of_any_length(columns: int, dtype: torch.dtype) -> None:
    """The last row's label is in another rank's part: the mass is subtracted nowhere."""
    torch.manual_seed(columns)
    logits = (torch.randn(6, columns) * 4).to(dtype)
    labels = torch.tensor([0, columns - 1, columns // 2, 0, columns // 3, columns + 5]) + 1000
    plain, found = both(logits, labels, _Shard(first=1000, columns=columns, group=None))
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    for index, (mine, theirs) in enumerate(zip(found, plain, strict=True)):
        tolerance = 1e-6 if index < 3 else rounding
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert found[0].isnan().tolist() == [False] * 5 + [True]


def test_a_larger_logit_in_a_later_block() -> None:
    """The sum so far is scaled: e^-3 · 64 + 64."""
    logits = torch.cat((torch.full((1, 64), -3.0), torch.zeros(1, 64)), 1)
    peak, mass, target = head.statistics(logits, torch.tensor([5]))
    assert (peak.item(), target.item()) == (0.0, -3.0)
    assert mass.item() == pytest.approx(64 * (1 + 2.718281828459045**-3), rel=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, by which the interpreter computes
@pytest.mark.parametrize("place", [3, 70])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite(value: float, place: int) -> None:
    """NaN and inf give a log-probability that is NaN, so that the run stops; -inf is a probability of 0."""
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    logits[1, place] = value
    logits[2] = value
    plain, found = both(logits, torch.tensor([4, 4, 4]), _Shard(first=0, columns=100, group=None))
    assert found[0].isnan().tolist() == plain[0].isnan().tolist() == [False, value != -INF, True]
    # A row of -inf has the mass 0, and torch's NaN: log-probability and gradient are NaN either way.
    assert found[2][:2].isnan().tolist() == plain[2][:2].isnan().tolist()
    torch.testing.assert_close(found[3][0], plain[3][0])
    if value == -INF:
        torch.testing.assert_close(found[3][1], plain[3][1])
        assert found[3][1, place] == 0


def test_no_rows() -> None:
    nothing = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    assert [tuple(x.shape) for x in head.statistics(*nothing)] == [(0,)] * 3
    head.slope_in_place(*nothing, torch.empty(0), torch.empty(0))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    "chunks", [HeadChunks(17, 0), HeadChunks(0, 5), HeadChunks(6, 4)], ids=["kept", "computed again", "both"]
)
@pytest.mark.parametrize("vocabulary", [150, 149, 65])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_head(dtype: torch.dtype, frozen: bool, vocabulary: int, chunks: HeadChunks) -> None:
    rows, weight, labels, upstream = vocab_parallel.numbers(rows=17, hidden=8, vocabulary=150)
    rows, weight, labels = rows.to(dtype), weight.to(dtype), labels % vocabulary
    wanted = vocab_parallel.whole(rows, weight[:vocabulary], labels, upstream)
    rows.requires_grad_()
    weight.requires_grad_(not frozen)
    log_probs = response_log_probs(rows, weight, labels, chunks=chunks, vocabulary=vocabulary)
    gradients = torch.autograd.grad(log_probs, (rows,) if frozen else (rows, weight), upstream.float())
    rounding = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(log_probs.detach(), wanted[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, wanted[1:], strict=False):
        torch.testing.assert_close(
            mine[: len(theirs)], theirs, rtol=rounding, atol=rounding * float(theirs.abs().max())
        )


@pytest.mark.slow
def test_a_vocabulary_split_over_two_ranks() -> None:
    run_ranks(2, vocab_parallel.check_kernels)


def test_the_cpu_does_without() -> None:
    assert why_not(torch.device("cpu")) == "there is no GPU"
    assert not usable(torch.device("cpu"))


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), CompilationError("", None, "ptxas fails")])
def test_a_gpu_where_the_kernels_do_not_run_does_without(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found out once, and said."""

    def fail(*_: Tensor) -> None:
        raise error

    monkeypatch.setattr(head, "statistics", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, **_named: torch.empty(*size))
    monkeypatch.setattr("dpo_trainer.kernels.usable.why_not", why_not.__wrapped__)
    assert not usable.__wrapped__(torch.device("cuda", 0))
    assert "kernels are not used, so a step is slower: " in caplog.text
    assert str(error).split()[-1] in caplog.text
