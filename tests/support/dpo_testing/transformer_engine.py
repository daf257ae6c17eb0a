"""A substitute for Transformer Engine, which needs a GPU: the published signatures, and arithmetic for the CPU.

``install`` must come before Megatron-Core is imported. Every call of a substitute is bound to the signature that the
named version has (tests/golden/transformer-engine): an argument that it does not know is a TypeError, as on a GPU.

FP8 is computed as ``Float8CurrentScaling`` defines it: a matrix is divided by its largest magnitude over the format's
largest number, rounded to 8 bits, and multiplied in higher precision. E4M3 for inputs and weights; for gradients E5M2
(hybrid) or E4M3.
"""

import enum
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "transformer-engine"
VERSIONS = sorted(path.stem for path in GOLDEN.glob("*.json"))

FUSED = "a weight's gradient was added to main_grad"

calls: set[str] = set()
"""Names of the golden file that were called, and FUSED."""


class Format(enum.Enum):
    """FP8 formats, forward and backward."""

    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


class _State:
    recipe: Any = None


def signature(table: dict[str, Any], name: str) -> inspect.Signature:
    """The signature of a golden file's entry."""
    entry, kinds = table[name], inspect.Parameter
    found = [kinds(word, kinds.POSITIONAL_OR_KEYWORD) for word in entry["required"]]
    found += [kinds(word, kinds.POSITIONAL_OR_KEYWORD, default=None) for word in entry["optional"]]
    found += [kinds(word[1:], kinds.VAR_POSITIONAL) for word in entry["others"] if not word.startswith("**")]
    found += [kinds(word, kinds.KEYWORD_ONLY, default=None) for word in entry["keywords"]]
    found += [kinds(word[2:], kinds.VAR_KEYWORD) for word in entry["others"] if word.startswith("**")]
    return inspect.Signature(found)


def install(version: str) -> None:
    """Put the substitute of a version in place of ``transformer_engine``."""
    table = json.loads((GOLDEN / f"{version}.json").read_text())

    def checked(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        words = signature(table, name)

        def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
            method = "self" in inspect.signature(call).parameters

            @functools.wraps(call)
            def run(*arguments: Any, **named: Any) -> Any:
                words.bind(*arguments[method:], **named)
                calls.add(name)
                return call(*arguments, **named)

            run.__signature__ = words  # type: ignore[attr-defined] # Megatron-Core reads it
            return run

        return decorate

    package = "transformer_engine.pytorch"

    class Linear(nn.Module):
        @checked(f"{package}.module.linear.Linear.__init__")
        def __init__(
            self,
            in_features: int,
            out_features: int,
            *,
            tp_size: int,
            parallel_mode: str | None,
            bias: bool,
            **named: Any,
        ) -> None:
            super().__init__()
            assert parallel_mode in ("column", "row")
            assert not named["sequence_parallel"] or tp_size == 1
            self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
            self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
            self.parallel_mode, self.tp_size, self.use_bias = parallel_mode, tp_size, bias
            self.fuse_wgrad_accumulation = named["fuse_wgrad_accumulation"]
            self.save_original_input = False
            place = {"dtype": named["params_dtype"], "device": named["device"]}
            self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **place))
            self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features, **place)) if bias else None)

        @checked(f"{package}.module.linear.Linear.forward")
        def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
            out: Tensor = _Product.apply(
                inp, self.weight, _State.recipe, self.fuse_wgrad_accumulation, bool(is_first_microbatch)
            )
            return out + self.bias if isinstance(self.bias, Tensor) else out

    class FusedAdam(torch.optim.Optimizer):
        @checked(f"{package}.optimizers.fused_adam.FusedAdam.__init__")
        def __init__(self, params: Any, **named: Any) -> None:
            super().__init__(params, named)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ARG002
            for group in self.param_groups:
                group["step"] = count = group.get("step", 0) + 1
                (first, second), rate = group["betas"], group["lr"]
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    for name in ("exp_avg", "exp_avg_sq"):
                        state.setdefault(name, torch.zeros_like(parameter))
                    state["exp_avg"].lerp_(parameter.grad, 1 - first)
                    state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                    root = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.addcdiv_(state["exp_avg"] / (1 - first**count), root, value=-rate)

    @checked(f"{package}.optimizers.multi_tensor_apply.MultiTensorApply.__call__")
    def multi_tensor_applier(op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(tensor_lists, *args)

    def l2norm(lists: list[list[Tensor]], _each: bool) -> tuple[Tensor, None]:
        return torch.stack([x.double().square().sum() for x in lists[0]]).sum().sqrt().float().view(1), None

    def scale(lists: list[list[Tensor]], by: Any) -> None:
        for source, to in zip(*lists, strict=True):
            to.copy_(source * by)

    @checked(f"{package}.quantization.fp8_autocast")
    @contextmanager
    def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
        before, _State.recipe = _State.recipe, fp8_recipe if enabled else None
        try:
            yield
        finally:
            _State.recipe = before

    @checked(f"{package}.quantization.fp8_model_init")
    @contextmanager
    def fp8_model_init(enabled: bool = True, **_named: Any) -> Iterator[None]:
        assert not enabled, "weights are kept in bf16"
        yield

    @checked(f"{package}.distributed.checkpoint")
    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        own = ("distribute_saved_activations", "get_rng_state_tracker", "tp_group")
        named = {name: value for name, value in kwargs.items() if name not in own}
        recipe = _State.recipe

        def run(*values: Any, **others: Any) -> Any:  # recomputed in the state of the first pass
            with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
                return function(*values, **others)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **named)

    @checked(f"{package}.distributed.activation_recompute_forward.__init__")
    @contextmanager
    def activation_recompute_forward(
        activation_recompute: bool = False, recompute_phase: bool = False
    ) -> Iterator[None]:
        yield

    class Float8CurrentScaling:
        @checked("transformer_engine.common.recipe.Float8CurrentScaling")
        def __init__(self, **named: Any) -> None:
            self.fp8_format: Format = named["fp8_format"]

    class Unused:
        """A base class of what Megatron-Core defines and the trainer does not use."""

    unused = {name: type(name, (Unused,), {}) for name in _UNUSED}
    pytorch = _module(package, Linear=Linear, fp8_autocast=fp8_autocast, fp8_model_init=fp8_model_init, **unused)
    state = type("FP8GlobalStateManager", (), {"is_fp8_enabled": staticmethod(lambda: _State.recipe is not None)})
    _module(f"{package}.fp8", FP8GlobalStateManager=state, fp8_autocast=fp8_autocast, fp8_model_init=fp8_model_init)
    _module(
        f"{package}.distributed",
        checkpoint=checkpoint,
        activation_recompute_forward=activation_recompute_forward,
        CudaRNGStatesTracker=type("CudaRNGStatesTracker", (Unused,), {}),
    )
    _module(f"{package}.tensor", QuantizedTensor=type("QuantizedTensor", (Unused,), {}))
    _module(
        f"{package}.optimizers",
        FusedAdam=FusedAdam,
        FusedSGD=torch.optim.SGD,
        multi_tensor_applier=multi_tensor_applier,
        multi_tensor_l2norm=l2norm,
        multi_tensor_scale=scale,
        multi_tensor_scale_tensor=scale,
    )
    router = ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss")
    _module(f"{package}.router", **dict.fromkeys(router))
    _module(
        "transformer_engine.common.recipe",
        Format=Format,
        Float8CurrentScaling=Float8CurrentScaling,
        DelayedScaling=type("DelayedScaling", (Unused,), {}),
    )
    sys.modules["transformer_engine"].__version__ = version  # type: ignore[attr-defined]
    assert sys.modules["transformer_engine"].pytorch is pytorch


