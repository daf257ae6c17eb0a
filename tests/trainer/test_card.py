"""The model card, as the Hugging Face hub's own library reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dpo_api.version import VERSION
from dpo_store import open_store
from dpo_testing.runs import job_of, run_here
from dpo_testing.training_world import LORA, make, merged
from dpo_trainer import card as card_module
from dpo_trainer.card import Trained, hub_id, license_of, model_card

SPEC = {
    "model": {"huggingFace": {"uri": "s3://models/llama/"}},
    "data": {
        "train": [{"uri": "s3://prefs/a|b.jsonl"}, {"uri": "s3://prefs/c.jsonl", "weight": 2}],
        "validation": [{"uri": "s3://prefs/v.jsonl"}],
    },
    "dpo": {"loss": "ipo", "beta": 0.2},
    "podTemplate": {"env": [{"name": "SOME_TOKEN", "value": "hush"}]},
    "storage": {"credentialsSecretRef": {"name": "keys-of-s3"}},
}
TRAINED = Trained(
    step=40,
    last_step=70,
    metrics={"val/loss": 0.123456789, "val/acc": 0.75, "val/validation_step_time": 3.0, "train/loss": 9.0},
    train=[{"pairs": 1200, "dropped": {"too long": 3, "empty": 1}}, {"pairs": 5, "dropped": {}}],
    validation=[{"pairs": 100, "dropped": {}}],
)


def parsed(spec: dict[str, Any], license_: dict[str, str] | None = None, **more: Any) -> ModelCard:
    return ModelCard(model_card(job_of(spec, "my-job"), TRAINED, license_ or {}, **more))


def test_the_hub_reads_the_front_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"s3://models/llama/": "meta-llama/Llama-3.2-1B", "s3://prefs/c.jsonl": "argilla/prefs"}
    with monkeypatch.context() as patch:
        patch.setattr(card_module, "hub_id", names.get)
        data = parsed(SPEC, {"license": "llama3.2"}).data
    assert (data.base_model, data.library_name, data.license) == ("meta-llama/Llama-3.2-1B", "transformers", "llama3.2")
    assert (data.tags, data.datasets) == (["dpo-operator", "dpo", "ipo"], ["argilla/prefs"])
    adapter = parsed({**SPEC, "lora": {}}, adapter=True).data
    assert (adapter.library_name, adapter.tags[-1], adapter.license) == ("peft", "lora", None)


def test_a_folder_is_not_a_model_of_the_hub() -> None:
    card = parsed(SPEC)
    assert card.data.base_model is None
    assert "Made from `s3://models/llama/` by dpo-operator with the loss `ipo`" in card.text


def test_what_the_card_says() -> None:
    text = parsed(SPEC, {"license": "other", "license_name": "acme", "license_link": "https://acme.example/l"}).text
    for line in (
        "# my-job",
        "70 steps of at most 64 pairs. The weights are those of step 40.",
        "| s3://prefs/a\\|b.jsonl | training | 1,200 | 4 |",
        "| s3://prefs/c.jsonl | training, weight 2 | 5 | 0 |",
        "| s3://prefs/v.jsonl | validation | 100 | 0 |",
        "| dpo.loss | ipo |",
        "| dpo.beta | 0.2 |",
        "| training.learningRate | 9e-6 |",
        "| val/acc | 0.75 |",
        "| val/loss | 0.123457 |",
        f"| dpo-operator | {VERSION} |",
        "That of the start model: [acme](https://acme.example/l).",
    ):
        assert line in text
    for secret in ("hush", "keys-of-s3", "validation_step_time", "train/loss"):
        assert secret not in text


def test_supervised_fine_tuning_is_no_dpo() -> None:
    card = parsed({**SPEC, "dpo": {"preferenceWeight": 0, "sftWeight": 1}})
    assert card.data.tags == ["dpo-operator", "sft"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://org/name", "org/name"),
        ("hf://org/name@refs/pr/1", "org/name"),
        ("hf://datasets/org/name@main/part-*.jsonl", "org/name"),
        ("hf://datasets/org/name/a.parquet", "org/name"),
        ("s3://org/name", None),
        ("/home/me/org/name", None),
    ],
)
def test_the_name_on_the_hub(uri: str, expected: str | None) -> None:
    assert hub_id(uri) == expected


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x\n", {}, {"license": "mit"}),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", {}, {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://x.example/LICENSE\n---\n",
            {},
            {"license": "other", "license_name": "llama3", "license_link": "https://x.example/LICENSE"},
        ),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {}, {"license": "other"}),
        ("no front matter\n---\nlicense: mit\n---\n", {"license": "bsd"}, {"license": "bsd"}),
        (None, {"license": "mit"}, {"license": "mit"}),
        (None, {}, {}),
        ("---\nlicense: [mit, x]\n---\n", {}, {}),
        ('---\nlicense: "a\\n---\\nbad: yes"\n---\n', {}, {}),
        ("---\nlicense: {a\n---\n", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: x\ndate: 2026-13-45\n---\n", {"license": "mit"}, {"license": "mit"}),
        ("---\n[a]\n---\n", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", {}, {}),
    ],
)
def test_the_license_of_the_start_model(
    card: str | None, config: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert license_of(open_store(), str(tmp_path)) == expected


@pytest.mark.slow
def test_a_run_writes_the_same_card_twice(tmp_path: Path) -> None:
    """Whole and adapter; the license of the start model; no path but those of the manifest."""
    spec = merged(merged(make(tmp_path), LORA), {"training": {"maxSteps": 3}})
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    runs = [run_here(spec, tmp_path / name) for name in ("one", "two")]
    (tmp_path / "two" / "model" / "adapter" / "README.md").write_text("---\ntags: [dpo-operator]\n---\nof another run")
    (tmp_path / "two" / "export.json").unlink()
    run_here(spec, tmp_path / "two")  # exports again
    for name in ("README.md", "adapter/README.md"):
        texts = [(run.folder / "model" / name).read_text() for run in runs]
        assert texts[0] == texts[1]
        assert ModelCard(texts[0]).data.license == "mit"
        allowed = texts[0]
        for uri in (tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "valid.jsonl"):
            assert str(uri) in allowed
            allowed = allowed.replace(str(uri), "")
        assert "/" not in allowed.replace("text/", "").replace("val/", ""), allowed
