"""The command as a whole: light to import, errors without tracebacks, completion, and documentation that is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_api.errors import Outcome
from dpo_api.version import VERSION
from dpo_cli import __main__ as entry
from dpo_testing.cli import PACKAGES, Dpo, World

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
HEAVY = ("torch", "megatron", "transformers", "dpo_trainer", "kopf", "kubernetes")


def python(code: str, **environment: str) -> str:
    environment = {"PYTHONPATH": ":".join(PACKAGES), "PATH": "/usr/bin:/bin"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_every_module_is_light() -> None:
    code = (
        "import importlib, pkgutil, sys, dpo_cli\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(dpo_cli.__path__, 'dpo_cli.')]\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code) == "[]\n"


def test_help_needs_no_store() -> None:
    code = "import sys; from dpo_cli.__main__ import run; run(['--help']); print('boto3' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"


def test_no_arguments_are_answered_with_help(dpo: Dpo) -> None:
    said = dpo()
    assert (said.code, said.err) == (0, "")
    assert "Usage: dpo [OPTIONS] COMMAND" in said.out


def test_version(dpo: Dpo) -> None:
    assert dpo("version").out == f"dpo {VERSION} (API dpo-operator.dev/v1alpha1)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validat"], "No such command 'validat'"),
        (["validate"], "Missing argument 'FILE...'"),
        (["run"], "Missing option '-f'"),
        (["run", "x", "-f", "y"], "two manifests: y, x"),
        (["run", "-f", "x", "--processes", "0"], "Input should be greater than or equal to 1"),
        (["validate", "x", "--output", "xml"], "'xml' is not one of 'text', 'json'"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
    ],
)
def test_mistakes_in_the_command_line(dpo: Dpo, arguments: list[str], message: str) -> None:
    said = dpo(*arguments)
    assert (said.code, said.out) == (64, "")
    assert said.err.startswith("error  ")
    assert message in said.err


def test_an_unexpected_error_leaves_its_traceback_in_a_file(
    dpo: Dpo, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setenv("TMPDIR", str(world.folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("dpo_cli.validate.validate_file", broken)
    said = dpo("validate", "x.yaml")
    assert said.code == 1
    [file] = world.folder.glob("dpo-error-*.log")
    assert f"error  RuntimeError: boom; details are in {file}" in said.err
    assert "this is an internal error" in said.err
    assert "Traceback" in file.read_text()


def test_ctrl_c_while_checking(dpo: Dpo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_cli.validate.validate_file", interrupted)
    assert dpo("validate", "x.yaml").code == 130


def test_a_reader_that_goes_away_is_no_error(world: World) -> None:
    command = f"{sys.executable} -m dpo_cli validate --offline {world.write()} | true; exit ${{PIPESTATUS[0]}}"
    environment = {"PYTHONPATH": ":".join(PACKAGES), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (entry.PIPE_CLOSED, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.slow
def test_completion_scripts_complete(dpo: Dpo, shell: str) -> None:
    script = dpo("completion", shell).out
    assert f"_DPO_COMPLETE=complete_{shell}" in script
    asked = {
        "_DPO_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "dpo vali",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "dpo vali",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert "validate" in python("from dpo_cli.__main__ import main; main()", **asked)


def test_bash_accepts_its_completion(dpo: Dpo, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(dpo("completion", "bash").out)
    subprocess.run(["bash", "-c", f"source {script} && complete -p dpo"], check=True, capture_output=True)


def test_the_documented_exit_codes_are_the_ones_in_use() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*?) \| (.*?) \|$", DOCS, re.MULTILINE)
    helps = {"none": "–", "permanent": "no", "retryable": "yes", "infrastructure": "yes, not charged"}
    assert rows == [(str(o.exit_code), o.name, o.description, helps[o.retry]) for o in Outcome]
    assert f"{entry.INTERRUPTED} is a command that was killed by Ctrl-C" in DOCS


CLUSTER = ("submit", "status", "logs", "suspend", "resume", "retry", "delete", "top")


@pytest.mark.slow
def test_help_of_cluster_commands_loads_no_api() -> None:
    for command in CLUSTER:
        code = f"import sys; from dpo_cli.__main__ import run; run(['{command}', '--help']); print(sorted(sys.modules))"
        loaded = python(code).splitlines()[-1]
        assert not [name for name in ("'boto3'", "'rich'", "'dpo_api.spec'", "'dpo_operator'") if name in loaded], (
            command
        )


@pytest.mark.parametrize("command", CLUSTER)
def test_cluster_commands_are_documented_with_their_options(dpo: Dpo, command: str) -> None:
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", dpo(command, "--help").out)) - {"--help"}
    section = DOCS.split("## On a cluster")[1].split("\n## ")[0]
    assert re.search(f"`dpo {command}[ `]", section)
    assert {option for option in options if option not in section} == set()


@pytest.mark.parametrize("command", ["validate", "run", "render", "convert", "report"])
def test_every_option_is_documented(dpo: Dpo, command: str) -> None:
    options = set(re.findall(r"--[a-z]+", dpo(command, "--help").out)) - {"--help", "--file"}
    section = DOCS.split(f"## dpo {command}")[1].split("\n## ")[0]
    # `dpo report` reaches S3 as boto3 does: its region is the environment's as a rule.
    assert {option for option in options if option not in section} <= {"--region"}
