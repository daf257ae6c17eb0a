"""Wrong manifests meet the real API server and the real operator: each is answered by its own rule, with the fix.

That a rule is the one and only reason is proved by removing rules: a manifest must be admitted by exactly those
variants of the CRD that lack its rule.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest

from dpo_api.crd import custom_resource_definition
from dpo_api.manifest import NAME_MAX
from dpo_testing.controlplane import ControlPlane
from dpo_testing.jobs import Jobs
from dpo_testing.kubeapi import DPOJOBS, Api, ApiError, Object, eventually, path_of
from dpo_testing.manifests import MINIMAL, manifest
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.schema_rules import Schema, SchemaRule, node, without
from dpo_testing.wrong_manifests import (
    ACCEPTANCE,
    ADMISSION,
    CHANGES,
    COMPLETE,
    DRY_RUN,
    SCHEMA,
    Wrong,
)

_CRDS = ("apiextensions.k8s.io/v1", "customresourcedefinitions")
STORED: Object = copy.deepcopy(MINIMAL) | {"metadata": {"name": "stored"}}
"""The DPOJob that the cases of CHANGES try to change."""
ACCEPTED: Object = {"acceptedSpecDigest": "sha256:" + "0" * 64}
"""Its status."""
REFUSED = (*ADMISSION, *CHANGES)


def names(cases: Sequence[Wrong]) -> list[str]:
    return [case.name for case in cases]


def ask(api: Api, resource: tuple[str, str], namespace: str, case: Wrong) -> ApiError | None:
    """Return the API server's refusal of a case, or None if it is admitted. Nothing is stored."""
    dry: Any = {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        if case in CHANGES:
            path, body = path_of(resource, namespace, "stored"), {"spec": case.document}
            api.call("PATCH", path, body, content_type="application/merge-patch+json", **dry)
        else:
            api.call("POST", path_of(resource, namespace), {**case.document, "apiVersion": resource[0]}, **dry)
    except ApiError as error:
        return error
    return None


def at_once[T, R](work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))


@pytest.fixture(scope="module")
def space(cluster: ControlPlane) -> Iterator[str]:
    with cluster.namespace("wrong") as name:
        yield name


# --- answered at admission -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(cluster: ControlPlane, space: str) -> dict[str, ApiError | None]:
    """The API server's answer to every case, by name."""
    cluster.admin.create(DPOJOBS, space, STORED)
    cluster.admin.patch(DPOJOBS, space, "stored", {"status": ACCEPTED}, sub="status")
    given = at_once(lambda case: ask(cluster.admin, DPOJOBS, space, case), REFUSED)
    cluster.admin.delete(DPOJOBS, space, "stored")
    return dict(zip(names(REFUSED), given, strict=True))


_KEY = re.compile(r"\[([^\]]*[^\]\d][^\]]*)\]")
"""A key of a map, as in labels[app], which we write labels.app."""


def causes(error: ApiError) -> list[tuple[str, str]]:
    """Return field and message of everything that an answer calls wrong."""
    if error.reason == "BadRequest":  # strict decoding names unknown fields in one sentence
        return [("", error.message)]
    found = [(_KEY.sub(r".\1", cause["field"]), cause["message"]) for cause in error.causes]
    return [(where, words) for where, words in found if "some validation rules were not checked" not in words]


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_admission_names_the_field_and_the_fix(answers: dict[str, ApiError | None], case: Wrong) -> None:
    error = answers[case.name]
    assert error is not None, "it was admitted"
    found = causes(error)
    assert any(case.says in message for _, message in found), found
    # One mistake, one answer: nothing hides it. (A value of the wrong kind is none of the allowed ones either.)
    assert {where for where, _ in found} in ({case.field}, {""}, {"<nil>"}), found
    assert len(found) == 1 or "type" in str(case.rule), found
    if found[0][0] != case.field:
        assert case.field in found[0][1], found


@pytest.mark.parametrize("status", [None, {"state": "Rejected", "completionTime": "2026-01-01T00:00:00Z"}],
                         ids=["not judged yet", "rejected"])  # fmt: skip
@pytest.mark.parametrize("case", CHANGES, ids=names(CHANGES))
def test_a_job_that_is_not_accepted_can_be_edited(
    cluster: ControlPlane, space: str, case: Wrong, status: Object | None
) -> None:
    name = f"open-{'rejected' if status else 'new'}"
    if cluster.admin.find(DPOJOBS, space, name) is None:
        cluster.admin.create(DPOJOBS, space, STORED | {"metadata": {"name": name}})
        if status is not None:
            cluster.admin.patch(DPOJOBS, space, name, {"status": status}, sub="status")
    body = {"spec": case.document}
    cluster.admin.call(
        "PATCH", path_of(DPOJOBS, space, name), body, content_type="application/merge-patch+json", dryRun="All"
    )


