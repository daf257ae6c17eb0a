"""`dpo convert` of models of several sizes: the rate, against copying the files, and the memory by which it grows.

    python benchmarks/convert.py [--gib 1 10] [--to megatron nemo huggingface] [--no-check]

Llamas of one width and more and more layers, with random bf16 weights. Each conversion is a process of its own, which
reads the model twice (to write it, and to compare) and the result once. The peer is `cp` of the source's files, after
which it is synced. A conversion's growth is its peak resident memory less what it had before its first read; it should
not depend on the model's size. The last line is JSON.
"""

# ruff: noqa: E402 - the packages are found from here
import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "trainer")]

from peers.memory import status

from dpo_api.models.reader import parse_config
from dpo_store import open_store
from dpo_trainer.convert.command import main as convert
from dpo_trainer.formats.export import PlannedFile, file_names, index_of, plan_shards, write_tensors
from dpo_trainer.formats.layout import slots

GIB = 2**30
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
SHARD = 2 * GIB


def make(folder: Path, gib: float) -> int:
    """Write a model of about this size; return its bytes."""
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 11008 + 2 * 4096)
    layers = max(1, round((gib * GIB - 4 * 4096 * 32000) / layer))
    raw = SHAPE | {"num_hidden_layers": layers}
    config = parse_config(raw, "config.json")
    every = slots(config, range(layers), first=True, last=True)
    plan = [
        (name, shape, torch.bfloat16)
        for slot in every
        for name, shape in zip(slot.sources, slot.shapes, strict=True)
    ]  # fmt: skip
    shards = plan_shards(plan, SHARD)
    files = [PlannedFile(name, 0, 0, held) for name, held in zip(file_names(len(shards)), shards, strict=True)]
    store = open_store()

    def values(file: PlannedFile) -> Iterator[Tensor]:
        for _, shape, dtype in file.tensors:
            yield torch.randn(shape).to(dtype)

    for file in files:
        write_tensors(store, str(folder / file.name), file.tensors, values(file))
    (folder / "model.safetensors.index.json").write_bytes(index_of(files))
    (folder / "config.json").write_text(json.dumps(raw))
    return sum(file.size for file in files)


def measure(source: str, target: str, form: str, *more: str) -> dict[str, float]:
    """Convert in this process; its seconds, and the growth of its peak in bytes."""
    before, began = status("VmHWM"), time.perf_counter()
    code = convert([source, target, f"--to={form}", f"--max-shard-bytes={SHARD}", *more])
    if code:
        raise SystemExit(code)
    return {"seconds": time.perf_counter() - began, "grown": status("VmHWM") - before}


def copied(source: Path, target: Path) -> float:
    """Copy a folder and sync it; its seconds."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Print a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--to", nargs="+", default=["megatron", "nemo"], choices=["megatron", "nemo", "huggingface"])
    parser.add_argument("--folder", help="where to write; it needs three times the largest size [a temporary folder]")
    parser.add_argument("--no-check", action="store_true", help="compare neither parameters nor log-probs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, *(["--no-check"] if options.no_check else []))))
        return
    rows = []
    print(f"{'GiB':>6} {'to':12} {'s':>7} {'MiB/s':>7} {'cp, s':>7} {'ratio':>6} {'grown, MiB':>11}")
    for gib in options.gib:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="dpo-convert-") as name:
            source = Path(name) / "source"
            source.mkdir()
            size = make(source, gib)
            peer = copied(source, Path(name) / "copy")
            subprocess.run(["rm", "-r", Path(name) / "copy"], check=True)
            for form in options.to:
                target = Path(name) / ("out.nemo" if form == "nemo" else "out")
                words = [sys.executable, __file__, "--child", source, target, form]
                words += ["--no-check"] if options.no_check else []
                found = json.loads(subprocess.run(words, check=True, capture_output=True).stdout.splitlines()[-1])
                subprocess.run(["rm", "-r", target], check=True)
                row = {"gib": size / GIB, "to": form, "copy_s": peer, "ratio": peer / found["seconds"], **found}
                rows.append(row)
                print(
                    f"{row['gib']:6.2f} {form:12} {row['seconds']:7.1f} {size / 2**20 / row['seconds']:7.0f}"
                    f" {peer:7.1f} {row['ratio']:6.2f} {row['grown'] / 2**20:11.0f}",
                    flush=True,
                )
    print(json.dumps({"convert": rows}))


if __name__ == "__main__":
    main()
