"""What rank 0 tells the world."""

import json
import math
import time
from pathlib import Path
from typing import Any

from dpo_api.manifest import DPOJob
from dpo_api.plan import Plan
from dpo_api.progress import Progress
from dpo_trainer.distributed import World
from dpo_trainer.rundir import RunDirectory


class Reporter:
    """TEMPORARY until metrics/ is there."""

    def __init__(self, world: World, events: Path | None) -> None:
        self.world, self.events = world, events
        self.attempt = 1
        self.latest: dict[str, float] = {}
        self.last_checkpoint: int | None = None
        self.step = self.total = 0
        self._lines: list[str] = []

    @classmethod
    def open(cls, job: DPOJob, world: World, events: Path | None, port: int | None, host: str) -> "Reporter":
        return cls(world, events)

    @property
    def finite_latest(self) -> dict[str, float]:
        return {k: v for k, v in self.latest.items() if math.isfinite(v)}

    def phase(self, name: str, *, done: int | None = None, of: int | None = None, message: str = "") -> None:
        if not self.world.is_main or self.events is None:
            return
        progress = Progress(phase=name, step=self.step, total=self.total, done=done, of=of, message=message[:1000], metrics=self.finite_latest, observed_at=time.time(), attempt=max(1, self.attempt), last_checkpoint_step=self.last_checkpoint)
        with self.events.open("a") as f:
            f.write(progress.to_json() + "\n")

    def note(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def indexed(self, plan: Plan, stats: dict[str, Any]) -> None:
        self.total = plan.total_steps

    def finished_before(self, done: dict[str, Any]) -> None:
        self.latest = dict(done["metrics"])

    def start_training(self, directory: RunDirectory, step: int, plan: Plan) -> None:
        self.directory, self.step = directory, step
        if self.world.is_main:
            try:
                old = directory.store.read(directory.path("metrics.jsonl")).decode().splitlines()
            except Exception:
                old = []
            self._lines = [l for l in old if json.loads(l)["step"] <= step] if step else []

    def write(self, values: dict[str, float]) -> None:
        self.latest |= {k: v for k, v in values.items()}
        if self.world.is_main:
            self._lines.append(json.dumps({"step": self.step, **values}))
            self.directory.store.write(self.directory.path("metrics.jsonl"), ("\n".join(self._lines) + "\n").encode())

    def stepped(self, step: int, values: dict[str, float], *, tokens: int, pairs: int, waited: float) -> None:
        self.step = step
        self.write({f"train/{k}": v for k, v in values.items()})
        self.phase("train")

    def validated(self, step: int, values: dict[str, float]) -> None:
        self.write({f"val/{k}": v for k, v in values.items()})

    def flush(self) -> None: ...

    def checkpointed(self, step: int) -> None:
        self.last_checkpoint = step

    def close(self) -> None: ...
