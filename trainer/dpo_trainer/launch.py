"""Starts a node's processes through torchrun and turns their results into one exit code and one message.

torchrun alone turns every worker's exit code into 1, answers SIGTERM with a traceback and kills workers after 30 s. So
it runs as a child, each rank writes a result file, and this process sums the results up. It imports neither torch nor
Megatron-Core.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dpo_api.errors import DPOError, InvalidSpecError, NotFoundError, Outcome
from dpo_api.manifest import load_manifest
from dpo_api.progress import LastWords
from dpo_api.spec import DPOJobSpec, Resources
from dpo_api.validation import refuse_errors
from dpo_trainer.agent import LOCAL_RENDEZVOUS, report_signal
from dpo_trainer.parent import follow_parent
from dpo_trainer.results import read_results, summarise

MARGIN_SECONDS = 5.0
"""Part of the grace period that is kept for summing up after the workers have exited."""


def launch(arguments: argparse.Namespace) -> int:
    """Run this node's part of the job; returns the outcome's exit code."""
    results = Path(tempfile.mkdtemp(prefix="dpo-results-"))
    try:
        words = _launch(arguments, results)
    finally:
        shutil.rmtree(results, ignore_errors=True)
    if arguments.last_words is not None:
        arguments.last_words.write_text(words.to_json())
    outcome = words.known_outcome
    if outcome is not Outcome.Succeeded:
        print(f"{outcome.name}: {words.message}", file=sys.stderr, flush=True)
    return outcome.exit_code


def _launch(arguments: argparse.Namespace, results: Path) -> LastWords:
    try:
        if arguments.spec_digest is not None:
            check_digest(arguments.spec, arguments.spec_digest)
        job = load_manifest(arguments.spec, stored=True)
        refuse_errors(job.spec)
    except DPOError as error:
        return LastWords(outcome=error.outcome.name, message=str(error))
    processes = arguments.processes or processes_here(os.environ, job.spec.resources)
    command = [sys.executable, "-m", "dpo_trainer"]
    if not arguments.joined:
        command += ["agent", *_rendezvous(os.environ), f"--nproc-per-node={processes}", "--max-restarts=0"]
        command += ["-m", "dpo_trainer"]
    command += ["worker", "--results", str(results)]
    for name in ("spec", "run_dir", "attempt", "events", "port", "host"):
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}={value}"]
    environment = {**os.environ, **allocator(os.environ), **switches(job.spec)}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(max(1.0, arguments.grace_seconds - MARGIN_SECONDS)))
    # torchrun would set this to 1, with a warning, when several processes share a node. Share the cores evenly instead.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if arguments.joined else processes
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))
    follow_parent()
    code = 0
    with _Forwarding() as stop:
        if not stop.asked:
            # A new session, so that a terminal's Ctrl-C reaches only this process, which passes it on once.
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            stop.to(child)
            code = child.wait()
    if arguments.joined and code < 0:
        report_signal(results, int(os.environ["RANK"]), -code)
    return summarise(read_results(results), code, asked=stop.asked)


def check_digest(spec: Path, accepted: str) -> None:
    """Raise InvalidSpecError if the file of the spec does not have the digest (sha256:…) that was accepted."""
    try:
        found = f"sha256:{hashlib.sha256(spec.read_bytes()).hexdigest()}"
    except OSError as error:
        raise NotFoundError(f"{spec}: {error.strerror}") from None
    if found != accepted:
        text = f"{spec} is not the accepted spec: its digest is {found}, not {accepted}. Somebody replaced the job's"
        raise InvalidSpecError(
            f"{text} ConfigMap. Delete the ConfigMap, then retry the job: the operator makes it again"
        )


class _Forwarding:
    """Passes the first SIGTERM or SIGINT on to the child, once, also one that arrives before the child is started.

    A second signal would do harm: torchrun's handler raises, which would end its wait for the workers' checkpoint.
    """

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals to this child from now on."""
        self._child = child
        if self.asked:
            child.terminate()

    def _note(self, _signal: int, _frame: Any) -> None:
        first, self.asked = not self.asked, True
        if first and self._child is not None:
            self._child.terminate()


def switches(spec: DPOJobSpec) -> dict[str, str]:
    """Return the environment variables that Transformer Engine and cuBLAS read when they are loaded.

    This is the only place that sets them: on a cluster too, a pod runs the launcher. A field of the spec takes
    precedence over a variable that is already set.
    """
    engine = spec.transformer_engine
    asked = {
        "NVTE_MASKED_SOFTMAX_FUSION": engine.masked_softmax_fusion,
        "NVTE_FLASH_ATTN": engine.flash_attention,
        "NVTE_FUSED_ATTN": engine.fused_attention,
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": False if spec.training.deterministic else None,
    }
    found = {name: str(int(value)) for name, value in asked.items() if value is not None}
    if spec.training.deterministic:
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch refuses deterministic cuBLAS without it
    return found


def allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of torch's allocator on GPUs; none if the environment has some.

    Packs differ in length, and so do their tensors. Without segments that grow, memory that is free in pieces of other
    sizes cannot be used.
    """
    if environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def processes_here(environment: Mapping[str, str], resources: Resources) -> int:
    """Return how many processes to start: PET_NPROC_PER_NODE, else the spec's, else one per requested GPU, else 1."""
    per_node = environment.get("PET_NPROC_PER_NODE", "")
    return int(per_node) if per_node.isdigit() else resources.processes()


def _rendezvous(environment: Mapping[str, str]) -> list[str]:
    """Return torchrun's rendezvous arguments. It must not be the dynamic one, which unpickles what its store holds."""
    if int(environment.get("PET_NNODES", "1") or 1) > 1:
        # torchrun reads PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT itself. PyTorchJob sets them.
        return ["--rdzv-backend=static"]
    return [f"--rdzv-backend={LOCAL_RENDEZVOUS}", "--rdzv-endpoint=localhost"]
