"""`make quickstart`: trains a small base model, aligns it with a DPOJob over S3, and compares both.

The steps, all in runs/quickstart/:

1. world/: write a tokenizer, an untrained 2-layer Llama, facts, questions and preferences (world.py);
2. sft/: train the base model with `dpo run` (examples/quickstart/sft.yaml); it knows the answers, but refuses half of
   the time;
3. copy the base model and the preferences to an S3 server that runs as long as this script;
4. run/: align the model with `dpo run` (examples/quickstart.yaml) over S3, with two processes;
5. ask both models questions that are not in the preferences.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ask import ask
from world import make_world

from dpo_store.embedded import embedded_s3, environment

ROOT = Path(__file__).resolve().parents[2]
HOME = Path("runs/quickstart")


def dpo(*words: str, **variables: str) -> None:
    """Run the `dpo` command in the foreground; exit with its code if it fails."""
    done = subprocess.run([sys.executable, "-m", "dpo_cli", *words], env={**os.environ, **variables}, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def summary_row(name: str, found: dict[str, Any]) -> str:
    """Return one row of the result."""
    shares = "  ".join(f"{key} {100 * found[key]:5.1f} %" for key in ("right", "refused", "garbage"))
    return f"  {name:8s} {shares}   (of {found['prompts']} prompts)"


def main() -> None:
    """Run all steps; a finished base model is reused."""
    began = time.monotonic()
    os.chdir(ROOT)
    if not (HOME / "sft" / "export.json").exists():
        shutil.rmtree(HOME, ignore_errors=True)
        counts = make_world(HOME / "world")
        size = f"{counts['parameters'] / 1e6:.1f} M parameters"
        print(f"quickstart  a 2-layer Llama ({size}) · {counts['train']} pairs · an embedded S3 endpoint · 2 processes")
        print("\n— base model: supervised fine-tuning —", flush=True)
        dpo("run", "-f", "examples/quickstart/sft.yaml")
    shutil.rmtree(HOME / "run", ignore_errors=True)
    bucket = HOME / "bucket"
    shutil.rmtree(bucket, ignore_errors=True)
    shutil.copytree(HOME / "sft" / "model", bucket / "base")
    shutil.copytree(HOME / "world" / "preferences", bucket / "preferences")
    print("\n— alignment: dpo run -f examples/quickstart.yaml, over S3 —", flush=True)
    with embedded_s3("quickstart", bucket) as endpoint:
        settings = ("--set", f"storage.endpoint={endpoint}")
        dpo("run", "-f", "examples/quickstart.yaml", "--output", str(HOME / "run"), *settings, **environment(endpoint))

    print("\n— held-out questions, one sample each at temperature 1 —", flush=True)
    test = HOME / "world" / "test.jsonl"
    before, after = ask(HOME / "sft" / "model", test), ask(HOME / "run" / "model", test)
    (HOME / "result.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")
    for old, new in zip(before["samples"], after["samples"], strict=True):
        question = old["prompt"].split("User\n")[1].split("\n")[0]
        print(f"  {question}\n    before: {old['sample']!r}\n    after:  {new['sample']!r}")
    print(summary_row("before", before), summary_row("after", after), sep="\n")
    shares = f"{100 * after['right']:.0f} % of held-out questions (before: {100 * before['right']:.0f} %)"
    print(f"result      answers {shares}")
    print(f"            report: {HOME}/run/report.html · model: {HOME}/run/model · {time.monotonic() - began:.0f} s")
    print("next        write your own manifest, starting from examples/llama3-8b-lora.yaml")
    print("            run it on this machine: dpo run -f FILE · on a cluster: kubectl apply -f FILE")


if __name__ == "__main__":
    main()
