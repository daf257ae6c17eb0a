"""`make quickstart`: a small world, a base model, and a DPOJob over S3 that aligns it; the numbers before and after.

What happens, in order, all below runs/quickstart/:

1. world/: a tokenizer, an untrained 2-layer Llama, facts, questions, preferences (world.py);
2. sft/: the base model, by `dpo run` of examples/quickstart/sft.yaml: knows the answers, refuses half of the time;
3. the base model and the preferences go into an S3 server that lives as long as this script;
4. run/: the aligned model, by `dpo run` of examples/quickstart.yaml over S3, with two processes;
5. both models answer questions that no preference holds.
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
    """Run the `dpo` command in the foreground; stop here when it fails."""
    done = subprocess.run([sys.executable, "-m", "dpo_cli", *words], env={**os.environ, **variables}, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def told(name: str, found: dict[str, Any]) -> str:
    """One row of the result."""
    shares = "  ".join(f"{key} {100 * found[key]:5.1f} %" for key in ("right", "refused", "garbage"))
    return f"  {name:8s} {shares}   (of {found['prompts']} prompts)"


def main() -> None:
    """Do all of it; a finished base model is used again."""
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

    print("\n— questions that are not among the preferences, one sample each at temperature 1 —", flush=True)
    test = HOME / "world" / "test.jsonl"
    before, after = ask(HOME / "sft" / "model", test), ask(HOME / "run" / "model", test)
    (HOME / "result.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")
    for old, new in zip(before["samples"], after["samples"], strict=True):
        question = old["prompt"].split("User\n")[1].split("\n")[0]
        print(f"  {question}\n    before: {old['sample']!r}\n    after:  {new['sample']!r}")
    print(told("before", before), told("after", after), sep="\n")
    shares = f"{100 * after['right']:.0f} % of held-out questions (before: {100 * before['right']:.0f} %)"
    print(f"result      answers {shares}")
    print(f"            report: {HOME}/run/report.html · model: {HOME}/run/model · {time.monotonic() - began:.0f} s")
    print("next        write your own manifest: examples/llama3-8b-lora.yaml · run it here: dpo run -f FILE")
    print("            on a cluster: kubectl apply -f FILE")


if __name__ == "__main__":
    main()
