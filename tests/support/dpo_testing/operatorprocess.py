"""The operator as its users run it: one process, started, looked at, and killed."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from dpo_testing.controlplane import stable_port
from dpo_testing.kubeapi import eventually
from dpo_testing.playedclock import FOLDER as PLAYED_CLOCK
from dpo_testing.playedclock import PlayedClock
from dpo_testing.preloaded import PreloadedPopen, usable

_REPOSITORY = Path(__file__).resolve().parents[3]

QUICK = (
    "--backoff-base-seconds=1", "--backoff-max-seconds=4", "--scrape-seconds=1", "--progress-write-seconds=1",
    "--relist-seconds=5", "--dead-watch-seconds=10", "--log-format=json",
)  # fmt: skip
"""Flags that make waits short; everything else is as shipped."""


class _Forked(PreloadedPopen):
    """The operator without the seconds of its imports, which a test that kills it at each write pays many times."""

    preload = ("dpo_operator.runtime.app", "dpo_operator.runtime.selfcheck", "dpo_operator.runtime.options")


class OperatorProcess:
    """``dpo-operator`` against one kubeconfig. A context manager."""

    def __init__(
        self,
        kubeconfig: Path,
        *flags: str,
        namespaces: str = "",
        environment: Mapping[str, str] | None = None,
        repository: Path = _REPOSITORY,
        clock: PlayedClock | None = None,
        ca: Path | None = None,
        preloaded: bool = True,
    ) -> None:
        """Prepare; ``start`` runs it. ``namespaces``: one or several by comma; empty: all. ``repository``: its code.

        ``clock``: its wall clock, which the test sets. ``ca``: the CA of its certificate, if the flags give it one.
        ``preloaded``: forked from a process that has its imports; not with a clock or a repository of its own.
        """
        forked = preloaded and clock is None and repository == _REPOSITORY and usable()
        self._popen: type[subprocess.Popen[bytes]] = _Forked if forked else subprocess.Popen
        self._environment = dict(environment or {})
        self._packages = [str(repository / package) for package in ("crds", "operator")]
        if clock is not None:
            self._environment |= clock.environment
            self._packages.insert(0, str(PLAYED_CLOCK))
        self._tls = None if ca is None else ssl.create_default_context(cafile=str(ca))
        self.port = stable_port()
        self._log = Path(tempfile.mkstemp(prefix="dpo-operator-", suffix=".log")[1])
        self._command = [
            sys.executable, "-m", "dpo_operator", f"--kubeconfig={kubeconfig}", "--address=127.0.0.1",
            f"--port={self.port}", *QUICK, *flags,
        ]  # fmt: skip
        if namespaces:
            self._command.append(f"--namespaces={namespaces}")
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def __enter__(self) -> Self:
        """Start and wait until it is ready."""
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        """End it and remove its log."""
        self.kill()
        self._log.unlink(missing_ok=True)

    def start(self) -> None:
        """Start the process; its log goes on where that of the last one ended."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DPO_OPERATOR_")}
        environment |= {"PYTHONPATH": os.pathsep.join(self._packages), "OMP_NUM_THREADS": "1", **self._environment}
        with self._log.open("ab") as log:
            self._process = self._popen(self._command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.starts += 1

    @property
    def pid(self) -> int:
        """Process id of the running operator."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a lost node does: SIGKILL, and no word."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(30)

    def terminate(self) -> int:
        """Ask it to stop; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def get(self, path: str, *, token: str = "") -> tuple[int, str]:
        """Return status and text of /metrics, /healthz or /readyz; status 0 when nobody answers."""
        scheme = "http" if self._tls is None else "https"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{scheme}://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5.0, context=self._tls) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self) -> None:
        """Wait until its caches are filled."""

        def ready() -> bool:
            if not self.running:
                raise AssertionError(f"the operator ended:\n{self.log()[-4000:]}")
            return self.get("/readyz")[0] == 200

        eventually(ready, seconds=60, what="the operator is ready")

    def metric(self, name: str) -> float:
        """Return the value of one series, labels included in ``name``."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no series {name}")

    def passes(self) -> int:
        """Return how many passes over DPOJobs it has made since it was started."""
        return int(self.metric("dpo_operator_reconcile_duration_seconds_count"))

    def log(self) -> str:
        """Return everything that it has logged."""
        return self._log.read_text(errors="replace")

    def exceptions(self) -> list[str]:
        """Return the log's tracebacks; there should never be one."""
        found = []
        for line in self.log().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                found.append(line)
                continue
            if "exception" in entry:
                found.append(f"{entry['message']}\n{entry['exception']}")
        return found
