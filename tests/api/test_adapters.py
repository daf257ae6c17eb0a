"""A start model's adapter is read, or refused by one sentence that names the key or the tensor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_api.errors import InvalidModelError, InvalidSpecError, NotFoundError
from dpo_api.learning import Lora
from dpo_api.models.adapter import continued, read_adapter
from dpo_api.models.config import ModelConfig
from dpo_api.models.reader import parse_config
from dpo_store import open_store

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "target_modules": ["q_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def model(family: str = "llama", **changes: Any) -> ModelConfig:
    sizes = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return parse_config({"model_type": family, **sizes, **changes}, "config.json")


def write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, tuple[int, ...]] | None = None) -> str:
    found = {f"{Q}.lora_A.weight": (3, 8), f"{Q}.lora_B.weight": (8, 3), **(tensors or {})}
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in found.items() if shape}
    save_file(arrays, folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_is_read(tmp_path: Path) -> None:
    down = "base_model.model.model.layers.1.mlp.down_proj"
    more = {f"{down}.lora_A.weight": (3, 12), f"{down}.lora_B.weight": (8, 3)}
    found = read_adapter(open_store(), write(tmp_path, tensors=more), model())
    assert found.targets == ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    assert (found.rank, found.scale) == (3, 2.0)
    rooted = read_adapter(open_store(), write(tmp_path, {"use_rslora": True}), model())
    assert rooted.scale == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"bias": "all"}, "bias is 'all', trained biases: not supported; merge the adapter first"),
        ({"use_dora": True}, "use_dora is True, DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], whole trained modules"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .*, ranks that differ"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is .*, scales that differ"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', changed weights of the base model"),
        ({"r": 0}, "r is 0, not a whole number above 0"),
        ({"r": "8"}, "r is '8', not a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number above 0"),
        ({"r": 4}, r"lora_A of model.layers.0.self_attn.q_proj has shape \[3, 8\], but r 4 .* mean \[4, 8\]"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=says):
        read_adapter(open_store(), write(tmp_path, config), model())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{Q}.lora_B.weight": ()}, "lora_B of model.layers.0.self_attn.q_proj is missing"),
        ({f"{Q}.lora_A.weight": (3, 16)}, r"has shape \[3, 16\], but r 3 and this model mean \[3, 8\]"),
        ({"base_model.model.lm_head.lora_A.weight": (3, 8)}, "tensor base_model.model.lm_head.lora_A.weight is none"),
        ({f"{Q.replace('.0.', '.2.')}.lora_A.weight": (3, 8)}, "layers.2.self_attn.q_proj.lora_A.weight is none"),
        ({f"{Q}.base_layer.weight": (8, 8)}, "base_layer.weight is none of an adapter of this model"),
        ({f"{Q}.lora_B.weight": (), f"{Q}.lora_A.weight": (), "other": (1,)}, "tensor other is none"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tensors: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=says):
        read_adapter(open_store(), write(tmp_path, tensors=tensors), model())


def test_files_that_are_absent_or_damaged_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(InvalidModelError, match=r"adapter_model\.safetensors: not a safetensors file"):
        read_adapter(open_store(), folder, model())
    weights.unlink()
    with pytest.raises(NotFoundError, match=r"holds adapter_config\.json, but not adapter_model\.safetensors"):
        read_adapter(open_store(), folder, model())
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidModelError, match=r"adapter_model\.bin: pickled weights are not read"):
        read_adapter(open_store(), folder, model())
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InvalidModelError, match="must hold a JSON object"):
        read_adapter(open_store(), folder, model())


def settings(found: Lora) -> tuple[Any, ...]:
    return found.rank, found.alpha, found.rslora, found.modules, found.layers


def test_an_adapter_that_is_continued_decides_the_settings(tmp_path: Path) -> None:
    """Of the model's two layers one has an adapter, then both; settings that agree may be given."""
    one = read_adapter(open_store(), write(tmp_path, {"use_rslora": True}), model())
    given = Lora(continue_adapter=True, dropout=0.1)
    found = continued(given, one, model())
    assert settings(found) == (3, 6.0, True, ("attention_qkv",), (0,))
    assert (found.dropout, found.continue_adapter) == (0.1, True)
    assert continued(found, one, model()) == found
    down = "base_model.model.model.layers.1.mlp.down_proj"
    more = {f"{down}.lora_A.weight": (3, 12), f"{down}.lora_B.weight": (8, 3)}
    both = read_adapter(open_store(), write(tmp_path, tensors=more), model())
    assert settings(continued(given, both, model())) == (3, 6.0, False, ("attention_qkv", "mlp_fc2"), None)
    agreeing = Lora(continue_adapter=True, rank=3, layers=(1, 0), target_modules=("mlp_fc2", "attention_qkv"))
    assert settings(continued(agreeing, both, model())) == (3, 6.0, False, ("attention_qkv", "mlp_fc2"), None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rank": 4}, "spec.lora.rank: not that of model.adapter, 3; leave it out"),
        ({"alpha": 3.0}, "spec.lora.alpha: not that of model.adapter, 6.0"),
        ({"rslora": True}, "spec.lora.rslora: not that of model.adapter, False"),
        ({"target_modules": ("all",)}, r"spec.lora.targetModules: not that of model.adapter, \['attention_qkv'\]"),
        ({"layers": (0, 1)}, r"spec.lora.layers: not that of model.adapter, \[0\]"),
    ],
)
def test_a_setting_that_is_not_the_adapter_s_is_refused(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    adapter = read_adapter(open_store(), write(tmp_path), model())
    with pytest.raises(InvalidSpecError, match=says):
        continued(Lora(continue_adapter=True, **given), adapter, model())
