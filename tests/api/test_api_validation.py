"""Combinations that types cannot judge: each finding by a case, and no finding where there is nothing to say."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from dpo_api import cluster, plan, validation
from dpo_api.validation import Finding, check, errors
from dpo_testing.doubtful_specs import CASES, GROUPED, LLAMA, SFT, VALID, Case
from dpo_testing.manifests import spec


def found(case: Case) -> list[Finding]:
    return check(spec(case.changes, case.removed), **case.known)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_finding_is_made(case: Case) -> None:
    findings = found(case)
    hits = [f for f in findings if (f.level, f.field) == (case.level, case.field) and case.says in f.message]
    assert hits, [f"{f.level} {f}" for f in findings]


def test_nothing_is_said_of_a_good_spec() -> None:
    good = spec({**VALID, "training.globalBatchSize": 512, "lora.targetModules": ["attention", "mlp"]})
    assert check(good, GROUPED, 61_135, validation_pairs=[2000], on_cluster=True) == []
    assert check(spec(), on_cluster=True) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo.beta": 0.001},
        {"dpo.beta": 5},
        {"training.packing.maxTokens": 8192},
        {"training.microBatchSize": 64},
        {"training.epochs": 3},
        {"training.learningRate": 1e-4},
        {"lora": {}, "training.learningRate": 1e-3},
        {"output.uri": "s3://runs/job/model"},
        {"lora": {}, "output.merge": False},
        {"lora": {}, "output": {"merge": False, "formats": ["peft"]}},
        {"output.uri": "s3://runs/job2/"},
        {"data.maxLength": 8192},
        {"lora.layers": [0, 31]},
        {"resources.processesPerNode": 8},
        {"serviceAccountName": "trainer", "storage": {}},
        {"runPolicy": {"queueName": "team-a", "priorityClass": "high"}},
        {
            "model.huggingFace.uri": "/data/llama",
            "podTemplate": {
                "volumes": [{"name": "d", "emptyDir": {}}],
                "volumeMounts": [{"name": "d", "mountPath": "/data"}],
            },
        },
        {"logging.wandb": {"project": "p", "mode": "offline"}},
        {**SFT, "dpo.sftAverageLogProbs": False, "training.learningRate": 1e-3},
    ],
)
def test_the_edge_of_a_rule_is_still_right(changes: dict[str, Any]) -> None:
    assert check(spec(changes), GROUPED, 61_135, on_cluster=True) == []


def test_everything_is_said_at_once_and_errors_come_first() -> None:
    wrong = {"parallelism.tensor": 3, "dpo.gtRewardScale": 2, "dpo.loss": "ipo", "training.packing.maxTokens": 100}
    findings = check(spec(wrong), LLAMA)
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert {f.field for f in errors(findings)} >= {"spec.parallelism.tensor", "spec.training.packing.maxTokens"}
    assert "warning" in levels
    assert "note" in levels


def sites(module: ModuleType) -> set[int]:
    """Return the lines of a module where a finding is made."""
    makers = {"Finding", "_error", "_warning", "_note", "_unused"}
    return {
        node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in makers
    }


@pytest.mark.parametrize("module", [validation, cluster, plan], ids=lambda module: str(module.__name__))
def test_every_place_that_makes_a_finding_has_a_case(module: ModuleType) -> None:
    """A rule that no case reaches could be dropped without a test noticing."""
    seen: set[int] = set()
    name = str(Path(str(module.__file__)))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != name:
            return None
        if event == "line":
            seen.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for case in CASES:
            found(case)
    finally:
        sys.settrace(before)
    helpers = {"_error", "_warning", "_note"}
    own = {
        node.body[0].lineno
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.FunctionDef) and node.name in helpers
    }
    assert sites(module) - seen - own == set()
