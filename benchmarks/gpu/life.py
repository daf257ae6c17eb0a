"""A run's life: started by the launcher, asked to stop, taken up again, exported.

The first attempt saves a checkpoint every two steps and stops on SIGTERM. All checkpoints but the first are removed, so
that the second attempt, in this process, computes steps again whose losses the first one has written.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_api.errors import Outcome
from dpo_api.manifest import DPOJob, parse_job
from dpo_trainer import bridge
from dpo_trainer.distributed import World
from dpo_trainer.launch import switches
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.stopping import StopRequest
from gpu.report import Report
from gpu.tiny import write_world

EXPORTED = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.layers.0.self_attn.o_proj.weight": "decoder.layers.0.self_attention.linear_proj.weight",
    "model.layers.1.mlp.down_proj.weight": "decoder.layers.1.mlp.linear_fc2.weight",
}
"""Tensors that are one parameter each: the name in the exported file → the trainer's."""


def run(report: Report, small: bool) -> None:
    """Live it."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        os.environ["DPO_CACHE_DIR"] = str(folder / "cache")
        job = job_of(folder, small)
        began = time.monotonic()
        code, seen = until_stopped(folder, job)
        report.add(first_attempt_seconds=time.monotonic() - began, steps_before_the_stop=max(seen, default=0))
        log = (folder / "log").read_text()[-2000:]
        report.require(code == Outcome.Stopped.exit_code, f"asked to stop, the launcher exits with {code}: {log}")
        saved = sorted((folder / "out" / "checkpoints").iterdir())
        report.require(len(saved) > 1, f"there are checkpoints {[path.name for path in saved]}, not two")
        if report.failed:
            return
        for path in saved[1:]:
            shutil.rmtree(path)
        began = time.monotonic()
        rest(report, folder, job, seen)
        report.add(second_attempt_seconds=time.monotonic() - began)


def job_of(folder: Path, small: bool) -> DPOJob:
    """A deterministic run, long enough to be stopped while it trains."""
    write_world(folder / "world", small)
    spec: dict[str, Any] = {
        "model": {"huggingFace": {"uri": str(folder / "world" / "untrained")}},
        "data": {"train": [{"uri": str(folder / "world" / "preferences" / "train.jsonl")}], "maxLength": 96},
        "training": {
            "globalBatchSize": 4 if small else 16,
            "maxSteps": 12 if small else 120,
            "learningRate": 1e-4,
            "precision": "fp32" if bridge.needed() else "bf16",
            "deterministic": True,
            "packing": {"maxTokens": 512},
        },
        "checkpoint": {"everySteps": 2, "keep": 1000},
        "reference": {"cacheURI": str(folder / "reference")},
    }
    head = {"apiVersion": "dpo-operator.dev/v1alpha1", "kind": "DPOJob", "metadata": {"name": "life"}}
    return parse_job({**head, "spec": spec})


def losses(folder: Path) -> dict[int, float]:
    """Step → loss, of what the run has written so far."""
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["train/loss"] for event in events if "train/loss" in event}


def until_stopped(folder: Path, job: DPOJob) -> tuple[int, dict[int, float]]:
    """Start the run and ask it to stop after its fourth step; its exit code and its losses."""
    (folder / "spec.json").write_text(job.to_json())
    command = [sys.executable, "-m", "dpo_trainer", "launch", f"--spec={folder / 'spec.json'}"]
    command += [f"--run-dir={folder / 'out'}", "--processes=1"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
        while child.poll() is None and max(losses(folder), default=0) < 4:
            time.sleep(0.01)
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    return code, losses(folder)


def rest(report: Report, folder: Path, job: DPOJob, seen: dict[int, float]) -> None:
    """Take the run up from its first checkpoint; losses must repeat, and the export must be the masters."""
    os.environ.update(switches(job.spec))
    world = World.join(seed=job.spec.training.seed)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        attempt = Run(job, world, StopRequest(), RunOptions(run_dir=str(folder / "out")))
        attempt.execute()
        again = losses(folder)
        first = min(again, default=0)
        repeated = [step for step in sorted(seen) if step > 2]
        report.require(len(repeated) > 1, f"the first attempt wrote steps {sorted(seen)}, none of them to repeat")
        for step in repeated:
            report.require(
                again.get(step) == seen[step],
                f"step {step} has the loss {again.get(step)} after a resumption, {seen[step]} before",
            )
        report.add(steps_repeated=len(repeated), first_step_kept=first)
        exported(report, folder, attempt)
    finally:
        world.leave()
        torch.use_deterministic_algorithms(mode=False)
    report.add(host_peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    if world.device.type == "cuda":
        report.add(gpu_peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def exported(report: Report, folder: Path, attempt: Run) -> None:
    """Compare the exported file with the optimizer's fp32 masters, bit for bit."""
    assert attempt.training is not None
    engine = attempt.training.engine
    named: dict[str, Tensor] = dict(engine.model.named_parameters())
    files = (folder / "out" / "model").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for theirs, ours in EXPORTED.items():
        master = engine.masters.whole(named[ours])
        assert master is not None
        same = torch.equal(tensors[theirs].float(), master.cpu().float().to(tensors[theirs].dtype).float())
        report.require(same, f"the exported {theirs} is not the optimizer's master")
    if bridge.needed():
        return
    groups = [group for part in _optimizers(engine.optimizer) for group in part.param_groups]
    report.require(all(group.get("fused", True) for group in groups), "torch's Adam is not the fused one")


def _optimizers(optimizer: Any) -> list[Any]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
