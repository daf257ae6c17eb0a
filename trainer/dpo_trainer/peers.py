"""What the processes of a run may send each other as pickles.

torch's store has no authentication: a process that reaches the rendezvous port can join a run in place of one of its
processes, and torch's object collectives unpickle whatever a process sends. ``restrict`` makes them read through an
unpickler that knows only what the plan of a checkpoint by Megatron-Core and torch consists of. The trainer itself
exchanges tensors and JSON.
"""

import builtins
import pickle
from typing import Any

import torch
import torch.distributed.distributed_c10d as collectives
from torch.distributed.checkpoint.api import CheckpointException

from dpo_api.errors import InternalError
from dpo_api.pickles import CHECKPOINT, AllowListUnpickler, Globals

_EXCEPTIONS: Globals = frozenset(
    ("builtins", name)
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException) and value.__name__ == name
)

ALLOWED: Globals = (
    CHECKPOINT
    | _EXCEPTIONS
    | {("traceback", "StackSummary"), ("traceback", "FrameSummary")}
    | {("torch.distributed.checkpoint.api", "CheckpointException")}
    | {("torch.distributed.checkpoint.storage", "WriteResult")}
    | {("torch.distributed.checkpoint.planner", name) for name in ("LoadPlan", "ReadItem", "LoadItemType")}
    | {("dpo_trainer.peers", "tensor_of")}
    | {("megatron.core.dist_checkpointing.mapping", name) for name in ("ShardedTensor", "ShardedObject")}
)
"""(module, name) of each global in what Megatron-Core and torch exchange to save or load a checkpoint."""


def not_of_this_run(what: str) -> InternalError:
    """Return the error for a message that no process of this run can have sent."""
    return InternalError(
        f"a process sent {what}. The message was not used, and nothing in it was run. Either a process that is not part"
        " of this run has reached its rendezvous port, or the run's processes have different images. Restrict who can"
        " reach the pods with a NetworkPolicy, and use one image"
    )


def tensor_of(data: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """Return a tensor on the CPU from its bytes."""
    if not isinstance(data, bytes):  # bytearray(n) would allocate n bytes
        raise TypeError("the data of a tensor must be bytes")
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


class _Pickler(pickle.Pickler):
    """Sends what the usual pickle would send by a global that is not allowed.

    An exception of another class becomes a RuntimeError with the same words. Tensors, such as the step of the
    optimizer's common state, would be read by a function of torch that unpickles their bytes without restrictions.
    """

    def reducer_override(self, value: Any) -> Any:
        """Return how to pickle ``value``; NotImplemented for the usual way."""
        if type(value) is torch.Tensor:
            flat = value.detach().cpu().reshape(-1)
            return tensor_of, (flat.view(torch.uint8).numpy().tobytes(), value.dtype, value.shape)
        if not isinstance(value, BaseException) or isinstance(value, CheckpointException) or _is_plain(value):
            return NotImplemented
        return RuntimeError, (f"{type(value).__name__}: {value}",)


def _is_plain(error: BaseException) -> bool:
    known = (type(error).__module__, type(error).__qualname__) in _EXCEPTIONS
    return known and not vars(error) and all(isinstance(word, str | int | float | None) for word in error.args)


class _Unpickler(AllowListUnpickler):
    allowed = ALLOWED

    def load(self) -> Any:
        """Return the object. Raises InternalError for anything but a pickle of allowed globals."""
        try:
            return super().load()
        except Exception as error:
            raise not_of_this_run(f"a pickle that is not part of a checkpoint: {error}") from error


def restrict() -> None:
    """Make torch's object collectives in this process read and write through the classes above.

    Raises InternalError if this version of torch takes its unpickler from elsewhere.
    """
    collectives._pickler = _Pickler
    collectives._unpickler = _Unpickler
    refused = pickle.dumps(restrict)  # names a function that no checkpoint needs
    try:
        collectives._tensor_to_object(torch.frombuffer(bytearray(refused), dtype=torch.uint8), len(refused), None)
    except InternalError:
        return
    raise InternalError(
        f"torch {torch.__version__} unpickles the messages of other processes in a way that this trainer cannot "
        "restrict: use the trainer's own image"
    )
