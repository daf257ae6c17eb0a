"""The rendered chart, compared with the code that depends on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_api.pods import Toleration
from dpo_api.version import VERSION
from dpo_operator import labels, rbac
from dpo_operator.backend import initcontainer, pod
from dpo_operator.backend.network import build_network_policy
from dpo_operator.backend.pytorchjob import Identity
from dpo_operator.config import Settings
from dpo_operator.runtime.options import Options, parse
from dpo_operator.runtime.trust import CA, TOKEN
from dpo_testing.chart import (
    CHART,
    COMBINATIONS,
    MONITORING,
    NAMESPACE,
    RELEASE,
    REPOSITORY,
    environment,
    is_test,
    pick,
    render,
)
from dpo_testing.kubeapi import Object
from dpo_testing.networkpolicies import Peer, allows, matches


def kinds(objects: list[Object], *, tests: bool = False) -> set[str]:
    return {thing["kind"] for thing in objects if is_test(thing) == tests}


# -- the operator's pod -----------------------------------------------------------------------------------------------


def test_the_operator_reads_its_environment_as_it_is_meant(home: Path) -> None:
    """Defaults are the operator's own, except for what an installation decides."""
    deployment = pick(render(home=home), "Deployment")
    options, settings = parse([], environment(deployment))
    assert options == Options()
    monitoring = ["monitoring", "openshift-user-workload-monitoring", "gmp-system"]
    named = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": monitoring}
    assert settings == Settings(
        trainer_image="ghcr.io/dpo-operator/dpo-trainer:" + VERSION,
        labels=(("sidecar.istio.io/inject", "false"),),
        default_ttl_seconds_after_finished=30 * 24 * 3600,
        operator_namespace=NAMESPACE,
        operator_labels=tuple(sorted(deployment["spec"]["selector"]["matchLabels"].items())),
        metrics_from=({"namespaceSelector": {"matchExpressions": [named]}},),
    )


def test_every_value_reaches_the_operator(home: Path) -> None:
    values = {**COMBINATIONS["everything"], "watchNamespaces": ["b", "a"]}
    variables = environment(pick(render(values, home=home), "Deployment"))
    del variables["DPO_OPERATOR_TRAINER_POD_PATCH"]  # a file of the pod: see the test of it
    options, settings = parse([], variables)
    assert options.namespaces == ("a", "b")
    assert (options.workers, options.scrape_seconds, options.scrape_by) == (64, 1.5, "pod-ip")
    assert (options.log_format, options.log_level) == ("text", "debug")
    assert settings.default_queue == "all"
    assert settings.trainer_image_pull_secrets == ("pull-trainer", "pull-more")
    assert dict(settings.labels)["linkerd.io/inject"] == "disabled"
    assert dict(settings.extra_env) == {
        "AWS_DEFAULT_REGION": "eu-1",
        "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
        "AWS_REGION": "eu-1",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_TIMEOUT": "22",
    }
    assert dict(settings.trainer_annotations) == {"karpenter.sh/do-not-disrupt": "true", "note": 'a="b", c=d'}
    assert dict(settings.trainer_node_selector) == {"gpu": "h100"}
    assert settings.trainer_tolerations == (Toleration(key="gpu", operator="Exists", toleration_seconds=300),)
    assert (settings.trainer_runtime_class, settings.trainer_priority_class) == ("nvidia", "low")
    assert settings.default_ttl_seconds_after_finished == 3600


def test_the_pod_patch_is_the_file_that_the_operator_reads(home: Path, tmp_path: Path) -> None:
    """An operator reads it at its start, so another patch must replace the pod."""
    hashes: set[str] = set()
    for user in (0, 1_000_650_000):
        patch = {"spec": {"securityContext": {"runAsUser": user, "runAsNonRoot": False}}}
        objects = render({"trainer": {"podPatch": patch}, "podAnnotations": {"a": "b"}}, home=home)
        template = pick(objects, "Deployment")["spec"]["template"]
        (container,) = template["spec"]["containers"]
        source = {v["name"]: v for v in template["spec"]["volumes"]}["pod-patch"]["configMap"]["name"]
        (folder,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "pod-patch")
        ((name, text),) = pick(objects, "ConfigMap", source)["data"].items()
        variables = environment(pick(objects, "Deployment"))
        assert variables["DPO_OPERATOR_TRAINER_POD_PATCH"] == f"{folder}/{name}"
        file = tmp_path / name
        file.write_text(text)
        _, settings = parse([], {**variables, "DPO_OPERATOR_TRAINER_POD_PATCH": str(file)})
        assert settings.trainer_pod_patch == patch
        assert template["metadata"]["annotations"].pop("a") == "b"
        hashes.add(*template["metadata"]["annotations"].values())
    assert len(hashes) == 2