_UNUSED = ("LayerNormLinear", "RMSNorm", "LayerNorm", "DotProductAttention", "GroupedLinear")


def _module(name: str, **contents: Any) -> ModuleType:
    """Put a module, and the packages that it is in, into ``sys.modules``."""
    if name in sys.modules:
        made = sys.modules[name]
    else:
        made = sys.modules[name] = ModuleType(name)
        made.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(_module(parent), last, made)
    vars(made).update(contents)
    return made


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """x in FP8 with one scale for all of it, in fp32."""
    most = x.detach().abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    by = torch.finfo(kind).max / most
    return (x.float() * by).to(kind).float() / by


class _Product(torch.autograd.Function):
    """x [..., in], W [out, in] → x Wᵀ; the gradient of W is added to ``main_grad`` if that is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Any, fuse: bool, first: bool) -> Tensor:
        ctx.parameter, ctx.recipe, ctx.fuse, ctx.first = weight, recipe, fuse, first
        rows, wide = x.reshape(-1, x.shape[-1]), weight
        if recipe is not None:
            sizes = [rows.shape[0], *weight.shape]
            assert not any(size % 16 for size in sizes), f"FP8 needs multiples of 16, and these are {sizes}"
            rows, wide = (rounded(each, recipe.fp8_format.value[0]) for each in (rows, weight))
        ctx.save_for_backward(rows, wide)
        return (rows @ wide.t()).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, wide = ctx.saved_tensors
        slope = grad.reshape(-1, grad.shape[-1])
        if ctx.recipe is not None:
            slope = rounded(slope, ctx.recipe.fp8_format.value[1])
        to_rows = (slope @ wide).to(grad.dtype).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_rows, None, None, None, None
        weight, product = ctx.parameter, slope.t() @ rows
        if not ctx.fuse:
            return to_rows, product.to(weight.dtype), None, None, None
        calls.add(FUSED)
        # As the real one: the first pack of a step overwrites what is there.
        weight.main_grad.copy_(product) if ctx.first else weight.main_grad.add_(product)
        weight.grad_added_to_main_grad = True
        return to_rows, torch.full_like(weight, torch.nan), None, None, None
