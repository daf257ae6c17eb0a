"""Wrong manifests: what is changed in a good one, the one rule that refuses it, and the words of the answer.

``ADMISSION``: refused by the API server, each by a single rule of the CRD. ``CHANGES``: refused changes of a stored
DPOJob. ``ACCEPTANCE``: answered by the operator in the condition Accepted.
``DRY_RUN``: admitted, and answered there in the API server's words about the child.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from dpo_api.crd import custom_resource_definition
from dpo_api.loss import Loss
from dpo_api.manifest import load_documents
from dpo_testing.doubtful_specs import CASES as DOUBTFUL
from dpo_testing.manifests import manifest
from dpo_testing.schema_rules import Path, Schema, SchemaRule, broken, node, rules

Object = dict[str, Any]

_GOLDEN = File(__file__).resolve().parents[2] / "golden" / "api"
SCHEMA: Schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
COMPLETE: Object = load_documents(_GOLDEN / "v1alpha1" / "complete.yaml")[0].value
_OTHERS: list[Object] = [document.value for document in load_documents(_GOLDEN / "v1alpha1" / "other-forms.yaml")]


@dataclass(frozen=True)
class Wrong:
    """One wrong manifest."""

    name: str
    document: Object
    """The manifest; of ``CHANGES``, what is merged into the stored spec."""
    field: str
    """The field that the answer names."""
    says: str
    """What the answer says of it: the fix, or the bound that it must keep to."""
    rule: SchemaRule | None = None
    """The rule of the CRD that refuses it; None where the operator does."""


# --- answered at admission -------------------------------------------------------------------------------------------


def words(rule: SchemaRule) -> str:
    """Return what the API server says of a broken rule: its bound, its words, or the rule's own message."""
    place = node(SCHEMA, rule.path)
    keyword, _, rest = rule.what.partition(":")
    limit: Any = place.get(keyword)
    if keyword.startswith("cel"):
        return rest
    match keyword:
        case "required":
            return "Required value"
        case "closed":
            return "unknown field"
        case "type":
            kinds = {"x": "must be of type integer,string"} if "type" not in place else {}
            return kinds.get("x", f"must be of type {place.get('type')}")
        case "enum":
            return f'supported values: "{limit[0]}"'
        case "minimum":
            return "should be greater than " + ("" if place.get("exclusiveMinimum") else "or equal to ")
        case "maximum":
            return "should be less than " + ("" if place.get("exclusiveMaximum") else "or equal to ")
        case "minLength":
            return f"should be at least {limit} chars long"
        case "minItems":
            return f"should have at least {limit} items"
        case "maxLength":
            return f"may not be more than {limit} bytes"
        case _:
            return f"must have at most {limit} items"


def _golden_cases() -> Iterator[Wrong]:
    """The cases by which dpo_api is tested, for which the API server answers too."""
    cases: list[Object] = load_documents(_GOLDEN / "refused.yaml")[0].value
    for case in cases:
        if case["at"] == "accept":
            continue
        document = manifest(case.get("set"), case.get("unset", ()))
        found = list(broken(SCHEMA, document))
        if case["at"] in {"rule", "cluster-rule"}:
            found = [rule for rule in CEL if case["says"] in rule.what and _at(rule, case["field"])]
        if len(found) != 1:
            raise ValueError(f"{case['name']}: breaks {[str(rule) for rule in found]}, not one rule")
        rule = found[0]
        if rule.what == "minLength" and _VALIDATIONS in node(SCHEMA, rule.path):
            continue  # the rule of the field's form refuses it too
        if case["name"] in {"name with a capital", "name ends with a dash"}:
            continue  # Kubernetes' own rule for names refuses them too
        blamed = case["field"]
        yield Wrong(case["name"], document, blamed, words(rule), rule)


def _at(rule: SchemaRule, blamed: str) -> bool:
    """Whether a CEL rule blames a field: its place, or the field inside it."""
    inside = rule.what.partition(":")[0].removeprefix("cel")
    return pattern(dotted(rule.path) + inside) == pattern(blamed) or (rule.path == () and blamed == "metadata.name")


def dotted(path: Path) -> str:
    """Write a schema path as users would, with [0] for the items of a list: spec.data.train[0].uri."""
    return ".".join(path).replace(".[]", "[0]")


def pattern(name: str) -> str:
    """Write a field's name so that keys of maps and indices do not tell two apart."""
    parts = name.replace("[0]", "[]").replace("[1]", "[]").split(".")
    for index in range(len(parts) - 1):
        if parts[index] in {"labels", "annotations", "nodeSelector", "extended"}:
            return ".".join([*parts[: index + 1], "*"])
    return ".".join(parts)


