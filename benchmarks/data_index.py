"""The index pass as the data grows: time, memory, and how full the packs are.

    python benchmarks/data_index.py [--pairs 1000 10000 100000 1000000] [--lengths 256 1024 4096]
    python benchmarks/data_index.py --parquet [--no-tokens] [--pairs …]

Pairs of made-up words (110 + 2 × 45 on average, as in a dialogue) are read from jsonl by a fast BPE tokenizer of 8,192
ids that is trained here. Each index is built in a process of its own. The peer is what training scripts do with a
tokenizer of transformers: parse a line, encode its three texts, one after the other; it reads at most 20,000 pairs, and
the ratio compares tokens a second.

Pack density is the share of a pack's places that hold a token which is computed once, at the default pack size, for
batches of 64 pairs whose lengths vary tenfold. The peer pads each batch of 8 pairs to its longest response with its
prompt; both responses repeat the prompt. The ratio compares places per pair. The last line is JSON.

With --parquet, the same data are indexed from jsonl and from Parquet instead, and the two indexes are compared: pairs,
order and token ids are the same, or the benchmark fails. Reading alone makes records, and no tokens of them; with
--no-tokens that is all, and the records are compared.
"""

# ruff: noqa: E402 - the packages are found from here
import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / package) for package in ("crds", "trainer")]

from peers.memory import status

from dpo_api.inputs import data_format
from dpo_api.spec import Data
from dpo_store import open_store
from dpo_trainer.data.index.build import Source, build_index
from dpo_trainer.data.packs.packing import pack_batch, pair_cost
from dpo_trainer.data.problems import Problem
from dpo_trainer.data.reading.ranked import names_read, records_of
from dpo_trainer.data.reading.records import Record
from dpo_trainer.data.reading.rows import read_rows
from dpo_trainer.data.tokens.tokenizer import load_tokenizer

MIB = 2**20
PROMPT, RESPONSE = 110, 45
PEER_PAIRS = 20_000
BATCH, PADDED_BATCH = 64, 8
ROW_GROUP = 50_000


def words_of(draw: random.Random) -> list[str]:
    """2,000 words of 2 to 9 letters."""
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]


