"""`dpo convert` as a user calls it."""

from pathlib import Path

import pytest

from dpo_testing.command import Command
from dpo_testing.models import reference_model, save_folder


@pytest.mark.slow
def test_a_folder_to_a_checkpoint_and_a_mistake(tmp_path: Path) -> None:
    dpo = Command(tmp_path)
    save_folder(reference_model("llama"), tmp_path / "source")
    done = dpo("convert", "source", "out", "--to", "megatron")
    said = "out: all 21 parameters and the log-probs of 15 tokens are equal to those of source\n"
    assert (done.code, done.out) == (0, said)
    assert not done.err, "no library's warnings"
    again = dpo("convert", "source", "out", "--to", "megatron")
    assert again.code == 64
    assert again.err.startswith("error: out is not empty (it holds")
    assert dpo("convert", "source", "other", "--to", "gguf").code == 64
    wrong = dpo("convert", "source", "--adapter", "nothing", "other")
    assert (wrong.code, wrong.err.count("\n")) == (11, 1)
    assert wrong.err.startswith("error: nothing/adapter_config.json")
    unread = dpo("convert", "source", "unread", "--no-check")
    assert (unread.code, unread.out) == (0, "unread: written, and not compared with source\n")