RULES: tuple[SchemaRule, ...] = tuple(rule for rule in rules(SCHEMA) if rule.path[:1] != ("status",))
CEL = [rule for rule in RULES if rule.what.startswith("cel") and "cannot be changed" not in rule.what]

_TYPO = "unknwon"
_VALIDATIONS = "x-kubernetes-validations"

_URI = "s3://bucket/" + "k" * 1013
_TOO_LONG: dict[str, Any] = {
    "uri": _URI, "cacheURI": _URI, "architectureURI": _URI, "endpoint": "https://" + "x" * 505,
    "baseURL": "https://" + "x" * 505, "trackingURI": "https://" + "x" * 505, "mountPath": "/" + "m" * 1024,
    "validationInterval": "1." + "1" * 14 + "%", "limitTrainBatches": "1." + "1" * 14 + "%",
    "limitValidationBatches": "1." + "1" * 14 + "%", "gpuResource": "x" * 64 + "/" + "y" * 253,
}  # fmt: skip
"""Values one character too long that keep to every other rule of their field."""


_MIXED = [loss for loss in Loss if loss.row.needs_reference and loss is not Loss.EXO_PAIR]
"""Losses that can be parts of one mixture without a field of their own."""

NEVER_ALONE = {
    # Above learningRate's own maximum, and so above learningRate.
    SchemaRule(("spec", "training", "schedule", "minLearningRate"), "maximum"),
    # Four of three formats: one appears twice.
    SchemaRule(("spec", "output", "formats"), "maxItems"),
    # The pattern limits each of the two parts, and so their sum.
    SchemaRule(("spec", "output", "hub", "repository"), "maxLength"),
}
"""Rules that never refuse anything that no other rule does."""


def _reversed() -> Object:
    """COMPLETE, where the second items of lists come first."""
    document = copy.deepcopy(COMPLETE)
    for name in ("tolerations", "env"):
        document["spec"]["podTemplate"][name].reverse()
    return document


_BASES = (COMPLETE, _reversed(), *_OTHERS)


def _limit_cases(taken: set[SchemaRule]) -> Iterator[Wrong]:
    """One step beyond each limit, and a value of the wrong kind for each field, in a manifest with every field."""
    for rule in RULES:
        once = rule not in taken and rule.path[:1] == ("spec",) and not is_repeated(rule.path)
        base = next((base for base in _BASES if once and _there(base, rule)), None)
        if base is None:
            continue
        keyword = rule.what.partition(":")[0]
        document = copy.deepcopy(base)
        document["spec"].pop("runPolicy", None) if rule.path[1:2] != ("runPolicy",) else None
        document["metadata"] = {"name": "job"}
        document["spec"].setdefault("resources", {}).setdefault("gpusPerNode", 8)
        document["spec"].setdefault("checkpoint", {}).setdefault("uri", "s3://runs/job/")
        if rule in NEVER_ALONE or not _break(document, rule, keyword):
            continue
        if list(broken(SCHEMA, document)) != ([] if keyword == "cel" else [rule]):
            raise ValueError(f"{rule}: breaks {[str(r) for r in broken(SCHEMA, document)]}")
        name = _named(rule.path, document)
        name += {"required": "." + rule.what.partition(":")[2], "closed": f".{_TYPO}"}.get(keyword, "")
        yield Wrong(f"{dotted(rule.path)} {rule.what}", document, name, words(rule), rule)


def is_repeated(path: Path) -> bool:
    """Whether a place is another of a class that is tested elsewhere, as data.train[].storage is by spec.storage."""
    return "storage" in path[2:] or ("secretRef" in path and "caBundle" in path)


def _there(base: Object, rule: SchemaRule) -> bool:
    value: Any = base
    for step in rule.path:
        if step == "*":
            value = next(iter(value.values())) if value else None
        elif step == "[]":
            value = value[0] if value else None
        else:
            value = value.get(step)
        if value is None:
            return False
    return True


def _named(path: Path, document: Object) -> str:
    name = ""
    value: Any = document
    for step in path:
        key = 0 if step == "[]" else next(iter(value)) if step == "*" else step
        value = value[key]
        name += f"[{key}]" if step == "[]" else f".{key}" if name else str(key)
    return name


