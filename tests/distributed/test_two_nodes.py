"""Two nodes of two processes each, and what happens between them: a cut link, a killed process, a lost node.

Each node is a network namespace (dpo_testing.networks), in which a pod's launcher runs.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dpo_api.errors import Outcome
from dpo_api.progress import LastWords
from dpo_testing.networks import Network, missing, two_nodes
from dpo_testing.preloaded import HURRY, STEP_SECONDS
from dpo_testing.runs import Finished, finish, kill, merged, start, wait_for_step
from dpo_testing.simcluster import SimCluster, avoided, manifest
from dpo_testing.trajectories import checkpoints_in, differences, workers_of

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.xdist_group("interruption"),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

STEPS, EVERY = 24, 8
CUT_SECONDS = 30.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        network = two_nodes()
        with network as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")


class Attempt:
    """Both nodes' launchers."""

    def __init__(self, network: Network, spec: Mapping[str, Any], folder: Path, scratch: Path, port: int) -> None:
        """Start them as PyTorchJob starts pods. ``scratch`` gets a folder for each node."""
        self.folder, self.hurry = folder, scratch / "hurry"
        self.scratches = [scratch / f"node {node.rank}" for node in network.nodes]
        self.children = []
        for node, own in zip(network.nodes, self.scratches, strict=True):
            variables = {"PET_NNODES": "2", "PET_NODE_RANK": str(node.rank), "PET_NPROC_PER_NODE": "2"}
            variables |= {"PET_MASTER_ADDR": network.nodes[0].address, "PET_MASTER_PORT": str(port)}
            variables |= {**node.environment, "DPO_CACHE_DIR": str(own / "cache")}
            variables |= {STEP_SECONDS: "0.15", HURRY: str(self.hurry)}
            self.children.append(start(spec, folder, processes=2, scratch=own, environment=variables))

    def end(self, *codes: int | None) -> list[dict[str, Any] | None]:
        """Wait for each node's launcher and expect its exit code; return their messages. None: a lost node."""
        return [
            None if code is None else finish(child, own, code=code)
            for child, own, code in zip(self.children, self.scratches, codes, strict=True)
        ]

    def clear(self) -> None:
        for child in self.children:
            if child.poll() is None:
                kill(child)


def decided(words: list[dict[str, Any] | None]) -> tuple[str, str, list[str]]:
    """What the operator makes of the pods' messages: the reason, its class and the nodes that it avoids next."""
    cluster = SimCluster(manifest(resources={"nodes": 2, "gpusPerNode": 2, "memory": "1Gi"}))
    cluster.run_to("Running")
    for pod, said in zip(("job-1-master-0", "job-1-worker-0"), words, strict=True):
        if said is not None:
            message = LastWords.model_validate(said)
            cluster.end_pod(pod, message.known_outcome, message=message.message)
    cluster.settle()
    cluster.kill_leaving()
    cluster.settle()
    cluster.sleep_out()
    first = cluster.attempts[0]
    return first["reason"], first["failureClass"], avoided(cluster.children["job-2"])


@pytest.fixture(scope="module")
def spec(slow_spec: dict[str, Any]) -> dict[str, Any]:
    """Tensor parallelism in a node, data parallelism over the link."""
    return merged(slow_spec, {"parallelism": {"tensor": 2, "verify": False}})


@pytest.fixture
def attempts(network: Network, spec: dict[str, Any], tmp_path: Path) -> Iterator[Callable[[], Attempt]]:
    """Starts the next attempt of one run."""
    started: list[Attempt] = []

    def begin() -> Attempt:
        number = len(started) + 1
        started.append(Attempt(network, spec, tmp_path / "run", tmp_path / f"attempt {number}", 29500 + number))
        return started[-1]

    yield begin
    network.repair()
    for attempt in started:
        attempt.clear()


LOST = Outcome.Communication.exit_code


def seen(folder: Path) -> int:
    """The last training step in the run's record."""
    return max(Finished(folder).steps)


def resumed(attempts: Callable[[], Attempt], undisturbed: Finished) -> None:
    """Train to the end in another attempt, which begins at a checkpoint, and expect the undisturbed trajectory."""
    second = attempts()
    assert checkpoints_in(second.folder) == [EVERY]
    for words in second.end(0, 0):
        assert words is not None
        assert (words["outcome"], words["attempt"]) == ("Succeeded", 2)
    assert differences(undisturbed, Finished(second.folder)) == []


def test_a_link_that_is_cut_for_30_seconds_only_holds_up_a_run(
    network: Network, attempts: Callable[[], Attempt], undisturbed: Finished
) -> None:
    """TCP sends again what was lost, and the processes wait for longer than that."""
    only = attempts()
    wait_for_step(only.folder, EVERY + 1)
    network.cut()
    time.sleep(CUT_SECONDS)
    assert seen(only.folder) < STEPS - 4, "the run did not need the link"
    network.repair()
    for words in only.end(0, 0):
        assert words is not None
        assert (words["outcome"], words["attempt"]) == ("Succeeded", 1)
    assert differences(undisturbed, Finished(only.folder)) == []


def test_both_nodes_name_a_link_that_is_cut_for_longer_than_they_wait(
    network: Network, attempts: Callable[[], Attempt], undisturbed: Finished
) -> None:
    first = attempts()
    wait_for_step(first.folder, EVERY + 1)
    network.cut()
    first.hurry.touch()
    time.sleep(CUT_SECONDS)
    network.repair()
    words = first.end(LOST, LOST)
    one, other = (said["message"] for said in words if said is not None)
    assert re.search(
        r"waited \d+ s in the [\w ]+ of step \d+: ranks 2 and 3 have not arrived \(rank 2: .*, no word for", one
    )
    assert "the rendezvous store does not answer, so the node of rank 0 or the network to it is lost" in other
    assert decided(words) == ("Communication", "retryable", [])
    resumed(attempts, undisturbed)


def test_a_process_that_is_killed_on_one_node_ends_the_attempt_on_both(
    attempts: Callable[[], Attempt], undisturbed: Finished
) -> None:
    first = attempts()
    wait_for_step(first.folder, EVERY + 1)
    os.kill(workers_of(first.scratches[1])[3], signal.SIGKILL)
    words = first.end(LOST, LOST)
    assert words[1] is not None
    assert "a process of this run exited without reporting a result" in words[1]["message"]
    assert decided(words) == ("Communication", "retryable", [])
    resumed(attempts, undisturbed)


@pytest.mark.parametrize("lost", [1, 0], ids=["another node", "the node of rank 0"])
def test_a_lost_node_is_named_by_the_other(
    lost: int, network: Network, attempts: Callable[[], Attempt], undisturbed: Finished
) -> None:
    """Nothing arrives from it any more, not even that its connections are closed. The next attempt avoids it."""
    first = attempts()
    wait_for_step(first.folder, EVERY + 1)
    network.cut()
    network.nodes[lost].kill()
    first.hurry.touch()
    words = first.end(*(None if rank == lost else LOST for rank in range(2)))
    said = words[1 - lost]
    assert said is not None
    assert NAMED[lost] in said["message"]
    assert decided(words) == ("Communication", "retryable", [("node-master-0", "node-worker-0")[lost]])
    network.repair()
    resumed(attempts, undisturbed)


NAMED = {
    1: "ranks 2 and 3 have not arrived",
    0: "the rendezvous store does not answer, so the node of rank 0 or the network to it is lost",
}
