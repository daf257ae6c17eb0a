"""Builds Megatron-Core's GPTModel from a ModelConfig."""

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from megatron.core import parallel_state
from megatron.core.enums import Fp8Recipe
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from dpo_api.errors import InvalidSpecError
from dpo_api.models import Activation, ModelConfig, Norm
from dpo_api.models.stages import layers_of_stages
from dpo_trainer import bridge
from dpo_trainer.model.activation import GeGLU, SquaredReLU, SwiGLU
from dpo_trainer.model.attention import PackAttention
from dpo_trainer.model.linear import (
    AdaptableColumnParallelLinear,
    AdaptableRowParallelLinear,
    transformer_engine_linears,
)
from dpo_trainer.model.norm import HeadsRMSNorm, LayerNorm, LayerNorm1P, RMSNorm, RMSNorm1P
from dpo_trainer.model.residual import LayerWithNormsAfter, ResidualAdd
from dpo_trainer.model.rotary import all_frequencies

Precision = Literal["bf16", "fp32"]
Backend = Literal["auto", "local", "transformer_engine"]
Recomputation = Literal["none", "selective", "full"]
Fp8 = Literal["e4m3", "hybrid"]

NORMS: dict[Norm, tuple[str, Any]] = {
    "rms": ("RMSNorm", RMSNorm),
    "layernorm": ("LayerNorm", LayerNorm),
    "layernorm1p": ("LayerNorm", LayerNorm1P),
    "rms1p": ("RMSNorm", RMSNorm1P),
}
"""A family's norm → (Megatron-Core's name of it, our module)."""

ACTIVATIONS: dict[Activation, tuple[dict[str, Any], type[torch.nn.Module]]] = {
    "swiglu": ({"gated_linear_unit": True, "activation_func": F.silu}, SwiGLU),
    "geglu": ({"gated_linear_unit": True, "activation_func": F.gelu}, GeGLU),
    "relu2": ({"activation_func": F.relu}, SquaredReLU),
}
"""A family's activation → Megatron-Core's settings, and the module that computes it.

Megatron-Core takes only the functions that Transformer Engine has as modules, and calls none where there is a module.
"""


def build_model(
    config: ModelConfig,
    *,
    precision: Precision = "fp32",
    backend: Backend = "auto",
    recomputation: Recomputation = "none",
    sequence_parallel: bool = False,
    deterministic: bool = False,
    fp8: Fp8 | None = None,
    empty: bool = False,
) -> Any:
    """Build this rank's part of the model, with uninitialised weights, on this process's device.

    Needs ``parallel_state`` to be initialised: the tensor and pipeline sizes and this rank's place are read from it.
    backend: whose linear layers; "auto" takes Transformer Engine where a GPU and the library are present.
    recomputation: "selective" recomputes the MLP in the backward pass, "full" every layer. fp8: the format of the
    layers' matrix products, which need Transformer Engine and packs of a multiple of 16 tokens; see ``refuse_fp8``.
    empty: matrices have a shape and no memory (torch's meta device), for a caller that has their values; CPU only.
    Returns a GPTModel whose attention reads a Pack; call it through dpo_trainer.model.forward. Raises InvalidSpecError
    when the parallel sizes do not divide the model.
    """
    # GPTModel logs at every construction that HybridModel will replace it, which users cannot act on.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    _check_divides(config, tensor, parallel_state.get_pipeline_model_parallel_world_size())
    with bridge.construction(), torch.device("meta") if empty else nullcontext():
        transformer = transformer_config(
            config,
            precision=precision,
            recomputation=recomputation,
            sequence_parallel=sequence_parallel,
            deterministic=deterministic,
            fp8=fp8,
        )
        model = GPTModel(
            config=transformer,
            transformer_layer_spec=block_spec(config, transformer, use_transformer_engine(backend, precision)),
            vocab_size=padded_vocabulary(config.vocab_size, tensor),
            max_sequence_length=config.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=config.tied_embeddings,
            # Our attention applies the rotary embedding itself, by the pack's position ids.
            position_embedding_type="none",
        )
    if model.pre_process:
        model.embedding.register_forward_hook(partial(_embedded, config.multipliers.embedding))
    model.dpo_config = config
    frequencies, model.rope_factors = all_frequencies(config)
    model.register_buffer("rope_frequencies", frequencies.to(bridge.device()), persistent=False)
    return model


def _embedded(scale: float, _module: Any, _arguments: Any, embedded: Tensor) -> Tensor:
    """Return the embedding's output, [S, 1, H], times ``scale``, with strides (H, H, 1) in place of (H, S · H, 1).

    With the latter, torch.matmul with a frozen weight makes S products with S copies of the weight of the one product.
    """
    matrix = embedded.flatten(0, 1).unsqueeze(1)
    # As transformers, which rounds the factor to the embedding's type.
    return matrix if scale == 1 else matrix * torch.tensor(scale, dtype=matrix.dtype).item()


