"""The index pass over real files: counts, messages, reuse, crash, and two processes at once."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_api.errors import InvalidDataError, InvalidModelError, NoSpaceError, NotFoundError
from dpo_api.spec import Data, DPOJobSpec
from dpo_store import cache as cache_module
from dpo_store import open_store
from dpo_testing.corpora import (
    Row,
    byte_bpe_tokenizer,
    chat_rows,
    llama_tokenizer,
    parse_line,
    preference_rows,
    sentencepiece_tokenizer,
    write_jsonl,
)
from dpo_trainer.data.index import build as index_module
from dpo_trainer.data.index.build import IndexProgress, Listener, Source, build_index, build_indexes
from dpo_trainer.data.index.spill import PairIndex, SpillWriter
from dpo_trainer.data.reading.records import Record
from dpo_trainer.data.tokens.encode import EncodedPair, PairEncoder
from dpo_trainer.data.tokens.tokenizer import Tokenizer, load_tokenizer

BAD_ROWS: list[Row | str] = [
    '{"prompt": ',
    {"prompt": "q\n", "chosen": "a"},
    {"prompt": "q\n", "chosen": "", "rejected": "b"},
    {"prompt": "Answer: ", "chosen": "the", "rejected": "the"},
    {"prompt": "Answer: ", "chosen": "the", "rejected": "the"},
    {"prompt": 7, "chosen": "a", "rejected": "b"},
    "[]",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def build(
    path: Path | str, tokenizer: Tokenizer, cache: Path, listener: Listener | None = None, **settings: Any
) -> PairIndex:
    rejected_needed = settings.pop("rejected_needed", True)
    vocabulary = settings.pop("vocabulary", None)
    data = Data.model_validate({"train": [{"uri": str(path)}], **settings})
    return build_index(
        "train",
        [Source("train-0", str(path), open_store())],
        tokenizer,
        data,
        rejected_needed=rejected_needed,
        vocabulary=vocabulary,
        cache=cache,
        listener=listener,
    )


def pairs_of(index: PairIndex) -> list[tuple[list[int], list[int], list[int]]]:
    return [tuple(part.tolist() for part in index.tokens(i)) for i in range(index.n)]  # type: ignore[misc]


def alone(row: Row, tokenizer: Tokenizer, **settings: Any) -> EncodedPair:
    """The row encoded without the index."""
    data = Data.model_validate({"train": [{"uri": "x"}], **settings})
    record = parse_line(json.dumps(row).encode(), data.columns)
    assert isinstance(record, Record)
    result = PairEncoder(tokenizer, data).encode([record])[0]
    assert isinstance(result, EncodedPair)
    return result


@pytest.mark.parametrize("kind", ["bpe", "llama", "sentencepiece"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_each_line_becomes_its_pair(tmp_path: Path, kind: str, suffix: str) -> None:
    makers = {"bpe": byte_bpe_tokenizer, "llama": llama_tokenizer, "sentencepiece": sentencepiece_tokenizer}
    tokenizer = load_tokenizer(makers[kind](tmp_path / "tokenizer"))
    rows: list[Row] = [*preference_rows(300), *(chat_rows(5) if kind != "sentencepiece" else [])]
    index = build(write_jsonl(tmp_path / f"a{suffix}", rows), tokenizer, tmp_path / "cache")
    assert len(index) == index.n == len(rows)
    for number in (0, 1, 255, 256, 299, len(rows) - 1):
        expected = alone(rows[number], tokenizer)
        for ours, theirs in zip(
            index.tokens(number), (expected.prompt, expected.chosen, expected.rejected), strict=True
        ):
            assert ours.dtype == np.int32
            assert ours.tolist() == theirs.tolist()
        assert index.lengths[number].tolist() == [len(part) for part in index.tokens(number)]
        assert index.origin(number) == f"{tmp_path}/a{suffix}:{number + 1}"
    assert index.stats["tokens"] == int(index.lengths.sum())
    longest = max(int(prompt + max(chosen, rejected)) for prompt, chosen, rejected in index.lengths)
    assert index.stats["longest"] == longest
    assert index.stats["pairs"] == index.stats["lines"] == len(rows)
    with pytest.raises(ValueError, match="read-only"):
        index.tokens(0)[0][0] = 1


def test_rewards_and_costs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{**row, "chosen_reward": 3, "rejected_reward": 0.25} for row in preference_rows(2)]
    del rows[1]["chosen_reward"]
    index = build(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache")
    assert index.rewards([1, 0], 1.0, 0.0).tolist() == [[1.0, 0.25], [3.0, 0.25]]
    prompt, chosen, rejected = index.lengths[1].tolist()
    assert index.costs([1], share=True) == [prompt + chosen + rejected]
    assert index.costs([1], share=False) == [2 * prompt + chosen + rejected]
    assert index.costs([1], share=True, with_rejected=False) == [prompt + chosen]
    other = [dict(row) for row in rows]
    other[0]["chosen_reward"] = 4
    changed = build(write_jsonl(tmp_path / "b.jsonl", other), tokenizer, tmp_path / "cache")
    assert changed.fingerprint == index.fingerprint
    assert changed.rewards_fingerprint != index.rewards_fingerprint


def test_the_fingerprint_knows_ids_bounds_and_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = preference_rows(4)
    moved = [{**rows[0], "prompt": rows[0]["prompt"] + "the\n", "chosen_response": "x"}, *rows[1:]]
    sets = {
        "same": rows,
        "swapped": [rows[1], rows[0], *rows[2:]],
        "moved": moved,
        "sides": [{**rows[0], "chosen_response": rows[0]["rejected_response"]}, *rows[1:]],
    }
    prints = {
        name: build(write_jsonl(tmp_path / f"{name}.jsonl", some), tokenizer, tmp_path / "cache").fingerprint
        for name, some in sets.items()
    }
    assert len(set(prints.values())) == len(prints)
    elsewhere = build(write_jsonl(tmp_path / "copy" / "z.jsonl.gz", rows), tokenizer, tmp_path / "other")
    assert elsewhere.fingerprint == prints["same"]


def test_errors_list_the_first_five_and_the_total(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*preference_rows(400), *BAD_ROWS, *preference_rows(3, seed=9)])
    with pytest.raises(InvalidDataError) as caught:
        build(path, tokenizer, tmp_path / "cache")
    text = str(caught.value)
    head, *shown = text.split("\n  ")
    assert head == "7 of 410 lines of the train data cannot be used; the first:"
    assert [line.split(": ")[0] for line in shown[:5]] == [f"{path}:{number}" for number in range(401, 406)]
    assert "broken JSON" in shown[0]
    assert '"rejected_response" or "rejected"' in shown[1]
    assert "empty" in shown[2]
    assert "2 have no clean boundary: set spec.data.boundary: separate" in text
    assert "onInvalid: skip" in text
    assert not list((tmp_path / "cache").rglob("pairs.bin"))


def test_a_json_array_gets_advice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, indent in (("one-line.json", None), ("many-lines.json", 1)):
        path = tmp_path / name
        path.write_text(json.dumps(preference_rows(3), indent=indent))
        with pytest.raises(InvalidDataError, match=r"jq -c '\.\[\]' FILE makes such lines of a JSON array"):
            build(path, tokenizer, tmp_path / "cache")


def test_skip_counts_by_reason(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "d" / "a.jsonl", [BAD_ROWS[0], *preference_rows(3), "", "   ", *BAD_ROWS[1:]])
    write_jsonl(tmp_path / "d" / "b.jsonl.gz", preference_rows(2, seed=3))
    index = build(f"{tmp_path}/d/", tokenizer, tmp_path / "cache", onInvalid="skip")
    assert index.n == 5
    assert index.stats["lines"] == 12
    assert index.stats["dropped"] == {
        "brokenJson": 1,
        "notAnObject": 1,
        "missingKey": 1,
        "wrongType": 1,
        "emptyResponse": 1,
        "promptNotPrefix": 2,
    }
    assert [Path(name).name for name in index.stats["files"]] == ["a.jsonl", "b.jsonl.gz"]
    assert index.origin(0) == f"{first}:2"
    assert index.origin(4).endswith("b.jsonl.gz:2")
    assert any("2 of 12 lines" in text and "separate" in text for text in index.stats["warnings"])
    json.dumps(index.stats, allow_nan=False)


def test_over_length_policies(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[Row] = [*preference_rows(3), {"prompt": "q\n", "chosen": "the " * 300, "rejected": "a"}]
    rows.append({"prompt": "of " * 300 + "\n", "chosen": "a", "rejected": "b"})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    cache = tmp_path / "cache"
    dropped = build(path, tokenizer, cache, maxLength=200)
    assert (dropped.n, dropped.stats["dropped"], dropped.stats["truncated"]) == (3, {"overLength": 2}, 0)
    cut = build(path, tokenizer, cache, maxLength=200, overLength="truncate")
    assert (cut.n, cut.stats["dropped"], cut.stats["truncated"]) == (4, {"noRoomForResponse": 1}, 1)
    assert cut.stats["longest"] == 200
    with pytest.raises(InvalidDataError, match=r"a\.jsonl:4: \d+ tokens, more than spec\.data\.maxLength 200"):
        build(path, tokenizer, cache, maxLength=200, overLength="error", onInvalid="skip")
    with pytest.raises(InvalidDataError, match=r"5 lines, all dropped \(overLength 5\).*maxLength above 5"):
        build(path, tokenizer, cache, maxLength=5)


def test_nothing_to_train_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="no line in the train data"):
        build(write_jsonl(tmp_path / "empty.jsonl", ["", "  "]), tokenizer, tmp_path / "cache")
    with pytest.raises(NotFoundError):
        build(tmp_path / "absent.jsonl", tokenizer, tmp_path / "cache")
    bad = write_jsonl(tmp_path / "bad.jsonl", BAD_ROWS[3:5])
    with pytest.raises(InvalidDataError, match=r"no usable pair .*promptNotPrefix 2.*boundary: separate"):
        build(bad, tokenizer, tmp_path / "cache", onInvalid="skip")


def test_sft_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "chosen": row["chosen_response"]} for row in preference_rows(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    index = build(path, tokenizer, tmp_path / "cache", rejected_needed=False)
    assert index.lengths[:, 2].tolist() == [0, 0, 0, 0]
    assert index.tokens(3)[2].tolist() == []
    assert index.costs([0], share=False) == [int(index.lengths[0].sum())]


def test_ids_outside_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(4))
    index = build(path, tokenizer, tmp_path / "cache", vocabulary=tokenizer.size)
    largest = index.stats["largestId"]
    assert largest == max(max(part) for pair in pairs_of(index) for part in pair)
    for _ in ("found in the cache", "and again"):
        with pytest.raises(InvalidModelError, match=rf"a\.jsonl:\d: token id {largest} .* vocabulary of {largest} ids"):
            build(path, tokenizer, tmp_path / "cache", vocabulary=largest)


def test_end_token_warning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    answers = ("Bosch", "1215")
    plain = [{"prompt": f"question {text}?", "chosen": text, "rejected": "no"} for text in answers]
    cache = tmp_path / "cache"

    def warnings(rows: list[Any], **settings: Any) -> str:
        name = f"{len(list(tmp_path.iterdir()))}.jsonl"
        return " ".join(build(write_jsonl(tmp_path / name, rows), tokenizer, cache, **settings).stats["warnings"])

    assert "strings do not pass through the model's chat template: use messages, or write it" in warnings(plain)
    assert "appendEos: true, so that answers end" in warnings(plain)
    assert "strings do not pass" in warnings([row | {"chosen": "The same end."} for row in plain])
    for written in ("{}<|im_end|>\n", "{}\nAssistant:"):  # a template in the text, by special tokens or by its end
        rows = [row | {"prompt": written.format(row["prompt"])} for row in plain]
        assert warnings(rows).startswith("no response of the train data ends in an end token, so the model learns no")
    assert warnings(plain, appendEos=True) == ""
    assert warnings(preference_rows(3)) == ""  # all end in the same text, the tutorial's way
    assert warnings(chat_rows(3)) == ""
    assert warnings([*plain, *chat_rows(1)]) == ""


def test_the_date_that_templates_saw_is_recorded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    llama = load_tokenizer(llama_tokenizer(tmp_path / "llama"))
    talk, text = write_jsonl(tmp_path / "c.jsonl", chat_rows(2)), write_jsonl(tmp_path / "s.jsonl", preference_rows(2))
    assert build(talk, llama, tmp_path / "cache").stats["templateDate"] == "2024-07-26"
    assert build(text, llama, tmp_path / "cache").stats["templateDate"] is None
    assert build(talk, tokenizer, tmp_path / "cache").stats["templateDate"] is None


def test_reuse_and_what_prevents_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(20))
    seen: list[str] = []
    cache = tmp_path / "cache"

    def again(**settings: Any) -> tuple[PairIndex, bool]:
        seen.clear()
        index = build(path, tokenizer, cache, Listener(message=seen.append), **settings)
        return index, any("reused" in text for text in seen)

    first, reused = again()
    assert not reused
    assert f"index of train: 1 object, {path.stat().st_size / 1024:.1f} KiB; about " in seen[0]
    second, reused = again()
    assert reused
    assert pairs_of(first) == pairs_of(second)
    assert (first.fingerprint, first.stats) == (second.fingerprint, second.stats)
    for change in ({"maxLength": 120}, {"boundary": "separate"}, {"appendEos": True}, {"rejected_needed": False}):
        index, reused = again(**change)
        assert not reused, change
        assert index.folder != first.folder
    write_jsonl(path, preference_rows(21))
    assert again()[0].n == 21


@pytest.mark.parametrize("damage", ["no marker", "half a marker", "short tokens", "foreign format"])
def test_what_a_crash_leaves_is_built_again(tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(20))
    whole = build(path, tokenizer, tmp_path / "cache")
    expected, marker = pairs_of(whole), whole.folder / "index.json"
    if damage == "no marker":
        marker.unlink()
    elif damage == "half a marker":
        marker.write_bytes(marker.read_bytes()[:40])
    elif damage == "short tokens":
        with (whole.folder / "tokens.i32").open("r+b") as file:
            file.truncate(100)
    else:
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": -1}))
    assert PairIndex.open(whole.folder) is None
    assert pairs_of(build(path, tokenizer, tmp_path / "cache")) == expected


CHILD = """
import sys, time
from pathlib import Path
from dpo_api.errors import DPOError
from dpo_api.spec import Data
from dpo_store import open_store
from dpo_trainer.data.index.build import Listener, Source, build_index
from dpo_trainer.data.tokens.tokenizer import load_tokenizer
data, base = sys.argv[1], Path(sys.argv[2])
def report(progress):
    print("progress", progress.lines, flush=True)
    while not (base / "go").exists():
        time.sleep(0.01)
