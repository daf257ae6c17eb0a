"""Speed, memory and losses against TRL: the same model, pairs, order and settings, in fp32 on the CPU.

    python benchmarks/against_trl.py [--workloads dialogue long short varied] [--forms full lora] [--repeats 1]

A random Llama (8 layers × 512, vocabulary 8,192; 32 million parameters) learns from pairs of made-up words. Each run is
a process of its own and uses all cores. TRL is installed into an environment of its own in the cache directory
(benchmarks/peers/trl.txt). It runs with the fastest of some micro-batches and without gradient checkpointing, which
would make it slower. The pairs are in our order of the first epoch, so both see the same batches.

Lengths vary by up to a third; those of the workload "varied" are log-normal with a standard deviation of 0.8 of their
mean. TRL pads a micro-batch to its longest text.

"counted": the cost of the reference's log-probs is in the time. TRL computes them in each step; ours are computed once,
before the first step. "precomputed": neither has it. The bound is the number of useful FLOPs, each counted once, over
the best rate of an fp32 matrix product, measured in between.

It ends with 1 if losses differ by more than 1e-4. The last line is JSON.
"""

# ruff: noqa: E402 - the test support lies where only pytest finds it by itself
import argparse
import json
import math
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "operator", "trainer", "tests/support")]

from dpo_api.models import read_config
from dpo_api.sizing.flops import Work, forward_flops, seen_keys, step_flops
from dpo_store import open_store
from dpo_store.cache import cache_folder
from dpo_testing.corpora import write_jsonl
from dpo_testing.runs import Finished, job_of
from dpo_trainer.data.packs.order import batch_pairs

