"""Checks of the values in a podTemplate, whose fields are a closed list.

The operator alone sets the command, the security context, the service account and the PyTorchJob's own labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpo_api.findings import Finding, shown
from dpo_api.spec import DPOJobSpec

FIELD = "spec.podTemplate"

RESERVED_KEYS = ("dpo-operator.dev/", "training.kubeflow.org/", "kueue.x-k8s.io/")
"""Prefixes of labels and annotations that controllers use to find their pods."""
TOPOLOGY = ("kueue.x-k8s.io/podset-",)
"""Prefix of the annotations by which a pod template asks Kueue for nodes that are close to each other."""
UNCONFINING = ("container.apparmor.security.beta.kubernetes.io/", "seccomp.security.alpha.kubernetes.io/")

RESERVED_ENV = frozenset(
    {
        *("HOME", "TMPDIR", "USER", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH"),
    }
)
RESERVED_ENV_PREFIXES = ("PET_", "DPO_")
S3_KEYS = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"})
HUB_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
"""From which huggingface_hub takes its token; the second is its older name."""
VALUE_SOURCES = ("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef")

VOLUME_SOURCES = (
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
)
"""The volume types that restricted Pod Security allows."""
RESERVED_VOLUMES = re.compile(r"^(spec|shm|scratch|cache|identity|(claim|credentials|ca)-[0-9]+)$")
RESERVED_PATHS = (
    *("/", "/dev", "/etc", "/etc/dpo", "/tmp", "/cache", "/mnt/claims", "/proc", "/sys", "/usr"),  # noqa: S108
    "/var/run/secrets",
)

SIDECAR_NAMES = frozenset({"pytorch", "init-pytorch"})
SIDECAR_FIELDS = frozenset(
    {
        *("name", "image", "imagePullPolicy", "command", "args", "workingDir", "env", "envFrom", "ports", "resources"),
        *("volumeMounts", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "restartPolicy"),
        *("securityContext", "terminationMessagePath", "terminationMessagePolicy"),
    }
)
SIDECAR_SECURITY = frozenset({"runAsUser", "runAsGroup", "readOnlyRootFilesystem"})


def check(spec: DPOJobSpec) -> Iterator[Finding]:
    """Yield an error for everything in a podTemplate that the operator refuses to put in a pod."""
    template = spec.pod_template
    yield from reserved_keys(template.labels, f"{FIELD}.labels")
    yield from reserved_keys(template.annotations, f"{FIELD}.annotations", allowed=TOPOLOGY, more=UNCONFINING)
    yield from _environment(spec)
    yield from _volumes(template.volumes)
    own = {volume.get("name") for volume in template.volumes}
    for index, mount in enumerate(template.volume_mounts):
        yield from _mount({"name": mount.name, "mountPath": mount.mount_path}, f"{FIELD}.volumeMounts[{index}]", own)
    seen: set[str] = set()
    for index, sidecar in enumerate(template.sidecars):
        yield from _sidecar(sidecar, f"{FIELD}.sidecars[{index}]", own, seen)
    yield from _affinity(template.affinity)


def _error(field: str, message: str) -> Finding:
    return Finding("error", field, message)


def reserved_keys(
    keys: Iterable[str], field: str, *, allowed: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> Iterator[Finding]:
    """Yield an error for each key of labels or annotations that is a controller's.

    ``allowed`` and ``more`` are prefixes of keys that are not refused although a controller reads them, and of further
    ones that are.
    """
    prefixes = (*RESERVED_KEYS, *more)
    for key in keys:
        if key.startswith(prefixes) and not key.startswith(allowed):
            prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
            why = "would weaken the pods' security" if prefix in UNCONFINING else "is reserved for a controller"
            hint = "; set runPolicy.queueName or priorityClass" if prefix.startswith("kueue") else "; leave it out"
            yield _error(field, f"{key} {why}{hint}")


def _environment(spec: DPOJobSpec) -> Iterator[Finding]:
    seen: set[str] = set()
    wandb, mlflow = spec.logging.wandb, spec.logging.mlflow
    given = {"WANDB_API_KEY": "logging.wandb.apiKeySecretRef"} if wandb and wandb.api_key_secret_ref else {}
    given |= {"MLFLOW_TRACKING_TOKEN": "logging.mlflow.tokenSecretRef"} if mlflow and mlflow.token_secret_ref else {}
    if spec.storage.hub.token_secret_ref is not None:
        given |= dict.fromkeys(HUB_TOKENS, "storage.hub.tokenSecretRef")
    if spec.storage.credentials_secret_ref is not None:
        given |= dict.fromkeys(S3_KEYS, "storage.credentialsSecretRef")
    for index, variable in enumerate(spec.pod_template.env):
        field, name = f"{FIELD}.env[{index}]", variable.name
        if name in seen:
            yield _error(f"{field}.name", f"{name} is set twice; set it once")
        seen.add(name)
        if name in RESERVED_ENV or name.startswith(RESERVED_ENV_PREFIXES):
            yield _error(f"{field}.name", f"{name} is set by the operator; leave it out")
        elif name in given:
            yield _error(f"{field}.name", f"{name} comes from spec.{given[name]}; set one of the two")
        elif name in S3_KEYS | HUB_TOKENS and variable.value is not None:
            yield _error(
                f"{field}.value", f"{name} as plain text would be a secret in a spec; use valueFrom.secretKeyRef"
            )
        source = variable.value_from
        if source is not None and (len(source) != 1 or next(iter(source)) not in VALUE_SOURCES):
            yield _error(f"{field}.valueFrom", f"{_listed(source)}: set exactly one of {', '.join(VALUE_SOURCES)}")


def _volumes(volumes: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    seen: set[Any] = set()
    for index, volume in enumerate(volumes):
        field, name = f"{FIELD}.volumes[{index}]", volume.get("name")
        if not isinstance(name, str) or not name:
            yield _error(f"{field}.name", "must be set")
            continue
        if name in seen:
            yield _error(f"{field}.name", f"{name} is the name of two volumes; give each its own")
        seen.add(name)
        if RESERVED_VOLUMES.match(name):
            yield _error(f"{field}.name", f"{name} is the name of one of the operator's volumes; choose another")
        sources = set(volume) - {"name"}
        if len(sources) != 1 or not sources <= set(VOLUME_SOURCES):
            text = f"{_listed(sources)}: set exactly one of {', '.join(VOLUME_SOURCES)}"
            yield _error(field, f"{text}, which restricted Pod Security allows")
        fix = "set spec.serviceAccountName for access to cloud storage"
        yield from tokens(volume.get("projected"), f"{field}.projected", fix)


def tokens(projected: Any, field: str, fix: str) -> Iterator[Finding]:
    """Refuse each API token among the sources of a projected volume at ``field``."""
    sources = projected.get("sources") if isinstance(projected, Mapping) else None
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, Mapping) and "serviceAccountToken" in source:
            place = f"{field}.sources[{index}].serviceAccountToken"
            yield _error(place, f"trainer pods get no token of the cluster; {fix}")


def _mount(mount: Mapping[str, Any], field: str, own: set[Any]) -> Iterator[Finding]:
    if mount.get("name") not in own:
        names = ", ".join(sorted(str(name) for name in own)) or "none"
        yield _error(f"{field}.name", f"{shown(mount.get('name'))} is not a volume of podTemplate.volumes ({names})")
    path = mount.get("mountPath")
    if not isinstance(path, str) or not path.startswith("/"):
        yield _error(f"{field}.mountPath", f"{shown(path)} is not an absolute path")
        return
    place = "/" + path.strip("/")
    inside = ("/dev/", "/etc/dpo/", "/mnt/claims/", "/proc/", "/sys/", "/var/run/secrets/")
    if place in RESERVED_PATHS or f"{place}/".startswith(inside):
        yield _error(f"{field}.mountPath", f"{path} is used by the operator or the system; choose another")


def _sidecar(sidecar: Mapping[str, Any], field: str, own: set[Any], seen: set[str]) -> Iterator[Finding]:
    name = sidecar.get("name")
    if not isinstance(name, str) or not name:
        yield _error(f"{field}.name", "must be set")
    elif name in SIDECAR_NAMES or name in seen:
        why = "is the name of a trainer container" if name in SIDECAR_NAMES else "is the name of two sidecars"
        yield _error(f"{field}.name", f"{name} {why}; choose another")
    else:
        seen.add(name)
    for key in sorted(set(sidecar) - SIDECAR_FIELDS):
        yield _error(f"{field}.{key}", f"is not a field of sidecars; known: {', '.join(sorted(SIDECAR_FIELDS))}")
    if sidecar.get("restartPolicy", "Always") != "Always":
        text = f"{shown(sidecar['restartPolicy'])}: a sidecar runs as an init container with Always; leave it out"
        yield _error(f"{field}.restartPolicy", text)
    context = sidecar.get("securityContext", {})
    for key in sorted(set(context if isinstance(context, Mapping) else {"": 0}) - SIDECAR_SECURITY):
        text = f"is fixed by restricted Pod Security; only {', '.join(sorted(SIDECAR_SECURITY))} may be set"
        yield _error(f"{field}.securityContext" + (f".{key}" if key else ""), text)
    ports = sidecar.get("ports")
    for index, port in enumerate(ports if isinstance(ports, list) else []):
        if isinstance(port, Mapping) and port.get("hostPort"):
            yield _error(f"{field}.ports[{index}].hostPort", "takes the node's port; leave it out")
    mounts = sidecar.get("volumeMounts")
    for index, mount in enumerate(mounts if isinstance(mounts, list) else []):
        if isinstance(mount, Mapping):
            yield from _mount(mount, f"{field}.volumeMounts[{index}]", own)


def _affinity(affinity: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Check the form of the affinity: the operator adds its preference for other nodes to it."""
    if affinity is None:
        return
    known = ("nodeAffinity", "podAffinity", "podAntiAffinity")
    for key in affinity:
        if key not in known:
            yield _error(f"{FIELD}.affinity.{key}", f"unknown field; known here: {', '.join(known)}")
    node = affinity.get("nodeAffinity", {})
    if not isinstance(node, Mapping):
        yield _error(f"{FIELD}.affinity.nodeAffinity", f"{shown(node)} is not a mapping")
        return
    name = "preferredDuringSchedulingIgnoredDuringExecution"
    if not isinstance(node.get(name, []), list):
        yield _error(f"{FIELD}.affinity.nodeAffinity.{name}", f"{shown(node[name])} is not a list")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing is set"
