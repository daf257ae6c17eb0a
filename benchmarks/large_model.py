"""A model of a size that shows in memory, divided among processes: what each part of a run takes, and what it reads.

    python benchmarks/large_model.py [--layers 4 --vocabulary 16000 --tokens 1024 --processes 2 --pipeline 1 --lora]

Random bf16 weights of a 1B model's widths are written to a temporary folder and trained for a few steps on the CPU, by
the launcher: TP2, or PP2 with --pipeline 2. A checkpoint is written while training goes on, and the result is exported.
Each rank's memory is sampled 20 times a second, less what it had before loading, and compared with what dpo_api.sizing
predicts. On the CPU, a checkpoint is written from the live state if that takes less time than the forward and backward
passes of a step. The bytes read must be the folder's.
The defaults take 12 GiB of memory and 6 GB of disk; with --lora --layers 16 --vocabulary 32000, a model of 1.1 billion
parameters, they take 7 GiB and 6 GB. The sizes of SmolLM 135M, in fp32 and one process: --processes 1 --precision fp32
--hidden 576 --ffn 1536 --layers 30 --groups 3 --vocabulary 49152 --tied --tokens 2048. The last line is JSON.
"""

# ruff: noqa: E402 - the test support lies where only pytest finds it by itself
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support")]

from dpo_api.models import read_config
from dpo_api.sizing import layout_of, memory_of
from dpo_api.sizing.memory import value_bytes
from dpo_api.spec import DPOJobSpec
from dpo_store import open_store
from dpo_testing.corpora import WORDS, llama_tokenizer, write_jsonl
from dpo_testing.runs import job_of
from dpo_testing.trajectories import workers_of

EVERY_SECONDS = 0.05
HEAD = 64
MIB = 2**20
GOAL = 0.1
"""How far a measured peak may be from the prediction, as a share of it."""


