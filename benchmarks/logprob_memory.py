"""Peak memory of response log-probabilities, forward and backward: the trainer's chunked form against the naive one.

    python benchmarks/logprob_memory.py [--vocabulary 128256 --hidden 512 --rows 1024 --dtype fp32 --device cpu]

Each form runs in a fresh child process on the same numbers and reports the peak it adds to what its inputs take: on CPU
the resident set (the kernel's high-water mark), on a GPU the allocator's peak. The two results must agree, or the
comparison is refused. The last line is JSON.
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
from torch import Tensor

from dpo_trainer.logprobs import default_chunk, response_log_probs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def naive(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, as autograd would have it."""
    return (rows @ weight.t()).float().log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


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


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One form in this process: peak bytes, seconds, and figures of the result to compare."""
    torch.manual_seed(0)
    dtype, device = DTYPES[options.dtype], options.device
    rows = torch.randn(options.rows, options.hidden, device=device).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(options.vocabulary, options.hidden, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, options.vocabulary, (options.rows,), device=device)
    form = naive if options.form == "naive" else partial(response_log_probs, chunk=options.chunk or None)
    form(rows[:2], weight[:64], labels[:2] % 64)  # libraries' own buffers are nobody's peak
    peak, start = Peak(device), time.perf_counter()
    result = form(rows, weight, labels)
    rows_grad, weight_grad = torch.autograd.grad(result.mean(), (rows, weight))
    if device != "cpu":
        torch.cuda.synchronize()
    seconds, added = time.perf_counter() - start, peak.added()
    return {
        "peak_bytes": added,
        "seconds": seconds,
        "mean": float(result.mean()),
        "rows_grad_norm": float(rows_grad.double().norm()),
        "weight_grad_norm": float(weight_grad.double().norm()),
    }


def child(form: str, options: argparse.Namespace) -> dict[str, float]:
    flags = [
        f"--{name}={getattr(options, name)}" for name in ("vocabulary", "hidden", "rows", "dtype", "device", "chunk")
    ]
    out = subprocess.run(
        [sys.executable, __file__, f"--form={form}", *flags], check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--chunk", type=int, default=0, help="rows a chunk; 0 = the trainer's own choice")
    parser.add_argument("--form", choices=("naive", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options)))
        return
    results = {form: child(form, options) for form in ("naive", "chunked")}
    for figure in ("mean", "rows_grad_norm", "weight_grad_norm"):
        ours, theirs = (results[form][figure] for form in ("chunked", "naive"))
        assert abs(ours - theirs) <= (1e-4 if options.dtype == "fp32" else 2e-2) * abs(theirs), (figure, ours, theirs)
    chunk = options.chunk or default_chunk(options.rows, options.vocabulary)
    print(
        f"log-probabilities of {options.rows:,} response tokens, vocabulary {options.vocabulary:,}, "
        f"hidden {options.hidden:,}, {options.dtype}, {options.device}: forward + backward, chunks of {chunk} rows"
    )
    for form, result in results.items():
        print(f"  {form:8} {result['peak_bytes'] / 2**20:9,.0f} MiB above its inputs   {result['seconds']:6.2f} s")
    ratio = results["naive"]["peak_bytes"] / results["chunked"]["peak_bytes"]
    speed = results["naive"]["seconds"] / results["chunked"]["seconds"]
    print(f"  naive / chunked: {ratio:.1f} × the memory, {speed:.2f} × the time")
    print(json.dumps({"memory_ratio": ratio, "time_ratio": speed, "chunk": chunk, **results}))


if __name__ == "__main__":
    main()
