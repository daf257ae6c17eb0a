"""What processes send each other as pickles: what a checkpoint needs arrives, and everything else is refused."""

import importlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as collectives
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from dpo_api.errors import FencedError, InternalError
from dpo_trainer.peers import ALLOWED, restrict, tensor_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def restricted() -> Iterator[None]:
    before = collectives._pickler, collectives._unpickler
    restrict()
    yield
    collectives._pickler, collectives._unpickler = before


def read(data: bytes) -> Any:
    """Read bytes as a collective reads what another process sent."""
    return collectives._tensor_to_object(torch.frombuffer(bytearray(data), dtype=torch.uint8), len(data), None)


def sent(value: Any) -> Any:
    """Return what arrives at the other process."""
    tensor, size = collectives._object_to_tensor(value, torch.device("cpu"), None)
    return collectives._tensor_to_object(tensor, int(size), None)


@pytest.mark.parametrize(("module", "name"), sorted(ALLOWED))
def test_each_allowed_global_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(7.0),
        torch.tensor([[1.5, -2.0], [0.0, float("inf")]], dtype=torch.bfloat16),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.empty(0, 3),
    ],
)
def test_a_tensor_arrives_as_it_is(tensor: torch.Tensor) -> None:
    """The optimizer's common state holds the number of steps as one."""
    found = sent({"step": tensor})["step"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)


def test_plain_values_arrive_as_they_are() -> None:
    value = {"lr": 1e-3, "betas": (0.9, 0.95), "names": ["a", None], "on": True, "raw": b"\0", "set": {1, 2}}
    assert sent(value) == value


def test_the_error_of_another_process_keeps_its_words() -> None:
    failures = {
        0: _wrap_exception(OSError(28, "No space left on device")),
        1: _wrap_exception(FencedError("attempt 2")),
    }
    found = sent(CheckpointException("write", failures))
    assert isinstance(found, CheckpointException)
    assert isinstance(found.failures[0][0], OSError)
    assert found.failures[0][0].errno == 28
    assert isinstance(found.failures[1][0], RuntimeError)
    assert str(found.failures[1][0]) == "FencedError: attempt 2"


class _OddError(ValueError):
    def __init__(self) -> None:
        super().__init__(Path("x"), lambda: None)  # which no pickle can hold


@pytest.mark.parametrize("error", [_OddError(), ValueError(Path("x"))])
def test_an_error_that_no_list_can_foresee_arrives_as_text(error: Exception) -> None:
    found = sent(error)
    assert type(found) is RuntimeError
    assert "x" in str(found)


class _Run:
    def __reduce__(self) -> Any:
        return os.mkdir, ("proof",)


class _Nested:
    def __reduce__(self) -> Any:
        return getattr, ("", "join")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (pickle.dumps(_Run()), "posix.mkdir"),
        (pickle.dumps([1, {"a": (_Run(),)}], protocol=0), "posix.mkdir"),
        (pickle.dumps(_Nested()), "builtins.getattr"),
        (pickle.dumps(torch.ones(1)), "torch._utils._rebuild_tensor_v2"),
        (b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.", "torch.Size.mro"),  # a path through an allowed class
        (b"\x80\x04\x95", "EOFError|truncated"),
        (b"N", "Ran out of input"),
    ],
    ids=["call", "nested call", "getattr", "tensor", "path through a class", "cut", "no end"],
)
def test_anything_else_is_refused_by_name(
    data: bytes, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InternalError, match=f"a process sent a pickle that is not part of a checkpoint: .*({named})"):
        read(data)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_made_of_bytes_only() -> None:
    with pytest.raises(TypeError, match="must be bytes"):
        tensor_of(10**12, torch.uint8, torch.Size((10**12,)))  # type: ignore[arg-type]


def test_a_torch_that_cannot_be_restricted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(tensor: torch.Tensor, size: int, _group: Any) -> Any:
        return pickle.loads(tensor.numpy().tobytes()[:size])  # noqa: S301 - what the check must find

    monkeypatch.setattr(collectives, "_tensor_to_object", elsewhere)
    with pytest.raises(
        InternalError, match=rf"torch {torch.__version__.partition('+')[0]}.* use the trainer's own image"
    ):
        restrict()
