"""Every layout of a run over processes gives one trajectory: losses, rewards, gradient norms and exported weights."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_api.progress import Progress
from dpo_testing.runs import ROOT, Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences, figures, unlike

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("layouts")]

FULL = {"training": {"activationRecomputation": "full"}}


@dataclass(frozen=True)
class Layout:
    """Sizes, and what else the layout sets in the spec. Data parallelism takes the processes that are left."""

    processes: int
    parallelism: dict[str, Any]
    more: dict[str, Any] | None = None

    def of(self, spec: dict[str, Any]) -> dict[str, Any]:
        return merged(merged(spec, {"parallelism": self.parallelism}), self.more or {})


LAYOUTS = {
    "TP2": Layout(2, {"tensor": 2}),
    "TP2, sequence": Layout(2, {"tensor": 2, "sequence": True}),
    "TP4 of 2 groups": Layout(4, {"tensor": 4}),
    "PP2": Layout(2, {"pipeline": 2}),
    "PP3 of 4 layers": Layout(3, {"pipeline": 3}),
    "TP2 PP2, sequence, full recomputation": Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True}, FULL),
    "DP2": Layout(2, {}),
    "DP2 TP2": Layout(4, {"tensor": 2}),
    "DP2 PP2": Layout(4, {"pipeline": 2}),
    "CP2": Layout(2, {"context": 2}),
    "CP3": Layout(3, {"context": 3}),
    "DP2 CP2": Layout(4, {"context": 2}),
    "TP2 CP2, sequence": Layout(4, {"tensor": 2, "context": 2, "sequence": True}),
    "PP2 CP2, full recomputation": Layout(4, {"pipeline": 2, "context": 2}, FULL),
}
LORA = {
    "lora": {"rank": 4, "alpha": 8, "targetModules": ["all"], "dropout": 0.1},
    "training": {"learningRate": 2e-3},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The model's overrides, and the spec's.
    "all weights": ({}, {}),
    "vocabulary of 385": ({"vocab_size": 385}, {}),
    "tied, selective recomputation": (
        {"tie_word_embeddings": True},
        {"training": {"activationRecomputation": "selective"}},
    ),
    "window": ({"variant": "mistral", "sliding_window": 16}, {}),
    "LoRA with dropout": ({}, LORA),
    "LoRA, one stage's layers": ({}, merged(LORA, {"lora": {"layers": [3]}})),
    # A validation at the end would gather the parameters that the export must wait for.
    "SFT alone, no validation": ({}, {"dpo": {"preferenceWeight": 0, "sftWeight": 1}, "data": {"validation": None}}),
}
STEADY_EPS = 1e-6
"""With Adam's usual 1e-8, a weight whose gradient is near zero moves by the sign of that gradient's rounding error."""

CHOSEN = [
    ("TP2", "vocabulary of 385"),
    ("TP2, sequence", "LoRA with dropout"),
    ("TP4 of 2 groups", "all weights"),
    ("PP2", "tied, selective recomputation"),
    ("PP3 of 4 layers", "LoRA, one stage's layers"),
    ("TP2 PP2, sequence, full recomputation", "all weights"),
    ("DP2", "SFT alone, no validation"),
    ("DP2 TP2", "LoRA with dropout"),
    ("DP2 PP2", "window"),
    ("CP2", "all weights"),
]
"""Each kind of parallelism and each variant once or more: `make test`. The others are nightly."""

GRID = [
    pytest.param(layout, variant, marks=[] if (layout, variant) in CHOSEN else [pytest.mark.nightly])
    for variant in VARIANTS
    for layout in LAYOUTS
]

Base = Callable[[str], tuple[dict[str, Any], Finished]]


@pytest.fixture(scope="module")
def base(world: Path) -> Base:
    """A variant's spec, and its run by one process; each is run once."""
    done: dict[str, tuple[dict[str, Any], Finished]] = {}

    def of(variant: str) -> tuple[dict[str, Any], Finished]:
        if variant not in done:
            folder = world / f"{len(done)} {variant}"
            model, changes = VARIANTS[variant]
            # 11 pairs in batches of 8: the last batch of an epoch has fewer packs than there are stages.
            spec = merged(
                make(folder, pairs=11, num_hidden_layers=4, **model),
                {"training": {"maxSteps": 6, "learningRate": 5e-4, "validationInterval": 4, "eps": STEADY_EPS}},
            )
            spec = merged(spec, changes)
            done[variant] = (spec, run_here(spec, folder / "base"))
        return done[variant]

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_gives_the_committed_trajectory(variant: str, base: Base, tmp_path: Path) -> None:
    """What changes every layout in the same way changes no layout beside another: it is seen here."""
    _, run = base(variant)
    kept = ROOT / "tests" / "golden" / "trajectory" / f"{re.sub('[^a-z0-9]+', '-', variant.lower())}.json"
    made = tmp_path / kept.name
    made.write_text(json.dumps(figures(run), indent=1) + "\n")
    expected = json.loads(kept.read_text()) if kept.exists() else {}
    assert unlike(expected, figures(run)) == [], f"if the change is meant: cp {made} {kept}"


FRESH = [
    ("TP2 PP2, sequence, full recomputation", "LoRA with dropout"),
    ("DP2 TP2", "tied, selective recomputation"),
    ("CP3", "window"),
]
"""Started by `python -m`: their interpreters import for themselves."""


@pytest.mark.parametrize(
    ("layout", "variant", "preloaded"),
    [pytest.param(*case.values, True, marks=case.marks) for case in GRID]
    + [pytest.param(*case, False, marks=pytest.mark.nightly) for case in FRESH],
)
def test_a_layout_is_one_trajectory(layout: str, variant: str, preloaded: bool, base: Base, tmp_path: Path) -> None:
    spec, expected = base(variant)
    # A reference of its own: computed in this layout, not read from the base run's cache.
    changed = merged(LAYOUTS[layout].of(spec), {"reference": {"cacheURI": str(tmp_path / "reference")}})
    scratch, processes = tmp_path / "scratch", LAYOUTS[layout].processes
    got = run_processes(changed, tmp_path / "out", processes=processes, scratch=scratch, preloaded=preloaded)
    assert differences(expected, got) == []
    split = {"tensor", "pipeline", "context"} & LAYOUTS[layout].parallelism.keys()
    assert ("layout verified: " in (tmp_path / "scratch" / "log").read_text()) == bool(split)
    said = Progress.from_json((scratch / "events").read_bytes().splitlines()[-1])
    assert said.layout_verified is (True if split else None)
    assert said.layout_verdict.startswith("verified: log-probs and gradients are those of one rank") is bool(split)
