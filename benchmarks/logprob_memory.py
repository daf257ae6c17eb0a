"""Memory and time of response log-probabilities, forward and backward: the trainer's form against the naive one.

    python benchmarks/logprob_memory.py [--vocabulary 128256 --hidden 512 --rows 1024 8192 --dtype fp32 --device cpu]

Each form runs in fresh child processes, in turn, on the same numbers. A process reports the least time of its
repetitions and the peak that they add to what its inputs take: on CPU the resident set (the kernel's high-water mark),
on a GPU the allocator's peak. The two results must agree, or the comparison is refused. Where the naive form needs more
memory than is free, it gets fewer rows; its time is then compared a row, and its memory is not. The last line is JSON.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from peers.memory import status
from torch import Tensor

from dpo_api.sizing.head import CPU_BUDGET_BYTES, GPU_BUDGET_BYTES, HeadChunks, head_bytes, head_chunks
from dpo_trainer.logprobs import response_log_probs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
NAIVE_BYTES = 13
"""What the naive form takes of memory for each logit in fp32: its logits, their log-softmax, and both gradients of it
by turns (12 bytes), and some more for what lies beside them. In bf16 it takes no more."""


def naive(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, as autograd would have it."""
    return (rows @ weight.t()).float().log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


class Peak:
    """Bytes added at the peak since the object was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            # Forget the high-water mark of the imports, where the kernel lets us.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def added(self) -> int:
        after = status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return after - self.before


def division(options: argparse.Namespace) -> HeadChunks:
    """How the trainer divides these rows, within the device's budget or the given one."""
    budget = options.budget * MIB or (CPU_BUDGET_BYTES if options.device == "cpu" else GPU_BUDGET_BYTES)
    return head_chunks(options.rows, options.vocabulary, DTYPES[options.dtype].itemsize, budget, keep=True)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One form in this process: peak bytes, seconds, and figures of the result to compare."""
    torch.manual_seed(0)
    dtype, device = DTYPES[options.dtype], options.device
    rows = torch.randn(options.rows, options.hidden, device=device).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(options.vocabulary, options.hidden, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, options.vocabulary, (options.rows,), device=device)
    form = naive if options.form == "naive" else response_log_probs
    form(rows[:2], weight[:64], labels[:2] % 64)  # libraries' own buffers are nobody's peak
    if options.form != "naive":
        form = partial(response_log_probs, chunks=division(options))
    peak, seconds = Peak(device), []
    for _ in range(options.repeats):
        start = time.perf_counter()
        result = form(rows, weight, labels)
        rows_grad, weight_grad = torch.autograd.grad(result.mean(), (rows, weight))
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        figures = {
            "mean": float(result.detach().mean()),
            "rows_grad_norm": float(torch.linalg.vector_norm(rows_grad, dtype=torch.float64)),
            "weight_grad_norm": float(torch.linalg.vector_norm(weight_grad, dtype=torch.float64)),
        }
        added = peak.added()
        del result, rows_grad, weight_grad
    return {"peak_bytes": added, "seconds": min(seconds), "rows": options.rows, **figures}


def child(form: str, options: argparse.Namespace, rows: int) -> dict[str, float]:
    names = ("vocabulary", "hidden", "dtype", "device", "budget", "repeats")
    flags = [f"--form={form}", f"--rows={rows}", *(f"--{name}={getattr(options, name)}" for name in names)]
    out = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return result


def fitting(options: argparse.Namespace, rows: int) -> int:
    """Rows that the naive form has memory for: half as often as is needed."""
    if options.device == "cpu":
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None, "/proc/meminfo has no MemAvailable"
        free = int(found[1]) * 1024
    else:
        free = torch.cuda.mem_get_info()[0]
    free -= 16 * options.vocabulary * options.hidden  # the head, its gradient, their fp32 copies while they are made
    while rows > 1 and NAIVE_BYTES * rows * options.vocabulary > 0.9 * free:
        rows //= 2
    return rows


def compare(options: argparse.Namespace, rows: int) -> dict[str, object]:
    """Both forms for one number of rows: print the figures and return them."""
    fewer = fitting(options, rows)
    forms = {"naive": fewer, "ours": rows}
    runs = [{form: child(form, options, count) for form, count in forms.items()} for _ in range(options.rounds)]
    results = {form: min((run[form] for run in runs), key=lambda result: result["seconds"]) for form in forms}
    for figure in ("mean", "rows_grad_norm", "weight_grad_norm") if fewer == rows else ():
        ours, theirs = (results[form][figure] for form in ("ours", "naive"))
        assert abs(ours - theirs) <= (1e-4 if options.dtype == "fp32" else 2e-2) * abs(theirs), (figure, ours, theirs)
    options.rows = rows
    chunks, value = division(options), DTYPES[options.dtype].itemsize
    gradient = (
        options.vocabulary * options.hidden * (value if len(chunks.parts(rows)) == 1 else value + 4 * (value == 2))
    )
    predicted = head_bytes(chunks, options.vocabulary, value) + gradient
    print(
        f"log-probabilities of {rows:,} response tokens, vocabulary {options.vocabulary:,}, hidden {options.hidden:,}, "
        f"{options.dtype}, {options.device}: forward + backward; {chunks.kept:,} rows are kept"
    )
    for form, result in results.items():
        less = f" ({fewer:,} rows: no memory for more)" if result["rows"] < rows else ""
        print(f"  {form:6} {result['peak_bytes'] / MIB:9,.0f} MiB above its inputs   {result['seconds']:6.2f} s{less}")
    print(f"  {'':6} {predicted / MIB:9,.0f} MiB are predicted for ours: the matrices, and the head's gradient")
    memory = results["naive"]["peak_bytes"] / results["ours"]["peak_bytes"] if fewer == rows else None
    speed = results["naive"]["seconds"] / fewer / (results["ours"]["seconds"] / rows)
    times = f"{speed:.2f} × the time{' a row' if fewer < rows else ''}"
    print(f"  naive / ours: {f'{memory:.1f} × the memory, ' if memory else ''}{times}")
    return {
        "rows": rows,
        "kept": chunks.kept,
        "predicted_bytes": predicted,
        "memory_ratio": memory,
        "time_ratio": speed,
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=int, default=0, help="MiB of the trainer's form; 0 = the trainer's own")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each form")
    parser.add_argument(
        "--repeats", type=int, default=2, help="repetitions in a process, of which the least time counts"
    )
    parser.add_argument("--form", choices=("naive", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        options.rows = options.rows[0]
        print(json.dumps(measure(options)))
        return
    print(json.dumps([compare(options, rows) for rows in options.rows]))


if __name__ == "__main__":
    main()