def _break(document: Object, rule: SchemaRule, keyword: str) -> bool:
    """Change a document so that it breaks this rule; return whether there is a way to break it alone."""
    place, path = node(SCHEMA, rule.path), rule.path
    if keyword == "required":
        target = _value(document, path)
        del target[rule.what.partition(":")[2]]
        return True
    if keyword == "closed":
        _value(document, path)[_TYPO] = 1
        return True
    new = _beyond(place, keyword, _value(document, path), path[-1])
    if new is None:
        return False
    _set(document, path, new)
    return True


def _beyond(place: Schema, keyword: str, old: Any, name: str) -> Any:
    limit: Any = place.get(keyword)
    match keyword:
        case "minimum":
            return limit if place.get("exclusiveMinimum") else limit - 1
        case "maximum":
            return limit if place.get("exclusiveMaximum") else limit + 1
        case "enum":
            return "somethingElse"
        case "minLength":
            return None if _VALIDATIONS in place else ""
        case "cel":
            if not isinstance(old, str | int):  # rules of sections have cases written by hand
                return None
            return "gs://bucket/x" if "s3://" in place[_VALIDATIONS][0]["message"] else "A b"
        case "maxLength":
            digits = "quantity" in str(place.get(_VALIDATIONS))
            return _TOO_LONG.get(name, ("9" if digits else "a") * (limit + 1))
        case "maxItems":
            return [_nth(old[0], n) for n in range(limit + 1)]
        case "maxProperties":
            return {f"example.com/k{n}": next(iter(old.values())) for n in range(limit + 1)}
        case "minItems":
            return []
        case "type" if "enum" in place:
            return None  # such a value is not one of the list either
        case "type":
            return 0.5 if "type" not in place else 7 if place["type"] == "string" else "x"
    return None


def _nth(item: Any, n: int) -> Any:
    """Return an item like this one, to be added to others."""
    if isinstance(item, dict) and "name" in item:
        return {**item, "name": f"n{n}"}
    if isinstance(item, dict) and "loss" in item:
        return {**item, "loss": str(_MIXED[n])}
    return n if item == 0 else item


def _value(document: Object, path: Path) -> Any:
    value: Any = document
    for step in path:
        value = value[0] if step == "[]" else next(iter(value.values())) if step == "*" else value[step]
    return value


def _set(document: Object, path: Path, new: Any) -> None:
    parent, last = _value(document, path[:-1]), path[-1]
    if last == "*":
        parent[next(iter(parent))] = new
    else:
        parent[0 if last == "[]" else last] = new


# --- changes of a stored DPOJob --------------------------------------------------------------------------------------

_OTHER_VALUES: Object = {
    "image": "localhost/other:1", "imagePullPolicy": "Never", "serviceAccountName": "other",
    "model": {"huggingFace": {"uri": "s3://models/other/"}}, "tokenizer": {"uri": "s3://models/other/"},
    "chatTemplate": "{{ messages }}", "data": {"maxLength": 8}, "dpo": {"beta": 0.2}, "lora": {"rank": 8},
    "training": {"seed": 2}, "parallelism": {"distributedOptimizer": False}, "resources": {"nodes": 2},
    "reference": {"cacheURI": "s3://cache/x/"}, "checkpoint": {"keep": 9}, "output": {"dtype": "fp32"},
    "storage": {"region": "eu-1"}, "logging": {"tensorboard": {"enabled": True}},
    "transformerEngine": {"enabled": False}, "podTemplate": {"labels": {"team": "b"}},
}  # fmt: skip


def _change_cases() -> Iterator[Wrong]:
    for rule in RULES:
        if "cannot be changed" in rule.what:
            section = rule.what.partition(":")[0].removeprefix("cel.spec.")
            change = {section: _OTHER_VALUES[section]}
            yield Wrong(f"change of {section}", change, f"spec.{section}", words(rule), rule)


# --- answered by the operator ----------------------------------------------------------------------------------------

_SIDECAR = {"name": "agent", "image": "agent:1"}
_VOLUME = {"name": "extra", "emptyDir": {}}


def _sidecar(**more: Any) -> Object:
    return {"sidecars": [{**_SIDECAR, **more}]}


def _mounted(path: str) -> Object:
    return {"volumes": [_VOLUME], "volumeMounts": [{"name": "extra", "mountPath": path}]}


