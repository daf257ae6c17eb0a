"""Every mistake that people make, through the real command, with the real trainer behind it.

One clear message that names the field or file:line, the value and the fix; the outcome's exit code; no traceback
anywhere; nothing lost.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpo_api.errors import Outcome
from dpo_testing.cli import Said
from dpo_testing.command import Command, only_error, quiet_log
from dpo_testing.corpora import jsonl, llama_tokenizer, write_jsonl
from dpo_testing.runs import merged
from dpo_testing.s3server import S3Server
from dpo_testing.training_world import make, preferences, write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def dpo(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    base = make(tmp_path, pairs=21, validation=3)
    return merged(base, {"training": {"maxSteps": 2, "validationInterval": 100}, "reference": None})


def run(dpo: Command, spec: dict[str, Any], *arguments: str, **variables: str) -> Said:
    return dpo("run", "-f", dpo.write(spec), "--output", "out", *arguments, **variables)


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- met before the trainer starts


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        node: Any = spec
        *way, last = path.split(".")
        for part in way:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "outcome", "expected"),
    [
        pytest.param(
            edit("training.learningrate", 1e-6),
            Outcome.InvalidSpec,
            ["spec.training.learningrate: unknown field; did you mean learningRate?", "(line "],
            id="unknown field",
        ),
        pytest.param(
            edit("training.maxSteps", "2 steps"),
            Outcome.InvalidSpec,
            ['spec.training.maxSteps: "2 steps" is not a whole number', "(line "],
            id="wrong type",
        ),
        pytest.param(
            edit("training.globalBatchSize", "8"),
            Outcome.InvalidSpec,
            ['spec.training.globalBatchSize: "8" is not a whole number; remove the quotes'],
            id="a number in quotes",
        ),
        pytest.param(
            edit("data.train.0.uri", "trian.jsonl"),
            Outcome.NotFound,
            ["spec.data.train[0].uri: trian.jsonl: does not exist; did you mean train.jsonl?", "(line "],
            id="missing file",
        ),
    ],
)
def test_an_invalid_manifest(
    dpo: Command, spec: dict[str, Any], change: Callable[[dict[str, Any]], None], outcome: Outcome, expected: list[str]
) -> None:
    change(spec)
    said = run(dpo, spec)
    text = only_error(said, outcome)
    assert all(part in text for part in expected), text
    assert said.out == "", "nothing has started"
    assert not (dpo.folder / "out").exists()


def test_a_missing_bucket(dpo: Command, spec: dict[str, Any], s3: S3Server) -> None:
    s3.make_bucket("preferences")
    edit("data.train.0.uri", "s3://preference/train.jsonl")(spec)
    text = only_error(run(dpo, spec, **s3.environment()), Outcome.NotFound)
    assert "spec.data.train[0].uri: s3://preference/train.jsonl: bucket 'preference' does not exist" in text
    assert "did you mean s3://preferences/?" in text
    assert not (dpo.folder / "out").exists()


def test_a_missing_bucket_for_the_results(dpo: Command, spec: dict[str, Any], s3: S3Server) -> None:
    s3.make_bucket("results")
    file = dpo.write(spec)
    said = dpo("run", "-f", file, "--output", "s3://result/tiny", **s3.environment())
    text = only_error(said, Outcome.NotFound)
    assert "error    --output: s3://result/tiny" in text
    assert "the bucket does not exist" in text
    said = dpo("run", "-f", file, "--set", "output.uri=s3://result/tiny", **s3.environment())
    assert "error    spec.output.uri: s3://result/tiny" in only_error(said, Outcome.NotFound)
    assert said.out == ""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "the secret key is wrong; check AWS_ACCESS_KEY_ID and AWS_"),
        ({"AWS_ACCESS_KEY_ID": "AKSTRANGER"}, "does not know this access key; check AWS_ACCESS_KEY_ID and AWS_SECRET"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no S3 credentials found; set AWS_ACCESS_KEY_ID and"),
    ],
    ids=["wrong secret", "unknown key", "none"],
)
def test_wrong_credentials(
    dpo: Command, spec: dict[str, Any], s3: S3Server, variables: dict[str, str], expected: str
) -> None:
    edit("data.train.0.uri", "s3://locked/train.jsonl")(spec)
    said = run(dpo, spec, **(s3.environment() | variables))
    text = only_error(said, Outcome.AccessDenied)
    assert "spec.data.train[0].uri: s3://locked/" in text
    assert expected in text
    secrets = (s3.secret_key, "not-the-secret")
    assert not any(secret in said.all for secret in secrets)


# -- the data


GOOD = {"prompt": "please answer ", "chosen_response": "Hockney", "rejected_response": "Bosch"}


def test_lines_that_cannot_be_used(dpo: Command, spec: dict[str, Any]) -> None:
    """A broken line, a missing key and an empty response in one pass over the data: all are listed."""
    bad = [
        '{"prompt": "a", "chosen_response": ',
        {"prompt": "a", "chosen_response": "b"},
        GOOD | {"chosen_response": ""},
    ]
    write_jsonl(dpo.folder / "train.jsonl.gz", [GOOD, bad[0], GOOD, bad[1], GOOD, bad[2], GOOD])
    path = str(dpo.folder / "train.jsonl.gz")
    edit("data.train.0.uri", path)(spec)
    said = run(dpo, spec)
    lines = only_error(said, Outcome.InvalidData).splitlines()
    assert lines[0] == "error  3 of 7 lines of the train data cannot be used:"
    assert lines[1].strip() == f"{path}:2: broken JSON: Expecting value at column 36"
    assert lines[2].strip() == (
        f'{path}:4: no "rejected_response" or "rejected" (keys here: "prompt", "chosen_response");'
        " spec.data.columns.rejected names it"
    )
    assert lines[3].strip() == f"{path}:6: the chosen response is empty"
    assert lines[4].strip() == "spec.data.onInvalid: skip leaves such lines out and counts them"
    assert len(lines) == 5
    quiet_log(dpo.folder / "out")
    assert not any((dpo.folder / "cache" / "index").glob("*/index.json")), "half an index must not look whole"


def test_a_prompt_that_is_no_prefix(dpo: Command, spec: dict[str, Any]) -> None:
    """The deep look says it without a run; and the hint is right: the same data with that setting is fine."""
    write_jsonl(dpo.folder / "train.jsonl", [GOOD | {"prompt": "question: please answer"}, GOOD])
    edit("data.boundary", "strict")(spec)
    file = dpo.write(spec)
    said = dpo("validate", "--deep", file)
    lines = only_error(said, Outcome.InvalidData).splitlines()
    assert lines[0].startswith("  error    spec.data: 1 of 2 lines of the train data cannot be used:")
    assert lines[1].strip().startswith(f"{dpo.folder}/train.jsonl:2: the prompt's tokens are not a prefix")
    assert lines[2].strip() == (
        "1 have no clean boundary: set spec.data.boundary: separate to tokenise the responses on their own"
    )
    said = dpo("validate", "--deep", file, "--set", "data.boundary=separate")
    assert said.code == 0
    assert "of 2 pairs" in said.out
    assert "warning  spec.data: the held-out data are plain strings without special tokens" in said.out


def test_pairs_that_are_all_too_long(dpo: Command, spec: dict[str, Any]) -> None:
    said = run(dpo, spec, "--set", "data.maxLength=3")
    text = only_error(said, Outcome.InvalidData)
    assert "no usable pair in the train data: 21 lines, all dropped (overLength 21); raise spec.data.maxLength" in text
    assert "above 3 or set spec.data.overLength: truncate" in text
    quiet_log(dpo.folder / "out")


# -- the model


def test_a_tokenizer_of_another_model(dpo: Command, spec: dict[str, Any]) -> None:
    """The data happens to use only small ids: it is refused all the same."""
    size = len(AutoTokenizer.from_pretrained(llama_tokenizer(dpo.folder / "other", 500)))
    write_jsonl(dpo.folder / "train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9)
    said = run(dpo, merged(spec, {"tokenizer": {"uri": "other"}}))
    text = only_error(said, Outcome.InvalidModel)
    assert f"the tokenizer has {size} ids but the model's vocabulary holds 384" in text
    assert "check spec.model and spec.tokenizer" in text
    quiet_log(dpo.folder / "out")


def test_weights_that_were_cut_short(dpo: Command, spec: dict[str, Any]) -> None:
    weights = dpo.folder / "model" / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    said = run(dpo, spec)
    text = only_error(said, Outcome.InvalidModel)
    assert f"{weights}: not a usable safetensors file: it is truncated: its header describes" in text
    assert f"the file has {size // 2:,}; copy or download it again" in text
    quiet_log(dpo.folder / "out")


# -- the machine


def test_a_port_that_is_taken(dpo: Command, spec: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = run(dpo, spec, "--port", str(port))
    text = only_error(said, Outcome.PortInUse)
    assert f"127.0.0.1 port {port}: Address already in use; choose another with --port" in text
    assert not (dpo.folder / "out").exists(), "it is met before anything is loaded"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of this size; skips where only root may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("a full disk needs a small file system, and only root may mount one here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_full_disk_under_the_index(dpo: Command, spec: dict[str, Any]) -> None:
    write_jsonl(dpo.folder / "train.jsonl", preferences(400))
    with small_disk(dpo.folder / "small", "16k") as small:
        said = run(dpo, spec, DPO_CACHE_DIR=str(small / "cache"))
        text = only_error(said, Outcome.NoSpace)
        assert f"{small}/cache/index/" in text
        assert "the token index needs about" in text
        assert "free some, or set DPO_CACHE_DIR to a larger disk" in text
        quiet_log(dpo.folder / "out")
        assert not list((small / "cache" / "index").glob("*/tokens.i32")), "what cannot be completed is removed"


def test_a_full_disk_under_the_results(dpo: Command, spec: dict[str, Any]) -> None:
    """Full at the first checkpoint, then at the export; with room the same command goes on where it was."""
    changed = merged(spec, {"checkpoint": {"everySteps": 1, "uri": "small/run"}, "training": {"maxSteps": 3}})
    with small_disk(dpo.folder / "small", "256k") as small:
        file = dpo.write(merged(changed, {"output": {"uri": "tiny/model"}}))
        out = small / "run"
        text = only_error(dpo("run", "-f", file), Outcome.NoSpace)
        assert text == "error  small/run/checkpoints/step-000001: no space left on the disk"
        quiet_log(out)
        assert not (out / "checkpoints" / "step-000001" / "complete.json").exists()
        resize(small, "32m")
        with small_disk(dpo.folder / "tiny", "64k") as tiny:
            said = dpo("run", "-f", file)
            assert re.fullmatch(
                r"error  tiny/model/model\.safetensors: tiny/model needs \d+\.\d KiB but has \d+\.\d KiB free; "
                "make room or choose another folder",
                only_error(said, Outcome.NoSpace),
            )
            assert "kept        checkpoint of step 3; the same command continues from it" in said.out
            quiet_log(out)
            assert not (out / "export.json").exists()
            resize(tiny, "16m")
            said = dpo("run", "-f", file)
            assert said.code == 0, said.all
            assert (tiny / "model" / "model.safetensors").stat().st_size > 64 * 1024
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if "train/loss" in event] == [1, 2, 3]


# -- a run directory that holds something already


def test_few_pairs_then_another_model_and_other_data(dpo: Command, spec: dict[str, Any]) -> None:
    """Fewer pairs than a global batch train, and say so. Then the finished run is not disturbed by strangers."""
    few = merged(spec, {"training": {"globalBatchSize": 64, "maxSteps": None, "epochs": 2}})
    # Compressed: only the index pass can count them.
    packed = dpo.folder / "few.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl(preferences(5, seed=1))))
    edit("data.train.0.uri", str(packed))(few)
    said = run(dpo, few)
    assert said.code == 0, said.all
    assert (
        "spec.training.globalBatchSize: 5 pairs are fewer than one global batch of 64; each step uses all" in said.out
    )
    assert said.out.count("are fewer than one global batch") == 1
    out = dpo.folder / "out"
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(e["step"], e["train/consumed_samples"]) for e in events if "train/loss" in e] == [(1, 5), (2, 10)]
    before = untouched(out)

    write_model(dpo.folder / "other", intermediate_size=64)
    text = only_error(
        run(dpo, merged(few, {"model": {"huggingFace": {"uri": "other"}}})), Outcome.IncompatibleCheckpoint
    )
    assert re.search(r"out/checkpoints/step-000002 belongs to another run: spec\.model was \w{12}, now \w{12}\. ", text)
    assert "Undo the change, or give this run a directory of its own (checkpoint.uri, or --output)." in text
    assert untouched(out) == before
    quiet_log(out)

    write_jsonl(dpo.folder / "more.jsonl", preferences(6, seed=1))
    text = only_error(run(dpo, edited(few, "data.train.0.uri", "more.jsonl")), Outcome.IncompatibleCheckpoint)
    assert re.search(r"step-000002 belongs to another run: spec\.data\.train was \w{12}:\w{12}, now \w{12}:", text)
    assert untouched(out) == before
    quiet_log(out)

    said = run(dpo, few)
    assert said.code == 0, said.all
    assert "this run was already finished: there was nothing to do" in said.out


def edited(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    edit(path, value)(copy)
    return copy


def untouched(folder: Path) -> dict[str, str]:
    """What another run must leave as it is: everything but the number of the newest attempt and the log."""
    return {name: digest for name, digest in files(folder).items() if name not in {"attempt", "trainer.log"}}