def lines(pairs: int) -> Iterator[str]:
    """The data set of this size, a line each; a smaller one is the beginning of a larger one."""
    draw = random.Random(1)
    words = words_of(draw)

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(mean - mean // 3, mean + mean // 3)))

    for _ in range(pairs):
        row = {
            "prompt": text(PROMPT), "chosen_response": f" {text(RESPONSE)}", "rejected_response": f" {text(RESPONSE)}"
        }  # fmt: skip
        yield json.dumps(row) + "\n"


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer; most words become one or two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (json.loads(line)["prompt"] for line in lines(2000))
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_parquet(path: Path, source: Path) -> None:
    """Write the lines of a file as Parquet, with a column beside them that is not read."""
    with source.open(encoding="utf-8") as file, contextlib.ExitStack() as stack:
        writer = None
        numbered = enumerate(file)
        while rows := [{**json.loads(line), "id": str(number)} for number, line in islice(numbered, ROW_GROUP)]:
            table = pa.Table.from_pylist(rows)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
            writer.write_table(table)


def index(data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Build the index in this process; pairs, tokens, seconds, and the bytes by which the peak grew."""
    store = open_store()
    loaded = load_tokenizer(tokenizer)
    loaded.encode(["a word"])
    before, began = status("VmHWM"), time.perf_counter()
    found = build_index(
        "train", [Source("train", str(data), store)], loaded, Data.model_validate({"train": [{"uri": str(data)}]}),
        cache=cache,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return {
        "pairs": found.n, "tokens": found.stats["tokens"], "seconds": seconds, "grown": status("VmHWM") - before,
        "fingerprint": found.fingerprint,
    }  # fmt: skip


def reading(path: Path) -> dict[str, Any]:
    """Read the records and nothing else; seconds, a digest of all of them, and the bytes by which the peak grew."""
    store, data, digest = open_store(), Data.model_validate({"train": [{"uri": str(path)}]}), hashlib.sha256()
    before, began, count = status("VmHWM"), time.perf_counter(), 0
    for row in read_rows(store, store.stat(str(path)), data_format(str(path)), names_read(data.columns)):
        assert not isinstance(row.content, Problem)
        for record in records_of(row.content, data):
            assert isinstance(record, Record)
            digest.update(repr((record.prompt, record.chosen, record.rejected)).encode())
            count += 1
    return {
        "records": count, "seconds": time.perf_counter() - began, "grown": status("VmHWM") - before,
        "digest": digest.hexdigest(),
    }  # fmt: skip


def one_by_one(data: Path, tokenizer: Path) -> dict[str, float]:
    """Encode in the peer's way; tokens and seconds."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    loaded("a word")
    tokens, began = 0, time.perf_counter()
    with data.open(encoding="utf-8") as file:
        for _, line in zip(range(PEER_PAIRS), file, strict=False):
            row = json.loads(line)
            tokens += sum(len(loaded(row[key])["input_ids"]) for key in row)
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


def child(part: str, *paths: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, f"--child={part}", *map(str, paths)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def grow(folder: Path, pairs: int) -> dict[str, Any]:
    """Build the index of this many pairs; print and return the figures."""
    data = folder / "data.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(lines(pairs))
    peer = child("peer", data, folder / "tokenizer")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        ours = child("index", data, folder / "tokenizer", Path(cache))
    rate, other = ours["tokens"] / ours["seconds"], peer["tokens"] / peer["seconds"]
    print(
        f"| {pairs:,} | {data.stat().st_size / MIB:,.0f} MiB | {ours['seconds']:,.1f} s | {rate / 1000:,.0f} |"
        f" {other / 1000:,.0f} | {rate / other:.2f} | {ours['grown'] / MIB:,.0f} MiB |",
        flush=True,
    )
    return {**ours, "tokens_per_s": rate, "peer_tokens_per_s": other, "ratio": rate / other}


def compare(folder: Path, pairs: int, *, tokens: bool) -> dict[str, Any]:
    """Index this many pairs from jsonl and from Parquet, or only read them; print and return the figures."""
    data, table = folder / "data.jsonl", folder / "data.parquet"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(lines(pairs))
    write_parquet(table, data)
    figures: dict[str, Any] = {"pairs": pairs}
    for path in (data, table):
        kind = path.suffix[1:]
        found: dict[str, Any] = {"reading": child("reading", path)}
        assert found["reading"]["records"] == pairs
        cells = [f"{found['reading']['seconds']:,.1f} s", f"{found['reading']['grown'] / MIB:,.0f} MiB", "", ""]
        if tokens:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                found |= child("index", path, folder / "tokenizer", Path(cache))
            cells[2:] = f"{found['seconds']:,.1f} s", f"{found['grown'] / MIB:,.0f} MiB"
        figures[kind] = found
        print(f"| {pairs:,} | {kind} | {path.stat().st_size / MIB:,.0f} MiB | {' | '.join(cells)} |", flush=True)
    one, other = figures["jsonl"], figures["parquet"]
    assert one["reading"]["digest"] == other["reading"]["digest"], "other pairs, or another order"
    assert one.get("fingerprint") == other.get("fingerprint"), "other token ids"
    return figures


def density(longest: int, pack_tokens: int) -> dict[str, float]:
    """Pack pairs of up to ``longest`` tokens; print and return how full the packs are."""
    draw = np.random.default_rng(1)
    whole = np.exp(draw.uniform(np.log(longest / 10), np.log(longest), 100 * BATCH)).astype(int)
    prompts = np.maximum(1, (whole * draw.uniform(0.3, 0.9, len(whole))).astype(int))
    responses = np.stack([np.maximum(1, whole - prompts), np.maximum(1, (whole - prompts) * 3 // 4)])
    size = max(pack_tokens, 2 * longest)
    costs = [pair_cost(p, c, r, share=True) for p, c, r in zip(prompts, *responses, strict=True)]
    packs = sum(len(pack_batch(costs[at : at + BATCH], size, None)) for at in range(0, len(costs), BATCH))
    padded = sum(
        2 * PADDED_BATCH * int((prompts[at : at + PADDED_BATCH] + responses[:, at : at + PADDED_BATCH]).max())
        for at in range(0, len(costs), PADDED_BATCH)
    )
    full, ratio = sum(costs) / (packs * size), padded / (packs * size)
    print(f"| {longest:,} | {size:,} | {full:.1%} | {ratio:.2f} |", flush=True)
    return {"longest": longest, "pack_tokens": size, "density": full, "ratio": ratio}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"index": index, "peer": one_by_one, "reading": reading}


def main() -> None:
    """Print two tables and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--parquet", action="store_true", help="compare jsonl with Parquet, and nothing else")
    parser.add_argument("--no-tokens", action="store_true", help="with --parquet: only read and compare records")
    parser.add_argument("--child", choices=tuple(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](*options.paths)))
        return
    if options.parquet:
        print("| pairs | format | file | reading alone | memory grew by | index | memory grew by |")
        print("|---|---|---|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory(prefix="dpo-index-") as name:
            write_tokenizer(Path(name) / "tokenizer")
            found = [compare(Path(name), pairs, tokens=not options.no_tokens) for pairs in options.pairs]
            print(json.dumps(found))
        return
    print("| pairs | text | index | thousand tokens/s | one by one | ratio | memory grew by |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="dpo-index-") as name:
        write_tokenizer(Path(name) / "tokenizer")
        grown = [grow(Path(name), pairs) for pairs in options.pairs]
    print(
        "\n| longest, tokens | pack, tokens | of its places in use | padded / packed |\n|---|---|---|---|", flush=True
    )
    full = [density(longest, options.pack_tokens) for longest in options.lengths]
    print(json.dumps({"index": grown, "packs": full}))


if __name__ == "__main__":
    main()
