"""`dpo run` around a trainer that replays: checks before, signals, exit codes, logs and files after.

Runs of the real trainer are in test_run_end_to_end.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_api.errors import NotFoundError, Outcome
from dpo_api.manifest import load_manifest, parse_job
from dpo_api.plan import make_plan
from dpo_api.spec import Resources
from dpo_cli import trainer
from dpo_cli.machine import count_listed, gpu_count, visible
from dpo_cli.run import CLUSTER_ONLY, choose_processes, environment_of, ignored_here, tail_of
from dpo_testing.cli import Dpo, Replay, Said, World
from dpo_testing.manifests import manifest
from dpo_testing.s3server import S3Server, free_port

EVENTS: list[dict[str, Any]] = [
    {"phase": "starting"},
    {"phase": "index", "message": "100 pairs, 0 dropped, 1,200 tokens, longest 9"},
    {"phase": "validate", "total": 10},
    {"phase": "train", "step": 1, "total": 10, "metrics": {"val/loss": 0.69, "val/acc": 0.5, "train/loss": 0.69}},
    {"phase": "train", "step": 10, "total": 10, "metrics": {"train/loss": 0.1, "train/acc": 0.98}},
    {"phase": "done", "step": 10, "total": 10},
]
METRICS = [
    {"step": 0, "val/loss": 0.6931, "val/acc": 0.52},
    {"step": 1, "train/loss": 0.6931},
    {"step": 10, "train/loss": 0.1, "val/loss": 0.07, "val/acc": 0.99},
]
SUCCESS = {"events": EVENTS, "metrics": METRICS, "lastWords": {"outcome": "Succeeded", "step": 10, "total": 10}}


def test_a_run_from_start_to_summary(world: World, replay: Replay) -> None:
    said = replay.run(SUCCESS, "run", "-f", world.write())
    assert (said.code, said.err) == (0, "")
    lines = [line.split("  (")[0] for line in said.out.splitlines()]
    assert lines == [
        "tiny  1 process · run directory runs/tiny",
        "  start      starting the trainer",
        "  index      100 pairs, 0 dropped, 1,200 tokens, longest 9",
        "  val        step 0  loss 0.690  acc 0.50",
        "  train      step 10/10  loss 0.100  acc 0.98",
        "result      validation: accuracy 99.0% · loss 0.070 (before: 0.693)",
        "model       runs/tiny/model",
        "report      runs/tiny/report.html",
    ]
    assert "\x1b" not in said.out
    folder = world.folder / "runs" / "tiny"
    assert "Succeeded" in (folder / "report.html").read_text()
    assert json.loads((folder / "summary.json").read_text())["outcome"] == "Succeeded"
    assert json.loads((folder / "spec.json").read_text())["spec"]["training"]["globalBatchSize"] == 10


def test_a_warning_about_the_data_is_printed_once(world: World, replay: Replay) -> None:
    world.spec["training"]["globalBatchSize"] = 1000
    job = load_manifest(world.write())
    known = [str(finding) for finding in make_plan(job.spec, 100, [20]).warnings]
    warned = {"phase": "index", "warnings": [*known, "no response ends"]}
    said = replay.run(SUCCESS | {"events": [*EVENTS[:2], warned, warned, *EVENTS[2:]]}, "run", "-f", world.write())
    assert said.out.count("are fewer than one global batch") == 1
    assert said.out.count("  warning    no response ends\n") == 1


@pytest.mark.slow
def test_a_run_that_was_refused_leaves_the_directory_of_another(world: World, replay: Replay) -> None:
    assert replay.run(SUCCESS, "run", "-f", world.write()).code == 0
    folder = world.folder / "runs" / "tiny"
    before = {name: (folder / name).read_bytes() for name in ("spec.json", "summary.json", "report.html")}
    world.spec["training"]["seed"] = 7
    words = {"outcome": "IncompatibleCheckpoint", "message": "belongs to another run", "step": 3}
    said = replay.run({"lastWords": words, "code": 8, "claimed": False}, "run", "-f", world.write())
    assert said.code == 8
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_port_that_is_taken_is_found_before_anything_starts(world: World, replay: Replay) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = replay.run(SUCCESS, "run", "-f", world.write(), "--port", port)
        assert (said.code, said.out) == (12, "")
        assert (
            said.err
            == f"error  cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port\n"
        )
    assert not (world.folder / "runs").exists()
    assert replay.run(SUCCESS, "run", "-f", world.write(), "--port", port).code == 0


def arguments(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "arguments.json").read_text())
    return found


@pytest.mark.slow
def test_the_command_line_reaches_the_trainer(world: World, replay: Replay) -> None:
    world.spec["checkpoint"] = {"uri": "elsewhere", "gracePeriodSeconds": 77}
    port = str(free_port())
    file = world.write()
    said = replay.run(
        SUCCESS,
        "run",
        "-f",
        file,
        "--output",
        "out",
        "--processes",
        "3",
        "--port",
        port,
        "--set",
        "training.maxSteps=7",
    )
    assert said.code == 0
    given = arguments(world.folder / "out")
    assert {name: given[name] for name in ("run_dir", "processes", "grace_seconds", "port", "host")} == {
        "run_dir": "out",
        "processes": "3",
        "grace_seconds": "77",
        "port": port,
        "host": "127.0.0.1",
    }
    assert json.loads((world.folder / "out" / "spec.json").read_text())["spec"]["training"]["maxSteps"] == 7
    assert not (world.folder / "elsewhere").exists()
    replay.run(SUCCESS, "run", "-f", file)
    assert arguments(world.folder / "elsewhere")["processes"] == "1"
    assert arguments(world.folder / "elsewhere")["port"] is None


@pytest.mark.slow
def test_cluster_settings_are_ignored_with_one_note(world: World, replay: Replay) -> None:
    world.spec["resources"] = {"nodes": 4, "processesPerNode": 2, "memory": "64Gi"}
    world.spec["runPolicy"] = {"maxRestarts": 3}
    said = replay.run(SUCCESS, "run", "-f", world.write())
    note = "  note     ignored: applies to clusters only: resources.nodes, resources.memory, runPolicy\n"
    assert said.out.count("note") == 1
    assert note in said.out
    assert arguments(world.folder / "runs" / "tiny")["processes"] == "2"


def test_every_ignored_setting_exists() -> None:
    job = parse_job(manifest())
    assert "storage.credentialsSecretRef" in ignored_here(job.spec)
    assert set(ignored_here(job.spec)) <= set(CLUSTER_ONLY)


def failing(words: dict[str, Any] | None, code: int, log: str = "a line of the log") -> dict[str, Any]:
    return {"events": EVENTS[:2], "log": log, "lastWords": words, "code": code}


@pytest.mark.slow
def test_a_users_mistake_is_one_message_without_the_log(world: World, replay: Replay) -> None:
    words = {"outcome": "InvalidData", "message": "1 of 9 lines cannot be used:\n  train.jsonl:7: not JSON"}
    said = replay.run(failing(words, 3), "run", "-f", world.write())
    assert said.code == 3
    assert said.err == "error  1 of 9 lines cannot be used:\n         train.jsonl:7: not JSON\n"
    assert "a line of the log" not in said.all
    assert "report" not in said.out, "there is nothing to draw before the first step"


@pytest.mark.slow
def test_an_internal_error_shows_the_end_of_this_runs_log(world: World, replay: Replay) -> None:
    log = world.folder / "runs" / "tiny" / "trainer.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier attempt\n")
    text = "\n".join(f"line {n}" for n in range(100)) + "\nValueError: boom"
    said = replay.run(
        failing({"outcome": "Internal", "message": "ValueError: boom"}, 1, text), "run", "-f", world.write()
    )
    assert said.code == 1
    assert "error  ValueError: boom" in said.err
    assert "  | line 99\n" in said.err
    assert "  | line 50\n" not in said.err
    assert "full log: runs/tiny/trainer.log" in said.err
    assert log.read_text().startswith("of an earlier attempt\n")
    assert "of an earlier attempt" not in said.all


def test_a_trainer_that_dies_without_a_termination_message(world: World, replay: Replay) -> None:
    said = replay.run(failing(None, 99), "run", "-f", world.write())
    assert said.code == 1
    assert "the trainer ended without a termination message (exit code 99)" in said.err


@pytest.mark.parametrize(
    ("code", "outcome", "text"),
    [
        (-9, Outcome.Internal, "killed by signal 9"),
        (0, Outcome.Internal, "without a termination message"),
        (7, Outcome.NoSpace, "A disk or a quota is full."),
    ],
)
def test_messages_for_exit_codes(tmp_path: Path, code: int, outcome: Outcome, text: str) -> None:
    words = trainer.last_words(tmp_path / "none", code)
    assert (words.known_outcome, text in words.message) == (outcome, True)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda spec: spec["dpo"].update(beta="high"), 2, 'spec.dpo.beta: "high" is not a number'),
        (lambda spec: spec["data"]["train"][0].update(uri="nope.jsonl"), 11, "spec.data.train[0].uri: nope.jsonl"),
        (lambda spec: spec["data"]["train"][0].update(uri="pvc://claim/x"), 11, "claims are mounted on a cluster only"),
        (lambda spec: spec["parallelism"].update(tensor=2), 2, "spec.parallelism: tensor 2 x"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    world: World, replay: Replay, change: Callable[[Any], None], code: int, text: str
) -> None:
    world.spec |= {"dpo": {}, "parallelism": {}}
    change(world.spec)
    said = replay.run(SUCCESS, "run", "-f", world.write())
    assert said.code == code
    assert text in said.err
    assert said.out == ""
    assert not (world.folder / "runs").exists()


def test_one_of_several_jobs(world: World, replay: Replay, dpo: Dpo) -> None:
    both = world.folder / "both.yaml"
    both.write_text(
        Path(world.write("a.yaml", "one")).read_text() + "---\n" + Path(world.write("b.yaml", "two")).read_text()
    )
    said = dpo("run", "-f", str(both))
    assert said.code == 64
    assert said.err == f"error  {both} holds 2 DPOJobs (one, two); choose one with --name\n"
    assert dpo("run", "-f", str(both), "--name", "three").code == 64
    assert replay.run(SUCCESS, "run", "-f", str(both), "--name", "two").code == 0
    assert [path.name for path in (world.folder / "runs").iterdir()] == ["two"]


def test_a_run_that_was_already_finished_says_so(world: World, replay: Replay) -> None:
    said = replay.run(SUCCESS | {"events": EVENTS[:2]}, "run", "-f", world.write())
    assert said.code == 0
    assert "  note     this run was already finished: there was nothing to do\nresult " in said.out


@pytest.mark.slow
def test_a_run_directory_that_cannot_be(world: World, replay: Replay) -> None:
    (world.folder / "file").write_text("")
    said = replay.run(SUCCESS, "run", "-f", world.write(), "--output", "file")
    assert (said.code, said.err) == (11, "error  file: is a file, not a folder; choose another run directory\n")
    said = replay.run(SUCCESS, "run", "-f", world.write(), "--output", "file/below")
    assert said.code == 11


def test_a_missing_trainer_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(NotFoundError, match=r"pip install 'dpo-operator\[trainer\]'"):
        trainer.require_trainer()


HANGING = {"events": EVENTS[:4], "metrics": METRICS[:2], "hang": True}


def signalled(world: World, replay: Replay, script: dict[str, Any], *signals: int) -> Said:
    """Start a run, wait until it trains, send the signals half a second apart."""
    child = replay.start(script, "run", "-f", world.write(), start_new_session=True)
    marker = world.folder / "runs" / "tiny" / "arguments.json"
    wait_for(marker.exists)
    time.sleep(0.5)
    for number in signals:
        child.send_signal(number)
        time.sleep(0.5)
    out, err = child.communicate(timeout=30)
    return Said(child.returncode, out, err)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for 30 s"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.slow
def test_one_signal_stops_with_a_checkpoint_and_shows_how_to_continue(
    world: World, replay: Replay, number: int
) -> None:
    where = "asked to stop after step 2 of 4; checkpoint: runs/tiny/checkpoints/step-000002; the same command continues"
    words = {"outcome": "Stopped", "message": where, "step": 2, "total": 4}
    said = signalled(world, replay, HANGING | {"stoppedWords": words}, number)
    assert said.code == 143
    assert "stopping: writing a checkpoint first" in said.out
    assert f"stopped     {where}\n" in said.out
    assert f"continue    dpo run -f {world.folder}/job.yaml\n" in said.out
    assert "report      runs/tiny/report.html" in said.out
    assert said.err == ""


@pytest.mark.slow
def test_a_second_ctrl_c_kills_the_trainer_and_its_children(world: World, replay: Replay) -> None:
    script = HANGING | {"ignoreTerm": True, "childSleeps": 1000}
    said = signalled(world, replay, script, signal.SIGINT, signal.SIGINT)
    assert said.code == 130
    assert "killed by a second Ctrl-C" in said.err
    pids = [int(text) for text in (world.folder / "runs" / "tiny" / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_run_directory_in_s3(world: World, replay: Replay, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    s3.make_bucket("runs")
    world.spec["checkpoint"] = {"uri": "s3://runs/tiny/"}
    said = replay.run(SUCCESS, "run", "-f", world.write())
    assert said.code == 0
    assert "model       s3://runs/tiny/model\n" in said.out
    assert "report      s3://runs/tiny/report.html\n" in said.out
    page = s3.client().get_object(Bucket="runs", Key="tiny/report.html")["Body"].read()
    assert b"accuracy, validation" in page
    assert not (world.folder / "runs").exists()
    assert not list(world.folder.glob("*.log"))


@pytest.mark.parametrize(
    ("asked", "stated", "gpus", "processes", "noted"),
    [
        (None, None, 0, 1, False),
        (None, 2, 0, 2, False),
        (3, 2, 8, 3, False),
        (None, None, 8, 8, False),
        (None, 2, 8, 2, False),
        (None, 8, 2, 2, True),
    ],
)
def test_how_many_processes(asked: int | None, stated: int | None, gpus: int, processes: int, noted: bool) -> None:
    chosen, notes = choose_processes(asked, Resources(processes_per_node=stated), gpus)
    assert (chosen, bool(notes)) == (processes, noted)


def test_a_missing_gpu_is_reported() -> None:
    assert choose_processes(None, Resources(gpus_per_node=8), 0) == (
        1,
        ["no GPU found on this machine (the manifest asks for 8 per node): training on CPU"],
    )


LISTING = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"


def test_gpus_are_counted_without_torch(tmp_path: Path) -> None:
    assert count_listed(LISTING) == 2
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    assert gpu_count({"PATH": path}) == 2
    assert gpu_count({"PATH": path, "CUDA_VISIBLE_DEVICES": "1"}) == 1
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_count({"PATH": path}) == 0
    assert gpu_count({"PATH": str(tmp_path / "empty")}) == 0


@pytest.mark.parametrize(
    ("variable", "count"), [(None, 4), ("", 0), ("-1", 0), ("0,2", 2), ("0,9,1", 1), ("GPU-1", 1), ("1,-1,2", 1)]
)
def test_cuda_visible_devices(variable: str | None, count: int) -> None:
    assert visible(4, variable) == count


def test_the_tail_of_a_log_is_cut_at_this_runs_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n" + b"".join(b"%d\x1b[31m\n" % n for n in range(30)))
    assert list(tail_of(log, len(b"before\n"), 3)) == ["27 [31m", "28 [31m", "29 [31m"]
    assert list(tail_of(log, log.stat().st_size, 3)) == []
    assert list(tail_of(tmp_path / "none", 0, 3)) == []


def test_kill_tree_reaches_grandchildren_in_other_sessions() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        trainer.kill_tree(parent.pid)
    wait_for(lambda: not alive(grandchild))


@pytest.mark.slow
def test_the_manifest_may_come_from_standard_input(world: World, replay: Replay) -> None:
    text = Path(world.write()).read_text()
    child = replay.start(SUCCESS, "run", "-f", "-", stdin=subprocess.PIPE)
    out, _ = child.communicate(text, timeout=30)
    assert child.returncode == 0
    assert "result " in out
    assert yaml.safe_load(text)["metadata"]["name"] == "tiny"


def test_the_trainer_trusts_the_certificates_that_the_manifest_names() -> None:
    assert environment_of(parse_job(manifest()).spec) == {}
    named = parse_job(manifest({"spec.storage.caBundle": {"path": "/etc/ca.pem"}}))
    assert environment_of(named.spec) == {"DPO_CA_BUNDLE": "/etc/ca.pem"}
