"""LoRA on Megatron-Core's fused linear layers (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).

y = Wx + scale · B A x with W frozen, A [rank, in], B [out, rank]; scale is alpha / rank, or alpha / √rank with
``rslora``; x is the linear layer's own input, that is the norm's output for q/k/v and the MLP's first layer. Modules
and initialisations have NeMo's names. The policy without its adapters is the reference, so no second copy of the model
exists.

Tensor parallelism follows the base. Column-parallel bases (q/k/v, fc1): A is split over its rank and its output
gathered, B over the base's rows. Row-parallel bases (the output projections): A is split over its input and its
output summed, B over its rows and its output gathered.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from dpo_api.errors import InvalidSpecError
from dpo_api.learning import Lora, LoraLinear
from dpo_trainer import bridge
from dpo_trainer.formats.adapter import AdapterMatrices, Joined, joined, projections_of
from dpo_trainer.formats.layout import Value
from dpo_trainer.model.dropout import TokenKeys, channel_keys, dropout, key_of
from dpo_trainer.model.forward import unwrap

MODULES: dict[LoraLinear, str] = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
_NORMAL_STD = 0.2  # NeMo's


def scale_of(lora: Lora) -> float:
    """Return the factor of B A: alpha / rank, or alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    alpha = lora.alpha if lora.alpha is not None else lora.rank
    return alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter is attached: its base's module and layer, and its place among the layers with adapters."""

    module: LoraLinear
    layer: int
    position: int
    count: int
    gated: bool
    """Whether the base holds a gate and an up projection: an MLP's first layer, if it has a gate."""

    @property
    def row_parallel(self) -> bool:
        return self.module in ("attention_dense", "mlp_fc2")


