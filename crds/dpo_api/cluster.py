"""Checks of a spec that apply on a cluster but not to `dpo run`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from dpo_api import overlay
from dpo_api.findings import Finding
from dpo_api.spec import DPOJobSpec, Section, StorageAccess

_URIS = frozenset({"uri", "cache_uri", "architecture_uri"})


def uris(section: Section, prefix: str = "spec") -> Iterator[tuple[str, str, StorageAccess | None]]:
    """Yield (field, URI, access override) for every storage URI of a spec, in the order of its fields."""
    for attribute, name in _places(type(section)):
        value, where = getattr(section, attribute), f"{prefix}.{name}"
        if isinstance(value, str):
            yield where, value, getattr(section, "storage", None)
        elif isinstance(value, Section):
            yield from uris(value, where)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from uris(item, f"{where}[{index}]")


@functools.cache
def _places(section: type[Section]) -> tuple[tuple[str, str], ...]:
    """Return attribute and field of what may hold URIs: most fields hold none, and each pass looks for them."""
    return tuple(
        (attribute, field.alias or attribute)
        for attribute, field in section.model_fields.items()
        if attribute in _URIS or any(isinstance(kind, type) and issubclass(kind, Section) for kind in _kinds(field))
    )


def _kinds(field: FieldInfo) -> Iterator[Any]:
    """Yield the types that a field's annotation names."""
    left: list[Any] = [field.annotation]
    while left:
        kind = left.pop()
        yield kind
        left += get_args(kind)


def check(spec: DPOJobSpec) -> Iterator[Finding]:
    """Yield the errors and warnings that apply on a cluster."""
    yield from _required(spec)
    yield from _reachable(spec)
    yield from overlay.check(spec)
    policy = spec.run_policy
    if policy.queue_name is None:
        for name, value in (
            ("priorityClass", policy.priority_class),
            ("restartPriorityClass", policy.restart_priority_class),
        ):
            if value is not None:
                yield Finding("warning", f"spec.runPolicy.{name}", "has no effect without queueName")
    deadline, limit = policy.active_deadline_seconds, spec.training.max_run_seconds
    if deadline is not None and limit is not None and limit >= deadline:
        text = f"{limit} s is not below runPolicy.activeDeadlineSeconds {deadline} s, so it has no effect; set it lower"
        yield Finding("warning", "spec.training.maxRunSeconds", text)
    wandb = spec.logging.wandb
    if wandb is not None and wandb.mode == "online" and wandb.api_key_secret_ref is None:
        text = "must be set for mode online on a cluster: the name and key of a Secret with the API key"
        yield Finding("error", "spec.logging.wandb.apiKeySecretRef", text)
    yield from _hub(spec)


def _hub(spec: DPOJobSpec) -> Iterator[Finding]:
    """Compare the token for the Hugging Face Hub with what the job does there."""
    field, stated = "spec.storage.hub.tokenSecretRef", spec.storage.hub.token_secret_ref is not None
    if spec.output.hub is not None:
        if not stated and not any(variable.name in overlay.HUB_TOKENS for variable in spec.pod_template.env):
            text = "must be set with output.hub on a cluster: the name and key of a Secret with a token that may write"
            yield Finding("error", field, text)
    elif stated and not any(uri.startswith("hf://") for _, uri, _ in uris(spec)):
        yield Finding("warning", field, "has no effect, because the job neither reads from the hub nor pushes to it")


def _required(spec: DPOJobSpec) -> Iterator[Finding]:
    if spec.checkpoint.uri is None:
        text = "must be set on a cluster: the run directory, such as s3://runs/my-job/"
        yield Finding("error", "spec.checkpoint.uri", text)
    if spec.resources.gpus_per_node is None:
        text = "must be set on a cluster: the GPUs of each pod, or 0 to train on CPU"
        yield Finding("error", "spec.resources.gpusPerNode", text)


def _reachable(spec: DPOJobSpec) -> Iterator[Finding]:
    mounts = [mount.mount_path.rstrip("/") + "/" for mount in spec.pod_template.volume_mounts]
    anonymous = False
    for field, uri, access in uris(spec):
        if uri.startswith("s3://"):
            anonymous = anonymous or spec.storage.access(access).credentials_secret_ref is None
        elif access is not None:
            place = field.rpartition(".")[0]
            yield Finding("warning", f"{place}.storage", f"has no effect, because {uri} is not in S3")
        path = uri.removeprefix("file://")
        if "://" not in path and not any(path.startswith(mount) for mount in mounts):
            text = f"{uri} is not mounted in the pods; use s3:// or pvc://, or mount it with podTemplate.volumes"
            yield Finding("error", field, text)
    if anonymous and spec.service_account_name is None:
        text = "neither this (for each endpoint) nor serviceAccountName is set, so pods have no credentials for S3"
        yield Finding("warning", "spec.storage.credentialsSecretRef", text)
