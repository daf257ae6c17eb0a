"""Equivalent settings give the same run: processes, micro-batches, packing and prompt sharing change no weight."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_testing.runs import Finished, merged, run_here, run_processes
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences
from dpo_trainer import batches
from dpo_trainer.data.packs import collate
from dpo_trainer.model.pack import Pack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trajectory")]

EQUIVALENT = {
    "micro-batches of 1": {"training": {"microBatchSize": 1}},
    "micro-batches of 4": {"training": {"microBatchSize": 4}},
    "not packed": {"training": {"packing": {"enabled": False}}},
    "prompts not shared": {"training": {"prefixSharing": False}},
    "neither": {"training": {"packing": {"enabled": False}, "prefixSharing": False}},
    "small packs": {"training": {"packing": {"maxTokens": 128}}},
    "plain optimizer": {"parallelism": {"distributedOptimizer": False}},
}


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    # 17 pairs in batches of 8: the last batch of an epoch is one pair, which is fewer than two ranks.
    return make(world, pairs=17)


@pytest.fixture(scope="module")
def base(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "base")


def test_the_run_is_worth_comparing(base: Finished) -> None:
    assert base.steps == list(range(1, 13))
    assert abs(base.series("train/preference_loss")[0] - np.log(2)) < 1e-6
    assert min(base.series("train/preference_loss")) < 0.4
    assert base.series("train/consumed_samples")[:4] == [8, 16, 17, 25]


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_settings_are_one_trajectory(name: str, base: Finished, spec: dict[str, Any], world: Path) -> None:
    # A reference of its own: computed by these settings, not read from the base run's cache.
    changed = merged(merged(spec, EQUIVALENT[name]), {"reference": {"cacheURI": str(world / f"reference {name}")}})
    assert differences(base, run_here(changed, world / name)) == []


@pytest.mark.parametrize("name", ["small packs", pytest.param("neither", marks=pytest.mark.nightly)])
def test_two_processes_are_one_trajectory(name: str, base: Finished, spec: dict[str, Any], world: Path) -> None:
    """Unequal packs a rank, and a last batch of one pair, for which the second rank runs a filler."""
    changed = merged(merged(spec, EQUIVALENT[name]), {"reference": {"cacheURI": str(world / f"two {name}")}})
    two = run_processes(changed, world / f"two processes, {name}", processes=2, scratch=world / f"scratch {name}")
    assert differences(base, two) == []


def _leak(pack: Pack) -> Pack:
    """Let each rejected response see its pair's chosen one."""
    segments = list(pack.segments)
    for index, segment in enumerate(segments):
        if index % 3 == 2:
            segments[index] = replace(segment, parent=index - 1)
            segments[index - 1] = replace(segments[index - 1], parent=None)
    return replace(pack, segments=tuple(segments))


def _late(pack: Pack) -> Pack:
    """Position the rejected response after the chosen one, as a stream without position ids would."""
    positions = pack.position_ids.clone()
    for index, segment in enumerate(pack.segments):
        if index % 3 == 2:
            positions[segment.start : segment.end] += pack.segments[index - 1].length
    return replace(pack, position_ids=positions)


@pytest.mark.parametrize("harm", [_leak, _late])
def test_a_planted_leak_is_caught(
    harm: Callable[[Pack], Pack],
    base: Finished,
    spec: dict[str, Any],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "make_pack", lambda *args, **kwargs: harm(collate.make_pack(*args, **kwargs)))
    changed = merged(spec, {"reference": {"cacheURI": str(world / harm.__name__)}})
    assert differences(base, run_here(changed, world / f"harmed {harm.__name__}")) != []


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scaled_gradient_is_caught(
    factor: float, base: Finished, spec: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving, or dividing once more by a number of processes: Adam hides it from the loss, the norm does not."""
    from dpo_trainer import engine

    true = engine.finalize_model_grads

    def scaled(model: Any, *args: Any, **kwargs: Any) -> None:
        true(model, *args, **kwargs)
        for chunk in model:
            chunk.scale_gradients(factor)

    monkeypatch.setattr(engine, "finalize_model_grads", scaled)
    found = differences(base, run_here(spec, world / f"scaled {factor}"))
    assert any("grad_norm" in sentence for sentence in found)
