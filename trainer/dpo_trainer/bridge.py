"""Runs Megatron-Core without a GPU. All knowledge of where it assumes CUDA is here.

Megatron-Core asks for the current CUDA device, stream and generator, and writes ``device='cuda'`` in a few functions.
``install`` makes those calls return the CPU. ``construction`` adds what only constructors and checkpoint loading need.
Both do nothing where a GPU is present, so nothing is patched there.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")

# Modules whose functions write the literal 'cuda' while a step or a checkpoint runs: they get a `torch` that maps it.
_LITERAL_MODULES = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)
_FACTORIES = frozenset(
    {"arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros", "zeros_like"}
)

_installed = False


def needed() -> bool:
    """Whether this machine has no GPU that torch can use."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that this process computes on: its current GPU, else the CPU."""
    return _CPU if needed() else torch.device("cuda", torch.cuda.current_device())


def install() -> bool:
    """Patch Megatron-Core to run on the CPU, once per process; return whether it is patched.

    On a machine with a GPU this changes nothing and returns False.
    """
    global _installed  # noqa: PLW0603 - patches of a library's modules are process-wide by nature
    if not needed():
        return False
    if _installed:
        return True
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.current_stream = lambda *_a, **_k: _NullStream()  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_a, **_k: None
    on_cpu = _TorchOnCPU()
    for name in _LITERAL_MODULES:
        importlib.import_module(name).torch = on_cpu  # type: ignore[attr-defined]
    _bridge_random_state()
    _bridge_clipping()
    _bridge_optimizer_state()
    _bridge_groups_of_one()
    _installed = True
    return True


@contextlib.contextmanager
def construction() -> Iterator[None]:
    """Enter around building a model or an optimizer and around loading their checkpoints.

    Literal ``cuda`` devices become the CPU, and ``Tensor.type()`` returns the CUDA name that Megatron-Core's
    optimizers compare with. It affects this thread only and doubles the cost of small operations, so do not use it
    around a training step. Does nothing where a GPU is present.
    """
    if not install():
        yield
        return
    with _CudaMeansCPU():
        yield


class _NullStream:
    """A stream on which all work is complete."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_a, **_k: None


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
        return _CPU
    return value


class _TorchOnCPU:
    """The torch module, with factory functions that use the CPU for ``device='cuda'``."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in _FACTORIES:
            value = _with_cpu_device(value)
        setattr(self, name, value)
        return value


def _with_cpu_device[**P, R](factory: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return make


class _CudaMeansCPU(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.to:
            args = (args[0], *map(_on_cpu, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return func(*args, **kwargs)


def _bridge_random_state() -> None:
    """Activation checkpointing saves and restores the state of a CUDA generator, which does not exist here.

    The tracker whose fork does nothing is public API. Nothing here draws from a generator: see model.dropout.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_a, **_k: torch.empty(0, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *_a, **_k: None
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def _answering[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function to run inside ``_CudaMeansCPU``; for functions called once per step or per checkpoint."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with _CudaMeansCPU():
            return function(*args, **kwargs)

    return inside


def _bridge_clipping() -> None:
    """Gradient clipping asserts ``grad.type() == 'torch.cuda.FloatTensor'``."""
    from megatron.core.optimizer import clip_grads

    original: Any = clip_grads.clip_grad_by_total_norm_fp32
    clip, name = _answering(original), original.__name__
    # Modules imported earlier have their own reference to the function.
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("megatron.core", "dpo_trainer")) and vars(module).get(name) is original:
            setattr(module, name, clip)


def _bridge_optimizer_state() -> None:
    """The distributed optimizer sends its state through ``.cuda()`` when a checkpoint gathers or distributes it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name in ("get_parameter_state_dp_zero", "load_parameter_state_from_dp_zero"):
        setattr(DistributedOptimizer, name, _answering(getattr(DistributedOptimizer, name)))


def _bridge_groups_of_one() -> None:
    """In a group of one, gradients are scattered and parameters gathered within their own buffer: nothing has to move.

    NCCL sees that; Gloo copies the whole buffer, three times in a step.
    """
    module = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(module, name, _unless_alone(getattr(module, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: Tensor, source: Tensor, **options: Any) -> Any:
        if options["group"].size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, **options)

    return call