tokenizer = load_tokenizer(base / "tokenizer")
try:
    index = build_index("train", [Source("t", data, open_store())], tokenizer, Data(train=[{"uri": data}]),
                        cache=base / "cache", listener=Listener(progress=report))
    print("done", index.n, index.fingerprint, flush=True)
except DPOError as error:
    print(type(error).__name__, repr(str(error)), flush=True)
"""
"""Builds an index; after each batch it waits for the file ``go``."""


def child(path: Path, base: Path, before: str = "") -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", before + CHILD, str(path), str(base)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def waits_for_a_lock(processes: list["subprocess.Popen[str]"]) -> bool:
    """Whether the kernel lists one of them as blocked ("-> FLOCK … pid …")."""
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(str(process.pid) in words for words in waiting for process in processes)


@pytest.mark.slow
def test_killed_in_the_middle_then_built_by_another(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path / "tokenizer")  # needs no transformers: the child starts quickly
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(900))
    victim = child(path, tmp_path)
    assert read_line(victim) == "progress 256\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert list((tmp_path / "cache").rglob("pairs.bin"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    index = build_index(
        "train",
        [Source("t", str(path), open_store())],
        tokenizer,
        Data.model_validate({"train": [{"uri": str(path)}]}),
        cache=tmp_path / "cache",
    )
    assert index.n == 900
    assert pairs_of(index) == pairs_of(build(path, tokenizer, tmp_path / "elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True])
def test_two_processes_build_one_index(tmp_path: Path, bad: bool) -> None:
    """Each says progress for the batches that it read itself: one does all, the other waits and gets the same."""
    sentencepiece_tokenizer(tmp_path / "tokenizer")  # needs no transformers: the child starts quickly
    path = write_jsonl(tmp_path / "a.jsonl", [*preference_rows(600), *(BAD_ROWS[:1] if bad else [])])
    both = [child(path, tmp_path) for _ in range(2)]
    while not waits_for_a_lock(both):
        assert all(process.poll() is None for process in both)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    outputs = sorted((process.communicate()[0].splitlines() for process in both), key=len)
    assert [len(lines) for lines in outputs] == [1, 4]
    assert outputs[0][-1] == outputs[1][-1]
    assert outputs[0][0].startswith("InvalidDataError '1 of 601 lines" if bad else "done 600 ")


def test_a_failure_is_forgotten_by_the_next_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*preference_rows(3), BAD_ROWS[0]])
    stamp = path.stat()
    for _ in range(2):
        with pytest.raises(InvalidDataError, match="1 of 4 lines"):
            build(path, tokenizer, tmp_path / "cache")
    assert path.stat().st_ino == stamp.st_ino


def test_a_full_disk_is_met_early(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(3000))
    monkeypatch.setattr(index_module, "free_bytes", lambda _: 200_000)
    lines: list[int] = []

    def note(progress: IndexProgress) -> None:
        lines.append(progress.lines)

    with pytest.raises(NoSpaceError, match=r"cache/index/\w+: .* needs about 1\.\d MiB and only 195\.3 KiB are free"):
        build(path, tokenizer, tmp_path / "cache", Listener(progress=note))
    assert lines[-1] < 3000
    assert not list((tmp_path / "cache").rglob("pairs.bin"))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_sentence(tmp_path: Path) -> None:
    """A real refusal by the kernel: a limit on file sizes acts as a full disk."""
    sentencepiece_tokenizer(tmp_path / "tokenizer")  # needs no transformers: the child starts quickly
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(8000))
    (tmp_path / "go").touch()
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    output = child(path, tmp_path, limited).communicate()[0]
    assert output.splitlines()[-1].startswith("NoSpaceError ")
    assert str(tmp_path / "cache") in output
    assert not list((tmp_path / "cache").rglob("pairs.bin"))


def test_a_cache_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(3))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NotFoundError, match="DPO_CACHE_DIR"):
        build(path, tokenizer, tmp_path / "file")


def test_all_sources_of_a_spec(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("a", 3), ("b", 4), ("v", 2), ("w", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", preference_rows(count, seed=count))
    spec = DPOJobSpec.model_validate(
        {
            "model": {"huggingFace": {"uri": "m/"}},
            "data": {
                "train": [{"uri": f"{tmp_path}/b.jsonl"}, {"uri": f"{tmp_path}/a.jsonl", "name": "second"}],
                "validation": [{"uri": f"{tmp_path}/v.jsonl"}, {"uri": f"{tmp_path}/w.jsonl", "name": "heldout"}],
            },
        }
    )
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    found = build_indexes(spec, tokenizer, lambda _: open_store())
    assert found.train.n == 7
    assert [source["name"] for source in found.train.stats["sources"]] == ["train-0", "second"]
    assert [source["pairs"] for source in found.train.stats["sources"]] == [4, 3]
    assert found.train.origin(4) == f"{tmp_path}/a.jsonl:1"
    assert {name: index.n for name, index in found.validation.items()} == {"validation-0": 2, "heldout": 5}
    assert cache_module.cache_folder() == tmp_path / "cache"
    assert found.train.folder.parent == tmp_path / "cache" / "index"
    sft = spec.model_copy(update={"dpo": spec.dpo.model_copy(update={"preference_weight": 0.0, "sft_weight": 1.0})})
    assert build_indexes(sft, tokenizer, lambda _: open_store()).train.lengths[:, 2].sum() == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Peak of all Python and numpy allocations while 511 and 2048 lines are indexed: the same buffers."""

    def peak(count: int) -> int:
        path = write_jsonl(tmp_path / f"{count}.jsonl", preference_rows(count))
        tracemalloc.start()
        index = build(path, tokenizer, tmp_path / "cache")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert index.n == count
        return most

    peak(512)  # fills the libraries' own caches
    assert peak(2048) < 1.25 * peak(511)


