"""The installation's pod patch: a partial pod template that is merged into every trainer pod.

It is for what a fabric needs and no job may ask for, such as hostPath libraries or a capability. Only the administrator
who installs the operator can set it. ``check`` refuses what belongs to the operator or to a job; the API server checks
the rest, field by field, when it tries a job's PyTorchJob.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dpo_api.findings import Finding, shown
from dpo_api.overlay import RESERVED_ENV, RESERVED_ENV_PREFIXES, RESERVED_KEYS, RESERVED_VOLUMES, SIDECAR_NAMES, tokens
from dpo_operator import labels
from dpo_operator.backend.pod import CONTAINER
from dpo_operator.backend.volumes import CACHE, CLAIMS, IDENTITY, SCRATCH

KEYS = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "env", "imagePullSecrets"), "name"),
    **dict.fromkeys(("resourceClaims", "claims"), "name"),
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
"""The field by which Kubernetes' strategic merge identifies the items of a list. Any other list is replaced."""
APPENDED = "tolerations"

POD_FIELDS = frozenset(
    {
        *("containers", "dnsConfig", "dnsPolicy", "hostAliases", "hostIPC", "hostNetwork", "hostPID", "hostUsers"),
        *("imagePullSecrets", "initContainers", "nodeSelector", "resourceClaims", "runtimeClassName", "schedulerName"),
        *("securityContext", "shareProcessNamespace", "tolerations", "topologySpreadConstraints", "volumes"),
    }
)
TRAINER_FIELDS = frozenset({"name", "env", "resources", "securityContext", "volumeDevices", "volumeMounts"})
INIT_FIELDS = frozenset(
    {
        *("name", "image", "imagePullPolicy", "command", "args", "workingDir", "env", "envFrom", "ports", "resources"),
        *("volumeMounts", "volumeDevices", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"),
        *("restartPolicy", "securityContext", "terminationMessagePath", "terminationMessagePolicy", "stdin", "tty"),
    }
)
_LISTS = frozenset({*KEYS, APPENDED} - {"claims", "env", "volumeMounts", "volumeDevices"})
_MAPPINGS = frozenset({"dnsConfig", "nodeSelector", "securityContext"})

ALLOWED_ENV = frozenset({"LD_LIBRARY_PATH", "LD_PRELOAD", "PATH"})
"""Variables that a job may not set and an installation may: they only add libraries and programs of the node."""
SHARED_VOLUMES = frozenset({"shm", "scratch"})
"""The operator's volumes that containers of the patch may mount."""
_OWN_PATHS = ("/etc/dpo", CACHE, CLAIMS, IDENTITY)
_TAKEN_PATHS = ("/", "/dev", "/dev/shm", "/etc", "/proc", "/sys", SCRATCH, "/usr")  # noqa: S108 - paths of a pod


def check(patch: Any) -> Iterator[Finding]:
    """Yield an error for everything in a patch that it may not set."""
    if not isinstance(patch, Mapping):
        yield _error("", f"{shown(patch)} is not a mapping; give metadata and spec of a pod template")
        return
    yield from _unknown(patch, "", {"metadata", "spec"})
    yield from _directives(patch, "")
    metadata, spec = ({} if patch.get(name) is None else patch[name] for name in ("metadata", "spec"))
    for name, part in (("metadata", metadata), ("spec", spec)):
        if not isinstance(part, Mapping):
            yield _error(name, f"{shown(part)} is not a mapping")
            return
    yield from _metadata(metadata)
    yield from _unknown(spec, "spec", POD_FIELDS)
    for name in sorted(set(spec) & (_LISTS | _MAPPINGS)):
        form, word = (list, "list of mappings") if name in _LISTS else (Mapping, "mapping")
        whole = isinstance(spec[name], form)
        if not whole or (name in _LISTS and not all(isinstance(item, Mapping) for item in spec[name])):
            yield _error(f"spec.{name}", f"{shown(spec[name])} is not a {word}")
            return
    yield from _volumes(spec.get("volumes", []))
    known = {volume.get("name") for volume in spec.get("volumes", [])} | SHARED_VOLUMES
    yield from _containers(spec.get("containers", []), known)
    yield from _init_containers(spec.get("initContainers", []), known)
    if spec.get("hostNetwork") and "dnsPolicy" not in spec:
        text = "must be set with hostNetwork: workers look up the master in the cluster's DNS;"
        yield _error("spec.dnsPolicy", f"{text} set ClusterFirstWithHostNet")


def _error(field: str, message: str) -> Finding:
    return Finding("error", field, message)


def _unknown(part: Mapping[str, Any], field: str, known: Collection[str]) -> Iterator[Finding]:
    for key in part:
        if key not in known and not key.startswith("$"):
            place = f"{field}.{key}" if field else key
            yield _error(place, f"may not be set by the pod patch; it may set {', '.join(sorted(known))}")


def _directives(value: Any, field: str) -> Iterator[Finding]:
    """Refuse $patch and its like: nothing that the operator writes may be removed."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{field}.{key}" if field else key
            if key.startswith("$"):
                yield _error(place, "directives of a strategic merge patch are not supported; leave it out")
            else:
                yield from _directives(inner, place)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _directives(inner, f"{field}[{index}]")


def _metadata(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _unknown(metadata, "metadata", {"annotations", "labels"})
    for name in ("annotations", "labels"):
        values = metadata.get(name) or {}
        if not isinstance(values, Mapping):
            yield _error(f"metadata.{name}", f"{shown(values)} is not a mapping")
            continue
        for key, value in values.items():
            if key.startswith(RESERVED_KEYS) or key == labels.MANAGED_BY:
                yield _error(f"metadata.{name}", f"{key} is set by the operator or a controller; leave it out")
            elif not isinstance(value, str):
                yield _error(f"metadata.{name}", f"{key}: {shown(value)} is not a text; put it in quotes")


def _volumes(volumes: list[Mapping[str, Any]]) -> Iterator[Finding]:
    seen: set[str] = set()
    for index, volume in enumerate(volumes):
        field, name = f"spec.volumes[{index}]", volume.get("name")
        if not isinstance(name, str) or not name:
            yield _error(f"{field}.name", "must be set")
            continue
        if name in seen or RESERVED_VOLUMES.match(name):
            why = "the name of two volumes" if name in seen else "the name of one of the operator's volumes"
            yield _error(f"{field}.name", f"{name} is {why}; choose another")
        seen.add(name)
        if len(set(volume) - {"name"}) != 1:
            yield _error(field, "set exactly one source, such as hostPath")
        yield from tokens(volume.get("projected"), f"{field}.projected", "leave it out")


def _containers(containers: list[Mapping[str, Any]], volumes: Collection[Any]) -> Iterator[Finding]:
    for index, container in enumerate(containers):
        field, name = f"spec.containers[{index}]", container.get("name")
        if name != CONTAINER:
            text = f"{shown(name)}: only {CONTAINER}, the trainer's container, may be changed; another one would keep"
            text += " finished pods running: add it to initContainers, with restartPolicy Always"
            yield _error(f"{field}.name", text)
            continue
        yield from _unknown(container, field, TRAINER_FIELDS)
        for position, variable in enumerate(_items(container, "env")):
            own = str(variable.get("name"))
            if own not in ALLOWED_ENV and (own in RESERVED_ENV or own.startswith(RESERVED_ENV_PREFIXES)):
                yield _error(f"{field}.env[{position}].name", f"{own} is set by the operator; leave it out")
        yield from _mounts(container, field, volumes)
        yield from _security(container, field, restricted=True)


def _init_containers(containers: list[Mapping[str, Any]], volumes: Collection[Any]) -> Iterator[Finding]:
    seen: set[Any] = set()
    for index, container in enumerate(containers):
        field, name = f"spec.initContainers[{index}]", container.get("name")
        if not isinstance(name, str) or not name:
            yield _error(f"{field}.name", "must be set")
        elif name in seen or name in SIDECAR_NAMES:
            yield _error(f"{field}.name", f"{name} is the name of another container; choose another")
        seen.add(name)
        if not container.get("image"):
            yield _error(f"{field}.image", "must be set")
        yield from _unknown(container, field, INIT_FIELDS)
        yield from _mounts(container, field, volumes)
        yield from _security(container, field, restricted=False)


def _items(container: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the items of a list; the API server says what is wrong with another form."""
    found = container.get(name)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _mounts(container: Mapping[str, Any], field: str, volumes: Collection[Any]) -> Iterator[Finding]:
    for index, mount in enumerate(_items(container, "volumeMounts")):
        place = f"{field}.volumeMounts[{index}]"
        if mount.get("name") not in volumes:
            names = ", ".join(sorted(map(str, volumes)))
            yield _error(f"{place}.name", f"{shown(mount.get('name'))} is not a volume of the pod patch ({names})")
        path = str(mount.get("mountPath"))
        clean = "/" + path.strip("/")
        if container.get("name") != CONTAINER:
            continue
        if clean in _TAKEN_PATHS or any(f"{clean}/".startswith(f"{own}/") for own in _OWN_PATHS):
            yield _error(f"{place}.mountPath", f"{path} is used by the operator or the system; choose another")


def _security(container: Mapping[str, Any], field: str, *, restricted: bool) -> Iterator[Finding]:
    """The trainer's container forbids privilege escalation, which the API server refuses together with privilege."""
    context = container.get("securityContext") or {}
    if not isinstance(context, Mapping):
        yield _error(f"{field}.securityContext", f"{shown(context)} is not a mapping")
    elif restricted and context.get("privileged") and context.get("allowPrivilegeEscalation") is not True:
        text = "must be true for a privileged container, which the API server refuses otherwise"
        yield _error(f"{field}.securityContext.allowPrivilegeEscalation", text)


def applied(template: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod template with the patch merged into it, as a strategic merge would.

    The patch never becomes part of a job's own volume or sidecar. Where a job uses the same name, the patch's gets
    another one: otherwise a job could mount the patch's host paths where it likes, or run its own command with the
    rights of the patch's container.
    """
    if not patch:
        return template
    patch = copy.deepcopy(dict(patch))
    spec, own = patch.get("spec") or {}, template["spec"]
    volumes = _renamed(spec.get("volumes", []), {volume["name"] for volume in own.get("volumes", [])})
    for container in [*spec.get("containers", []), *spec.get("initContainers", [])]:
        for mount in container.get("volumeMounts", []):
            mount["name"] = volumes.get(mount["name"], mount["name"])
    first = spec.pop("initContainers", [])
    _renamed(first, {container["name"] for container in own.get("initContainers", [])})
    found: dict[str, Any] = _merged(copy.deepcopy(template), patch)
    if first:  # before the job's sidecars, so that they and the trainer find it running
        found["spec"]["initContainers"] = [*first, *found["spec"].get("initContainers", [])]
    found["spec"] = dict(sorted(found["spec"].items()))
    return found


def _renamed(items: list[dict[str, Any]], taken: set[str]) -> dict[str, str]:
    """Rename the items whose name is taken; return their new names by the former ones."""
    names: dict[str, str] = {}
    free = taken | {item["name"] for item in items}
    for item in items:
        if item["name"] in taken:
            new = next(name for count in range(len(free) + 1) if (name := f"installation-{count}") not in free)
            free.add(new)
            names[item["name"]] = item["name"] = new
    return names


def _merged(base: Any, patch: Any, name: str = "") -> Any:
    if isinstance(base, dict) and isinstance(patch, dict):
        for key, value in patch.items():
            if value is not None:
                base[key] = _merged(base[key], value, key) if key in base else value
        return base
    if isinstance(base, list) and isinstance(patch, list):
        if name == APPENDED:
            return [*base, *(item for item in patch if item not in base)]
        if name in KEYS:
            return _by_key(base, patch, name)
    return patch


def _by_key(base: list[dict[str, Any]], patch: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    key = KEYS[name]
    places = {item.get(key): index for index, item in enumerate(base)}
    for item in patch:
        place = places.get(item.get(key))
        if place is None:
            base.append(item)
        else:  # a variable has a value or a valueFrom, not one of each
            base[place] = item if name == "env" else _merged(base[place], item)
    return base
