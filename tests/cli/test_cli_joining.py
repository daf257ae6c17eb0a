"""`dpo run` under torchrun and srun: each process that they start is one process of the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_api.errors import Outcome, UsageError
from dpo_cli.joining import Member, first_host, member
from dpo_testing.command import Command, only_error
from dpo_testing.runs import Finished, merged
from dpo_testing.s3server import free_port
from dpo_testing.training_world import make
from dpo_testing.trajectories import differences

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
}


def test_the_place_among_processes_of_torchrun() -> None:
    assert member(TORCHRUN) == Member("torchrun", 3, 4, 1, None, "node-0", 29_500)
    assert member({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}) == Member("torchrun", 3, 4, 1, 2, "node-0", 29_500)
    assert member({**SRUN, **TORCHRUN}) == Member("torchrun", 3, 4, 1, None, "node-0", 29_500), "srun torchrun dpo run"


def test_the_place_among_tasks_of_srun() -> None:
    assert member(SRUN) == Member("srun", 3, 4, 1, 2, "gpu07", 10_000 + 4713)
    given = {"MASTER_ADDR": "login", "MASTER_PORT": "29500"}
    assert member({**SRUN, **given}) == Member("srun", 3, 4, 1, 2, "login", 29_500)
    uneven = member({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert uneven is not None
    assert uneven.local_size is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # no srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_nobody_to_join(environment: dict[str, str]) -> None:
    assert member(environment) is None


@pytest.mark.parametrize(
    ("given", "name", "value", "expected"),
    [
        (TORCHRUN, "WORLD_SIZE", None, "WORLD_SIZE is not set, but RANK is: torchrun sets RANK, WORLD_SIZE"),
        (TORCHRUN, "RANK", None, "RANK is not set, but WORLD_SIZE is"),
        (TORCHRUN, "MASTER_ADDR", "", "MASTER_ADDR is not set, but RANK is"),
        (TORCHRUN, "RANK", "4", "RANK is '4': it must be a whole number from 0 to 3, as WORLD_SIZE has 4 processes"),
        (TORCHRUN, "RANK", "-1", "RANK is '-1': it must be a whole number from 0 to 3"),
        (TORCHRUN, "WORLD_SIZE", "0", "WORLD_SIZE is '0': it must be a whole number from 1"),
        (TORCHRUN, "LOCAL_RANK", "x", "LOCAL_RANK is 'x': it must be a whole number from 0 to 3"),
        (TORCHRUN, "MASTER_PORT", "65536", "MASTER_PORT is '65536': it must be a whole number from 1 to 65535"),
        (SRUN, "SLURM_PROCID", None, "SLURM_PROCID is not set, but srun started this process"),
        (SRUN, "SLURM_PROCID", "4", "SLURM_PROCID is '4': it must be a whole number from 0 to 3"),
        (SRUN, "SLURM_LOCALID", "2", "SLURM_LOCALID is '2': it must be a whole number from 0 to 1"),
        (SRUN, "SLURM_NODELIST", None, "SLURM_NODELIST is not set or names no host"),
        (SRUN, "SLURM_JOB_ID", None, "SLURM_JOB_ID is not set, but srun started this process"),
        (SRUN, "SLURM_STEP_NUM_TASKS", "two", "SLURM_STEP_NUM_TASKS is 'two': it must be a whole number from 1"),
    ],
)
def test_a_wrong_variable_is_named(given: dict[str, str], name: str, value: str | None, expected: str) -> None:
    environment = {key: text for key, text in {**given, name: value}.items() if text is not None}
    with pytest.raises(UsageError) as error:
        member(environment)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-06,9],login1", "gpu03"),
        ("rack2-gpu[7]", "rack2-gpu7"),
        ("a.example.org,b.example.org", "a.example.org"),
        ("n[01-02]-ib,x", "n01-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_what_a_training_process_gets() -> None:
    found = Member("srun", 5, 8, 1, 4, "gpu07", 14_713)
    own = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "14713", "LOCAL_WORLD_SIZE": "4"}
    assert found.environment(gpus=4) == {**own, "LOCAL_RANK": "1"}
    assert found.environment(gpus=1) == {**own, "LOCAL_RANK": "0"}, "srun --gpus-per-task=1"
    lacking = replace(found, starter="torchrun").environment(gpus=1)
    assert lacking["LOCAL_RANK"] == "1", "the trainer says that it has no GPU"
    assert found.nodes(gpus=4) == (2, 4)
    assert Member("torchrun", 0, 6, 0, None, "a", 1).nodes(gpus=4) == (6, 1)
    assert Member("torchrun", 0, 8, 0, None, "a", 1).nodes(gpus=4) == (2, 4)


def test_processes_cannot_be_asked_for_beside(tmp_path: Path) -> None:
    dpo = Command(tmp_path)
    said = dpo("run", "-f", "job.yaml", "--processes", "2", **TORCHRUN)
    assert "--processes 2: torchrun has started 4 processes" in only_error(said, Outcome.Usage)


Start = Callable[[Command, str], list["subprocess.Popen[str]"]]


def by_variables(of: Callable[[int, int], dict[str, str]]) -> Start:
    def start(dpo: Command, file: str) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [dpo.start("run", "-f", file, "-o", "joined", **of(rank, port)) for rank in range(2)]

    return start


def torchrun_variables(rank: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def srun_variables(rank: int, port: int) -> dict[str, str]:
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    return {**place, "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(port - 10_000), "SLURM_STEP_ID": "0"}


def torchrun_itself(dpo: Command, file: str) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dpo_cli"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {name: value for name, value in dpo.environment().items() if name != "PET_NPROC_PER_NODE"}
    words = [*command, "run", "-f", file, "-o", "joined"]
    return [subprocess.Popen(words, cwd=dpo.folder, env=environment, text=True, **pipes)]  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(by_variables(torchrun_variables), id="torchrun's variables"),
        pytest.param(by_variables(srun_variables), id="srun's variables", marks=pytest.mark.nightly),
        pytest.param(torchrun_itself, id="torchrun itself", marks=pytest.mark.nightly),
    ],
)
def test_joined_processes_have_the_trajectory_of_one_launch(start: Start, tmp_path: Path) -> None:
    dpo = Command(tmp_path)
    file = dpo.write(merged(make(tmp_path, pairs=11), {"training": {"maxSteps": 4, "validationInterval": 4}}))
    alone = dpo("run", "-f", file, "-o", "alone", "--processes", "2")
    assert alone.code == 0, alone.all
    said = [dpo.finish(child) for child in start(dpo, file)]
    assert [each.code for each in said] == [0] * len(said), "\n".join(each.all for each in said)
    assert differences(Finished(tmp_path / "alone"), Finished(tmp_path / "joined")) == []
    out = "".join(each.out for each in said)
    assert out.count("2 processes of ") == 1, "rank 0 alone reports"
    assert out.count("step 4/4") == 1
    assert (tmp_path / "joined" / "report.html").exists()
    assert (tmp_path / "joined" / "trainer-1.log").exists()
    assert (tmp_path / "joined" / "summary.json").exists()
