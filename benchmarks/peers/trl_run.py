"""One DPO run of TRL, in an environment of its own (benchmarks/against_trl.py makes it). The last line is JSON.

python trl_run.py SETTINGS.json
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """Notes when training begins and when each optimizer step ends."""

    def __init__(self) -> None:
        self.began = 0.0
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


def adapter(settings: dict[str, Any]) -> Any:
    """The LoRA configuration, or None."""
    if settings["lora"] is None:
        return None
    from peft import LoraConfig

    wide = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank, alpha = settings["lora"]["rank"], settings["lora"]["alpha"]
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=wide, task_type="CAUSAL_LM")


def start_from(model: Any, folder: str) -> None:
    """Copy an adapter's weights into the model's, and share what the trainer shares."""
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    own = {name.replace(".default", ""): tensor for name, tensor in model.named_parameters() if "lora_" in name}
    missing = own.keys() ^ stored.keys()
    assert not missing, f"the adapters differ in {sorted(missing)[:3]}"
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    # The trainer's fused projections share one A (query, key and value; gate and up). So do TRL's here, or the two
    # would train different models.
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for other in (attention.k_proj, attention.v_proj):
            other.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
        mlp.up_proj.lora_A["default"].weight = mlp.gate_proj.lora_A["default"].weight


def main() -> None:
    """Train; print the figures."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    train = Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["chosen_response"], "rejected": r["rejected_response"]} for r in rows]
    )
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    rate = settings["learning_rate"]
    config = DPOConfig(
        output_dir=settings["out"], use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        per_device_train_batch_size=settings["micro_batch"], num_train_epochs=1, disable_tqdm=True,
        gradient_accumulation_steps=settings["batch"] // settings["micro_batch"], learning_rate=rate,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-8,
        max_grad_norm=1.0, beta=0.1, max_length=2048, gradient_checkpointing=settings["checkpointing"],
        precompute_ref_log_probs=settings["precomputed"], train_sampling_strategy="sequential",
    )  # fmt: skip
    clock = Clock()
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=train, peft_config=adapter(settings), callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )  # fmt: skip
    if settings["lora"] is not None:
        start_from(trainer.model, settings["adapter"])
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry and "train_runtime" not in entry]
    report = {
        "losses": [step["loss"] for step in steps],
        "seconds": clock.ends[-1] - clock.began,
        "first_step_at": clock.ends[0],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
