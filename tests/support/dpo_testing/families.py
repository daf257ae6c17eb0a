"""What is measured of each family. The tests bound it, and hack/families.py writes it into docs/models.md."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_api.learning import Lora
from dpo_testing.models import (
    load_model,
    local_store,
    plain_pack,
    reference_model,
    save_folder,
    shared_pack,
    token_stream,
)
from dpo_testing.runs import merged, run_here, run_processes
from dpo_testing.training_world import LORA, make
from dpo_testing.trajectories import differences
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import export_adapter
from dpo_trainer.model.forward import logits
from dpo_trainer.model.lora import adapters, attach_lora, merged_value

LABELS = {
    "llama": "Llama 2",
    "llama3": "Llama 3",
    "llama-linear": "Llama, linear",
    "llama-yarn": "Llama, YaRN",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen2-window": "Qwen2 with windows",
    "qwen3": "Qwen3",
    "nemotron": "Nemotron",
    "stablelm": "StableLM",
    "phi3": "Phi-4",
    "smollm3": "SmolLM3",
    "granite": "Granite 3",
    "olmo2": "OLMo 2",
    "gemma3": "Gemma 3",
}
"""Variant → its name in docs/models.md."""
LOGITS, LOGITS_WITH_LORA = 1e-5, 2e-5
"""Bounds of a logit's difference, where the logits' standard deviation is 1 or more."""

SEQUENCES = [token_stream(n, seed=n) for n in (23, 9, 40)]
PAIRS = [
    (token_stream(11, seed=1), token_stream(9, seed=2), token_stream(14, seed=3)),
    (token_stream(3, seed=4), token_stream(17, seed=5), token_stream(1, seed=6)),
]
_PACK = plain_pack([token_stream(30, seed=3)])

STEADY = {"maxSteps": 5, "learningRate": 5e-4, "validationInterval": 4, "eps": 1e-6}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2, sequence": (2, {"tensor": 2, "sequence": True}),
    "TP4 of 2 groups": (4, {"tensor": 4}),
    "CP2": (2, {"context": 2}),
    "TP2 PP2, sequence": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}
"""Name → processes, and the parallelism of the spec."""


@torch.no_grad()
def theirs(reference: Any, tokens: Tensor) -> Tensor:
    """Logits of transformers' model, [tokens, vocabulary]."""
    out: Tensor = reference(tokens[None]).logits[0]
    return out


def response_logits(reference: Any) -> Tensor:
    """Those of the rows that predict the responses of ``PAIRS``, each pair's prompt before each response."""
    texts = [(prompt, response) for prompt, *responses in PAIRS for response in responses]
    rows = [theirs(reference, torch.cat([prompt, response]))[len(prompt) - 1 : -1] for prompt, response in texts]
    return torch.cat(rows)


@torch.no_grad()
def logit_differences(reference: Any, ours: Any) -> dict[str, float]:
    """Form of the batch → the largest difference of a logit to transformers'."""
    each = [theirs(reference, tokens) for tokens in SEQUENCES]
    assert all(expected.std() >= 1 for expected in each)
    alone = [logits(ours, plain_pack([tokens])) for tokens in SEQUENCES]
    packed = logits(ours, plain_pack(SEQUENCES, padding=5))[: sum(map(len, SEQUENCES))]
    pack = shared_pack(PAIRS, padding=3)
    pack.validate()
    return {
        "alone": _apart(torch.cat(alone), torch.cat(each)),
        "packed": _apart(packed, torch.cat(each)),
        "shared prompts": _apart(logits(ours, pack)[pack.rows], response_logits(reference)),
    }


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
def adapter_differences(variant: str, folder: Path) -> dict[str, float]:
    """Reader of what a model with LoRA was exported as → the largest difference of a logit to the trainer's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def distance(model: Any) -> float:
        return _apart(theirs(model.eval(), _PACK.tokens), ours)

    load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    start = save_folder(reference_model(variant), folder / "start")
    lora = Lora(rank=4, alpha=6.0, target_modules=("all",), column_init="kaiming")
    model = load_model(start).eval()
    before = logits(model, _PACK)
    attach_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model):
        adapter.linear_out.weight.normal_(std=0.1, generator=generator)
    ours = logits(model, _PACK)
    assert _apart(ours, before) > 0.1
    export_adapter(model, lora, str(start), folder / "adapter")
    export(model, local_store(), str(start), folder / "merged", value_of=merged_value(model))
    return {
        "PEFT": distance(PeftModel.from_pretrained(load(start), folder / "adapter")),
        "transformers, merged": distance(load(folder / "merged")),
        "the trainer, merged": _apart(logits(load_model(folder / "merged"), _PACK), ours),
    }


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def unlike_weights(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not in both folders with the same type and the same bits."""
    first, second = weights(one), weights(other)
    assert first, one
    return sorted(first.keys() ^ second.keys()) + [
        name
        for name in first.keys() & second.keys()
        if first[name].dtype != second[name].dtype
        or not torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
    ]


