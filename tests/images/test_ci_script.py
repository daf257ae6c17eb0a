""".ci/run ends with what its two targets end with, and never runs into a time limit without a word. make is played."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = """\
#!/bin/bash
echo "$1 ${E2E_FULL_UNTIL}" >>asked
if [[ "$1" == "$hangs" ]]; then sleep 600; fi
name="rc_${1//-/_}"
exit "${!name:-0}"
"""


def run(folder: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    for name, text in (("bin/make", MAKE), ("hack/build-tools.sh", '#!/bin/bash\necho "tools $*" >>asked\n')):
        path = folder / name
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
    path_variable = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [folder / ".ci" / "run"], capture_output=True, text=True, check=False, env={"PATH": path_variable, **env}
    )
    return done, (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "failed"),
    [({}, ""), ({"rc_test": "2"}, "test"), ({"rc_e2e": "2"}, "e2e"), ({"rc_test": "2", "rc_e2e": "2"}, "test e2e")],
)
def test_both_targets_run_and_either_may_fail(tmp_path: Path, codes: dict[str, str], failed: str) -> None:
    began = time.time()
    done, asked = run(tmp_path, **codes)
    assert [line.split()[0] for line in asked] == ["tools", "test", "e2e"]
    assert done.returncode == bool(failed)
    assert done.stdout.strip().endswith(f"ci: failed: {failed}" if failed else " s")
    until = {int(line.split()[1]) for line in asked[1:]}
    assert len(until) == 1
    assert int(began) + 3600 <= until.pop() <= time.time() + 3600


def test_the_story_is_whole_for_an_hour_from_the_start(tmp_path: Path) -> None:
    began = time.time()
    _, asked = run(tmp_path, SECONDS="1500")  # bash counts on from here: 25 minutes have passed
    until = int(asked[1].split()[1])
    assert int(began) + 2100 <= until + 1 <= time.time() + 2101


@pytest.mark.parametrize("target", ["test", "e2e"])
@pytest.mark.slow
def test_a_target_that_takes_too_long_is_ended_and_named(tmp_path: Path, target: str) -> None:
    done, asked = run(tmp_path, SECONDS="5098", hangs=target)  # two seconds before 85 minutes
    assert done.returncode == 1
    assert f"ci: make {target} was ended after 0 minutes: 85 minutes of the whole check have passed" in done.stdout
    if target == "test":
        assert "ci: 85 minutes have passed: make e2e is not started" in done.stdout
        assert "ci: failed: test e2e" in done.stdout
    else:
        assert asked[-1].startswith("e2e-down ")
        assert "ci: failed: e2e" in done.stdout
