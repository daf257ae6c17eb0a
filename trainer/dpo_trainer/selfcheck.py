"""`python -m dpo_trainer --selfcheck`: check what this node has for training and report what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Literal

from dpo_api.errors import DPOError
from dpo_api.texts import size, sizes
from dpo_api.version import VERSION
from dpo_store import StorageOptions, open_store
from dpo_store.cache import cache_folder
from dpo_store.options import RetryPolicy

Level = Literal["ok", "note", "lacks"]

LACKS = 1
"""Exit code if something is missing; 0 if nothing is."""

OLDEST_ENGINE = (2, 9)
"""The oldest Transformer Engine whose signatures the tests hold, as in pyproject.toml: the first for CUDA 13."""

GIB = 1024**3
SHM_GPU = GIB
"""NCCL keeps its buffers between the GPUs of a node in shared memory; Docker's default of 64 MiB is too small."""
FREE_SCRATCH = GIB

SHM = Path("/dev/shm")  # noqa: S108 - shared memory, where NCCL looks for it
DEVICE_FILES = Path("/dev")


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only ``lacks`` makes the exit code other than 0."""

    level: Level
    topic: str
    text: str

    def __str__(self) -> str:
        """Return the line as it is printed."""
        return f"{self.level:<6} {self.topic:<10} {self.text}"


def selfcheck(gpus: int | None = None, s3: Sequence[str] = (), endpoint: str | None = None) -> int:
    """Print the report and return the exit code. gpus: how many there must be."""
    warnings.simplefilter("ignore")  # libraries' warnings; what matters is in the report
    lacking = 0
    for finding in findings(gpus, s3, endpoint):
        print(finding, flush=True)
        lacking += finding.level == "lacks"
    print(f"selfcheck: {lacking} lacking" if lacking else "selfcheck: all is there", flush=True)
    return LACKS if lacking else 0


def findings(gpus: int | None, s3: Sequence[str], endpoint: str | None) -> Iterator[Finding]:
    """Run every check; a failure of one does not hide the next."""
    seen = devices_seen()
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("software", software),
        ("gpu", lambda: devices(seen, gpus)),
        ("nccl", lambda: collectives(seen)),
        ("te", lambda: [transformer_engine(seen)]),
        ("triton", lambda: [kernels(seen)]),
        ("shm", lambda: [shared_memory(SHM, seen)]),
        ("cache", lambda: [folder("cache", cache_folder(), "set DPO_CACHE_DIR to a folder this user may write to")]),
        ("scratch", lambda: [folder("scratch", Path(tempfile.gettempdir()), "mount a volume there, or set TMPDIR")]),
    ]
    checks += [("s3", lambda uri=uri: [storage(uri, endpoint)]) for uri in s3]  # type: ignore[misc]
    for topic, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - drivers and libraries fail in ways of their own
            yield Finding("lacks", topic, f"the check failed: {_one_line(error)}")


def devices_seen() -> int:
    """Return how many GPUs torch can use; 0 if torch cannot be loaded, which ``software`` reports."""
    try:
        import torch
    except (ImportError, OSError):
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def software() -> Iterator[Finding]:
    """Report the versions of the trainer's main dependencies, which must import, not only be installed."""
    yield Finding("ok", "trainer", f"dpo-trainer {VERSION}, Python {platform.python_version()}, user {os.getuid()}")
    for module, distribution in (("torch", "torch"), ("megatron.core", "megatron-core")):
        try:
            __import__(module)
            yield Finding("ok", "software", f"{distribution} {metadata.version(distribution)}")
        except (ImportError, OSError) as error:
            text = f"{distribution} does not load: {_one_line(error)}; use the trainer's image, or install '.[trainer]'"
            yield Finding("lacks", "software", text)


def devices(seen: int, wanted: int | None) -> Iterator[Finding]:
    """Let each GPU compute a product; if there is no GPU, report why."""
    for index in range(seen):
        yield _computes(index)
    if wanted is not None and seen < wanted:
        yield Finding("lacks", "gpu", f"{seen} of {wanted} GPUs; {why_none() if seen == 0 else _FEWER}")
    elif seen == 0:
        driver = (DEVICE_FILES / "nvidiactl").exists()
        yield Finding("lacks" if driver else "note", "gpu", f"no GPU: {why_none()}")


_FEWER = "a pod gets the GPUs in its resources.limits, a Docker container those in --gpus"


