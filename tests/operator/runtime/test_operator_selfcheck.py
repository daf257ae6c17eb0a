"""`dpo-operator --selfcheck` where no cluster answers; what it says of a real one is test_rbac_rights.py's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_operator.runtime.selfcheck import OLDEST, version

ROOT = Path(__file__).resolve().parents[3]


def selfcheck(kubeconfig: Path) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "dpo_operator", "--selfcheck"]
    variables = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_an_api_server_that_does_not_answer_is_lacking(tmp_path: Path) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    file = tmp_path / "config"
    file.write_text(json.dumps(config))
    code, lines = selfcheck(file)
    assert (code, lines[-1]) == (1, "selfcheck: 1 lacking")
    assert lines[0].startswith("lacks  cluster    http://127.0.0.1:9 does not answer (")
    assert len(lines) == 2, "the other checks are skipped"


@pytest.mark.slow
def test_no_way_to_a_cluster_is_lacking(tmp_path: Path) -> None:
    code, lines = selfcheck(tmp_path / "none")
    assert (code, len(lines)) == (1, 2)
    assert lines[0].startswith("lacks  cluster    the kubeconfig")


@pytest.mark.parametrize(
    ("found", "level"),
    [("v1.28.9", "lacks"), ("v1.29.0", "ok"), ("v1.31.2-gke.1", "ok"), ("v2.0.0", "ok"), ("unknown", "ok")],
)
def test_an_old_cluster_is_lacking(found: str, level: str) -> None:
    said = version("https://c", found)
    assert said.level == level
    assert found in said.text


def test_the_oldest_cluster_is_the_charts() -> None:
    chart = yaml.safe_load((ROOT / "charts" / "dpo-operator" / "Chart.yaml").read_text())
    assert chart["kubeVersion"].startswith(">={}.{}.".format(*OLDEST))
