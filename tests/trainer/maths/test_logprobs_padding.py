"""Memory that nobody has written never reaches a result of the LM head."""

from collections.abc import Iterator

import pytest
import torch

from dpo_trainer.logprobs import response_log_probs


@pytest.fixture
def _new_tensors_are_nan() -> Iterator[None]:
    """torch fills each new tensor with NaN, as deterministic runs may ask for."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # a property
    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("_new_tensors_are_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [131, 384, 500])
@pytest.mark.parametrize("count", [1, 80, 160])
def test_columns_beyond_the_vocabulary_are_not_used(count: int, vocabulary: int, dtype: torch.dtype) -> None:
    """A matrix of 131 or 500 columns has room for 136 or 504. bf16 GEMMs of CPUs with AMX read the rest."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 64, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (count,), generator=draw)
    found = response_log_probs(rows, weight, labels)
    for tensor in (found, *torch.autograd.grad(found.sum(), (rows, weight))):
        assert bool(torch.isfinite(tensor).all())