PEERS = Path(__file__).resolve().parent / "peers"
VOCABULARY, LAYERS, HIDDEN, FFN, HEADS, GROUPS = 8192, 8, 512, 1408, 8, 4
RATE = 5e-5
LORA = {"rank": 16, "alpha": 32, "targetModules": ["all"], "dropout": 0.0}
LORA_RATE = 1e-3
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workload:
    """Pairs of these mean lengths, in tokens."""

    prompt: int
    response: int
    batch: int
    steps: int
    micro_batches: tuple[int, ...]
    """Those that TRL is tried with."""
    sigma: float = 0.0
    """Of the logarithm of a length, log-normal and at most eight times the mean. 0: within a third of the mean."""

    def length(self, mean: int, draw: random.Random) -> int:
        """Draw the length of one text, in tokens."""
        if not self.sigma:
            return draw.randint(mean - mean // 3, mean + mean // 3)
        drawn = draw.lognormvariate(math.log(mean) - self.sigma**2 / 2, self.sigma)
        return min(max(2, round(drawn)), 8 * mean)


WORKLOADS = {
    "dialogue": Workload(110, 45, 16, 4, (2, 4)),
    "varied": Workload(110, 45, 16, 4, (1, 2, 4), sigma=0.7),
    "long": Workload(768, 96, 8, 3, (1, 2)),
    "short": Workload(24, 12, 32, 4, (4, 8)),
}


def write_model(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer for which each word is one token."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<eos>", "<pad>", *(f"w{index}" for index in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pairs_of(workload: Workload) -> list[dict[str, str]]:
    """Random pairs of this workload."""
    draw = random.Random(1)

    def words(mean: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 2)}" for _ in range(workload.length(mean, draw)))

    count = workload.batch * workload.steps
    return [
        {"prompt": words(workload.prompt), "chosen_response": f" {words(workload.response)}",
         "rejected_response": f" {words(workload.response)}"}
        for _ in range(count)
    ]  # fmt: skip


def work_of(rows: Sequence[dict[str, str]]) -> Work:
    """What the pairs are for the model; each response ends with <eos>, and its last token is not an input."""
    tokens = scored = seen = 0
    for row in rows:
        prompt, chosen, rejected = (len(row[key].split()) for key in ("prompt", "chosen_response", "rejected_response"))
        tokens += prompt + chosen + rejected
        scored += chosen + 1 + rejected + 1
        seen += seen_keys(prompt + chosen) + seen_keys(rejected, before=prompt)
    return Work(tokens=tokens, rows=scored, seen=LAYERS * seen)


def product_rate() -> float:
    """The best rate of an fp32 matrix product on this machine, in FLOPs a second."""
    best = 0.0
    for m, n, k in ((2048, 2816, 512), (2048, 2048, 2048), (1024, 4096, 1024)):
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        for _ in range(8):
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * m * n * k / (time.perf_counter() - begin))
    return best


def environment_of_trl() -> Path:
    """Return the interpreter of an environment with TRL, which uses this one's torch; made the first time."""
    wanted = (PEERS / "trl.txt").read_text()
    folder = cache_folder() / "benchmarks" / "trl"
    python, made = folder / "bin" / "python", folder / "made.txt"
    if not made.exists() or made.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        (own,) = folder.glob("lib/*/site-packages")
        (own / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
        words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([*words, str(PEERS / "trl.txt")], check=True)
        made.write_text(wanted)
    return python


class Bench:
    """One model and its runs."""

    def __init__(self, folder: Path, python: Path) -> None:
        """``python``: the interpreter that has TRL."""
        self.folder, self.python = folder, python
        self.count = 0
        write_model(folder / "model")

    def spec(self, name: str, *, lora: bool, rate: float | None = None, **training: Any) -> dict[str, Any]:
        """The trainer's spec for a workload; ``rate`` is the learning rate, if not the workload's."""
        workload = WORKLOADS[name]
        rate = rate or (LORA_RATE if lora else RATE)
        settings = {
            "globalBatchSize": workload.batch, "epochs": 1, "precision": "fp32", "weightDecay": 0.0,
            "learningRate": rate, "schedule": {"warmupSteps": 0, "minLearningRate": rate},
        }  # fmt: skip
        spec: dict[str, Any] = {
            "model": {"huggingFace": {"uri": str(self.folder / "model")}},
            "data": {"train": [{"uri": str(self.folder / f"{name}.jsonl")}], "maxLength": 2048, "appendEos": True},
            "training": settings | training,
            "reference": {"cacheURI": str(self.folder / f"reference of {name}, {lora}")},
        }  # fmt: skip
        return spec | ({"lora": LORA} if lora else {})

    def _child(self, command: list[str]) -> tuple[str, float, float]:
        """Run; return the output, when it started (Unix seconds), and the peak of its largest process in MiB."""
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4])}
        variables |= {"DPO_CACHE_DIR": str(self.folder / "cache")}
        script = (
            "import json,resource,subprocess,sys,time\n"
            "begin=time.time()\n"
            "done=subprocess.run(sys.argv[1:])\n"
            "peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024\n"
            "print(json.dumps([begin,peak]))\n"
            "sys.exit(done.returncode)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *command], env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        *before, last = done.stdout.splitlines()
        begin, peak = json.loads(last)
        return "\n".join(before), begin, peak

    def ours(self, name: str, *, lora: bool, rate: float | None = None, **training: Any) -> dict[str, Any]:
        """One run of the trainer; its figures."""
        self.count += 1
        out = self.folder / f"out {self.count}"
        out.mkdir()
        spec, events = out / "spec.json", out / "events"
        spec.write_text(job_of(self.spec(name, lora=lora, rate=rate, **training)).to_json())
        command = [sys.executable, "-m", "dpo_trainer", "launch", f"--spec={spec}", f"--run-dir={out / 'run'}"]
        _, begin, peak = self._child([*command, "--processes=1", f"--events={events}"])
        run = Finished(out / "run")
        seen = [json.loads(line) for line in events.read_text().splitlines()]

        def began(phase: str) -> float | None:
            return next((float(event["observedAt"]) for event in seen if event["phase"] == phase), None)

        steps, first, before = run.series("train/step_time"), began("train"), began("reference")
        assert first is not None
        reference = first - before if before is not None else 0.0
        return {
            "losses": run.series("train/loss"), "seconds": sum(steps) + reference,
            "first_step_after_s": first + steps[0] - begin, "peak_mib": peak, "folder": str(out / "run"),
        }  # fmt: skip

    def trl(self, name: str, *, lora: bool, precomputed: bool, micro: int, adapter: str | None) -> dict[str, Any]:
        """One run of TRL; its figures."""
        self.count += 1
        workload = WORKLOADS[name]
        settings = {
            "model": str(self.folder / "model"), "data": str(self.folder / f"{name} in order.jsonl"),
            "out": str(self.folder / f"out {self.count}"), "batch": workload.batch, "micro_batch": micro,
            "learning_rate": LORA_RATE if lora else RATE, "precomputed": precomputed, "checkpointing": False,
            "lora": LORA if lora else None, "adapter": adapter,
        }  # fmt: skip
        path = self.folder / f"settings {self.count}.json"
        path.write_text(json.dumps(settings))
        output, begin, _ = self._child([str(self.python), str(PEERS / "trl_run.py"), str(path)])
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found | {"micro_batch": micro, "first_step_after_s": found["first_step_at"] - begin}

    def write_data(self, name: str) -> list[dict[str, str]]:
        """Write a workload's pairs, for TRL in the order of our first epoch."""
        rows, workload = pairs_of(WORKLOADS[name]), WORKLOADS[name]
        write_jsonl(self.folder / f"{name}.jsonl", rows)
        batches = batch_pairs(len(rows), workload.batch, seed=1234, epoch=0, drop_last=True)
        write_jsonl(self.folder / f"{name} in order.jsonl", [rows[i] for i in np.concatenate(batches)])
        return rows

    def compare(self, name: str, *, lora: bool, repeats: int) -> dict[str, Any]:
        """Run both on a workload; print and return the figures."""
        rows = self.write_data(name)
        adapter = None
        if lora:  # TRL starts from our adapter: ours draws its own
            first = self.ours(name, lora=True, rate=1e-30, maxSteps=1)
            adapter = str(Path(first["folder"]) / "model" / "adapter")
        rates = [product_rate()]
        theirs = [
            self.trl(name, lora=lora, precomputed=False, micro=micro, adapter=adapter)
            for micro in WORKLOADS[name].micro_batches
        ]
        best = min(theirs, key=lambda run: run["seconds"])["micro_batch"]
        cases: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {"counted": [], "precomputed": []}
        for _ in range(repeats):
            for case, pairs in cases.items():
                again = self.trl(name, lora=lora, precomputed=case == "precomputed", micro=best, adapter=adapter)
                if case == "counted":
                    for file in self.folder.glob("reference of */*"):
                        file.unlink()
                pairs.append((self.ours(name, lora=lora), again))
                rates.append(product_rate())
        facts = read_config(open_store(), str(self.folder / "model")).facts
        work, count = work_of(rows), len(rows)
        spec = job_of(self.spec(name, lora=lora)).spec
        found: dict[str, Any] = {"workload": name, "form": "lora" if lora else "full", "gflops": max(rates) / 1e9}
        for case, pairs in cases.items():
            flops = step_flops(facts, work, spec.lora) + (forward_flops(facts, work) if case == "counted" else 0.0)
            mine = min((one for one, _ in pairs), key=lambda run: run["seconds"])
            peer = min((other for _, other in pairs), key=lambda run: run["seconds"])
            apart = max(abs(a - b) for a, b in zip(mine["losses"], peer["losses"], strict=True))
            found[case] = {
                "pairs_per_s": count / mine["seconds"], "trl_pairs_per_s": count / peer["seconds"],
                "speed_ratio": peer["seconds"] / mine["seconds"],
                "share_of_bound": flops / max(rates) / mine["seconds"],
                "peak_mib": mine["peak_mib"], "trl_peak_mib": peer["peak_mib"],
                "memory_ratio": mine["peak_mib"] / peer["peak_mib"],
                "first_step_s": mine["first_step_after_s"], "trl_first_step_s": peer["first_step_after_s"],
                "trl_micro_batch": best, "loss_difference": apart,
            }  # fmt: skip
            values = found[case]
            print(
                f"| {name}, {found['form']}, {case} | {values['pairs_per_s']:.2f} | {values['trl_pairs_per_s']:.2f} |"
                f" {values['speed_ratio']:.2f} | {values['share_of_bound']:.0%} | {mine['peak_mib']:,.0f} |"
                f" {peer['peak_mib']:,.0f} | {values['memory_ratio']:.2f} | {mine['first_step_after_s']:.0f} |"
                f" {peer['first_step_after_s']:.0f} | {apart:.1e} |",
                flush=True,
            )
        return found


def main() -> None:
    """Compare on each workload; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["dialogue", "long", "short"])
    parser.add_argument("--forms", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind; the fastest counts")
    options = parser.parse_args()
    python = environment_of_trl()
    print("| workload, form, reference | pairs/s | TRL | ratio | of the bound | peak MiB | TRL | ratio |"
          " first step s | TRL | losses differ by |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="dpo-trl-") as name:
        bench = Bench(Path(name), python)
        found = [
            bench.compare(workload, lora=form == "lora", repeats=options.repeats)
            for workload in options.workloads
            for form in options.forms
        ]
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": found}))
    worst = max(run[case]["loss_difference"] for run in found for case in ("counted", "precomputed"))
    if worst > TOLERANCE:
        sys.exit(f"losses differ by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
