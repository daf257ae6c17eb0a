"""Packs, and what building a model refuses."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from dpo_api.errors import InvalidSpecError
from dpo_api.models import ModelConfig
from dpo_testing.models import (
    load_model,
    plain_pack,
    reference_model,
    save_folder,
    shared_pack,
    single_process,
    token_stream,
)
from dpo_trainer.model.build import block_spec, build_model, transformer_config
from dpo_trainer.model.forward import hidden_rows
from dpo_trainer.model.norm import RMSNorm
from dpo_trainer.model.pack import Pack, Segment

SHARED = shared_pack([tuple(token_stream(n) for n in (4, 3, 2)), tuple(token_stream(n) for n in (2, 1, 5))], padding=2)  # type: ignore[arg-type]
CONFIG = ModelConfig("llama", 120, 48, 80, 2, 6, 2, 8)


def test_a_good_pack_validates() -> None:
    SHARED.validate()
    plain_pack([token_stream(4), token_stream(5)], padding=1).validate()
    assert (SHARED.length, SHARED.used) == (19, 17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": (Segment(0, 4), Segment(3, 6))}, "overlaps"),
        ({"segments": (Segment(0, 0),)}, "empty"),
        ({"segments": (Segment(0, 99),)}, "leaves the stream"),
        ({"segments": (Segment(0, 4, parent=1), Segment(4, 6))}, "does not come before"),
        ({"segments": (Segment(0, 2), Segment(2, 4, 0), Segment(4, 6, 1))}, "has a parent itself"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64)}, "position_ids has shape"),
        ({"origins": torch.zeros(3, dtype=torch.int64)}, "origins has shape"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, "differ in length"),
        ({"rows": torch.full_like(SHARED.rows, 19)}, "outside the stream"),
        ({"owners": torch.full_like(SHARED.owners, 4)}, "an owner names"),
    ],
)
def test_a_broken_pack_is_refused(change: dict[str, Any], message: str) -> None:
    broken: Pack = replace(SHARED, **change)
    with pytest.raises(ValueError, match=message):
        broken.validate()


@pytest.fixture
def _world() -> Iterator[None]:
    with single_process():
        yield


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize(
    ("tensor", "pipeline", "change", "message"),
    [
        (4, 1, {}, r"parallelism\.tensor is 4, but the model has 6 attention heads in 2 key/value groups"),
        (2, 1, {"ffn_hidden_size": 81}, r"does not divide the model's MLP width 81"),
        (1, 4, {}, r"parallelism\.pipeline is 4, but the model has 2 layers; use 2 or less"),
    ],
)
def test_sizes_that_do_not_divide_the_model(
    tensor: int, pipeline: int, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: tensor)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pipeline)
    with pytest.raises(InvalidSpecError, match=message):
        build_model(replace(CONFIG, **change))


@pytest.mark.usefixtures("_world")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_transformer_engine_asked_for_where_it_cannot_be() -> None:
    with pytest.raises(InvalidSpecError, match=r"spec\.transformerEngine\.enabled is true, but"):
        build_model(CONFIG, backend="transformer_engine")


@pytest.mark.usefixtures("_world")
def test_transformer_engine_has_the_linear_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are the same modules with it and without it."""
    column, row = type("Column", (), {}), type("Row", (), {})
    monkeypatch.setattr("dpo_trainer.model.build.transformer_engine_linears", lambda: (column, row))
    spec = block_spec(replace(CONFIG, qk_norm=True), transformer_config(CONFIG, precision="bf16"), True)
    layer = spec.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm)
    assert {*norms, spec.layer_norm} == {RMSNorm}
    assert (attention.linear_qkv, attention.linear_proj) == (column, row)


@pytest.mark.usefixtures("_world")
def test_dtypes_follow_the_precision() -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = build_model(CONFIG, precision=precision)  # type: ignore[arg-type]
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.rope_frequencies.dtype == torch.float32


def test_a_linear_layer_is_one_matrix_product(tmp_path: Path) -> None:
    """Where the strides of [S, 1, H] differ from (H, H, 1), torch.matmul with a frozen weight makes S products."""
    strides: dict[str, tuple[int, ...]] = {}
    with single_process():
        model = load_model(save_folder(reference_model("llama"), tmp_path / "model"))
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}:
                module.register_forward_pre_hook(
                    lambda _module, given, name=name: strides.update({name: given[0].stride()})
                )
        hidden_rows(model, plain_pack([token_stream(37)]))
    assert len(strides) == 4 * model.dpo_config.num_layers
    assert [name for name, (token, row, unit) in strides.items() if (token, unit) != (row, 1)] == []