def why_none() -> str:
    """Return the most likely reason why torch sees no GPU, and what to do."""
    import torch

    if not torch.backends.cuda.is_built():
        return "this torch is built for CPUs only; use the trainer's GPU image"
    if not (DEVICE_FILES / "nvidiactl").exists():
        return (
            "/dev/nvidiactl is not here, so the container has none; on a cluster request nvidia.com/gpu and check "
            "the GPU operator (its container toolkit and device plugin), with Docker use --gpus all. "
            "Training would run on the CPU"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them all"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"the driver is installed but CUDA does not start: {_one_line(error)}; is the driver new enough?"
    return "the driver is installed but reports no device"


def _computes(index: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    name = f"{index}: {facts.name}, {size(facts.total_memory)}, compute capability {facts.major}.{facts.minor}"
    ones = torch.ones(256, 256, dtype=torch.bfloat16, device=f"cuda:{index}")
    if not bool(((ones @ ones) == 256).all()):
        return Finding(
            "lacks", "gpu", f"{name}: a product of two matrices of ones is wrong; take the node out of service"
        )
    if facts.major < 8:
        return Finding("lacks", "gpu", f"{name}: no bf16; set training.precision to fp32, or use a newer GPU")
    return Finding("ok", "gpu", name)


def collectives(seen: int) -> Iterator[Finding]:
    """Let the node's GPUs sum a tensor through NCCL; without a GPU, check Gloo."""
    import torch
    import torch.distributed as dist

    if seen == 0:
        level: Level = "ok" if dist.is_gloo_available() else "lacks"
        yield Finding(level, "nccl", "not used without a GPU; Gloo is " + ("available" if level == "ok" else "missing"))
        return
    if not dist.is_nccl_available():
        yield Finding("lacks", "nccl", "torch is built without NCCL; use the trainer's GPU image")
        return
    from torch.cuda import nccl

    tensors = [torch.full((1024,), 1.0, device=f"cuda:{index}") for index in range(seen)]
    nccl.all_reduce(tensors)
    right = all(bool((tensor == seen).all()) for tensor in tensors)
    version = ".".join(map(str, nccl.version()))
    if right:
        yield Finding("ok", "nccl", f"{version}, a sum over {seen} GPU{'s' if seen > 1 else ''} is correct")
    else:
        yield Finding(
            "lacks", "nccl", f"{version}: a sum over {seen} GPUs is wrong; NCCL_DEBUG=INFO shows the transport it used"
        )


def transformer_engine(seen: int) -> Finding:
    """Check Transformer Engine, whose layers run on GPUs only."""
    if seen == 0:
        return Finding("note", "te", "Transformer Engine is not used without a GPU")
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError) as error:
        text = f"Transformer Engine does not load: {_one_line(error)}; training works without it but is slower"
        return Finding("note", "te", f"{text}: use the trainer's GPU image, or install '.[gpu]'")
    version = transformer_engine.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_ENGINE:
        oldest = ".".join(map(str, OLDEST_ENGINE))
        return Finding("note", "te", f"Transformer Engine {version} is older than {oldest}, the oldest that is tested")
    return Finding("ok", "te", f"Transformer Engine {version}")


def kernels(seen: int) -> Finding:
    """Check that Triton's kernels can be built and run; they need a C compiler and Python's headers."""
    if seen == 0:
        return Finding("note", "triton", "kernels are not used without a GPU")
    import torch

    from dpo_trainer.kernels.usable import why_not

    reason = why_not(torch.device("cuda", 0))
    if reason is not None:
        text = f"kernels do not run: {reason}; training works without them but is slower"
        return Finding("note", "triton", f"{text}: use the trainer's GPU image, or install gcc and Python's headers")
    return Finding("ok", "triton", "kernels run")


def shared_memory(place: Path, seen: int) -> Finding:
    """Check the size of shared memory, which NCCL uses between the GPUs of a node."""
    if not place.is_dir():
        return Finding("lacks" if seen > 1 else "note", "shm", f"there is no {place}")
    total = shutil.disk_usage(place).total
    if seen > 1 and total < SHM_GPU:
        needed, there = sizes(SHM_GPU, total)
        needs = f"NCCL needs {needed}: set resources.shm, or with Docker --shm-size"
        return Finding("lacks", "shm", f"{place} has {there}, {needs}")
    return Finding("ok", "shm", f"{place} has {size(total)}")


def folder(topic: str, place: Path, remedy: str) -> Finding:
    """Check a folder that a run writes to, by writing a file and removing it."""
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"selfcheck")
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding("lacks", topic, f"{place} cannot be written to ({error.strerror}); {remedy}")
    finally:
        for path in made:  # the deepest first; they are empty
            if path.is_dir():
                path.rmdir()
    level: Level = "ok" if free >= FREE_SCRATCH else "note"
    return Finding(level, topic, f"{place} is writable, {size(free)} free")


def storage(uri: str, endpoint: str | None) -> Finding:
    """Read one address with the credentials that a run would use."""
    store = open_store(StorageOptions(endpoint=endpoint), retry=RetryPolicy(attempts=2, connect_timeout=5.0))
    try:
        if uri.endswith("/"):
            count = sum(1 for _ in islice(store.list(uri), 1000))
            return Finding("ok", "s3", f"{uri} can be listed, {count if count < 1000 else 'at least 1000'} objects")
        first = store.expand(uri)[0]
        store.read(first.uri, 0, 1 if first.size else 0)
    except DPOError as error:
        return Finding("lacks", "s3", f"{error.outcome.name}: {error}")
    return Finding("ok", "s3", f"{first.uri} can be read, {size(first.size)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
