"""A pack on its way to a GPU: one copy, every tensor in its place; and a step that reads nothing back for each pack."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dpo_testing.engines import tiny_engine
from dpo_testing.pairs import pack_of
from dpo_trainer.engine import Engine
from dpo_trainer.logprobs import response_log_probs
from dpo_trainer.model import attend
from dpo_trainer.model.context import share_of
from dpo_trainer.model.pack import Pack
from dpo_trainer.model.transfer import ALIGNMENT, loaded, sent_at_once
from dpo_trainer.reference import ReferenceTable

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_tensors_of_one_copy_keep_shape_dtype_and_values() -> None:
    tensors = [
        torch.arange(5),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.randn(3, 2, dtype=torch.float64),
        torch.tensor([[True, False]]),
        torch.arange(12).view(3, 4).t(),  # not contiguous
        torch.tensor(7.0),
    ]
    sent = sent_at_once(tensors, CPU)
    for got, expected in zip(sent, tensors, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
        assert got.data_ptr() % ALIGNMENT == sent[0].data_ptr() % ALIGNMENT
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_tensor_of_a_pack_arrives_in_its_place(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of the pack and of its plan, and the constants, as they are where nothing is sent."""
    calls: list[int] = []

    def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        assert device == GPU
        calls.append(len(tensors))
        return sent_at_once(tensors, CPU)

    monkeypatch.setattr("dpo_trainer.model.transfer.sent_at_once", send)
    pack = share_of(pack_of(0, 1, 2, 3), 0, ranks)
    constants = [torch.randn(4, 2, dtype=torch.float64), torch.tensor([4.0, 6.0])]
    moved, others = loaded(pack, constants, GPU)
    still, same = loaded(pack, constants, CPU)
    assert len(calls) == 1
    assert_equal(moved, still)
    assert all(torch.equal(*both) for both in zip(others, constants, strict=True))
    assert all(one is other for one, other in zip(same, constants, strict=True))
    assert moved.plan is not None
    assert moved.plan.gathers
    assert moved.tokens.data_ptr() != pack.tokens.data_ptr()


def assert_equal(one: Any, other: Any) -> None:
    """Compare two data classes field by field."""
    for field in fields(one):
        got, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(expected, Tensor):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), field.name
        elif field.name == "plan":
            assert_equal(got, expected)
        elif field.name == "repeats":
            assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
        else:
            assert got == expected, field.name


class Reads:
    """Records what the host must wait for on a GPU: operations with results of unknown size, and values read in Python.

    Reading a tensor of the CPU in Python is no operation, so there are two recorders.
    """

    OPERATIONS = frozenset({"_local_scalar_dense", "nonzero", "equal", "bincount", "is_nonzero", "masked_select"})
    IN_PYTHON = frozenset({"tolist", "cpu", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"})

    def __init__(self) -> None:
        self.seen: list[str] = []
        seen = self.seen

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func._schema.name.removeprefix("aten::")
                by_mask = name in ("index", "index_put_") and any(
                    x is not None and x.dtype == torch.bool for x in args[1]
                )
                if by_mask or name in Reads.OPERATIONS:
                    seen.append(func._schema.name)
                return func(*args, **(kwargs or {}))

        class Python(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if getattr(func, "__name__", "") in Reads.IN_PYTHON:
                    seen.append(func.__name__)
                return func(*args, **(kwargs or {}))

        self._modes = ExitStack()
        self._enter = (Operations, Python)

    def __enter__(self) -> Self:
        for mode in self._enter:
            self._modes.enter_context(mode())
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with tiny_engine() as made:
        made.prepare_training()
        yield made


def unseen(function: Any) -> Any:
    """The function without the recording: what it does, it does on the CPU in any case, or on the CPU alone."""

    def call(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*arguments, **options)

    return call


@pytest.mark.slow
def test_a_steps_reads_do_not_grow_with_its_packs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the metrics of a step and for its norm, and for nothing of a single pack."""
    _sequences = attend._sequences
    module = "dpo_trainer.engine"
    monkeypatch.setattr(f"{module}.loaded", unseen(loaded))
    monkeypatch.setattr(f"{module}.response_log_probs", unseen(response_log_probs))  # checks labels on the CPU only
    sequences = unseen(lambda *of: list(_sequences(*of)))  # the CPU's attention is a loop over them
    monkeypatch.setattr(attend, "_sequences", sequences)
    pairs = np.arange(4)
    table = ReferenceTable(torch.zeros(4, 2, dtype=torch.float64))

    def reads(*packs: Pack) -> list[str]:
        def rewards(ids: Tensor) -> Tensor:
            return torch.zeros(len(ids), 2, dtype=torch.float64)

        with Reads() as found:
            engine.train_step(pairs, packs, unseen(table.of), unseen(rewards), rate=1e-4, seed=1)
        return found.seen

    reads(pack_of(0, 1, 2, 3))  # the first step allocates the optimizer's state
    whole = reads(pack_of(0, 1, 2, 3))
    assert reads(pack_of(0), pack_of(1), pack_of(2), pack_of(3)) == whole
    assert whole  # the metrics and the norm are read

    def passes(*packs: Pack) -> list[str]:
        with Reads() as found:
            engine.log_prob_sums(pairs, packs)
        return found.seen

    assert passes(pack_of(0), pack_of(1), pack_of(2, 3)) == passes(pack_of(0, 1, 2, 3))