def test_the_pod_patches_of_the_examples_pass_through_the_chart(home: Path) -> None:
    for path in sorted((REPOSITORY / "examples" / "pod-patches").glob("*.yaml")):
        patch = yaml.safe_load(path.read_text())
        made = pick(render({"trainer": {"podPatch": patch}}, home=home), "ConfigMap", "-pod-patch")
        assert yaml.safe_load(made["data"]["pod-patch.yaml"]) == patch, path.name


@pytest.mark.parametrize(("value", "seconds"), [(None, None), (0, 0), (31_536_000, 31_536_000)])
def test_finished_jobs_are_kept_as_long_as_the_chart_says(home: Path, value: int | None, seconds: int | None) -> None:
    objects = render({"defaults": {"ttlSecondsAfterFinished": value}}, home=home)
    _, settings = parse([], environment(pick(objects, "Deployment")))
    assert settings.default_ttl_seconds_after_finished == seconds


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({"repository": "r.example.com:5000/a"}, f"r.example.com:5000/a:{VERSION}"),
        ({"repository": "a", "tag": "1"}, "a:1"),
        ({"repository": "a", "tag": "1", "digest": "sha256:" + "a" * 64}, "a@sha256:" + "a" * 64),
    ],
)
def test_references_to_images(home: Path, image: Object, reference: str) -> None:
    objects = render({"image": image, "trainer": {"image": image}}, home=home)
    deployment = pick(objects, "Deployment")
    assert environment(deployment)["DPO_OPERATOR_TRAINER_IMAGE"] == reference
    used = {c["image"] for o in (deployment["spec"]["template"], *pods(objects)) for c in o["spec"]["containers"]}
    assert used == {reference}


def pods(objects: list[Object]) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == "Pod"]


