"""A process forked by dpo_testing.preloaded behaves as one that a new interpreter runs: each test starts both kinds."""

import json
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dpo_testing.gloo import run_ranks
from dpo_testing.preloaded import ROOT, PreloadedPopen

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks need Linux")


class Forked(PreloadedPopen):
    """With a server that has imported nothing, so that it starts at once."""

    preload = ()


Kind = type[subprocess.Popen[Any]]


@pytest.fixture(autouse=True)
def heeded_ctrl_c() -> Iterator[None]:
    """A shell without job control starts background commands with SIGINT ignored, and processes inherit that."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(params=[subprocess.Popen, Forked], ids=["interpreter", "forked"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("crds", "trainer", "tests/support"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def probe(kind: Kind, *words: str, **options: Any) -> subprocess.Popen[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(), **options}
    return kind([sys.executable, "-m", "dpo_testing.probe", *words], **given)


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [
        ("0", 0, ""),
        ("none", 0, ""),
        ("3", 3, ""),
        ("259", 3, ""),
        ("message", 1, "a last message\n"),
        ("error", 1, "ValueError: a deliberate error\n"),
        (f"signal {signal.SIGKILL:d}", -signal.SIGKILL, ""),
        (f"signal {signal.SIGTERM:d}", -signal.SIGTERM, ""),
    ],
)
def test_the_exit_code(kind: Kind, how: str, code: int, error: str) -> None:
    with probe(kind, "exit", how) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said.endswith(error)
    assert bool(said) == bool(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it(kind: Kind, number: signal.Signals) -> None:
    with probe(kind, "sleep") as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() != []
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(30) == -number
        assert process.poll() == -number


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 9), (signal.SIGINT, 8)])
def test_its_own_handler_gets_a_signal(kind: Kind, number: signal.Signals, code: int) -> None:
    with probe(kind, "handle") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == code


def test_it_gets_what_an_interpreter_gets(tmp_path: Path) -> None:
    def described(kind: Kind) -> tuple[dict[str, Any], str]:
        options = {"cwd": tmp_path, "stdin": subprocess.PIPE, "start_new_session": True}
        with probe(kind, "describe", "a b", "ü", env=environment(NEW="v=1\nw", EMPTY=""), **options) as process:
            out, error = process.communicate("some input", timeout=30)
        assert process.returncode == 0, error
        return json.loads(out), error

    found, error = described(Forked)
    assert (found, error) == described(subprocess.Popen)
    assert (found["cwd"], found["input"], found["words"]) == (str(tmp_path), "some input", ["a b", "ü"])
    assert (found["environment"]["NEW"], found["environment"]["EMPTY"]) == ("v=1\nw", "")
    assert (found["own session"], error) == (True, "a line of stderr\n")


def test_its_streams_can_be_files_and_one_another(kind: Kind, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        assert probe(kind, "describe", **options).wait(30) == 0
    facts, *rest = sorted((tmp_path / "log").read_text().splitlines(), reverse=True)
    assert (json.loads(facts)["input"], rest) == ("", ["a line of stderr"])


@pytest.mark.parametrize(("how", "code"), [("7", 7), (f"signal {signal.SIGKILL:d}", -signal.SIGKILL)])
def test_a_process_sees_how_its_own_child_ended(kind: Kind, how: str, code: int) -> None:
    with probe(kind, "start", "start", "exit", how) as process:
        out, _ = process.communicate(timeout=30)
    assert out.split() == [str(code), "0"]


def test_a_killed_parent_takes_its_child_along(kind: Kind) -> None:
    with probe(kind, "start", "sleep", "follow") as process:
        assert process.stdout is not None
        child, parent = map(int, process.stdout.readline().split())
        try:
            assert parent == process.pid
            process.kill()
            # The child has the parent's stdout: it is closed only when both are gone.
            out, _ = process.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert (out, process.returncode) == ("", -signal.SIGKILL)


def test_a_variable_that_was_read_at_import_cannot_differ() -> None:
    with probe(Forked, "exit", "0", env=environment(OMP_NUM_THREADS="7")) as process:
        _, error = process.communicate(timeout=30)
    assert process.returncode == 70
    assert "OMP_NUM_THREADS is read at import; '7' is not the server's" in error


@pytest.mark.parametrize("option", [{"shell": True}, {"pass_fds": [0]}, {"executable": "/bin/true"}])
def test_an_option_that_a_fork_does_not_have_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="takes no preexec_fn, pass_fds, shell or executable"):
        probe(Forked, "exit", "0", **option)


@pytest.mark.slow
def test_a_rank_that_fails_fails_its_caller() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*ZeroDivisionError"):
        run_ranks(2, operator.truediv, 0)  # rank 1, too