class LowRankAdapter(torch.nn.Module):
    """scale · B A x beside one linear layer. ``linear_in.weight`` is A, ``linear_out.weight`` is B.

    One that continues PEFT's adapters of a fused layer's projections has all their A, one below the other, and a row of
    B is multiplied with the result of its own projection's.
    """

    channels: Tensor  #: keys of the channels that dropout sees on this rank; absent without dropout
    owners: Tensor | None  #: [rows of B on this rank, projections]: see ``Joined``; None: all rows have the same A

    def __init__(
        self,
        config: Any,
        lora: Lora,
        place: _Place,
        inputs: int,
        outputs: int,
        seed: int,
        tokens: TokenKeys,
        start: Joined | None = None,
    ) -> None:
        super().__init__()
        self.config, self.place, self.tokens = config, place, tokens
        self.enabled = True
        self.scale = scale_of(lora)
        self.dropout, self.dropout_position = lora.dropout, lora.dropout_position
        if start is None:
            first = _draw(lora.column_init, (lora.rank, inputs), f"{seed}/{place.layer}/{place.module}/in")
            second = _draw(lora.row_init, (outputs, lora.rank), f"{seed}/{place.layer}/{place.module}/out")
            owners = None
        else:
            first, second = start.a, start.b
            owners = None if start.owners.shape[1] == 1 else _rows_of_rank(start.owners, place.gated)
        first, second = self.divided(first, second)
        self.linear_in = _Matrix(config, first, 1 if place.row_parallel else 0)
        self.linear_out = _Matrix(config, second, 0)
        if owners is not None:
            owners = owners.to(device=bridge.device(), dtype=config.params_dtype)
        self.register_buffer("owners", owners, persistent=False)
        if lora.dropout:
            channels = _channels(lora.dropout_position, place, inputs, outputs).to(bridge.device())
            keys = channel_keys(channels, key_of("adapter", place.layer, place.module))
            self.register_buffer("channels", keys, persistent=False)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Return ``base`` plus the adapter's output.

        x: the base's input, [S, 1, in] (a part of it where the base's is); base: what the base returned for it.
        """
        sequence_parallel = self.config.sequence_parallel
        if self.dropout_position == "pre":
            x = self._drop(x)
        if self.place.row_parallel:
            inner = reduce_from_tensor_model_parallel_region(self.linear_in(x))
        else:
            x = (
                gather_from_sequence_parallel_region(x)
                if sequence_parallel
                else copy_to_tensor_model_parallel_region(x)
            )
            inner = gather_from_tensor_model_parallel_region(self.linear_in(x))
        inner = copy_to_tensor_model_parallel_region(inner)
        gathers = self.place.row_parallel and _tensor_parallel()[0] > 1
        drops = self.dropout_position == "post" and self._drops
        if not gathers and not drops:
            added: Tensor = self.linear_out(inner, self.owners, base=base, scale=self.scale)
            return added
        out: Tensor = self.linear_out(inner if self.scale == 1 else inner * self.scale, self.owners)
        if gathers:
            out = gather_from_tensor_model_parallel_region(out)
            if sequence_parallel:
                out = scatter_to_sequence_parallel_region(out)
        return base + (self._drop(out) if drops else out)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _drop(self, x: Tensor) -> Tensor:
        """x: [S, 1, C], or this rank's part of the tokens or the channels."""
        if not self._drops:
            return x
        tokens = self.tokens.now()
        if self.config.sequence_parallel and (self.dropout_position == "pre") != self.place.row_parallel:
            # Inputs of column-parallel and outputs of row-parallel layers hold this rank's part of the stream.
            size, rank = _tensor_parallel()
            tokens = tokens.chunk(size)[rank]
        return dropout(x, tokens, self.channels, self.dropout)

    def divided(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's parts of whole matrices."""
        size, rank = _tensor_parallel()
        return a.chunk(size, dim=1 if self.place.row_parallel else 0)[rank], _rows_of_rank(b, self.place.gated)

    @torch.no_grad()
    def matrices(self, trained: "Trained | None" = None) -> tuple[Tensor, Tensor]:
        """Whole A [rank, in] and B [out, rank], fp32, unscaled. A collective over tensor-parallel ranks.

        With an A of each projection, A is [projections · rank, in].
        """
        a, b = self._parts(trained)
        a = _whole(a, 1 if self.place.row_parallel else 0)
        b = _whole(b, 0, gated=self.place.gated)
        return a.float(), b.float()

    @torch.no_grad()
    def delta(self, trained: "Trained | None" = None) -> Tensor:
        """What merging the adapter adds to this rank's part of the base weight, fp32."""
        a, b = self._parts(trained)
        if self.place.row_parallel:
            b = _whole(b, 0)
        else:
            a = _whole(a, 0)
        return self.scale * (_wide(b.float(), self.owners) @ a.float())

    def _parts(self, trained: "Trained | None") -> tuple[Tensor, Tensor]:
        """This rank's parts of A and B: the parameters, or what ``trained`` returns for them."""
        a, b = self.linear_in.weight.detach(), self.linear_out.weight.detach()
        return (a, b) if trained is None else (trained(self.linear_in.weight), trained(self.linear_out.weight))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries for dist_checkpointing. Only layers with an adapter are stacked."""
        if sharded_offsets:
            sharded_offsets = ((0, self.place.position, self.place.count),)
        group = parallel_state.get_tensor_model_parallel_group()
        data_group = (metadata or {}).get("dp_cp_group") or parallel_state.get_data_parallel_group(
            with_context_parallel=True
        )
        entries: dict[str, Any] = {}
        for name, matrix in (("linear_in", self.linear_in), ("linear_out", self.linear_out)):
            entries.update(
                make_sharded_tensors_for_checkpoint(
                    {"weight": matrix.weight},
                    f"{prefix}{name}.",
                    {"weight": matrix.axis},
                    sharded_offsets,
                    tp_group=group,
                    dp_cp_group=data_group,
                )
            )
        if self.place.gated:
            key = f"{prefix}linear_out.weight"
            singleton = (metadata or {}).get("singleton_local_shards", False)
            entries[key] = apply_swiglu_sharded_factory(
                entries[key], sharded_offsets, singleton, tp_group=group, dp_group=data_group
            )
        return entries


class _Matrix(torch.nn.Module):
    """A weight split over tensor-parallel ranks along ``axis``."""

    def __init__(self, config: Any, value: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight = torch.nn.Parameter(value.to(device=bridge.device(), dtype=config.params_dtype).contiguous())
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=axis, stride=1)
        self.weight.allreduce = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, owners: Tensor | None = None, *, base: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Multiply with the weight, or with ``_wide`` of it; with ``base``, return base + scale · the product.

        That sum is made by the matrix product, which needs no pass over the output of its own. Code that used the
        weight beside this call would not wait for the ranks that send it after an update.
        """
        weight = _wide(self.weight, owners)
        if base is None:
            return F.linear(x, weight)
        rows = base.reshape(-1, base.shape[-1])
        return torch.addmm(rows, x.reshape(-1, x.shape[-1]), weight.t(), alpha=scale).view(base.shape)


def attach_lora(
    model: Any,
    lora: Lora,
    *,
    seed: int,
    start: AdapterMatrices | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Freeze the model and attach adapters to the layers that ``lora`` names.

    Call it after the weights are loaded and before the model is wrapped for training. The initial values depend
    on ``seed`` only, not on the parallel sizes. start: the adapter that ``lora`` continues (see
    ``dpo_api.models.adapter.continued``); the values are then its own. numbers: those that the model's layers have in
    ``start``; None: their own. Raises InvalidSpecError naming the field for layers that do not exist and for a rank
    that tensor parallelism cannot split.
    """
    gpt = unwrap(model)
    layers, numbers = _chosen_layers(gpt, lora), numbers or range(gpt.config.num_layers)
    of_module = {module: _with_adapter(gpt, layers, numbers, module, start) for module in lora.modules}
    size, _ = _tensor_parallel()
    if lora.rank % size:
        raise InvalidSpecError(
            f"spec.lora.rank is {lora.rank}, not divisible by spec.parallelism.tensor {size}; "
            f"choose a multiple of {size}"
        )
    for parameter in gpt.parameters():
        parameter.requires_grad_(requires_grad=False)
    tokens = TokenKeys()
    if lora.dropout:
        gpt.adapter_tokens = tokens
    for layer in gpt.decoder.layers:
        index = layer.layer_number - 1
        for module, held in of_module.items():
            if index not in held:
                continue
            linear = layer.get_submodule(MODULES[module])
            gated = module == "mlp_fc1" and gpt.config.gated_linear_unit
            place = _Place(module, index, held.index(index), len(held), gated)
            outputs, inputs = linear.weight.shape
            if place.row_parallel:
                inputs *= size
            else:
                outputs *= size
            values = None if start is None else joined(start, gpt.dpo_config, numbers[index], module)
            linear.adapter = LowRankAdapter(gpt.config, lora, place, inputs, outputs, seed, tokens, values)
    if gpt.pre_process and gpt.config.recompute_granularity is not None:
        # What is recomputed gives gradients only if its input asks for one, and a frozen embedding does not.
        gpt.embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_(torch.is_grad_enabled()))


def adapters(model: Any) -> Iterator[LowRankAdapter]:
    """The model's adapters, in the model's order."""
    return (module for module in unwrap(model).modules() if isinstance(module, LowRankAdapter))


def exact_values(model: Any, start: AdapterMatrices) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of the adapters with its value in ``start``, which they continue: fp32, this rank's part.

    Those that are fp32 have it already, and are left out.
    """
    for adapter in adapters(model):
        if adapter.linear_in.weight.dtype == torch.float32:
            continue
        values = joined(start, unwrap(model).dpo_config, adapter.place.layer, adapter.place.module)
        matrices = (adapter.linear_in.weight, adapter.linear_out.weight)
        yield from zip(matrices, adapter.divided(values.a, values.b), strict=True)


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Within this context the model computes exactly what the start model does: it is the reference."""
    found = list(adapters(model))
    before = [adapter.enabled for adapter in found]
    try:
        for adapter in found:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(found, before, strict=True):
            adapter.enabled = enabled


Trained = Callable[[Tensor], Tensor]
"""An adapter's parameter → the value that training has given it: the fp32 master of a bf16 one."""


def merged_value(model: Any, *, base: Value | None = None, trained: Trained | None = None) -> Value:
    """For ``formats.export.export(value_of=…)``: each weight with its adapter added, in fp32.

    base: the frozen weights' values, else the parameters. trained: the adapters' values, else the parameters.
    """
    gpt = unwrap(model)

    @torch.no_grad()
    def value(name: str, parameter: Tensor) -> Tensor:
        own = parameter.detach() if base is None else base(name, parameter)
        adapter = getattr(gpt.get_submodule(name.rpartition(".")[0]), "adapter", None)
        if adapter is None or not name.endswith(".weight"):
            return own
        delta: Tensor = adapter.delta(trained)
        own = own.to(delta.device, torch.float32)
        # Adding a delta of 0 would turn -0 into 0, so such weights are left unchanged.
        unchanged = delta == 0
        return torch.where(unchanged, own, delta.add_(own), out=delta)

    return value


def adapter_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """The adapters' entries of a model's sharded state dict: what a LoRA checkpoint holds."""
    return {name: entry for name, entry in sharded.items() if ".adapter." in name}


def _chosen_layers(gpt: Any, lora: Lora) -> list[int]:
    count = gpt.config.num_layers
    if lora.layers is None:
        return list(range(count))
    for layer in lora.layers:
        if not 0 <= layer < count:
            raise InvalidSpecError(
                f"spec.lora.layers names layer {layer}, but the model has layers 0 to {count - 1}; "
                "leave such layers out"
            )
    return sorted(set(lora.layers))


def _wide(b: Tensor, owners: Tensor | None) -> Tensor:
    """B [rows, rank] as the factor of A x: with an A of each projection, [rows, projections · rank], else B itself.

    Each row has its values in its own projection's columns, and zeros that are no parameters in the others.
    """
    return b if owners is None else (b.unsqueeze(1) * owners.unsqueeze(2)).flatten(1)


def _with_adapter(
    gpt: Any, layers: list[int], numbers: Sequence[int], module: LoraLinear, start: AdapterMatrices | None
) -> list[int]:
    """Of the model's layers, those that get an adapter of this module: all, or those that have one to continue."""
    if start is None:
        return layers
    return [
        layer
        for layer in layers
        if not set(start.adapter.targets).isdisjoint(projections_of(gpt.dpo_config, numbers[layer], module))
    ]


def _tensor_parallel() -> tuple[int, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _rows_of_rank(whole: Tensor, gated: bool) -> Tensor:
    """This rank's rows of B in the base's order: a gated one holds its part of the gate, then of the up projection."""
    size, rank = _tensor_parallel()
    if not gated:
        return whole.chunk(size)[rank]
    gate, up = whole.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))


def _channels(position: Literal["pre", "post"], place: _Place, inputs: int, outputs: int) -> Tensor:
    """The channels, of the whole model's, that dropout sees on this rank, in their order here. int64."""
    size, rank = _tensor_parallel()
    if position == "post":
        channels = torch.arange(outputs)
        return channels if place.row_parallel else _rows_of_rank(channels, place.gated)
    channels = torch.arange(inputs)
    return channels.chunk(size)[rank] if place.row_parallel else channels


def _whole(part: Tensor, axis: int, *, gated: bool = False) -> Tensor:
    size, _ = _tensor_parallel()
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    if gated:
        halves = [p.chunk(2) for p in parts]
        parts = [gate for gate, _ in halves] + [up for _, up in halves]
    return torch.cat(parts, dim=axis)


def _draw(method: str, shape: tuple[int, int], key: str) -> Tensor:
    """Initial values [out, in], fp32 on the CPU, which depend on ``key`` only."""
    if method == "zero":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    fan_out, fan_in = shape
    if method == "xavier":  # Glorot & Bengio 2010, normal form as in NeMo
        return torch.randn(shape, generator=generator) * math.sqrt(2.0 / (fan_in + fan_out))
    if method == "kaiming":  # He et al. 2015 with a = √5, as torch.nn.Linear and PEFT: uniform in ±1/√fan_in
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
    if method == "normal":
        return torch.randn(shape, generator=generator) * _NORMAL_STD
    raise InvalidSpecError(f"spec.lora: unknown initialisation {method!r}; choose xavier, kaiming, normal or zero")
