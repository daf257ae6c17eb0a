"""The init container's template, run by a real shell against a real name server, in network and mount namespaces."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from dpo_operator.backend import initcontainer
from dpo_testing.kubeapi import eventually

NAME_SERVER = """
import socket, struct, sys, time
names, misses = set(sys.argv[2:]), int(sys.argv[1])
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
print("ready", flush=True)
while True:
    query, client = server.recvfrom(512)
    at, words = 12, []
    while query[at]:
        words.append(query[at + 1 : at + 1 + query[at]].decode())
        at += query[at] + 1
    name, kind = ".".join(words), struct.unpack("!H", query[at + 1 : at + 3])[0]
    print(name, flush=True)
    known = name in names and misses <= 0
    misses -= 1
    answer = b"\\xc0\\x0c" + struct.pack("!HHIH", 1, 1, 5, 4) + bytes([10, 0, 0, 1]) if known and kind == 1 else b""
    head = struct.pack("!HHHHH", 0x8180 | (0 if known else 3), 1, 1 if answer else 0, 0, 0)
    server.sendto(query[:2] + head + query[12 : at + 5] + answer, client)
"""
"""Answers every query by NXDOMAIN ``misses`` times, then A queries of known names with an address."""

CLUSTER_FIRST = "search team.svc.corp.example svc.corp.example corp.example eu.internal\nnameserver 127.0.0.1\n"
INSIDE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-ec"]


def script(master: str) -> str:
    (container,) = yaml.safe_load(
        initcontainer.TEMPLATE.replace("{{.MasterAddr}}", master).replace("{{.InitContainerImage}}", "busybox")
    )
    shell, option, text = container["command"]
    assert (shell, option) == ("sh", "-c")
    assert "{{" not in text, "it counts no tries"
    return str(text)


@contextmanager
def started(
    home: Path, resolv: str, *, misses: int = 0, names: tuple[str, ...], before: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """Run the template in its own network, whose name server writes each query to ``home/queries``."""
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run([*INSIDE, "ip link set lo up"], capture_output=True, check=False).returncode:
        pytest.skip("this machine has no busybox, or allows no namespaces of one's own")
    (home / "resolv.conf").write_text(resolv)
    (home / "server.py").write_text(NAME_SERVER)
    (home / "init.sh").write_text(before + script("job-1-master-0"))
    inside = f"""
    ip link set lo up
    mount --bind {home}/resolv.conf /etc/resolv.conf
    {sys.executable} -I {home}/server.py {misses} {" ".join(names)} >{home}/queries &
    server=$!
    until grep -q ready {home}/queries; do sleep 0.05; done
    trap 'kill -TERM $init' TERM
    code=0
    env -i PATH={home}/bin {busybox} sh {home}/init.sh & init=$!
    wait $init || code=$?
    trap - TERM
    kill $server
    exit $code
    """
    (home / "bin").mkdir()
    for applet in ("nslookup", "grep", "sleep"):
        (home / "bin" / applet).symlink_to(busybox)
    process = subprocess.Popen([*INSIDE, inside], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def queries(home: Path) -> list[str]:
    return (home / "queries").read_text().split()[1:]


@pytest.mark.slow
def test_it_waits_for_one_absolute_name(tmp_path: Path) -> None:
    name = "job-1-master-0.team.svc.corp.example"
    with started(tmp_path, CLUSTER_FIRST, misses=2, names=(name,)) as process:
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == f"waiting for {name}.\n"
    assert set(queries(tmp_path)) == {name}
    assert len(queries(tmp_path)) == 4, "two tries of an A and an AAAA query"


@pytest.mark.slow
def test_without_a_clusters_search_domain_it_asks_for_the_bare_name(tmp_path: Path) -> None:
    with started(
        tmp_path, "search corp.example\nnameserver 127.0.0.1\n", names=("job-1-master-0.corp.example",)
    ) as process:
        assert process.wait(60) == 0
    assert set(queries(tmp_path)) == {"job-1-master-0.corp.example"}


@pytest.mark.slow
def test_it_does_not_give_up_and_ends_when_it_is_stopped(tmp_path: Path) -> None:
    """``sleep`` is a function that does not wait. 200 tries are more than training-operator's own template makes."""
    pauses = tmp_path / "pauses"
    no_wait = f'sleep() {{ echo "$1" >>{pauses}; }}\n'
    with started(tmp_path, CLUSTER_FIRST, names=("other",), before=no_wait) as process:
        eventually(lambda: pauses.exists() and len(pauses.read_text().split()) > 200, what="200 tries")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    waited = [int(pause) for pause in pauses.read_text().split()]
    assert waited[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert set(waited[12:]) == {10}


def test_training_operator_can_render_it() -> None:
    """It uses html/template: after a "<" the rest is an HTML tag, in which most of a script is an error."""
    assert "<" not in initcontainer.TEMPLATE
