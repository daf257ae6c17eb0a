"""Checkpoints on S3: a slow one survives a stop even past torchrun's time limit; an incomplete one is ignored."""

import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from dpo_cli.metrics_log import MetricsLog, merge, parse_events
from dpo_store import Store, open_store
from dpo_testing.faults import FaultProxy, fault_proxy
from dpo_testing.runs import Finished, finish, job_of, kill, merged, run_here, start
from dpo_testing.s3server import S3Server, need, s3_server
from dpo_testing.training_world import LORA, make
from dpo_trainer.checkpoint import store as checkpoints
from dpo_trainer.distributed import World
from dpo_trainer.run import Run, RunOptions
from dpo_trainer.stopping import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("checkpoint-s3")]

STEPS, EVERY = 12, 4
FILES_SECONDS, MARKER_SECONDS = 34.0, 6.0
"""A checkpoint of 40 s. torchrun gives its workers 30 s; the files alone take longer than that."""

SERIES = ("train/loss", "train/grad_norm", "train/rewards_margin", "val/loss")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    need("versitygw")
    with s3_server() as running:
        running.make_bucket("runs")
        yield running


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _environment(server: S3Server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def spec(world: Path) -> dict[str, Any]:
    training = {"maxSteps": STEPS, "learningRate": 1e-3, "validationInterval": 3}
    return merged(make(world, pairs=13), {"training": training, "checkpoint": {"everySteps": EVERY}})


@pytest.fixture(scope="module")
def undisturbed(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(spec, world / "undisturbed")


@pytest.fixture(scope="module")
def undisturbed_lora(spec: dict[str, Any], world: Path) -> Finished:
    return run_here(merged(spec, LORA), world / "undisturbed LoRA")


@pytest.fixture(scope="module")
def store(server: S3Server) -> Store:
    return open_store(server.options())


def through(spec: dict[str, Any], endpoint: str) -> dict[str, Any]:
    return merged(spec, {"storage": {"endpoint": endpoint}})


def resume(spec: dict[str, Any], uri: str) -> None:
    """The next attempt, in this process."""
    world = World.join()
    try:
        Run(job_of(spec), world, StopRequest(), RunOptions(run_dir=uri)).execute()
    finally:
        world.leave()


def complete(store: Store, uri: str) -> list[int]:
    found = (re.search(r"step-(\d+)/complete\.json$", info.uri) for info in store.list(f"{uri}/checkpoints/"))
    return [int(match[1]) for match in found if match]


def record(store: Store, uri: str) -> MetricsLog:
    """The run's record as readers see it: the attempts' objects, merged."""
    events = []
    for number, info in enumerate(store.list(f"{uri}/metrics/"), 1):
        events += parse_events(info.uri, store.read(info.uri), number)
    return merge(events)


def assert_same(undisturbed: Finished, store: Store, uri: str) -> None:
    got = record(store, uri)
    for key in SERIES:
        values = [value for _, value in got.get(key)]
        assert values == pytest.approx(undisturbed.series(key), rel=1e-5, abs=1e-6), key
    assert [step for step, _ in got.get("train/loss")] == list(range(1, STEPS + 1))
    weights = load(store.read(f"{uri}/model/model.safetensors"))
    for name, tensor in undisturbed.weights.items():
        assert (tensor - weights[name]).abs().max() < 1e-5, name


def ranges_read(proxy: FaultProxy, path: str) -> list[tuple[int, int]]:
    """The ranges (first byte, end) of an object that were read, in their order in the object."""
    found = (re.fullmatch(r"bytes=(\d+)-(\d+)", seen.range) for seen in proxy.seen if seen.path.endswith(path))
    return sorted((int(match[1]), int(match[2]) + 1) for match in found if match)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "changes"), [("undisturbed", {}), pytest.param("undisturbed_lora", LORA, marks=pytest.mark.nightly)]
)
def test_a_stop_waits_for_a_slow_checkpoint(
    name: str, changes: dict[str, Any], spec: dict[str, Any], server: S3Server, proxy: FaultProxy, store: Store,
    world: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    undisturbed: Finished = request.getfixturevalue(name)
    uri, scratch, mine = f"s3://runs/slow-{name}", world / f"slow {name}", merged(spec, changes)
    files, marker = rf"step-{EVERY:06d}/.*distcp", rf"step-{EVERY:06d}/complete"
    proxy.clear()
    proxy.add("delay", method="PUT", path=files, seconds=FILES_SECONDS, times=1)
    proxy.add("delay", method="PUT", path=marker, seconds=MARKER_SECONDS, times=1)
    child = start(through(mine, proxy.endpoint), uri, processes=2, scratch=scratch)
    try:
        wait_until(lambda: proxy.count("PUT", files) > 0, "no checkpoint began")
        assert complete(store, uri) == []
        child.send_signal(signal.SIGTERM)
        words = finish(child, scratch, code=143)
    finally:
        if child.poll() is None:
            kill(child)
    assert (words["outcome"], words["step"]) == ("Stopped", EVERY)
    assert complete(store, uri) == [EVERY]
    assert proxy.count("PUT", marker) == 1  # the stop does not save the same step again
    resume(through(mine, server.endpoint), uri)
    assert_same(undisturbed, store, uri)


def test_a_kill_during_a_slow_checkpoint_leaves_the_older_one(
    undisturbed: Finished, spec: dict[str, Any], server: S3Server, proxy: FaultProxy, store: Store, world: Path
) -> None:
    uri, scratch = "s3://runs/cut", world / "cut"
    second = rf"step-{2 * EVERY:06d}/"
    proxy.clear()
    proxy.add("delay", method="PUT", path=second + ".metadata", seconds=FILES_SECONDS, times=1)
    child = start(through(spec, proxy.endpoint), uri, processes=1, scratch=scratch)
    try:
        wait_until(lambda: proxy.count("PUT", second) > 1, "no second checkpoint began")
    finally:
        kill(child)
    assert complete(store, uri) == [EVERY]
    assert any(re.search(second, info.uri) for info in store.list(f"{uri}/checkpoints/"))  # half of one lies there
    sizes = {info.uri.removeprefix(f"{uri}/"): info.size for info in store.list(f"{uri}/checkpoints/")}
    file = f"checkpoints/step-{EVERY:06d}/__0_0.distcp"
    proxy.clear()
    resume(through(spec, proxy.endpoint), uri)
    starts, ends = zip(*ranges_read(proxy, file), strict=True)
    assert (*starts, sizes[file]) == (0, *ends), "not each byte was read once"
    assert len(starts) > 2, "the file was copied"
    assert complete(store, uri) == [EVERY, 2 * EVERY, STEPS]
    assert json.loads(store.read(f"{uri}/export.json"))["attempt"] == 2
    assert_same(undisturbed, store, uri)


ASYNC = {"checkpoint": {"async": True, "everySteps": 1, "keep": 2}}


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.nightly)], ids=["three", "twenty"]
)
def test_killed_at_random_moments_of_uploads_in_the_background(
    kills: int, seed: int, undisturbed: Finished, spec: dict[str, Any], proxy: FaultProxy, store: Store, world: Path
) -> None:
    """Each upload takes longer than a step: most kills find one under way, and training waiting or going on."""
    uri, draw = f"s3://runs/random-{kills}", random.Random(seed)
    mine = through(merged(spec, ASYNC), proxy.endpoint)
    proxy.clear()
    proxy.add("delay", method="PUT", path=r"step-.*distcp", seconds=0.3, times=10_000)
    newest = [0]
    for number in range(kills):
        scratch = world / f"random {kills} {number}"
        begun = proxy.count("PUT", "distcp") + draw.randrange(1, 6 if kills == 3 else 4)
        child = start(mine, uri, processes=2, scratch=scratch)
        try:
            wait_until(
                lambda: proxy.count("PUT", "distcp") >= begun or child.poll() is not None,  # noqa: B023 - called at once
                "no checkpoint began",
            )
            time.sleep(draw.uniform(0, 0.6))
        finally:
            kill(child)
        newest.append(max(complete(store, uri), default=0))
    assert newest == sorted(newest)
    assert newest[-1] > 0
    resume(mine, uri)
    assert complete(store, uri) == [STEPS - 1, STEPS]
    assert_same(undisturbed, store, uri)


def test_a_stop_finishes_the_upload_in_the_background(
    undisturbed: Finished, spec: dict[str, Any], server: S3Server, proxy: FaultProxy, store: Store, world: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The stop waits for it, and saves the step that was reached meanwhile."""
    uri, scratch = "s3://runs/background", world / "background"
    mine, files = merged(spec, {"checkpoint": {"async": True}}), rf"step-{EVERY:06d}/.*distcp"
    proxy.clear()
    proxy.add("delay", method="PUT", path=files, seconds=8.0, times=1)
    child = start(through(mine, proxy.endpoint), uri, processes=2, scratch=scratch)
    try:
        wait_until(lambda: proxy.count("PUT", files) > 0, "no checkpoint began")
        time.sleep(1.0)
        assert complete(store, uri) == []
        child.send_signal(signal.SIGTERM)
        words = finish(child, scratch, code=143)
    finally:
        if child.poll() is None:
            kill(child)
    assert words["step"] >= EVERY
    assert complete(store, uri) == sorted({EVERY, words["step"]})
    monkeypatch.setattr(checkpoints, "MOST_READ", 0.0)  # as if its parts were needed by many ranks: it is copied
    resume(through(mine, server.endpoint), uri)
    assert_same(undisturbed, store, uri)
