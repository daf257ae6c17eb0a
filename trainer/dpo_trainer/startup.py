"""Imports Megatron-Core without what no run uses. Import this module before any other that imports Megatron-Core.

Importing Megatron-Core pulls in what costs a process seconds of CPU time, or memory:

- wandb and TensorBoard, for timers that the trainer does not use. They are hidden while Megatron-Core is imported, and
  it works without them. The trainer's own writers import them later if the spec asks for them.
- torch's compiler (dynamo and inductor), because fused functions are decorated with ``torch.compile``. Without a GPU
  the decorator is lazy: it calls ``torch.compile`` at the first call of the function, which is when ``torch.compile``
  itself compiles. The same code runs and gives the same numbers. With a GPU ``torch.compile`` is left alone. torch's
  optimizers import the compiler at their first call, in order to exclude some of their functions from it
  (``torch._disable_dynamo``). Without a GPU nothing is compiled, so they get to know themselves as excluded.
- Triton, whose library takes 70 MiB, and SymPy with torch's symbolic shapes, which take 30 MiB. Without a GPU Triton is
  hidden, too, and two modules are replaced by ``_Later``: one of Megatron-Core's kernels for mixtures of experts, which
  cannot do without Triton, and that of the symbolic shapes, which DTensor and the compiler use.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from dpo_trainer import bridge

_HIDDEN = ("wandb", "torch.utils.tensorboard")
_HIDDEN_WITHOUT_GPU = ("triton",)
_LATER_WITHOUT_GPU = ("megatron.core.transformer.moe.ops.paged_stash", "torch.fx.experimental.symbolic_shapes")

_MODULES = (
    "megatron.core",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)
"""These import, directly or indirectly, every module of Megatron-Core that the trainer uses."""


def lazily_compiled(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator like ``torch.compile`` that calls it at the first call of the decorated function."""

    @functools.wraps(compile_)
    def decorator(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(decorator, **options)
        if not isinstance(model, FunctionType):
            return compile_(model, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            function: Callable[..., Any] = compile_(model, **options)
            return function

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return decorator


class _Later(ModuleType):
    """Stands for a module. All of its names are functions that import the module when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call


@contextlib.contextmanager
def _unused_modules_hidden() -> Iterator[None]:
    absent: dict[str, Any] = dict.fromkeys(_HIDDEN)  # None: an import raises ModuleNotFoundError
    compile_ = torch.compile
    if bridge.needed():
        torch.compile = lazily_compiled(compile_)
        absent |= {**dict.fromkeys(_HIDDEN_WITHOUT_GPU), **{name: _Later(name) for name in _LATER_WITHOUT_GPU}}
    hidden = {name: module for name, module in absent.items() if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]


def _exclude_optimizers() -> None:
    """Do what ``torch._disable_dynamo`` does at the first call of a function, without its import: 130 MiB, 2 s."""
    for function in vars(torch.optim.Optimizer).values():
        plain = getattr(function, "__wrapped__", None)
        if plain is not None:
            plain.__dynamo_disable = plain


if bridge.needed():
    _exclude_optimizers()
with _unused_modules_hidden():
    for _module in _MODULES:
        importlib.import_module(_module)