def there_and_back(variant: str, dtype: torch.dtype, folder: Path) -> tuple[Path, list[str]]:
    """Load and export a model; return the folder it came from and the names of the files that were written.

    They are in ``folder``/out.
    """
    source = save_folder(reference_model(variant, dtype=dtype), folder / "in")
    model = load_model(source, precision="fp32" if dtype == torch.float32 else "bf16")
    return source, export(model, local_store(), str(source), folder / "out")


def unlike_trajectories(variant: str, layout: str, folder: Path) -> list[str]:
    """Sentences that say where a DPO run in this layout differs from the run of one process."""
    processes, parallelism = LAYOUTS[layout]
    spec = merged(make(folder, pairs=11, variant=variant), {"training": STEADY})
    alone = run_here(spec, folder / "alone")
    losses = alone.series("train/preference_loss")
    assert losses[-1] < losses[0] - 0.1
    # A reference of its own: computed in this layout, not read from the other run's cache.
    changed = merged(spec, {"parallelism": parallelism, "reference": {"cacheURI": str(folder / "its reference")}})
    split = run_processes(changed, folder / "split", processes=processes, scratch=folder / "scratch")
    found = differences(alone, split)
    return found if "layout verified: " in (folder / "scratch" / "log").read_text() else [*found, "not verified"]


def unlike_adapters(variant: str, folder: Path) -> list[str]:
    """The same with LoRA and two tensor-parallel processes, each matrix of the adapter included."""
    spec = merged(make(folder, pairs=11, variant=variant), {"training": STEADY})
    spec = merged(spec, {"lora": LORA["lora"], "training": {"learningRate": 2e-3}})
    alone = run_here(spec, folder / "alone")
    changed = merged(spec, {"parallelism": {"tensor": 2}, "reference": {"cacheURI": str(folder / "its reference")}})
    split = run_processes(changed, folder / "split", processes=2, scratch=folder / "scratch")
    one, two = (load_file(run.folder / "model" / "adapter" / "adapter_model.safetensors") for run in (alone, split))
    found = [*differences(alone, split), *sorted(one.keys() ^ two.keys())]
    for name in one.keys() & two.keys():
        assert one[name].abs().max() > 0, name
        gap = _apart(one[name], two[name])
        if not gap <= LOGITS:
            found.append(f"{name} ends {gap:.1e} away")
    return found


# -- the table of docs/models.md

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
HEAD = "| family | logits | LoRA | there and back | DPO run | DPO run with LoRA |"
HOLDS = "✓"


@dataclass(frozen=True)
class Row:
    """A family's line: two largest differences of a logit, and what holds."""

    label: str
    logits: str
    lora: str
    there_and_back: str
    run: str
    run_with_lora: str

    def __str__(self) -> str:
        """The line of the table."""
        cells = (self.label, self.logits, self.lora, self.there_and_back, self.run, self.run_with_lora)
        return f"| {' | '.join(cells)} |"


_TABLE = re.compile(re.escape(HEAD) + r"\n\|(?:---\|)+\n((?:\|.*\n)+)")


def rows_of(page: str) -> list[Row]:
    """The rows of the page's table."""
    found = _TABLE.search(page)
    assert found is not None, HEAD
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in found[1].splitlines()]


def with_rows(page: str, rows: list[Row]) -> str:
    """The page with these rows in its table, in place of those of the same families."""
    known = {row.label: row for row in rows_of(page)} | {row.label: row for row in rows}
    text = "".join(f"{known[label]}\n" for label in LABELS.values() if label in known)
    return _TABLE.sub(lambda found: found[0].removesuffix(found[1]) + text, page)


def assert_like_the_page(variant: str, column: str, measured: float) -> None:
    """The page's figure is about what is measured here. Another processor adds in another order."""
    row = next(row for row in rows_of(PAGE.read_text(encoding="utf-8")) if row.label == LABELS[variant])
    said = float(getattr(row, column))
    assert said / 4 <= measured <= 4 * said, f"{row.label}: {column} is {measured:.1e}; the page says {said:.1e}"
