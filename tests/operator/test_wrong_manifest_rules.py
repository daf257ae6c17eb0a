"""The table of wrong manifests is whole: every rule has a case, and a case fails when its rule is deleted.

The rules of the CRD are deleted on a real API server (test_bad_manifests.py); here it is those of dpo_api's checks.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import pytest

from dpo_api import cluster, overlay, validation
from dpo_api.findings import Finding, ManifestError
from dpo_api.manifest import parse_job
from dpo_api.spec import DPOJobSpec
from dpo_operator.config import Settings
from dpo_operator.reconcile import reconcile
from dpo_operator.types import CreateChild, CreateConfigMap, Observed, PatchStatus
from dpo_testing.schema_rules import SchemaRule, node
from dpo_testing.wrong_manifests import (
    ACCEPTANCE,
    ADMISSION,
    CHANGES,
    DRY_RUN,
    NEVER_ALONE,
    RULES,
    SCHEMA,
    Wrong,
    is_repeated,
)

EVERY = (*ADMISSION, *CHANGES, *ACCEPTANCE, *DRY_RUN)
PROVEN = {case.rule for case in (*ADMISSION, *CHANGES)}


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(PROVEN) + len(ACCEPTANCE) >= 200
    assert len({case.name for case in EVERY}) == len(EVERY)


def test_every_rule_of_the_crd_has_a_case() -> None:
    asked = [rule for rule in RULES if rule.path[:1] == ("spec",) or rule.what.startswith("cel")]
    left = {rule for rule in asked if rule not in PROVEN and not is_repeated(rule.path)}
    assert {str(rule) for rule in left if not _said_twice(rule)} == set()


def _said_twice(rule: SchemaRule) -> bool:
    """Whether a rule never refuses anything alone."""
    place = node(SCHEMA, rule.path)
    by_form = rule.what == "minLength" and "x-kubernetes-validations" in place  # "" has not the field's form either
    by_list = rule.what == "type" and "enum" in place  # nor is 7 one of a list of words
    return by_form or by_list or rule in NEVER_ALONE


# --- the operator, should such an object be stored -------------------------------------------------------------------


def observed(document: dict[str, Any]) -> Observed:
    """An object as an older CRD, or one without validation, could have let it in."""
    job = copy.deepcopy(document)
    job["metadata"] = {
        "name": "job", "namespace": "team-a", "uid": "7c2d", "generation": 1, "resourceVersion": "5",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return Observed(job=job)


# The name is the API server's to check in every case.
STORABLE = [case for case in (*ADMISSION, *ACCEPTANCE) if case.rule is None or case.rule.path]


@pytest.mark.parametrize("case", STORABLE, ids=lambda case: str(case.name))
def test_the_operator_rejects_it_and_creates_nothing(case: Wrong) -> None:
    decision = reconcile(observed(case.document), 1_800_000_000.0, Settings())
    assert decision.status["state"] == "Rejected"
    assert not [action for action in decision.actions if isinstance(action, CreateChild | CreateConfigMap)]
    assert [type(action) for action in decision.actions].count(PatchStatus) == 1
    accepted = next(c for c in decision.status["conditions"] if c["type"] == "Accepted")
    assert accepted["status"] == "False"
    assert case.field.rpartition("[")[0] in accepted["message"]


# --- a check that is deleted -----------------------------------------------------------------------------------------

NEEDS_FACTS = {"_steps", "_divides", "_fits_model", "_fp8_fits_model"}
"""Checks of the model and the data, which the operator does not see."""
MODULES = (validation, cluster, overlay)


def is_error(statement: ast.AST) -> TypeGuard[ast.Expr]:
    """Whether a statement yields a finding of level error."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield)):
        return False
    call = statement.value.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return False
    first = call.args[0] if call.args else None
    return call.func.id == "_error" or (
        call.func.id == "Finding" and isinstance(first, ast.Constant) and first.value == "error"
    )


def sites(module: ModuleType) -> list[int]:
    """Return the lines of a module where it finds an error."""
    functions = [f for f in ast.parse(inspect.getsource(module)).body if isinstance(f, ast.FunctionDef)]
    return sorted(s.lineno for f in functions if f.name not in NEEDS_FACTS for s in ast.walk(f) if is_error(s))


def without_site(module: ModuleType, line: int) -> Callable[[DPOJobSpec], Iterable[Finding]]:
    """Return a module's check without the error at a line."""

    class Delete(ast.NodeTransformer):
        def visit_Expr(self, statement: ast.Expr) -> ast.AST:
            return ast.copy_location(ast.Pass(), statement) if statement.lineno == line else statement

    tree = Delete().visit(ast.parse(inspect.getsource(module)))
    changed = ModuleType(module.__name__)
    # A function that has lost its only yield is no generator any more.
    for function in (f for f in tree.body if isinstance(f, ast.FunctionDef)):
        if isinstance(function.returns, ast.Subscript) and ast.unparse(function.returns).startswith("Iterator"):
            function.body.append(ast.parse("yield from ()").body[0])
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), vars(changed))  # noqa: S102
    check: Callable[[DPOJobSpec], Iterable[Finding]] = changed.check
    return check


def parsed() -> Iterator[tuple[Wrong, DPOJobSpec]]:
    for case in (*ADMISSION, *ACCEPTANCE):
        try:
            yield case, parse_job(case.document).spec
        except ManifestError:  # answered before there is a spec to check
            continue


def answered(case: Wrong, found: Iterable[Finding]) -> bool:
    # The CRD's rules are at the spec, so their messages name the field.
    says = case.says.removeprefix(case.field.removeprefix("spec.") + " ")
    return any(f.level == "error" and f.field == case.field and says in f.message for f in found)


def test_a_case_fails_without_its_check() -> None:
    cases = list(parsed())
    assert len(cases) >= 60
    fallen: set[str] = set()
    deletions: list[
        tuple[str, Callable[[DPOJobSpec], Iterable[Finding]], Callable[[DPOJobSpec], Iterable[Finding]]]
    ] = []
    for module in MODULES:
        whole = module.check
        deletions += [(f"{module.__name__}:{line}", whole, without_site(module, line)) for line in sites(module)]
    idle = []
    for what, whole, rest in deletions:
        lost = {c.name for c, spec in cases if answered(c, whole(spec)) and not answered(c, rest(spec))}
        fallen |= lost
        if not lost:
            idle.append(what)
    assert idle == [], "checks that no case needs"
    assert {case.name for case, _ in cases} - fallen == set(), "cases that no check answers"
