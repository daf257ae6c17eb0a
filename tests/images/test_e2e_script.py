"""hack/e2e.sh is green or skipped for one reason each; whatever else happens makes it red, and takes the cluster down.

Its Python is played here: what it is asked and how it answers is all that the script knows of the cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_testing.realcluster.machine import no_services

ROOT = Path(__file__).resolve().parents[2]
PLAYED = """\
#!/bin/bash
case "$*" in
  "-m dpo_testing.realcluster "*) name=$3 ;;
  "-m pytest "*) name=pytest ;;
esac
echo "$name" >>asked
echo "$name says so"
code="rc_$name"
exit "${!code:-0}"
"""
UP_AND_DOWN = ["suitable", "up", "pytest", "times", "down"]
FAILED = ["suitable", "up", "pytest", "times", "logs", "down"]


@pytest.mark.parametrize(
    ("codes", "given", "asked", "code"),
    [
        ({}, {}, UP_AND_DOWN, 0),
        ({}, {"E2E_KEEP": "1"}, UP_AND_DOWN[:-1], 0),
        ({}, {"E2E_KUBECONFIG": "some"}, ["pytest"], 0),
        ({"suitable": 3}, {}, ["suitable"], 3),
        ({"suitable": 1}, {}, ["suitable"], 1),
        ({"up": 1}, {}, ["suitable", "up", "times", "logs", "down"], 1),
        ({"up": 3}, {}, ["suitable", "up", "times", "logs", "down"], 1),
        ({"pytest": 1}, {}, FAILED, 1),
        ({"pytest": 3}, {}, FAILED, 1),
        ({"pytest": 5}, {}, FAILED, 1),
        ({"pytest": 3}, {"E2E_KUBECONFIG": "some"}, ["pytest"], 1),
        ({"down": 1}, {}, UP_AND_DOWN, 1),
    ],
)
def test_what_the_script_ends_with(
    tmp_path: Path, codes: dict[str, int], given: dict[str, str], asked: list[str], code: int
) -> None:
    (tmp_path / "hack").mkdir()
    shutil.copy(ROOT / "hack" / "e2e.sh", tmp_path / "hack")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PLAYED)
    python.chmod(0o755)
    answers = {f"rc_{name}": str(value) for name, value in codes.items()}
    done = subprocess.run(
        [tmp_path / "hack" / "e2e.sh"], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], **answers, **given},
    )  # fmt: skip
    assert (tmp_path / "asked").read_text().split() == asked
    assert done.returncode == code
    if code == 3:
        assert done.stdout == "e2e: skipped: suitable says so\n"


def story(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "e2e", "tests/e2e", "-x", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"HOME": os.environ["HOME"], **env},
    )  # fmt: skip


@pytest.mark.slow
def test_a_story_that_is_skipped_altogether_is_no_success(tmp_path: Path) -> None:
    done = story(PATH=str(tmp_path), DPO_E2E_RUN=str(tmp_path / "run"))  # no Go on this PATH, and no cluster is up
    assert "skipped" in done.stdout
    assert "passed" not in done.stdout
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize(
    ("given", "left_out"),
    [({}, False), ({"E2E_SHORT": "1"}, True), ({"E2E_FULL_UNTIL": "1"}, True), ({"E2E_FULL_UNTIL": "9e9"}, False)],
)
@pytest.mark.slow
def test_the_short_form_lists_what_it_leaves_out(tmp_path: Path, given: dict[str, str], left_out: bool) -> None:
    done = story(PATH=str(tmp_path), DPO_E2E_RUN=str(tmp_path / "run"), **given)
    listed = (
        "e2e: short form, for lack of time or with E2E_SHORT; left out: test_a_suspended_job, test_a_deleted_master, "
        "test_a_drained_node, test_a_stopped_object_store, test_a_deleted_operator, "
        "test_two_alerts_fire_for_their_causes"
    )
    assert (listed in done.stdout) is left_out


@pytest.mark.slow
def test_a_given_cluster_without_the_rest_is_one_message(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    given = {"E2E_KUBECONFIG": str(tmp_path / "gone"), "E2E_OPERATOR_IMAGE": "operator:1"}
    done = story(PATH=str(tmp_path), DPO_E2E_RUN=run, **given)
    assert done.returncode == 1
    missing = "E2E_TRAINER_IMAGE, E2E_S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    assert f"E2E_KUBECONFIG needs {missing} to be set as well" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_packages_start_no_service_and_the_machines_own_policy_comes_back(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"

    def answer() -> int:
        return subprocess.run([policy, "containerd", "start"], check=False).returncode

    with no_services(policy):
        assert answer() == 101
    assert list(tmp_path.iterdir()) == []

    policy.write_text("#!/bin/sh\nexit 104\n")
    policy.chmod(0o755)
    with no_services(policy):
        assert answer() == 101
    assert answer() == 104
    assert [path.name for path in tmp_path.iterdir()] == ["policy-rc.d"]