def test_long_lines_make_smaller_batches(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_BATCH_BYTES", 10_000)
    reports: list[int] = []
    rows = [{"prompt": "q\n", "chosen": "the " * 1000, "rejected": "a"}] * 7

    def note(progress: IndexProgress) -> None:
        reports.append(progress.lines)

    build(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", Listener(progress=note))
    assert reports == [3, 6, 7]


def test_the_fingerprint_tells_where_a_pair_is_cut(tmp_path: Path) -> None:
    def fingerprint(name: str, *cuts: int) -> str:
        ids = np.arange(9, dtype=np.int32)
        writer = SpillWriter(tmp_path / name)
        parts = np.split(ids, cuts)
        writer.add(EncodedPair(parts[0], parts[1], parts[2], 1.0, 0.0, truncated=False), 0, 1)
        writer.finish({"files": ["f"], "formats": ["jsonl"]})
        index = PairIndex.open(tmp_path / name)
        assert index is not None
        assert [part.tolist() for part in index.tokens(0)] == [part.tolist() for part in parts]
        return index.fingerprint

    assert fingerprint("a", 3, 6) == fingerprint("b", 3, 6)
    assert len({fingerprint("c", 3, 6), fingerprint("d", 2, 6), fingerprint("e", 3, 7), fingerprint("f", 2, 7)}) == 4


def test_progress_is_reported_after_each_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reports: list[IndexProgress] = []
    path = write_jsonl(tmp_path / "a.jsonl", preference_rows(600))
    index = build(path, tokenizer, tmp_path / "cache", Listener(progress=reports.append))
    assert [report.lines for report in reports] == [256, 512, 600]
    assert reports[-1] == IndexProgress("train", 600, index.n, index.stats["tokens"])