def padded_vocabulary(size: int, tensor: int) -> int:
    """Return the rows of the embedding and of the LM head over all tensor-parallel ranks: a multiple of ``tensor``.

    Rows from ``size`` on are zero, no token reads them, and no softmax counts them. Files do not hold them.
    """
    return -(-size // tensor) * tensor


def transformer_config(
    config: ModelConfig,
    *,
    precision: Precision,
    recomputation: Recomputation = "none",
    sequence_parallel: bool = False,
    deterministic: bool = False,
    fp8: Fp8 | None = None,
) -> Any:
    """Megatron-Core's own configuration of the model, sized by ``parallel_state``."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    on_cpu = bridge.needed()
    choices: dict[Recomputation, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        softmax_scale=config.multipliers.attention,
        normalization=NORMS[config.norm][0],
        layernorm_epsilon=config.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,  # Megatron-Core's defaults are 0.1
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # the weights are loaded: drawing them first would cost their time and memory
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=stages,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_model_parallel_layout=_stages(config.num_layers, stages) if stages > 1 else None,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=True,  # packs differ in length
        batch_p2p_sync=False,  # the host need not wait for what a stage sends: that was for old versions of torch
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - not a password; variable_seq_lengths wants it, experts or not
        calculate_per_token_loss=True,  # our loss function returns (sum, number of pairs): divided once, globally
        deterministic_mode=deterministic,
        **ACTIVATIONS[config.activation][0],
        use_te_activation_func=True,  # Megatron-Core's name for an activation that is a module of the layer spec
        **choices[recomputation],
        # Each tensor is scaled by its own largest value: no history of values that a checkpoint would have to hold.
        **({} if fp8 is None else {"fp8": fp8, "fp8_recipe": Fp8Recipe.tensorwise}),
    )


def _stages(layers: int, stages: int) -> list[list[str]]:
    """Return Megatron-Core's words for what each pipeline stage holds."""
    held = [["decoder"] * len(own) for own in layers_of_stages(layers, stages)]
    return [["embedding", *held[0]], *held[1:-1], [*held[-1], "loss"]]


def use_transformer_engine(backend: Backend, precision: Precision) -> bool:
    """Whether ``backend`` means Transformer Engine here; InvalidSpecError when it is asked for and absent.

    "auto" does not choose it for fp32, whose products it rounds to TF32 whatever torch is set to.
    """
    if backend == "local" or (backend == "auto" and precision == "fp32"):
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    possible = bool(HAVE_TE) and not bridge.needed()
    if backend == "transformer_engine" and not possible:
        missing = "Transformer Engine is not installed" if not HAVE_TE else "there is no GPU"
        raise InvalidSpecError(
            f"spec.transformerEngine.enabled is true, but {missing}; leave it out to choose by itself"
        )
    return possible


FP8_CAPABILITY = (8, 9)
"""Compute capability from which on GPUs multiply FP8 matrices: Ada, Hopper and later."""


def refuse_fp8(fp8: Fp8 | None, backend: Backend) -> None:
    """Raise InvalidSpecError if FP8 is asked for, and cannot be computed here; before a model is loaded."""
    if fp8 is None:
        return
    reason = None
    if bridge.needed():
        reason = "there is no GPU"
    elif torch.cuda.get_device_capability() < FP8_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        reason = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and FP8 needs 8.9 or later"
    elif not use_transformer_engine(backend, "bf16"):
        reason = "Transformer Engine is not used" if backend == "local" else "Transformer Engine is not installed"
    if reason is not None:
        raise InvalidSpecError(f"spec.transformerEngine.fp8 is {fp8}, but {reason}; leave it out")


def block_spec(config: ModelConfig, transformer: Any, transformer_engine: bool) -> Any:
    """The transformer block: Megatron-Core's layer around our attention and norms.

    Norms stay separate from the linear layers with Transformer Engine too: an adapter needs the norm's output, and
    state dicts keep the same names on both backends. They are ours on both: torch's kernel is fused, and Transformer
    Engine prepares its norm, an operation that could be fused with others, again at every call.
    """
    column: Any = AdaptableColumnParallelLinear
    row: Any = AdaptableRowParallelLinear
    norm: Any = NORMS[config.norm][1]
    if transformer_engine:
        column, row = transformer_engine_linears()
    activation: Any = ACTIVATIONS[config.activation][1]
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    ropes = tuple(config.rope_of(layer) for layer in range(config.num_layers))
    after: Any = norm if config.norm_places != "before" else None
    add: Any = get_bias_dropout_add
    if after is not None or config.multipliers.residual != 1:
        add = ModuleSpec(
            module=ResidualAdd, params={"config": transformer, "scale": config.multipliers.residual, "norm": after}
        )
    before: Any = norm if config.norm_places != "after" else IdentityOp
    of_heads: dict[str, Any] = {"q": None, "k": None}
    if config.qk_norm:
        of_heads = dict.fromkeys(of_heads, norm)
    if config.qk_norm_over_all:
        heads = {"q": config.num_attention_heads, "k": config.num_query_groups}
        of_heads = {part: partial(HeadsRMSNorm, heads=count) for part, count in heads.items()}
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=partial(PackAttention, windows=windows, ropes=ropes),
        linear_proj=row,
        q_layernorm=of_heads["q"],
        k_layernorm=of_heads["k"],
    )
    layer = ModuleSpec(
        module=TransformerLayer if after is None else LayerWithNormsAfter,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=before,
            mlp=partial(
                MLP.as_mlp_submodule, MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=activation)
            ),
            mlp_bda=add,
            # Checkpoints carry the names of fused norms on every backend, as Megatron-Core's own do.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(transformer), layer_norm=norm)


def _check_divides(config: ModelConfig, tensor: int, pipeline: int) -> None:
    groups, heads = config.num_query_groups, config.num_attention_heads
    if heads % tensor or (groups % tensor and tensor % groups):
        raise InvalidSpecError(
            f"spec.parallelism.tensor is {tensor}, but the model has {heads} attention heads in {groups} key/value "
            "groups; choose a size that divides the heads and divides, or is a multiple of, the groups"
        )
    if config.ffn_hidden_size % tensor:
        raise InvalidSpecError(
            f"spec.parallelism.tensor is {tensor}, which does not divide the model's MLP width "
            f"{config.ffn_hidden_size}; use a divisor"
        )
    if pipeline > config.num_layers:
        raise InvalidSpecError(
            f"spec.parallelism.pipeline is {pipeline}, but the model has {config.num_layers} layers; "
            f"use {config.num_layers} or less"
        )