def write_model(folder: Path, sizes: argparse.Namespace) -> int:
    """Write a Llama of these sizes, one file a layer; return the bytes of its files of weights."""
    folder.mkdir()
    llama_tokenizer(folder, 384)
    h, f = sizes.hidden, sizes.ffn
    kv = HEAD * sizes.groups if sizes.groups else max(h // 4, HEAD)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": h,
        "intermediate_size": f, "num_hidden_layers": sizes.layers, "num_attention_heads": h // HEAD, "head_dim": HEAD,
        "num_key_value_heads": kv // HEAD, "vocab_size": sizes.vocabulary, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": sizes.tied, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()

    place: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{sizes.layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        place.update(dict.fromkeys(tensors, name))

    for layer in range(sizes.layers):
        ours = f"model.layers.{layer}"
        shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
        shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        tensors = {f"{ours}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{ours}.{name}.weight": torch.ones(h, dtype=torch.bfloat16) for name in norms}
        save(layer, tensors)
    rest = {"model.embed_tokens.weight": draw(sizes.vocabulary, h)}
    rest |= {} if sizes.tied else {"lm_head.weight": draw(sizes.vocabulary, h)}
    save(sizes.layers, {**rest, "model.norm.weight": torch.ones(h, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def spec_of(folder: Path, sizes: argparse.Namespace) -> dict[str, Any]:
    """Four steps of two packs, each of one pair that nearly fills it; a checkpoint after the second and the last.

    All pairs are equal: oneDNN keeps the code that it makes for each shape.
    """
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    words = " ".join(random.Random(1).choices(WORDS, k=sizes.tokens))
    response = tokenizer.decode(tokenizer.encode(words, add_special_tokens=False).ids[: sizes.tokens // 2 - 16])
    row = {"prompt": "model ", "chosen_response": f"a {response}", "rejected_response": f"b {response}"}
    write_jsonl(folder / "train.jsonl", [row] * 8)
    lora = {"lora": {"rank": 16, "alpha": 16, "targetModules": ["all"]}} if sizes.lora else {}
    return lora | {
        "model": {"huggingFace": {"uri": str(folder / "model")}},
        "data": {
            "train": [{"uri": str(folder / "train.jsonl")}], "maxLength": sizes.tokens // 2, "boundary": "separate"
        },
        "training": {
            "globalBatchSize": 2, "maxSteps": 4, "learningRate": 1e-5, "schedule": {"warmupSteps": 0},
            "precision": sizes.precision, "packing": {"maxTokens": sizes.tokens}, "activationRecomputation": "none",
        },
        "parallelism": {
            "tensor": sizes.processes // sizes.pipeline, "pipeline": sizes.pipeline, "sequence": False, "verify": False
        },
        "checkpoint": {"everySteps": 2, "async": True, "keep": 1},
        "reference": {"cacheURI": str(folder / "reference")},
    }  # fmt: skip


def field(process: int, file: str, name: str) -> int:
    """A number of /proc/PID/status (in bytes) or /proc/PID/io; 0 once the process has ended."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/{file}").read_text(encoding="ascii")
        if found := re.search(rf"^{name}:\s+(\d+)( kB)?", text, re.MULTILINE):
            return int(found[1]) * (1024 if found[2] else 1)
    return 0


def part_of(events: Path) -> tuple[str, int]:
    """The part of the run that rank 0 has reported (imports, index, load, reference, step, save, export); the step."""
    with suppress(OSError):
        lines = [json.loads(line) for line in events.read_bytes().split(b"\n")[:-1]]
        phases, step = [line["phase"] for line in lines], lines[-1]["step"] if lines else 0
        match phases[-1:]:
            case ["starting"]:
                return "load" if "loading" in lines[-1].get("message", "") else "imports", step
            case ["train" | "checkpoint"]:
                return "save" if "checkpoint" in phases else "step", step
            case [phase]:
                return str(phase), step
    return "imports", 0


def waited(port: int) -> float | None:
    """Seconds for which training has waited for checkpoints, from /metrics."""
    with suppress(OSError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            text = answer.read().decode()
        if found := re.search(r"^dpo_checkpoint_wait_seconds_total(?:\{[^}]*\})? (\S+)", text, re.MULTILINE):
            return float(found[1])
    return None


class Run:
    """One run, watched from outside."""

    def __init__(self, folder: Path, sizes: argparse.Namespace) -> None:
        """Run it to its end."""
        self.most: dict[str, dict[int, int]] = {}
        """Part of the run → rank → most bytes of anonymous memory."""
        self.waits: dict[int, float] = {}
        """Step → seconds for which training had waited for checkpoints while it was the last one."""
        events = folder / "events.jsonl"
        (folder / "spec.json").write_text(job_of(spec_of(folder, sizes)).to_json())
        command = [sys.executable, "-m", "dpo_trainer", "launch", f"--spec={folder / 'spec.json'}"]
        command += [f"--run-dir={folder / 'out'}", f"--processes={sizes.processes}", f"--events={events}"]
        command += [f"--port={sizes.port}", "--host=127.0.0.1"]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4]), "OMP_NUM_THREADS": "1"}
        # What is freed goes back to the kernel, so that resident memory is what is held.
        variables |= {"DPO_CACHE_DIR": str(folder / "cache"), "MALLOC_MMAP_THRESHOLD_": "131072"}
        ranks: dict[int, int] = {}
        with (folder / "log").open("wb") as log, subprocess.Popen(
            command, stdout=log, stderr=log, env=variables
        ) as child:  # fmt: skip
            asked = time.monotonic()
            while child.poll() is None:
                if len(ranks) < sizes.processes:
                    ranks = workers_of(folder)
                part, step = part_of(events)
                here = self.most.setdefault(part, {})
                for rank, process in ranks.items():
                    here[rank] = max(here.get(rank, 0), field(process, "status", "RssAnon"))
                if part == "save" and time.monotonic() - asked > 0.5:
                    asked, found = time.monotonic(), waited(sizes.port)
                    self.waits |= {} if found is None else {step: found}
                time.sleep(EVERY_SECONDS)
        self.log = (folder / "log").read_text()
        if child.returncode:
            sys.exit(f"the run ended with {child.returncode}:\n{self.log[-3000:]}")

    def peak(self, part: str) -> int:
        """The most bytes of a rank in a part of the run, less what it had before loading."""
        before = self.most.get("index", self.most["imports"])
        return max((bytes_ - before[rank] for rank, bytes_ in self.most.get(part, {}).items()), default=0)


def predictions(folder: Path, sizes: argparse.Namespace) -> dict[str, int]:
    """Bytes of the rank that takes the most, in each part of the run."""
    config = read_config(open_store(), str(folder / "model"))
    spec: DPOJobSpec = job_of(spec_of(folder, sizes)).spec
    layout = layout_of(spec, sizes.processes)
    memory = memory_of(config.facts, spec, layout)
    held = memory.weights + memory.gradients + memory.optimizer
    most = sizes.hidden * max(sizes.vocabulary, sizes.ffn)
    loading = memory.weights + 2 * most  # a rank holds at most one tensor beside its part, in the files' bf16
    saving = 4 * most // layout.tensor  # the box that is being written
    # The tensor-parallel parts of a tensor, the whole one, and the one that is being written.
    exporting = held + 3 * value_bytes(spec) * most
    return {"load": loading, "step": memory.total, "save": memory.total + saving, "export": exporting}


def main() -> None:
    """Write the model, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("ffn", 8192), ("layers", 4), ("vocabulary", 16000), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--port", type=int, default=29411)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--groups", type=int, help="key/value heads; without it, a quarter of the query heads")
    parser.add_argument("--tied", action="store_true", help="the LM head is the embedding")
    sizes = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpo-large-") as name:
        folder = Path(name)
        size = write_model(folder / "model", sizes)
        run = Run(folder, sizes)
        expected = predictions(folder, sizes)
    found = re.search(r"read ([\d,]+) bytes of weights in ([\d.]+) s", run.log)
    read = int(found[1].replace(",", "")) if found else None
    parts = {part: {"measured": run.peak(part), "predicted": bytes_} for part, bytes_ in expected.items()}
    print(f"| {'part':8} | {'measured MiB':>12} | {'predicted MiB':>13} | ratio |")
    for part, row in parts.items():
        ratio = row["measured"] / row["predicted"]
        print(f"| {part:8} | {row['measured'] / MIB:12,.0f} | {row['predicted'] / MIB:13,.0f} | {ratio:5.2f} |")
    report = {
        "sizes": vars(sizes),
        "folder_bytes": size,
        "read_bytes": read,
        "load_seconds": float(found[2]) if found else None,
        "seconds_waited_for_checkpoints_by_step": run.waits,
        "parts": parts,
        "within_goal": all(abs(row["measured"] / row["predicted"] - 1) <= GOAL for row in parts.values()),
        "peak_of_a_process": max(max(ranks.values(), default=0) for ranks in run.most.values()),
        "other_parts": {part: run.peak(part) for part in run.most if part not in parts},
    }
    print(json.dumps(report))
    if read != size:
        sys.exit(f"{read} bytes of weights were read, the folder has {size}")


if __name__ == "__main__":
    main()
