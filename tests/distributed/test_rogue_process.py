"""A process that reached a run's rendezvous port sends pickles. None is run, and the run ends with an error."""

import base64
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from dpo_testing.preloaded import PreloadedPopen, usable
from dpo_testing.rogue import SCENES, Evil, meet
from dpo_testing.runs import PACKAGES
from dpo_trainer.launch import _rendezvous

pytestmark = pytest.mark.slow

WAITING = """
import os, sys, time
folder = sys.argv[sys.argv.index("--results") + 1]
open(f"{folder}/started", "w").close()
while not os.path.exists(f"{folder}/go"):
    time.sleep(0.02)
"""


@pytest.mark.parametrize("scene", SCENES)
def test_what_a_rogue_process_sends_is_not_unpickled(scene: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = {**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    outcome, message = meet(scene, tmp_path, PreloadedPopen if usable() else subprocess.Popen, variables)
    assert not (tmp_path / "proof").exists(), (tmp_path / "proof").read_text()
    assert outcome == "Internal", (message, (tmp_path / "rogue.log").read_text())
    found = "a message that is not JSON" if scene == "value" else "it names posix.system"
    assert found in message
    assert "has reached its rendezvous port" in message


def listening(pid: int) -> set[tuple[str, int]]:
    """The addresses, as the kernel writes them, and ports that a process listens on."""
    own = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            address, _, port = words[1].partition(":")
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.add((address, int(port, 16)))
    return found


def test_the_store_of_one_node_is_not_unpickled_and_cannot_be_reached_from_outside(tmp_path: Path) -> None:
    script, proof = tmp_path / "worker.py", tmp_path / "proof"
    script.write_text(WAITING)
    command = [sys.executable, "-m", "dpo_trainer", "agent", *_rendezvous({}), "--nproc-per-node=1", "--max-restarts=0"]
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(
            [*command, str(script), "--results", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while not (tmp_path / "started").exists():
            assert agent.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        reached = listening(agent.pid)
        for _, port in reached:
            store = TCPStore("127.0.0.1", port, 1, is_master=False)
            for key in store.list_keys():
                store.set(key, base64.b64encode(pickle.dumps(Evil(proof))).decode())  # as the dynamic rendezvous does
        (tmp_path / "go").touch()
        agent.wait(120)  # a dynamic rendezvous reads its state once more before it ends
    finally:
        agent.kill()
    assert not proof.exists(), proof.read_text()
    assert {address for address, _ in reached} == {"0100007F"}


def test_several_nodes_meet_by_the_static_rendezvous_whatever_the_environment_says() -> None:
    assert _rendezvous({"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d"}) == ["--rdzv-backend=static"]
