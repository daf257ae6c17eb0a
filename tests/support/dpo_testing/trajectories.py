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


Figures = dict[str, list[float]]
"""Series by name."""


def differences(one: Finished, other: Finished) -> list[str]:
    """Sentences that say where two runs differ; none when they are one trajectory."""
    found = unlike(_series(one), _series(other))
    for name, tensor in one.weights.items():
        gap = (tensor - other.weights[name]).abs().max().item()
        if not gap <= TOLERANCE:
            found.append(f"{name} ends {gap:.1e} away")
    return found


def figures(run: Finished) -> Figures:
    """What a file can keep of a run: its series, and the Euclidean norm of each exported tensor."""
    ends = {f"norm of {name}": [tensor.double().norm().item()] for name, tensor in run.weights.items()}
    return _series(run) | ends


def unlike(expected: Figures, got: Figures) -> list[str]:
    """Sentences that say where figures differ by more than the tolerance; NaN is like NaN alone."""
    found = [f"{key} is only in one of them" for key in sorted(expected.keys() ^ got.keys())]
    for key in expected.keys() & got.keys():
        one, other = np.array(expected[key]), np.array(got[key])
        if one.shape != other.shape:
            found.append(f"{key} has {len(other)} values, not {len(one)}")
            continue
        noise = REWARD_NOISE if key in REWARDS else 0.0
        bad = ~np.isclose(other, one, rtol=TOLERANCE, atol=noise, equal_nan=True)
        found += [f"{key}[{i}] is {other[i]!r}, not {one[i]!r}" for i in np.flatnonzero(bad)[:2]]
    return found


def _series(run: Finished) -> Figures:
    return {"step": [float(step) for step in run.steps], **{key: run.series(key) for key in (*SERIES, *REWARDS)}}


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
