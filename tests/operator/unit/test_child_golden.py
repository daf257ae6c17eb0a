"""Whole objects: what `dpo render` prints for every example manifest, which is what the operator creates.

After a wanted change: UPDATE_GOLDEN=1 python -m pytest tests/operator/unit/test_child_golden.py, then read the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from dpo_api.findings import ManifestError
from dpo_api.manifest import load_manifest
from dpo_cli.render import render

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "child"
LOCAL = {"quickstart.yaml"}
"""Examples for one machine: their addresses are local paths, which are not mounted in pods."""
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.name not in LOCAL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_rendered_objects(example: Path) -> None:
    text = render(str(example), [], image="registry.example.com/dpo/trainer:1")
    golden = GOLDEN / example.name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden} differs; see the top of this file"


def test_every_golden_has_its_example() -> None:
    assert {path.name for path in GOLDEN.glob("*.yaml")} == {path.name for path in EXAMPLES}


def test_every_storage_form_has_an_example() -> None:
    rendered = {path.stem: (GOLDEN / path.name).read_text() for path in EXAMPLES}
    assert "secretKeyRef" in rendered["llama3-8b-lora"]
    assert "persistentVolumeClaim" in rendered["storage-pvc"]
    assert "serviceAccountToken" in rendered["storage-pod-identity"]
    assert "DPO_CREDENTIALS_DIR" in rendered["storage-per-source"]


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_examples_for_one_machine_are_refused_with_a_message(name: str) -> None:
    with pytest.raises(ManifestError, match=r"not mounted in the pods|on a cluster"):
        render(str(ROOT / "examples" / name), [])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_trainer_reads_what_was_written(example: Path, tmp_path: Path) -> None:
    """The pinned spec is the author's, but for runPolicy, which may change; the trainer's own class reads it."""
    config_map = next(yaml.safe_load_all((GOLDEN / example.name).read_text()))
    pinned = tmp_path / "spec.json"
    pinned.write_text(config_map["data"]["spec.json"])
    written = load_manifest(example).to_dict()["spec"]
    written.pop("runPolicy", None)
    assert load_manifest(pinned).to_dict()["spec"] == json.loads(json.dumps(written))