def test_a_job_that_0_1_0_accepted_cannot_be_edited(cluster: ControlPlane, space: str) -> None:
    """Its status has no digest."""
    cluster.admin.create(DPOJOBS, space, STORED | {"metadata": {"name": "former"}})
    cluster.admin.patch(DPOJOBS, space, "former", {"status": {"configMap": "former-spec-1"}}, sub="status")
    for change in ({"dpo": {"beta": 0.2}}, {"storage": None}):
        with pytest.raises(ApiError, match="cannot be changed after acceptance"):
            cluster.admin.patch(DPOJOBS, space, "former", {"spec": change})
    cluster.admin.patch(DPOJOBS, space, "former", {"spec": {"runPolicy": {"maxRestarts": 7}}})


def test_a_job_that_0_1_0_accepted_with_a_field_that_was_removed(cluster: ControlPlane, space: str) -> None:
    """The API server drops the field when it reads the job, which can still be written."""
    name = "dpojobs.dpo-operator.dev"
    place = ("schema", "openAPIV3Schema", "properties", "spec", "properties", "transformerEngine", "properties")

    def serve(field: Object | None) -> None:
        versions = cluster.admin.get(_CRDS, None, name)["spec"]["versions"]
        fields = functools.reduce(lambda part, key: part[key], place, versions[0])
        fields.pop("attention", None)
        fields |= {} if field is None else {"attention": field}
        cluster.admin.patch(_CRDS, None, name, {"spec": {"versions": versions}})

    def engine() -> Object | None:
        found: Object | None = cluster.admin.get(DPOJOBS, space, "older")["spec"].get("transformerEngine")
        return found

    def kept() -> bool:
        if not _made(cluster.admin, space, older):
            return False
        if engine() == {"attention": False}:
            return True
        cluster.admin.delete(DPOJOBS, space, "older")  # the API server did not know the field yet
        return False

    older = manifest({"metadata.name": "older", "spec.transformerEngine": {"attention": False}})
    serve({"type": "boolean"})
    try:
        eventually(kept, seconds=30, what="a CRD with the field")
        cluster.admin.patch(DPOJOBS, space, "older", {"status": {"configMap": "older-spec-1"}}, sub="status")
    finally:
        serve(None)
    eventually(lambda: engine() == {}, seconds=30, what="a CRD without it")
    cluster.admin.patch(DPOJOBS, space, "older", {"status": {"restarts": 1}}, sub="status")
    cluster.admin.patch(DPOJOBS, space, "older", {"spec": {"runPolicy": {"suspend": True}}})
    with pytest.raises(ApiError, match="transformerEngine cannot be changed after acceptance"):
        cluster.admin.patch(DPOJOBS, space, "older", {"spec": {"transformerEngine": None}})
    cluster.admin.delete(DPOJOBS, space, "older")


_SOURCES = [{"uri": f"s3://prefs/{n}", "name": f"source-{n}"} for n in range(64)]


@pytest.mark.parametrize(
    "good",
    [
        manifest(),
        COMPLETE,
        manifest({"metadata.name": "n" * NAME_MAX}),
        manifest({"spec.lora.layers": list(range(512))}),
        manifest({"spec.data.train": _SOURCES, "spec.data.validation": _SOURCES}),
        manifest({"spec.model.huggingFace.uri": "s3://bucket/" + "k" * 1012}),
    ],
    ids=["smallest", "every field", "longest name", "most layers", "most sources", "longest address"],
)
def test_the_good_ones_are_admitted(cluster: ControlPlane, space: str, good: Object) -> None:
    """At their limits too: CEL's rules cost time, and a list within its bounds must not cost too much."""
    case = Wrong("", {**good, "metadata": {"name": good["metadata"]["name"]}}, "", "")
    assert ask(cluster.admin, DPOJOBS, space, case) is None


# --- a rule that is removed ------------------------------------------------------------------------------------------


THIRDS = 3
"""Variants of the CRD that lack a third of the rules each. Further ones lack kinds (a place of any kind has no other
rules either): one those of all fields, and one for each depth those of the mappings and lists there."""


def lacking(rules: Sequence[SchemaRule]) -> dict[SchemaRule, int]:
    """Give each rule the variant that lacks it, another one than its neighbours."""
    thirds = cycle(range(THIRDS))
    return {rule: THIRDS + _depth(rule) if rule.what == "type" else next(thirds) for rule in rules}


def _depth(rule: SchemaRule) -> int:
    return len(rule.path) if node(SCHEMA, rule.path).get("type") in {"object", "array"} else 0


