"""Measures every family against transformers and PEFT: ``python hack/families.py``.

It prints the table of docs/models.md ("What is checked"), and with ``--write`` writes it there. ``--only llama qwen2``
measures some variants of tests/support/dpo_testing/models.py and leaves the other rows as they are. The columns:

- logits: the largest difference of a logit to transformers', over sequences alone, packed and with shared prompts
- LoRA: the same between the trainer's model with LoRA and PEFT's with the exported adapter, transformers' of the merged
  folder, and the trainer's of the merged folder
- there and back: whether a model in fp32 and one in bf16 leave as they came, bit by bit
- DPO run, with LoRA: whether two tensor-parallel processes train as one does: losses, gradient norms, weights

A check that does not hold is named on stderr, has no ✓, and makes the exit code 1. It takes less than half a minute
for each on one core. The tests call the same functions (tests/support/dpo_testing/families.py).
"""

# ruff: noqa: E402 - the packages are found from here
import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support")]

import torch

from dpo_testing import families
from dpo_testing.families import HEAD, HOLDS, LABELS, LOGITS, LOGITS_WITH_LORA, PAGE, Row
from dpo_testing.models import load_model, reference_model, save_folder, single_process

FAILS = "fails"


def measure(variant: str, folder: Path) -> Row:
    """Measure one variant; its files go to an empty folder."""

    def mark(column: str, unlike: Callable[[], list[str]]) -> str:
        try:
            found = unlike()
        except Exception as error:  # noqa: BLE001 - whatever it is, the table says that it fails
            found = [f"{type(error).__name__}: {str(error)[:300]}"]
        if found:
            print(f"{variant}: {column}: {'; '.join(found[:3])}", file=sys.stderr)
        return FAILS if found else HOLDS

    def figure(column: str, found: dict[str, float], bound: float) -> str:
        worst = max(found, key=lambda name: found[name])
        if not found[worst] <= bound:
            print(f"{variant}: {column}: {worst} is {found[worst]:.1e} away, beyond {bound:.0e}", file=sys.stderr)
            return f"{found[worst]:.1e} {FAILS}"
        return _short(found[worst])

    def copies() -> list[str]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            source, _ = families.there_and_back(variant, dtype, folder / str(dtype))
            found += families.unlike_weights(source, folder / str(dtype) / "out")
        return found

    with single_process():
        reference = reference_model(variant)
        ours = load_model(save_folder(reference, folder / "model")).eval()
        logits = figure("logits", families.logit_differences(reference, ours), LOGITS)
        lora = figure("LoRA", families.adapter_differences(variant, folder / "lora"), LOGITS_WITH_LORA)
        back = mark("there and back", copies)
    return Row(
        LABELS[variant],
        logits,
        lora,
        back,
        mark("DPO run", lambda: families.unlike_trajectories(variant, "TP2", folder / "run")),
        mark("DPO run with LoRA", lambda: families.unlike_adapters(variant, folder / "run with LoRA")),
    )


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure the families, for the table of docs/models.md.")
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS), help="these variants")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/models.md")
    options = parser.parse_args()
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n", flush=True)
    rows = []
    for variant in options.only:
        with tempfile.TemporaryDirectory(prefix="dpo-families-") as name:
            os.environ["DPO_CACHE_DIR"] = str(Path(name) / "cache")
            (Path(name) / "run").mkdir()
            (Path(name) / "run with LoRA").mkdir()
            with redirect_stdout(sys.stderr):  # what the runs print
                rows.append(measure(variant, Path(name)))
        print(rows[-1], flush=True)
    if options.write:
        PAGE.write_text(families.with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(FAILS in str(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
