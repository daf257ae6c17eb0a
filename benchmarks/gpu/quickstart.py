"""`dpo run` of the quickstart's job, over folders: it must end well, and the model must learn to prefer."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dpo_trainer import bridge
from gpu.report import Report
from gpu.tiny import EXAMPLES, write_world


def run(report: Report, small: bool) -> None:
    """Run it from an untrained model, whose preferences are learned at once."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        write_world(folder / "world", small)
        job: dict[str, Any] = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
        spec = job["spec"]
        del spec["storage"]
        preferences = folder / "world" / "preferences"
        spec["model"] = {"huggingFace": {"uri": str(folder / "world" / "untrained")}}
        spec["data"] |= {"train": [{"uri": str(preferences / "train.jsonl")}]}
        spec["data"]["validation"] = [{"name": "heldout", "uri": str(preferences / "valid.jsonl")}]
        spec["training"] |= {"learningRate": 1e-3, "epochs": 1, "precision": "fp32" if bridge.needed() else "bf16"}
        spec["dpo"]["sftWeight"] = 0.0  # which alone would make the model prefer what was chosen
        if small:
            spec["resources"] = {"processesPerNode": 1}
            spec["training"] |= {"maxSteps": 4, "globalBatchSize": 8}
        spec["checkpoint"] = {"uri": str(folder / "out"), "everySteps": 1000}
        spec["reference"] = {"cacheURI": str(folder / "reference")}
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        command = [sys.executable, "-m", "dpo_cli", "run", "-f", str(folder / "job.yaml")]
        environment = {**os.environ, "DPO_CACHE_DIR": str(folder / "cache")}
        with (folder / "log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        report.require(code == 0, f"dpo run exits with {code}: {(folder / 'log').read_text()[-2000:]}")
        if code:
            return
        events = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        found = [event["val/acc"] for event in events if "val/acc" in event]
        report.add(held_out_accuracy=[found[0], found[-1]], processes=spec["resources"]["processesPerNode"])
        report.require(found[-1] > found[0], f"the accuracy on held-out pairs was {found[0]} and is {found[-1]}")
