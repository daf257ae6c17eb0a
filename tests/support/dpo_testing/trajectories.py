"""When two runs are one: every step once, the same figures, the same weights."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from dpo_testing.runs import Finished
from dpo_trainer.rundir import MARKER

SERIES = ("train/loss", "train/preference_loss", "train/grad_norm", "train/lr", "train/consumed_samples", "val/loss")
REWARDS = ("train/rewards_chosen_mean", "train/rewards_rejected_mean", "train/rewards_all_std", "val/rewards_margin")
REWARD_NOISE = 1e-6
"""A reward near zero is the difference of two sums near -50: fp32 bounds it absolutely, not relatively."""
TOLERANCE = 1e-5


def differences(one: Finished, other: Finished) -> list[str]:
    """Sentences that say where two runs differ; none when they are one trajectory."""
    found = [] if other.steps == one.steps else [f"the steps are {other.steps}, not {one.steps}"]
    for key in (*SERIES, *REWARDS):
        expected, got = np.array(one.series(key)), np.array(other.series(key))
        if expected.shape != got.shape:
            found.append(f"{key} has {len(got)} values, not {len(expected)}")
            continue
        noise = REWARD_NOISE if key in REWARDS else 0.0
        bad = np.abs(got - expected) > TOLERANCE * np.abs(expected) + noise
        found += [f"{key}[{i}] is {got[i]!r}, not {expected[i]!r}" for i in np.flatnonzero(bad)[:2]]
    for name, tensor in one.weights.items():
        gap = (tensor - other.weights[name]).abs().max().item()
        if gap > TOLERANCE:
            found.append(f"{name} ends {gap:.1e} away")
    return found


def checkpoints_in(folder: Path) -> list[int]:
    """The steps whose checkpoints exist in a run directory."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"checkpoints/*/{MARKER}"))


def workers_of(scratch: Path) -> dict[int, int]:
    """Rank -> process id of the workers whose launcher was started with this scratch folder and that still live."""
    found: dict[int, int] = {}
    spec = f"--spec={scratch / 'spec.json'}"
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, rank = _command(process, scratch / "processes" / process.name)
            if "worker" in words and spec in words and rank is not None and _lives(process):
                found[int(rank)] = int(process.name)
    return found


def _command(process: Path, note: Path) -> tuple[list[str], str | None]:
    """A process's arguments and its RANK: from its note if it was forked (dpo_testing.preloaded), else from /proc."""
    if note.exists():
        known = json.loads(note.read_text())
        return known["args"], known["rank"]
    words = (process / "cmdline").read_text(errors="replace").split("\0")
    pairs = (entry.split("=", 1) for entry in (process / "environ").read_text(errors="replace").split("\0"))
    return words, dict(pair for pair in pairs if len(pair) == 2).get("RANK")


def _lives(process: Path) -> bool:
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
