"""`dpo-operator --selfcheck`: reports what this operator needs from the cluster and what is missing.

It changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dpo_api.version import VERSION
from dpo_operator.rbac import AUTHENTICATION, RULES, Rule
from dpo_operator.runtime import login
from dpo_operator.runtime.app import way_to_trainers
from dpo_operator.runtime.client import ApiError, Client, Unreachable
from dpo_operator.runtime.options import Options
from dpo_operator.runtime.resources import CHILDREN, JOBS, Resource

LACKS = 1
"""Exit code if something is missing; 0 otherwise."""

OLDEST = (1, 29)
"""Older versions of Kubernetes have no sidecars, and the chart refuses them."""

TIMEOUT_SECONDS = 10.0

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

_FIXES = {
    JOBS: "install the chart with crds.install, or kubectl apply --server-side -f crds/dpojobs.yaml",
    CHILDREN: "install training-operator v1.9.4 (Kubeflow Trainer v2 has no PyTorchJob); jobs wait until then",
}
_RIGHTS_FIX = "set rbac.create in the chart, or grant what python -m dpo_operator.rbac prints"
_PROXY_FIX = "grant it where the operator runs outside the cluster, or set --scrape-by=off"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only ``lacks`` makes the exit code other than 0."""

    level: Literal["ok", "lacks"]
    topic: str
    text: str

    def __str__(self) -> str:
        """Return the line as text."""
        return f"{self.level:<6} {self.topic:<10} {self.text}"


async def selfcheck(options: Options) -> int:
    """Print what is present and what is missing; return the exit code."""
    lacking = 0
    async for finding in findings(options):
        print(finding, flush=True)
        lacking += finding.level == "lacks"
    print(f"selfcheck: {lacking} lacking" if lacking else "selfcheck: all is there", flush=True)
    return LACKS if lacking else 0


async def findings(options: Options) -> AsyncIterator[Finding]:
    """Run all checks in order; if the API server does not answer, skip the rest."""
    login.use(options.kubeconfig)
    try:
        server = login.connection().server
    except login.LoginError as error:
        yield Finding("lacks", "cluster", str(error))
        return
    client = Client(login.connection, timeout=TIMEOUT_SECONDS, user_agent=f"dpo-operator-selfcheck/{VERSION}")
    try:
        for topic, check in _checks(client, str(server), options):
            try:
                for finding in await check:
                    yield finding
            except ApiError as error:
                yield Finding("lacks", topic, f"the API server refused the request: {error}")
            except (Unreachable, OSError, ValueError) as error:  # the latter two: certificates that cannot be used
                fix = "check its address, the certificates and NetworkPolicies"
                yield Finding("lacks", "cluster", f"{server} does not answer ({error}); {fix}")
                return
    finally:
        await client.close()


def _checks(client: Client, server: str, options: Options) -> Iterator[tuple[str, Awaitable[list[Finding]]]]:
    yield "cluster", _version(client, server)
    for resource in (JOBS, CHILDREN):
        yield "kind", _kind(client, resource)
    proxied = way_to_trainers(options) == "api-proxy"
    for namespace in options.namespaces or ("",):
        yield "rights", _rights(client, namespace, [rule for rule in RULES if proxied or not rule.outside_only])
    if options.metrics_auth == "token":
        yield "rights", _rights(client, "", AUTHENTICATION)


async def _version(client: Client, server: str) -> list[Finding]:
    return [version(server, str((await client.request("GET", "/version")).get("gitVersion")))]


def version(server: str, found: str) -> Finding:
    """Check the version of the API server, such as v1.31.2-gke.1."""
    numbers = re.match(r"v?(\d+)\.(\d+)", found)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST:
        least = ".".join(map(str, OLDEST))
        return Finding("lacks", "cluster", f"{server} is Kubernetes {found}; upgrade the cluster to {least} or later")
    return Finding("ok", "cluster", f"{server} is Kubernetes {found}; this is dpo-operator {VERSION}")


async def _kind(client: Client, resource: Resource) -> list[Finding]:
    name = f"{resource.plural} of {resource.group}/{resource.version}"
    served = (await _found(client, resource.api)).get("resources") or []
    if any(kind.get("name") == resource.plural for kind in served):
        return [Finding("ok", "kind", name)]
    versions = (await _found(client, f"/apis/{resource.group}")).get("versions") or []
    others = ", ".join(str(one.get("version")) for one in versions)
    also = f" (it serves {resource.group}/{others})" if others else ""
    return [Finding("lacks", "kind", f"the cluster has no {name}{also}; {_FIXES[resource]}")]


async def _found(client: Client, path: str) -> dict[str, Any]:
    """Return the discovery document of a path; empty if there is none."""
    try:
        answer: dict[str, Any] = await client.request("GET", path)
    except ApiError as error:
        if error.status == 404:
            return {}
        raise
    return answer


async def _rights(client: Client, namespace: str, rules: Iterable[Rule]) -> list[Finding]:
    """Check each permission of a table; ``namespace`` empty: in all namespaces. One line for each missing one."""
    where = namespace or "all namespaces"
    wanted = [(rule, verb) for rule in rules for verb in rule.verbs]
    lacking = [
        Finding("lacks", "rights", f"{where}: cannot {verb} {rule.resource} ({rule.why}); {_fix(rule)}")
        for rule, verb in wanted
        if not await _may(client, namespace, rule.group, rule.resource, verb)
    ]
    return lacking or [Finding("ok", "rights", f"{where}: all {len(wanted)} permissions that the operator needs")]


def _fix(rule: Rule) -> str:
    return _PROXY_FIX if rule.outside_only else _RIGHTS_FIX


async def _may(client: Client, namespace: str, group: str, resource: str, verb: str) -> bool:
    resource, _, subresource = resource.partition("/")
    asked = {"namespace": namespace, "group": group, "resource": resource, "subresource": subresource, "verb": verb}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    return bool((await client.request("POST", _REVIEWS, review))["status"]["allowed"])