def test_one_replica_that_leaves_a_lost_node_soon(home: Path) -> None:
    spec = pick(render(home=home), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    left = {t["key"]: t["tolerationSeconds"] for t in spec["template"]["spec"]["tolerations"]}
    assert left == dict.fromkeys(pod.NODE_FAILURE_TAINTS, 30)


def test_probes_ask_what_the_operator_answers(home: Path) -> None:
    container = pick(render(home=home), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness", "startup")}
    assert paths == {"readiness": "/readyz", "liveness": "/healthz", "startup": "/healthz"}
    server = (REPOSITORY / "operator" / "dpo_operator" / "runtime" / "server.py").read_text()
    assert all(f'"{path}"' in server for path in paths.values())


@pytest.mark.parametrize("name", COMBINATIONS)
def test_service_and_policies_select_the_operator_and_not_the_tests(home: Path, name: str) -> None:
    objects = render(COMBINATIONS[name], home=home)
    operator = pick(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    own = [o["spec"]["selector"] for o in objects if o["kind"] in {"Deployment", "PodDisruptionBudget"}]
    own += [{"matchLabels": o["spec"]["selector"]} for o in objects if o["kind"] == "Service"]
    own += [o["spec"]["podSelector"] for o in objects if o["kind"] == "NetworkPolicy"]
    for selector in own:
        assert matches(selector, operator)
        assert not any(matches(selector, thing["metadata"]["labels"]) for thing in pods(objects))


# -- rights -----------------------------------------------------------------------------------------------------------


def test_rights_of_all_namespaces_are_the_table(home: Path) -> None:
    objects = [thing for thing in render(home=home) if not is_test(thing)]
    assert "Role" not in kinds(objects)
    assert pick(objects, "ClusterRole", RELEASE)["rules"] == rbac.policy_rules()
    _check_binding(
        pick(objects, "ClusterRoleBinding"), rbac.binding(None, account=RELEASE, account_namespace=NAMESPACE)
    )


def test_rights_of_some_namespaces_are_the_table_in_each(home: Path) -> None:
    objects = [thing for thing in render(COMBINATIONS["some namespaces"], home=home) if not is_test(thing)]
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds(objects)
    for kind in ("Role", "RoleBinding"):
        found = {thing["metadata"]["namespace"]: thing for thing in objects if thing["kind"] == kind}
        assert set(found) == {"team-a", "team-b"}
        for namespace, thing in found.items():
            if kind == "Role":
                assert thing["rules"] == rbac.policy_rules()
            else:
                _check_binding(thing, rbac.binding(namespace, account=RELEASE, account_namespace=NAMESPACE))


def _check_binding(found: Object, wanted: Object) -> None:
    assert {key: found[key] for key in ("kind", "roleRef", "subjects")} == {
        key: wanted[key] for key in ("kind", "roleRef", "subjects")
    }


def test_people_get_their_rights_through_view_edit_and_admin(home: Path) -> None:
    objects = render(home=home)
    levels: dict[str, set[str]] = {}
    for name in ("dpojob-view", "dpojob-edit"):
        role = pick(objects, "ClusterRole", name)
        prefix = "rbac.authorization.k8s.io/aggregate-to-"
        levels[name] = {label.removeprefix(prefix) for label in role["metadata"]["labels"] if label.startswith(prefix)}
        assert {group for rule in role["rules"] for group in rule["apiGroups"]} == {"dpo-operator.dev"}
    assert levels == {"dpojob-view": {"view", "edit", "admin"}, "dpojob-edit": {"edit", "admin"}}
    reading = {"get", "list", "watch"}
    view = pick(objects, "ClusterRole", "dpojob-view")["rules"]
    assert {verb for rule in view for verb in rule["verbs"]} == reading
    # A user who has only this role can see what they edit.
    (edit,) = pick(objects, "ClusterRole", "dpojob-edit")["rules"]
    assert edit["resources"] == ["dpojobs"], "the status is the operator's to write"
    assert set(edit["verbs"]) == reading | {"create", "update", "patch", "delete", "deletecollection"}


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_the_definition_is_ours_and_kept_if_asked(home: Path, keep: bool) -> None:
    found = pick(render({"crds": {"keep": keep}}, home=home), "CustomResourceDefinition")
    annotations = found["metadata"].pop("annotations", {})
    assert annotations == ({"helm.sh/resource-policy": "keep"} if keep else {})
    del found["metadata"]["labels"]
    assert found == yaml.safe_load((REPOSITORY / "crds" / "dpojobs.yaml").read_text())


# -- monitoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "apis", "made"),
    [("auto", MONITORING, True), ("auto", (), False), ("always", (), True), ("never", MONITORING, False)],
)
def test_monitors_where_the_cluster_knows_them(home: Path, way: str, apis: tuple[str, ...], made: bool) -> None:
    found = kinds(render({"monitoring": {"enabled": way}}, home=home, apis=apis))
    assert ({"PodMonitor", "ServiceMonitor", "PrometheusRule"} <= found) is made
    assert made or not {"PodMonitor", "ServiceMonitor", "PrometheusRule"} & found


def test_trainers_are_scraped_where_they_serve_and_named_by_their_labels(home: Path) -> None:
    monitor = pick(render(home=home), "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == pod.METRICS_PORT
    assert monitor["selector"]["matchExpressions"] == [{"key": labels.JOB, "operator": "Exists"}]
    assert monitor["namespaceSelector"] == {"any": True}
    discovered = {
        f"__meta_kubernetes_pod_label_{label.replace('.', '_').replace('/', '_').replace('-', '_')}": series
        for label, series in ((labels.JOB, "dpojob"), (labels.ATTEMPT, "attempt"))
    }
    assert {r["sourceLabels"][0]: r["targetLabel"] for r in endpoint["relabelings"]} == discovered
    assert "honorLabels" not in endpoint, "what a trainer says of itself is its user's code speaking"


def test_trainers_with_a_certificate_are_scraped_with_the_token_and_the_others_without(home: Path) -> None:
    values = {"trainer": {"metrics": {"secret": "tm", "serverName": "trainer.example"}}}
    objects = render(values, home=home)
    plain, secured = pick(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    (usual,) = pick(render(home=home), "PodMonitor")["spec"]["podMetricsEndpoints"]
    choice = {"sourceLabels": ["__meta_kubernetes_pod_label_dpo_operator_dev_metrics"], "regex": labels.HTTPS}
    assert labels.METRICS == "dpo-operator.dev/metrics"
    assert plain == usual | {"relabelings": [{"action": "drop", **choice}, *usual["relabelings"]]}
    assert secured == usual | {
        "scheme": "https",
        "tlsConfig": {"serverName": "trainer.example", "ca": {"secret": {"name": "tm", "key": "ca.crt"}}},
        "authorization": {"credentials": {"name": "tm", "key": "token"}},
        "relabelings": [{"action": "keep", **choice}, *usual["relabelings"]],
    }


def test_the_operator_gets_its_own_part_of_the_trainers_secret(home: Path) -> None:
    values = {"trainer": {"metrics": {"secret": "tm", "serverName": "trainer.example"}}}
    deployment = pick(render(values, home=home), "Deployment")
    options, settings = parse([], environment(deployment))
    assert (settings.trainer_metrics_secret, options.trainer_metrics_server_name) == ("tm", "trainer.example")
    spec = deployment["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "trainer-metrics"]
    keys = [{"key": key, "path": key} for key in (CA, TOKEN)]
    assert volume["secret"] == {"secretName": "tm", "items": keys}, "not the private key"
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "trainer-metrics"]
    assert (mount["mountPath"], mount["readOnly"]) == (options.trainer_metrics_folder, True)


def test_the_operators_series_keep_their_namespace(home: Path) -> None:
    objects = render(COMBINATIONS["everything"], home=home)
    monitor = pick(objects, "ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["honorLabels"] is True
    service = pick(objects, "Service")
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
    assert service["spec"]["ports"][0]["name"] == monitor["spec"]["endpoints"][0]["port"]
    for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule"):
        assert pick(objects, kind)["metadata"]["labels"]["release"] == "kps"


def test_rules_and_dashboards_are_what_was_generated(home: Path) -> None:
    objects = render({"dashboards": {"label": "dash", "labelValue": "yes", "namespace": "g"}}, home=home)
    assert pick(objects, "PrometheusRule")["spec"] == yaml.safe_load((CHART / "rules" / "alerts.yaml").read_text())
    boards = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
    assert len(boards) == 2
    found = [o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["labels"].get("dash") == "yes"]
    assert {o["metadata"]["namespace"] for o in found} == {"g"}
    assert {name: json.loads(text) for o in found for name, text in o["data"].items()} == boards


def _rules(home: Path, alerts: Object) -> dict[str, Object]:
    rendered = pick(render({"monitoring": {"rules": {"alerts": alerts}}}, home=home), "PrometheusRule")
    (group,) = rendered["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_alerts_can_be_switched_off_and_their_thresholds_set(home: Path) -> None:
    before = _rules(home, {})
    changed = _rules(
        home,
        {
            "DPOJobRejected": {"enabled": False},
            "DPOTrainingStalled": {"severity": "warning", "for": "15m", "seconds": 1_000_000},
            "DPOAccuracyNotRising": {"accuracy": 0.6},
            "DPOJobRestartLoop": {"attempts": 5},
        },
    )
    assert set(before) - set(changed) == {"DPOJobRejected"}
    stalled = changed["DPOTrainingStalled"]
    assert (stalled["labels"], stalled["for"]) == ({"severity": "warning"}, "15m")
    assert stalled["expr"] == before["DPOTrainingStalled"]["expr"].replace("> 1800", "> 1000000")
    assert " <= 0.6\n" in changed["DPOAccuracyNotRising"]["expr"]
    assert ">= 100" in changed["DPOAccuracyNotRising"]["expr"], "a threshold that is not set keeps its default"
    assert "at most 0.6" in changed["DPOAccuracyNotRising"]["annotations"]["description"]
    assert changed["DPOJobRestartLoop"]["expr"].endswith(">= 5")
    for name in set(before) - {"DPOJobRejected", "DPOTrainingStalled", "DPOAccuracyNotRising", "DPOJobRestartLoop"}:
        assert changed[name] == before[name]


# -- networks ---------------------------------------------------------------------------------------------------------


def test_network_policies_let_through_what_the_code_uses(home: Path) -> None:
    objects = render(COMBINATIONS["everything"], home=home)
    operator = pick(objects, "NetworkPolicy", RELEASE)["spec"]
    port = Settings().trainer_port
    out = [port_["port"] for rule in operator["egress"] for port_ in rule["ports"]]
    assert sorted(set(out)) == [53, 443, 6443, port]
    assert operator["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_policy_of_a_job_lets_this_operator_and_prometheus_in(home: Path, name: str) -> None:
    objects = render(COMBINATIONS[name], home=home)
    deployment = pick(objects, "Deployment")
    variables = environment(deployment)
    variables.pop("DPO_OPERATOR_TRAINER_POD_PATCH", None)  # a file in the operator's pod
    _, settings = parse([], variables)
    job = Identity(name="job", namespace="team-a", uid="uid")
    policies, pod_labels = [build_network_policy(job, settings)], labels.of_attempt("job", "uid", 1)
    port = settings.trainer_port
    operator = deployment["spec"]["template"]["metadata"]["labels"]
    assert allows(policies, "team-a", pod_labels, Peer(NAMESPACE, operator), port)
    assert not allows(policies, "team-a", pod_labels, Peer(NAMESPACE, operator), settings.rendezvous_port)
    assert not allows(policies, "team-a", pod_labels, Peer("default", operator), port)
    for thing in pods(objects):  # those of helm test
        assert not allows(policies, "team-a", pod_labels, Peer(NAMESPACE, thing["metadata"]["labels"]), port)
    assert allows(policies, "team-a", pod_labels, Peer("monitoring", {"app": "prom"}), port)


def test_policies_of_jobs_can_be_switched_off(home: Path) -> None:
    objects = render({"networkPolicy": {"trainer": {"enabled": False}}}, home=home)
    assert parse([], environment(pick(objects, "Deployment")))[1].network_policies is False


# -- what limits the operator, and who may read its metrics ------------------------------------------------------------

ADMISSION = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"


@pytest.mark.parametrize(
    ("way", "apis", "made"),
    [("auto", (ADMISSION,), True), ("auto", (), False), ("always", (), True), ("never", (ADMISSION,), False)],
)
def test_admission_policies_where_the_cluster_knows_them(
    home: Path, way: str, apis: tuple[str, ...], made: bool
) -> None:
    objects = render({"admissionPolicy": {"enabled": way}}, home=home, apis=apis)
    policies = {thing["metadata"]["name"] for thing in objects if thing["kind"] == "ValidatingAdmissionPolicy"}
    bound = {t["spec"]["policyName"] for t in objects if t["kind"] == "ValidatingAdmissionPolicyBinding"}
    assert policies == bound
    assert bool(policies) is made


@pytest.mark.parametrize("name", COMBINATIONS)
def test_admission_policies_are_about_the_operators_account(home: Path, name: str) -> None:
    objects = render({**COMBINATIONS[name], "admissionPolicy": {"enabled": "always"}}, home=home)
    account = pick(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    policies = [thing for thing in objects if thing["kind"] == "ValidatingAdmissionPolicy"]
    assert len(policies) == 2
    for policy in policies:
        assert policy["metadata"]["name"].endswith((f".{NAMESPACE}-owners", f".{NAMESPACE}-pods")), "one per release"
        (condition,) = policy["spec"]["matchConditions"]
        assert condition["expression"] == f'request.userInfo.username == "{user}"'


def test_the_metrics_are_open_unless_asked_otherwise(home: Path) -> None:
    objects = render(home=home)
    assert not [thing for thing in objects if "authentication" in thing["metadata"]["name"]]
    (endpoint,) = pick(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "honorLabels"}


def test_metrics_with_tls_and_tokens(home: Path) -> None:
    objects = render({"metrics": {"tls": {"secretName": "tls"}, "authentication": {"enabled": True}}}, home=home)
    deployment = pick(objects, "Deployment")
    options, _ = parse([], environment(deployment))
    assert options.metrics_auth == "token"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "tls"]
    assert {options.tls_cert_file, options.tls_key_file} == {
        f"{mount['mountPath']}/tls.{end}" for end in ("crt", "key")
    }
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["tls"]["secret"] == {"secretName": "tls"}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("readiness", "liveness", "startup")]
    assert [probe["scheme"] for probe in probes] == ["HTTPS"] * 3
    (endpoint,) = pick(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    service = pick(objects, "Service")["metadata"]
    assert endpoint["tlsConfig"] == {
        "serverName": f"{service['name']}.{service['namespace']}.svc",
        "ca": {"secret": {"name": "tls", "key": "ca.crt"}},
    }
    assert endpoint["bearerTokenFile"] == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    role = pick(objects, "ClusterRole", f"-authentication.{NAMESPACE}")
    assert role["rules"] == rbac.policy_rules(rules=rbac.AUTHENTICATION)
    reader = pick(objects, "ClusterRole", f"-metrics.{NAMESPACE}")
    assert reader["rules"] == [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]


def test_prometheus_token_may_come_from_a_secret(home: Path) -> None:
    token = {"name": "prometheus", "key": "token"}
    metrics = {"tls": {"secretName": "tls", "caKey": ""}, "authentication": {"enabled": True, "tokenSecret": token}}
    (endpoint,) = pick(render({"metrics": metrics}, home=home), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": token}
    assert "bearerTokenFile" not in endpoint
    assert "ca" not in endpoint["tlsConfig"]


# -- what is off, and the rest ----------------------------------------------------------------------------------------

ALWAYS = {"ConfigMap", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment", "Service"}


def test_what_is_made_by_default(home: Path) -> None:
    assert kinds(render(home=home, apis=())) == ALWAYS | {"ServiceAccount"}
    assert kinds(render(COMBINATIONS["little"], home=home)) == {"Deployment"}
    assert {"NetworkPolicy", "PodDisruptionBudget", "PriorityClass"} <= kinds(
        render(COMBINATIONS["everything"], home=home)
    )


def test_the_init_containers_template_is_the_documented_one(home: Path) -> None:
    found = pick(render(COMBINATIONS["everything"], home=home), "ConfigMap", "training-operator-init-container")
    assert found["metadata"]["namespace"] == "kubeflow"
    assert found["data"] == {"initContainer.yaml": initcontainer.TEMPLATE}


@pytest.mark.parametrize("user", [1000650000, None])
def test_the_init_containers_user_may_be_the_clusters_to_choose(home: Path, user: int | None) -> None:
    def contexts(text: str) -> list[Object]:
        return [container["securityContext"] for container in yaml.safe_load(re.sub(r"\{\{\.\w+\}\}", "1", text))]

    values = {"trainingOperator": {"initContainer": {"create": True, "runAsUser": user}}}
    found = pick(render(values, home=home), "ConfigMap", "training-operator-init-container")
    (documented,) = contexts(initcontainer.TEMPLATE)
    assert documented.pop("runAsUser") == 65534
    assert documented["runAsNonRoot"] is True
    assert contexts(found["data"]["initContainer.yaml"]) == [documented | ({} if user is None else {"runAsUser": user})]


def test_the_priority_class_is_the_operators(home: Path) -> None:
    objects = render(COMBINATIONS["everything"], home=home)
    made: Any = pick(objects, "PriorityClass")["metadata"]["name"]
    assert pick(objects, "Deployment")["spec"]["template"]["spec"]["priorityClassName"] == made
    given = render({"priorityClassName": "system-cluster-critical"}, home=home)
    assert pick(given, "Deployment")["spec"]["template"]["spec"]["priorityClassName"] == "system-cluster-critical"
