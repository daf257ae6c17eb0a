"""`dpo render`: the objects that the operator would create for a manifest, offline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from dpo_api.findings import ManifestError, placed
from dpo_api.manifest import DPOJob
from dpo_api.validation import check, errors
from dpo_cli.console import print_findings, stderr
from dpo_cli.jobs import LoadedJob, parse, read_documents
from dpo_operator.backend.network import build_network_policy
from dpo_operator.backend.pytorchjob import Identity, build_child, build_config_map
from dpo_operator.config import Settings
from dpo_operator.labels import KUEUE_PRIORITY, KUEUE_QUEUE, copied


def render(file: str, values: Sequence[str], *, image: str | None = None, attempt: int = 1) -> str:
    """Return the YAML of every DPOJob's ConfigMap, NetworkPolicy and PyTorchJob.

    ``image`` is used for jobs without spec.image.

    Warnings go to standard error. Raises ManifestError for a job that the operator would reject, NotFoundError for a
    missing file, and UsageError for wrong values.
    """
    settings = Settings() if image is None else replace(Settings(), trainer_image=image)
    documents, overrides = read_documents(file, values)
    loaded = [parse(document, overrides) for document in documents]
    for one in loaded:
        _check(one)
    objects = [thing for one in loaded for thing in objects_of(one.job, settings, attempt)]
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def objects_of(job: DPOJob, settings: Settings, attempt: int = 1) -> list[dict[str, Any]]:
    """Return the objects that the operator creates for a job, except for what only a cluster assigns (the UID)."""
    metadata = job.metadata
    identity = Identity(
        name=metadata.name,
        namespace=metadata.namespace,
        uid=metadata.uid or "",
        queue=metadata.labels.get(KUEUE_QUEUE),
        priority=metadata.labels.get(KUEUE_PRIORITY),
        annotations=copied(metadata.annotations),
    )
    image = job.spec.image or settings.trainer_image
    return [
        build_config_map(job, identity, image, settings),
        *([build_network_policy(identity, settings)] if settings.network_policies else []),
        build_child(job, identity, attempt, image, settings),
    ]


def _check(loaded: LoadedJob) -> None:
    document = loaded.document
    found = placed(check(loaded.job.spec, on_cluster=True), document.source, document.lines)
    wrong = errors(found)
    if wrong:
        raise ManifestError(wrong)
    print_findings(stderr(), [finding for finding in found if finding.level == "warning"])


class _Dumper(yaml.SafeDumper):
    """Writes every object without aliases, and multi-line text (the spec's JSON) as block scalars."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def print_rendered(file: str, values: Sequence[str], *, image: str | None, attempt: int) -> None:
    """Write the YAML to standard output."""
    sys.stdout.write(render(file, values, image=image, attempt=attempt))
