"""LoRA adapters written by PEFT, as a supervised fine-tuning leaves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def write_adapter(model: Path, folder: Path, **changes: Any) -> Path:
    """Write an adapter of a model folder with random matrices, and ``folder``/merged, what PEFT makes of both."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    merged = folder / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    for file in model.glob("token*"):
        (merged / file.name).write_bytes(file.read_bytes())
    return folder


def logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers, and PEFT for an adapter, compute for some tokens."""
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        found = PeftModel.from_pretrained(found, adapter)
    found.train(False)
    with torch.no_grad():
        result: torch.Tensor = found(input_ids=torch.arange(7, 27)[None]).logits
    return result
