"""The operator's /metrics over HTTPS, for clients with a token and the right to read it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import kopf
import pytest

from dpo_operator import rbac
from dpo_operator.runtime.authentication import ACCESS_REVIEWS, KEPT_SECONDS, TOKEN_REVIEWS, Answer, Gate
from dpo_operator.runtime.client import Client
from dpo_testing.accounts import RBAC, Account, account, may, token
from dpo_testing.chaosproxy import Call, ChaosProxy, Fault
from dpo_testing.controlplane import ControlPlane
from dpo_testing.kubeapi import Object, eventually
from dpo_testing.operatorprocess import OperatorProcess
from dpo_testing.pki import Authority

REVIEWS = ("authorization.k8s.io", "subjectaccessreviews", "create")


@dataclass(frozen=True)
class Guarded:
    """An operator whose metrics need a token, its account, and the tokens of two others."""

    process: OperatorProcess
    who: Account
    reader: str
    stranger: str


@pytest.fixture(scope="module")
def guarded(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The operator as its service account, with the shipped Role and the shipped ClusterRole for reviews alone."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority("metrics-ca")
    ca, _ = authority.pair.write(folder, "ca")
    certificate, key = authority.server("operator", ["127.0.0.1"]).write(folder, "tls")
    with ExitStack() as stack:
        namespace = stack.enter_context(cluster.namespace("metrics"))
        who = account(cluster, namespace, rbac.role(namespace))
        for name in ("reader", "stranger"):
            cluster.admin.create(("v1", "serviceaccounts"), namespace, {"metadata": {"name": name}})
        for kind, body in _cluster_roles(namespace, who):
            cluster.admin.apply((RBAC, kind), None, body)
            stack.callback(cluster.admin.delete, (RBAC, kind), None, body["metadata"]["name"])
        eventually(lambda: may(cluster, who, *REVIEWS), what="the ClusterRole is known")
        process = OperatorProcess(
            who.kubeconfig(cluster), f"--tls-cert-file={certificate}", f"--tls-key-file={key}", "--metrics-auth=token",
            "--scrape-by=off", namespaces=namespace, ca=ca,
        )  # fmt: skip
        tokens = [token(cluster, namespace, name) for name in ("reader", "stranger")]
        yield Guarded(stack.enter_context(process), who, *tokens)
        assert process.exceptions() == []


def _cluster_roles(namespace: str, who: Account) -> list[tuple[str, Object]]:
    """Return the operator's ClusterRole for reviews, and one that lets the account `reader` read /metrics."""
    reviews, reads = f"reviews-{namespace}", f"reads-{namespace}"
    read = rbac.cluster_role(name=reads) | {"rules": [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]}
    return [
        ("clusterroles", rbac.cluster_role(name=reviews, rules=rbac.AUTHENTICATION)),
        ("clusterrolebindings", rbac.binding(None, account=who.name, account_namespace=namespace, name=reviews)),
        ("clusterroles", read),
        ("clusterrolebindings", rbac.binding(None, account="reader", account_namespace=namespace, name=reads)),
    ]


def test_only_a_token_with_the_right_gets_the_metrics(guarded: Guarded) -> None:
    get = guarded.process.get
    code, text = get("/metrics", token=guarded.reader)
    assert code == 200
    assert "dpo_operator_synced 1.0" in text
    assert get("/metrics") == (401, "send a service account's token: Authorization: Bearer TOKEN\n")
    assert get("/metrics", token="eyJhbGciOiJub25lIn0.e30.") == (401, "the token is not valid\n")
    code, text = get("/metrics", token=guarded.stranger)
    assert code == 403
    assert f"system:serviceaccount:{guarded.who.namespace}:stranger cannot get the nonResourceURL /metrics" in text


def test_probes_need_no_token(guarded: Guarded) -> None:
    assert guarded.process.get("/healthz") == (200, "ok\n")
    assert guarded.process.get("/readyz") == (200, "ok\n")


def test_plain_http_gets_nothing(guarded: Guarded) -> None:
    script = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
    url = f"http://127.0.0.1:{guarded.process.port}/healthz"
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "200" not in done.stderr


def test_the_selfcheck_asks_for_the_rights_to_review(cluster: ControlPlane, guarded: Guarded) -> None:
    def lines(who: Account) -> list[str]:
        command = [
            sys.executable, "-m", "dpo_operator", "--selfcheck", f"--kubeconfig={who.kubeconfig(cluster)}",
            f"--namespaces={who.namespace}", "--scrape-by=off", "--metrics-auth=token", "--tls-cert-file=x",
            "--tls-key-file=y",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return [line for line in done.stdout.splitlines() if line.startswith("lacks")]

    assert lines(guarded.who) == []
    other = account(cluster, guarded.who.namespace, rbac.role(guarded.who.namespace, name="bare"), name="bare")
    eventually(lambda: may(cluster, other, "", "events", "list"), what="the role is known")
    lacking = lines(other)
    assert len(lacking) == 2
    assert all("cannot create" in line for line in lacking)
    assert "tokenreviews" in lacking[0]


def test_an_answer_is_kept_for_a_minute_and_a_failure_is_not(cluster: ControlPlane, guarded: Guarded) -> None:
    asked: list[str] = []
    fault: list[Fault] = []

    def rule(call: Call) -> Fault | None:
        if call.path in (TOKEN_REVIEWS, ACCESS_REVIEWS):
            asked.append(call.path)
            return fault[0] if fault else None
        return None

    async def play() -> None:
        client = Client(lambda: kopf.ConnectionInfo(server=proxy.url), user_agent="tests")
        now = 0.0
        gate = Gate(client, clock=lambda: now)
        header = f"Bearer {guarded.reader}"
        try:
            assert await gate.refuses(header, "/metrics") is None
            assert await gate.refuses(header, "/metrics") is None
            assert asked == [TOKEN_REVIEWS, ACCESS_REVIEWS]
            now = KEPT_SECONDS
            fault.append(Fault(status=503))
            refused = await gate.refuses(header, "/metrics")
            assert isinstance(refused, Answer)
            assert (refused.status, "the API server cannot check" in refused.text) == (503, True)
            fault.clear()
            assert await gate.refuses(header, "/metrics") is None
            # Another token is another client.
            other = await gate.refuses(f"Bearer {guarded.stranger}", "/metrics")
            assert other is not None
            assert other.status == 403
        finally:
            await client.close()

    with ChaosProxy(cluster.url, cluster.tls()) as proxy:
        proxy.rules[:] = [rule]
        asyncio.run(play())
