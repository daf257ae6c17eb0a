"""The page that explains every word of a status, and the table of rights: generated, complete, in step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dpo_api.status import STATES, ConditionType
from dpo_operator import docs, rbac
from dpo_operator.reasons import TOPICS, Reason

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "operations.md"
CODE = ROOT / "operator" / "dpo_operator"


def test_the_page_is_generated_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == docs.to_markdown(), "run `make generate`"


@pytest.mark.parametrize("word", [*(r.value for r in Reason), *STATES, *(k.value for k in ConditionType)])
def test_every_word_is_on_the_page(word: str) -> None:
    assert f"| `{word}` |" in PAGE.read_text(encoding="utf-8")


def test_every_reason_is_used_and_every_used_reason_is_known() -> None:
    code = "\n".join(path.read_text() for path in CODE.rglob("*.py") if path.parent.name != "reasons")
    used = set(re.findall(r"\bReason\.([A-Z]\w+)", code))
    assert used <= set(Reason.__members__), used - set(Reason.__members__)
    from dpo_api.errors import Outcome

    by_outcome = {outcome.name for outcome in Outcome}
    unused = set(Reason.__members__) - used - by_outcome
    assert not unused, unused


def test_reasons_are_words_that_kubernetes_takes() -> None:
    for reason in Reason:
        assert reason.name == reason.value == reason.word
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]{1,60}", reason.value)
        assert reason.meaning.endswith(".")
        assert reason.remedy.endswith(".")
        assert reason.topic in TOPICS


def test_links_and_anchors_of_the_page_need_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "](" not in text, "a link would need a test of its target"


# -- rights


def test_no_secret_no_pod_write_no_wildcard() -> None:
    for rule in rbac.policy_rules(outside=True):
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert "secrets" not in rule["resources"]
        if rule["resources"] == ["pods"]:
            assert set(rule["verbs"]) <= {"get", "list", "watch"}
        if rule["resources"] == ["dpojobs"]:
            assert not {"create", "update", "patch"} & set(rule["verbs"]), "the spec is its author's"


def test_the_proxy_is_for_the_outside_alone() -> None:
    assert ["pods/proxy"] not in [rule["resources"] for rule in rbac.policy_rules()]
    assert ["pods/proxy"] in [rule["resources"] for rule in rbac.policy_rules(outside=True)]


def test_role_and_cluster_role_are_the_same_table() -> None:
    assert rbac.role("team")["rules"] == rbac.cluster_role()["rules"]
    assert rbac.role("team")["metadata"]["namespace"] == "team"
    assert "namespace" not in rbac.cluster_role()["metadata"]
    for namespace, kind in ((None, "ClusterRole"), ("team", "Role")):
        bound = rbac.binding(namespace, account="dpo-operator", account_namespace="dpo-system")
        assert bound["roleRef"]["kind"] == kind
        assert bound["subjects"][0]["namespace"] == "dpo-system"


def test_prints_as_yaml() -> None:
    assert yaml.safe_load(yaml.safe_dump(rbac.cluster_role())) == rbac.cluster_role()