_TEMPLATES: tuple[tuple[str, Object, str, str], ...] = (
    ("label of ours", {"labels": {"dpo-operator.dev/job": "x"}}, "labels",
     "is reserved for a controller; leave it out"),
    ("label of PyTorchJob", {"labels": {"training.kubeflow.org/job-name": "x"}}, "labels",
     "is reserved for a controller"),
    ("queue by label", {"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "labels", "set runPolicy.queueName"),
    ("annotation of ours", {"annotations": {"dpo-operator.dev/x": "x"}}, "annotations", "is reserved for a controller"),
    ("unconfined AppArmor", {"annotations": {"container.apparmor.security.beta.kubernetes.io/pytorch": "unconfined"}},
     "annotations", "would weaken the pods' security; leave it out"),
    ("unconfined seccomp", {"annotations": {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"}},
     "annotations", "would weaken the pods' security; leave it out"),
    ("torchrun's variable", {"env": [{"name": "PET_NNODES", "value": "1"}]}, "env[0].name", "PET_NNODES is set by the"),
    ("own variable", {"env": [{"name": "DPO_CACHE_DIR", "value": "/x"}]}, "env[0].name", "DPO_CACHE_DIR is set by the"),
    ("reserved variable", {"env": [{"name": "LD_PRELOAD", "value": "/x"}]}, "env[0].name", "LD_PRELOAD is set by the"),
    ("variable twice", {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env[1].name",
     "A is set twice; set it once"),
    ("credentials twice", {"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "x"}]}, "env[0].name",
     "comes from spec.storage.credentialsSecretRef; set one of the two"),
    ("unknown source of a value", {"env": [{"name": "A", "valueFrom": {"vault": {}}}]}, "env[0].valueFrom",
     "vault: set exactly one of secretKeyRef, configMapKeyRef"),
    ("no source of a value", {"env": [{"name": "A", "valueFrom": {}}]}, "env[0].valueFrom",
     "nothing is set: set exactly"),
    ("volume of the host", {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "volumes[0]",
     "which restricted Pod Security allows"),
    ("volume without name", {"volumes": [{"emptyDir": {}}]}, "volumes[0].name", "must be set"),
    ("volume twice", {"volumes": [_VOLUME, _VOLUME]}, "volumes[1].name",
     "is the name of two volumes; give each its own"),
    ("volume of ours", {"volumes": [{"name": "scratch", "emptyDir": {}}]}, "volumes[0].name",
     "is the name of one of the operator's volumes; choose another"),
    ("token of the cluster",
     {"volumes": [{"name": "a", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]},
     "volumes[0].projected.sources[0].serviceAccountToken", "set spec.serviceAccountName for access to cloud storage"),
    ("mount of no volume", {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}, "volumeMounts[0].name",
     "is not a volume of podTemplate.volumes"),
    ("mount over the root", _mounted("/"), "volumeMounts[0].mountPath", "the operator or the system; choose another"),
    ("mount over the spec", _mounted("/etc/dpo/spec"), "volumeMounts[0].mountPath", "choose another"),
    ("mount over shared memory", _mounted("/dev/shm"), "volumeMounts[0].mountPath", "choose another"),
    ("sidecar without name", {"sidecars": [{"image": "a"}]}, "sidecars[0].name", "must be set"),
    ("sidecar of the trainer's name", _sidecar(name="pytorch"), "sidecars[0].name",
     "is the name of a trainer container"),
    ("sidecar twice", {"sidecars": [_SIDECAR, _SIDECAR]}, "sidecars[1].name", "is the name of two sidecars"),
    ("sidecar with a typo", _sidecar(comand=[]), "sidecars[0].comand", "is not a field of sidecars; known: args"),
    ("sidecar that ends", _sidecar(restartPolicy="Never"), "sidecars[0].restartPolicy", "with Always; leave it out"),
    ("privileged sidecar", _sidecar(securityContext={"privileged": True}), "sidecars[0].securityContext.privileged",
     "is fixed by restricted Pod Security"),
    ("sidecar on the host's port", _sidecar(ports=[{"hostPort": 80}]), "sidecars[0].ports[0].hostPort", "leave it out"),
    ("sidecar that reads keys", _sidecar(volumeMounts=[{"name": "credentials-0", "mountPath": "/a"}]),
     "sidecars[0].volumeMounts[0].name", "is not a volume of podTemplate.volumes"),
    ("sidecar with a relative mount",
     {"volumes": [_VOLUME], **_sidecar(volumeMounts=[{"name": "extra", "mountPath": "a"}])},
     "sidecars[0].volumeMounts[0].mountPath", "is not an absolute path"),
    ("affinity of no kind", {"affinity": {"nodeAfinity": {}}}, "affinity.nodeAfinity", "known here: nodeAffinity"),
    ("affinity as a list", {"affinity": {"nodeAffinity": []}}, "affinity.nodeAffinity", "is not a mapping"),
    ("wishes that are no list", {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": {}}}},
     "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution", "is not a list"),
    ("label key with a space", {"labels": {"a b": "c"}}, 'labels."a b"', "write a label key such as"),
)  # fmt: skip


def _acceptance_cases() -> Iterator[Wrong]:
    for case in DOUBTFUL:
        # What needs the model or the data is said by `dpo validate` and the trainer, not by the operator.
        if case.level != "error" or case.removed or set(case.known) - {"on_cluster"}:
            continue
        document = manifest({f"spec.{path}": value for path, value in case.changes.items()})
        yield Wrong(case.name, document, case.field, case.says)
    for name, template, blamed, says in _TEMPLATES:
        yield Wrong(name, manifest({"spec.podTemplate": template}), f"spec.podTemplate.{blamed}", says)
    key: Object = {"spec.podTemplate.env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "hush"}], "spec.storage": {}}
    yield Wrong("key as plain text", manifest(key), "spec.podTemplate.env[0].value", "use valueFrom.secretKeyRef")
    wandb: Object = {"project": "p", "apiKeySecretRef": {"name": "a", "key": "b"}}
    key = {"spec.podTemplate.env": [{"name": "WANDB_API_KEY", "value": "hush"}], "spec.logging.wandb": wandb}
    yield Wrong("key of wandb twice", manifest(key), "spec.podTemplate.env[0].name",
                "comes from spec.logging.wandb.apiKeySecretRef; set one of the two")  # fmt: skip
    key = {"spec.podTemplate.env": [{"name": "HF_TOKEN", "value": "hush"}]}
    yield Wrong("token of the hub as plain text", manifest(key), "spec.podTemplate.env[0].value",
                "HF_TOKEN as plain text would be a secret in a spec")  # fmt: skip
    key = {"spec.podTemplate.env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}],
           "spec.storage.hub": {"tokenSecretRef": {"name": "a", "key": "b"}}}  # fmt: skip
    yield Wrong("token of the hub twice", manifest(key), "spec.podTemplate.env[0].name",
                "HF_TOKEN comes from spec.storage.hub.tokenSecretRef; set one of the two")  # fmt: skip
    mlflow: Object = {"trackingURI": "https://mlflow", "tokenSecretRef": {"name": "a", "key": "b"}}
    key = {"spec.podTemplate.env": [{"name": "MLFLOW_TRACKING_TOKEN", "value": "x"}], "spec.logging.mlflow": mlflow}
    yield Wrong("token of MLflow twice", manifest(key), "spec.podTemplate.env[0].name",
                "comes from spec.logging.mlflow.tokenSecretRef; set one of the two")  # fmt: skip
    percent = manifest({"spec.training.validationInterval": "0.0%"})
    yield Wrong("interval of nought percent", percent, "spec.training.validationInterval", "should be above 0%")


_DRY_RUN: tuple[tuple[str, Object, str], ...] = (
    ("term with a typo", {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerm": []}}}}, "nodeSelectorTerm"),
    ("affinity without terms", {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}},
     "nodeSelectorTerms"),
    ("spread with a typo", {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable":
        "DoNotSchedule", "labelSelektor": {}}]}, "labelSelektor"),
    ("spread without a key", {"topologySpreadConstraints": [{"maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}]},
     "topologyKey"),
    ("volume with a typo", {"volumes": [{"name": "extra", "emptyDir": {"sizelimit": "1Gi"}}]}, "sizelimit"),
    ("secret as text", {"volumes": [{"name": "extra", "secret": "certificates"}]}, "secret"),
    ("source of a value without a key", {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a"}}}]}, "key"),
    ("sidecar's port as text", _sidecar(ports=[{"containerPort": "http"}]), "containerPort"),
    ("sidecar's variable with a typo", _sidecar(env=[{"name": "A", "valeu": "x"}]), "valeu"),
)  # fmt: skip

ADMISSION: tuple[Wrong, ...] = tuple(_golden_cases())
ADMISSION += tuple(_limit_cases({case.rule for case in ADMISSION if case.rule is not None}))
CHANGES: tuple[Wrong, ...] = tuple(_change_cases())
ACCEPTANCE: tuple[Wrong, ...] = tuple(_acceptance_cases())
DRY_RUN: tuple[Wrong, ...] = tuple(
    Wrong(name, manifest({"spec.podTemplate": template}), "spec.podTemplate", says) for name, template, says in _DRY_RUN
)