def bare(schema: Any) -> Any:
    """Return a schema without its descriptions."""
    if isinstance(schema, dict):
        return {k: bare(v) for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
    return [bare(item) for item in schema] if isinstance(schema, list) else schema


def variants_crd(schemas: Sequence[Schema]) -> Object:
    """Return one CRD whose versions v0, v1, … have these schemas."""
    made = custom_resource_definition()
    group = "variants.dpo-operator.dev"
    made["metadata"]["name"] = f"dpojobs.{group}"
    made["spec"]["group"] = group
    made["spec"]["names"] = {"kind": "DPOJob", "listKind": "DPOJobList", "plural": "dpojobs", "singular": "dpojob"}
    made["spec"]["versions"] = [
        {"name": f"v{n}", "served": True, "storage": n == 0, "schema": {"openAPIV3Schema": schema}}
        for n, schema in enumerate(schemas)
    ]
    return made


@pytest.mark.nightly  # that each is refused, with its own words, is in `make test`
def test_a_manifest_is_refused_by_its_own_rule_alone(cluster: ControlPlane, space: str) -> None:
    """Admitted by the one variant that lacks its rule, and refused by those that lack others: two rules would show."""
    rules = list(dict.fromkeys(case.rule for case in REFUSED if case.rule is not None))
    lacks = lacking(rules)
    count = 1 + max(lacks.values())
    schema = bare(SCHEMA)
    status = schema["properties"]["status"]
    status["properties"] = {name: status["properties"][name] for name in ("acceptedSpecDigest", "configMap")}
    crd = variants_crd([without(schema, [r for r in rules if lacks[r] == n]) for n in range(count)])
    cluster.admin.create(_CRDS, None, crd)
    try:
        group = crd["spec"]["group"]
        stored = {**STORED, "apiVersion": f"{group}/v0", "status": ACCEPTED}
        eventually(lambda: _made(cluster.admin, space, stored), seconds=60, what="the variants are served")
        tried = [(case, n) for case in REFUSED if case.rule for n in {*range(THIRDS), lacks[case.rule]}]
        admitted: dict[str, set[int]] = {case.name: set() for case in REFUSED}
        reasons: dict[str, str] = {}

        def attempt(pair: tuple[Wrong, int]) -> None:
            case, n = pair
            error = ask(cluster.admin, (f"{group}/v{n}", "dpojobs"), space, case)
            if error is None:
                admitted[case.name].add(n)
            elif case.rule is not None and n == lacks[case.rule]:
                reasons[case.name] = error.message

        at_once(attempt, tried)
        wrong = {
            case.name: (str(case.rule), reasons.get(case.name), admitted[case.name], lacks[case.rule])
            for case in REFUSED
            if case.rule is not None and admitted[case.name] != {lacks[case.rule]}
        }
        assert not wrong, wrong
    finally:
        cluster.admin.delete(_CRDS, None, crd["metadata"]["name"])


def _made(api: Api, namespace: str, body: Object) -> bool:
    try:
        api.create((body["apiVersion"], "dpojobs"), namespace, body)
    except ApiError as error:
        if error.status not in {404, 429, 503}:  # not served yet, or its storage is being made
            raise
        return False
    return True


# --- answered by the operator ----------------------------------------------------------------------------------------

JUDGED = (*ACCEPTANCE, *DRY_RUN)


@pytest.fixture(scope="module")
def judged(cluster: ControlPlane) -> Iterator[dict[str, Object]]:
    """What became of every case that is admitted: its status, by the case's name."""
    with cluster.namespace("judged") as space, OperatorProcess(cluster.kubeconfig, namespaces=space) as operator:
        jobs = Jobs(cluster.admin, space)
        at_once(lambda n: jobs.create({**JUDGED[n].document, "metadata": {"name": f"wrong-{n}"}}), range(len(JUDGED)))

        def states() -> dict[str, Object]:
            return {job["metadata"]["name"]: job.get("status") or {} for job in jobs.api.list(DPOJOBS, space)}

        found = eventually(states, until=lambda all_: all(s.get("state") == "Rejected" for s in all_.values()),
                           seconds=90, what="every wrong DPOJob is rejected")  # fmt: skip
        assert jobs.children() == {}
        assert operator.exceptions() == []
        yield {case.name: found[f"wrong-{n}"] for n, case in enumerate(JUDGED)}


@pytest.mark.parametrize("case", JUDGED, ids=names(JUDGED))
def test_the_operator_says_field_and_fix_in_accepted(judged: dict[str, Object], case: Wrong) -> None:
    told = next(c for c in judged[case.name]["conditions"] if c["type"] == "Accepted")
    assert told["status"] == "False"
    assert f"{case.field}: " in told["message"]
    assert case.says in told["message"].partition(f"{case.field}: ")[2]
    assert told["reason"] == ("ChildInvalid" if case in DRY_RUN else "Rejected")
