"""`dpo validate`: all mistakes at once, one sentence each, with the right exit code; and the plan of a valid job."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_testing.cli import CONFIG, Dpo, Replay, World, good_adapter, pairs
from dpo_testing.s3server import S3Server


def test_a_valid_job_shows_its_plan(world: World, dpo: Dpo) -> None:
    said = dpo("validate", world.write())
    assert said.code == 0
    text = said.out
    assert "job.yaml: valid\n" in text
    assert "llama · 2 layers · 4 heads (2 key-value) · hidden 64 · vocabulary 256 · 512 positions" in text
    # 100 lines in batches of 10: ten steps, a tenth of them constant, validation each 10 % of them.
    assert "≈ 10 of 10 pairs = 1 epoch of ≈ 100 pairs (≈ 10 steps an epoch)" in text
    assert "warm-up of 2 steps to 9e-6, cosine over 7 to 9e-7, the last 1 at 9e-7" in text
    assert "every 10% of an epoch (≈ 1 step), before the first step, at the end" in text


def test_max_steps_need_no_data(world: World, dpo: Dpo) -> None:
    world.spec["data"]["train"][0]["uri"] = "/nowhere/train.jsonl"
    said = dpo("validate", "--offline", world.write(), "--set", "training.maxSteps=40")
    assert said.code == 0
    assert "  steps       40 of 10 pairs\n" in said.out
    assert "cosine over 34 to 9e-7, the last 4 at 9e-7" in said.out


@pytest.mark.parametrize(
    ("settings", "forms"),
    [
        ([], "huggingFace"),
        (["lora={}"], "huggingFace, peft"),
        (["lora={}", "output.merge=false"], "peft"),
        (["lora={}", "output.formats=[huggingFace]"], "huggingFace"),
    ],
)
def test_the_formats_of_the_output_are_shown(world: World, dpo: Dpo, settings: list[str], forms: str) -> None:
    world.spec.pop("lora", None)
    said = dpo("validate", "--offline", world.write(), *(word for text in settings for word in ("--set", text)))
    assert said.out.endswith(f"/model ({forms})\n")


def test_all_mistakes_at_once(world: World, dpo: Dpo) -> None:
    world.spec["model"]["huggingFace"]["uri"] = str(world.folder / "modle")
    world.spec["data"]["train"][0]["uri"] = str(world.folder / "dta/")
    world.spec["data"]["maxLength"] = 100
    world.spec["training"]["packing"] = {"maxTokens": 150}
    said = dpo("validate", world.write())
    assert said.code == 2
    assert "job.yaml: 3 errors" in said.out
    for field in ("spec.model.huggingFace.uri", "spec.data.train[0].uri", "spec.training.packing.maxTokens"):
        assert f"  error    {field}: " in said.out


def edit(path: str, value: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        node: Any = world.spec
        *way, last = path.split(".")
        for part in way:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[int(part)]
        node[last] = value

    return change


def config(**changes: Any) -> Callable[[World], None]:
    return lambda world: (world.folder / "model" / "config.json").write_text(json.dumps(CONFIG | changes)) and None


def replace_file(name: str, text: str | None) -> Callable[[World], None]:
    def change(world: World) -> None:
        path = world.folder / name
        path.unlink() if text is None else path.write_text(text)

    return change


def odd_rope_as_nemo(world: World) -> None:
    """A model that NeMo cannot describe, which the job asks for in its format."""
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config(rope_scaling=rope | {"original_max_position_embeddings": 64})(world)
    edit("output.formats", ["huggingFace", "nemo"])(world)


def other_adapter(world: World) -> None:
    """An adapter of a model of another size."""
    folder = world.folder / "sft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    matrices = {f"{name}A.weight": np.zeros((2, 999)), f"{name}B.weight": np.zeros((999, 2))}
    save_file(matrices, folder / "adapter_model.safetensors")
    edit("model.adapter", {"uri": "sft"})(world)


def test_a_continued_adapter_s_settings_are_shown(world: World, dpo: Dpo) -> None:
    good_adapter(world, use_rslora=True)
    said = dpo("validate", world.write())
    assert said.code == 0
    assert "the adapter itself, rsLoRA rank 2, alpha 4, on attention_qkv of 1 layer, bf16" in said.out
    unread = dpo("validate", "--offline", world.write())
    assert "  trains      the adapter itself, bf16\n" in unread.out


def test_a_setting_that_a_continued_adapter_has_itself(world: World, dpo: Dpo) -> None:
    good_adapter(world)
    said = dpo("validate", world.write(), "--set", "lora.rank=4")
    assert said.code == 2
    assert "error    spec.lora.rank: not that of model.adapter, 2; leave it out" in said.out
    said = dpo("validate", world.write(), "--set", "resources.gpusPerNode=4", "--set", "parallelism.tensor=4")
    assert said.code == 2
    assert "error    spec.lora.rank: 2 of model.adapter is not divisible by parallelism.tensor 4" in said.out


def test_an_adapter_that_cannot_be_continued(world: World, dpo: Dpo) -> None:
    good_adapter(world, use_dora=True)
    said = dpo("validate", world.write())
    assert said.code == 4
    assert "use_dora is True, DoRA's magnitudes: not supported; merge the adapter first" in said.out


MISTAKES: list[tuple[str, Callable[[World], None], int, str]] = [
    ("unknown field", edit("trainig", {}), 2, "spec.trainig: unknown field; did you mean training?"),
    ("wrong type", edit("dpo.beta", "high"), 2, 'spec.dpo.beta: "high" is not a number'),
    ("missing file", edit("data.train.0.uri", "missing.jsonl"), 11, "spec.data.train[0].uri: missing.jsonl: "),
    ("missing folder", edit("data.train.0.uri", "dat/"), 11, "did you mean data/ (2 objects)?"),
    ("missing model", edit("model.huggingFace.uri", "/no/model"), 11, "/no/model/config.json"),
    ("misspelt model", edit("model.huggingFace.uri", "modle"), 11, "config.json: does not exist; did you mean model/"),
    (
        "hub name",
        edit("model.huggingFace.uri", "org/model"),
        11,
        "for a model of the Hugging Face Hub, write hf://org/model",
    ),
    ("no claim", edit("data.train.0.uri", "pvc://claim/x"), 0, "note     spec.data.train[0].uri: pvc://claim/x is on"),
    ("other family", config(model_type="gpt2"), 4, 'model_type is "gpt2": supported are llama, mistral'),
    ("damaged config", replace_file("model/config.json", "{"), 4, "config.json: not valid JSON"),
    ("heads of text", config(num_attention_heads="4"), 4, 'num_attention_heads is "4": it must be a positive integer'),
    ("default length", edit("data.maxLength", None), 2, "maxLength: 4096 (the default) is above the 512 positions"),
    ("too long", edit("data.maxLength", 1024), 2, "spec.data.maxLength: 1024 is above the 512 positions"),
    ("no weights", replace_file("model/model.safetensors", None), 11, "holds neither model.safetensors nor"),
    ("no adapter", edit("model.adapter", {"uri": "sft"}), 11, "spec.model.adapter.uri: sft/adapter_config.json: "),
    ("adapter of another model", other_adapter, 4, "lora_A of model.layers.0.self_attn.q_proj has shape [2, 999]"),
    ("no tokenizer", replace_file("model/tokenizer.json", None), 11, "holds no tokenizer"),
    ("tokenizer elsewhere", edit("tokenizer", {"uri": "data/"}), 11, "spec.tokenizer.uri: data/ holds no tokenizer"),
    ("tokenizer of another name", edit("tokenizer", {"uri": "data/train.jsonl"}), 11, "train.jsonl holds no tokenizer"),
    ("empty data", replace_file("data/train.jsonl", "\n"), 3, "spec.data.train: no usable pair is left"),
    ("few pairs", edit("training.globalBatchSize", 1000), 0, "100 pairs are fewer than one global batch of 1000"),
    ("no best", edit("output.from", "best"), 2, "spec.output.from: output.from is best, but no metric says"),
    ("no such .nemo", odd_rope_as_nemo, 2, "spec.output.formats: NeMo has no setting for rope_scaling"),
    ("nothing to learn", edit("dpo.preferenceWeight", 0), 2, "spec.dpo.preferenceWeight: "),
    ("bucket's name", edit("checkpoint.uri", "s3:/runs"), 2, "spec.checkpoint.uri: "),
]


@pytest.mark.parametrize(("change", "code", "text"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_each_mistake_is_one_sentence(
    world: World, dpo: Dpo, change: Callable[[World], None], code: int, text: str
) -> None:
    change(world)
    said = dpo("validate", world.write())
    assert text in said.out
    assert said.code == code
    assert ("valid" in said.out.splitlines()[0]) == (code == 0)


def test_pickled_weights_are_named(world: World, dpo: Dpo) -> None:
    (world.folder / "model" / "model.safetensors").rename(world.folder / "model" / "pytorch_model.bin")
    said = dpo("validate", world.write())
    assert said.code == 4
    assert (
        "pickled weights can run code and are not read; save the model again with safe_serialization=True" in said.out
    )


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("a: [1,\n b", 2, "broken.yaml:"),
        ("kind: Pod\napiVersion: v1\n", 2, "holds no object of kind DPOJob (it holds Pod)"),
        ("", 2, "broken.yaml"),
        ("just text", 2, "is not a mapping"),
    ],
)
def test_files_that_are_not_manifests(world: World, dpo: Dpo, text: str, code: int, message: str) -> None:
    (world.folder / "broken.yaml").write_text(text)
    said = dpo("validate", "broken.yaml")
    assert (said.code, message in said.all) == (code, True)


def test_a_missing_manifest(world: World, dpo: Dpo) -> None:
    said = dpo("validate", "nope.yaml")
    assert (said.code, said.err) == (11, "error  nope.yaml: no such file\n")


def test_several_files_are_all_validated(world: World, dpo: Dpo) -> None:
    said = dpo("validate", world.write(), "nope.yaml")
    assert said.code == 11
    assert "job.yaml: valid" in said.out
    assert "nope.yaml: 1 error" in said.out


def test_lines_of_the_file_are_named(world: World, dpo: Dpo) -> None:
    edit("dpo.beta", -1)(world)
    file = world.write()
    line = next(n for n, text in enumerate(Path(file).read_text().splitlines(), 1) if "beta" in text)
    assert f"(line {line})" in dpo("validate", file).out


def test_json_for_programs(world: World, dpo: Dpo) -> None:
    edit("dpo.averageLogProbs", True)(world)
    verdicts = json.loads(dpo("validate", world.write(), "--output", "json").out)
    assert [verdict["name"] for verdict in verdicts] == ["tiny"]
    [verdict] = verdicts
    assert (verdict["valid"], verdict["outcome"]) == (True, "Succeeded")
    assert verdict["model"]["kvHeads"] == 2
    assert (verdict["plan"]["totalSteps"], verdict["plan"]["exact"]) == (10, False)
    assert verdict["effective"]["dpo"]["averageLogProbs"] is True
    assert verdict["data"]["train"][0]["estimated_lines"] == 100


def test_json_of_an_invalid_job(world: World, dpo: Dpo) -> None:
    edit("dpo.beta", "high")(world)
    said = dpo("validate", world.write(), "-o", "json")
    [verdict] = json.loads(said.out)
    assert (said.code, verdict["valid"], verdict["outcome"], verdict["effective"]) == (2, False, "InvalidSpec", None)
    assert verdict["findings"][0]["field"] == "spec.dpo.beta"
    assert verdict["findings"][0]["line"] > 1


def test_the_needs_of_a_cluster_are_checked_on_request(world: World, dpo: Dpo) -> None:
    file = world.write()
    assert dpo("validate", file).code == 0
    said = dpo("validate", file, "--cluster")
    assert said.code == 2
    assert "spec.checkpoint.uri: must be set on a cluster" in said.out


def test_standard_input(world: World, dpo: Dpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(Path(world.write()).read_text()))
    said = dpo("validate", "-")
    assert said.code == 0
    assert "-: valid" in said.out


def test_lines_of_a_large_file_are_estimated_from_its_head(world: World, dpo: Dpo) -> None:
    # 40,000 lines of about 50 bytes: far more than the head that is read.
    (world.folder / "data" / "train.jsonl").write_text(pairs(40_000))
    [verdict] = json.loads(dpo("validate", world.write(), "-o", "json").out)
    assert verdict["data"]["train"][0]["estimated_lines"] == pytest.approx(40_000, rel=0.05)


def test_compressed_files_are_not_estimated(world: World, dpo: Dpo) -> None:
    import gzip

    (world.folder / "data" / "train.jsonl.gz").write_bytes(gzip.compress(pairs(100).encode()))
    edit("data.train.0.uri", "data/train.jsonl.gz")(world)
    said = dpo("validate", world.write())
    assert said.code == 0
    assert "1 epoch in batches of 10 pairs · --deep counts them" in said.out


@pytest.mark.parametrize(("name", "more"), [("train.parquet", {}), ("train.data", {"format": "arrow"})])
def test_tables_are_not_estimated(world: World, dpo: Dpo, name: str, more: dict[str, str]) -> None:
    """Their bytes say nothing about rows, and the client reads no Parquet."""
    (world.folder / "data" / name).write_bytes(b"PAR1\n\n\n" * 1000)
    edit("data.train", [{"uri": f"data/{name}", **more}])(world)
    said = dpo("validate", world.write())
    assert said.code == 0
    assert "1 epoch in batches of 10 pairs · --deep counts them" in said.out


WEIGHTED = [{"uri": "data/train.jsonl", "weight": 2}, {"uri": "data/train.jsonl", "name": "again"}]


def test_weights_are_shown(world: World, dpo: Dpo) -> None:
    assert "\n  weights" not in dpo("validate", world.write()).out
    edit("data.train", WEIGHTED)(world)
    assert (
        "weights     relative to each other · --deep counts what an epoch uses\n" in dpo("validate", world.write()).out
    )


@pytest.mark.slow
def test_deep_shows_what_an_epoch_uses(world: World, replay: Replay) -> None:
    edit("data.train", WEIGHTED)(world)
    sources = [{"name": "train-0", "pairs": 60, "uses": 80}, {"name": "again", "pairs": 60, "uses": 40}]
    index = {"train": {"pairs": 120, "sources": sources}, "validation": {"heldout": {"pairs": 20}}}
    said = replay.run({"index": index}, "validate", "--deep", world.write())
    assert "weights     train-0: 80 uses of 60 pairs, 66.7% of an epoch\n" in said.out
    assert "            again: 40 uses of 60 pairs, 33.3% of an epoch\n" in said.out


@pytest.mark.slow
def test_deep_counts_pairs(world: World, replay: Replay) -> None:
    index = {"train": {"pairs": 87}, "validation": {"heldout": {"pairs": 20}}}
    said = replay.run({"index": index}, "validate", "--deep", world.write())
    assert said.code == 0
    assert "8 of 10 pairs = 1 epoch of 87 pairs (8 steps an epoch, 7 pairs left over an epoch)\n" in said.out


@pytest.mark.slow
def test_deep_shows_what_is_wrong_with_the_data(world: World, replay: Replay) -> None:
    message = "2 of 100 lines of the train data cannot be used:\n  train.jsonl:7: not JSON\n  train.jsonl:9: no prompt"
    words = {"outcome": "InvalidData", "message": message}
    said = replay.run({"log": "a note", "lastWords": words, "code": 3}, "validate", "--deep", world.write())
    assert said.code == 3
    found = said.out.splitlines()[1:4]
    assert found[0].startswith("  error    spec.data: 2 of 100 lines of the train data cannot be used: (line ")
    assert found[1:] == ["             train.jsonl:7: not JSON", "             train.jsonl:9: no prompt"]


@pytest.mark.slow
def test_an_index_pass_that_crashes_is_an_internal_error(world: World, replay: Replay) -> None:
    said = replay.run({"log": "Segmentation fault", "code": 1}, "validate", "--deep", world.write())
    assert said.code == 1
    assert "the index pass failed: Segmentation fault" in said.out


def test_deep_and_offline_exclude_each_other(world: World, dpo: Dpo) -> None:
    assert dpo("validate", "--deep", "--offline", world.write()).code == 64


def at(server: S3Server, monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in (server.environment() | changes).items():
        monkeypatch.setenv(name, value)


def test_s3_sources_are_checked(world: World, dpo: Dpo, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    at(s3, monkeypatch)
    s3.make_bucket("prefs")
    s3.client().put_object(Bucket="prefs", Key="train/a.jsonl", Body=pairs(30).encode())
    s3.client().put_object(Bucket="prefs", Key="train/b.jsonl", Body=pairs(12).encode())
    edit("data.train.0.uri", "s3://prefs/train/")(world)
    said = dpo("validate", world.write())
    assert said.code == 0
    assert "s3://prefs/train/ (2 objects, " in said.out
    assert "≈ 42 lines" in said.out
    edit("data.train.0.uri", "s3://prefs/trian/")(world)
    edit("checkpoint.uri", "s3://no-such-bucket/run/")(world)
    said = dpo("validate", world.write())
    assert said.code == 11
    assert "did you mean s3://prefs/train/ (2 objects)?" in said.out
    assert "spec.checkpoint.uri: s3://no-such-bucket/run/: the bucket does not exist" in said.out


def test_wrong_credentials(world: World, dpo: Dpo, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    at(s3, monkeypatch, AWS_SECRET_ACCESS_KEY="not-the-secret")
    edit("data.train.0.uri", "s3://prefs/train/")(world)
    said = dpo("validate", world.write())
    assert said.code == 10
    assert "AWS_SECRET_ACCESS_KEY" in said.out
    assert "not-the-secret" not in said.all
