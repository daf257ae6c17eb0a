"""The commits of a job's inputs on the Hugging Face Hub, which the first attempt of a run finds and later ones use.

``revisions.json`` in the run directory holds them. A branch that moves while a run is restarted changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dpo_api.cluster import uris
from dpo_api.errors import IncompatibleCheckpointError, NotFoundError
from dpo_api.spec import DPOJobSpec
from dpo_store.store import Store
from dpo_store.uris import join_uri, parse

REVISIONS: Final = "revisions.json"
"""The commit of each repository, by its address: {"hf://org/name@main": "<40 hexadecimal digits>"}."""


def repositories(spec: DPOJobSpec) -> list[str]:
    """Return the addresses of the hub's repositories that a spec names, with their revisions, sorted."""
    return sorted({_repository(uri) for _, uri, _ in uris(spec) if uri.startswith("hf://")})


def saved(store: Store, run_dir: str) -> dict[str, str]:
    """Return the commits that a run directory holds; none if it is new.

    Raises IncompatibleCheckpointError for a damaged record.
    """
    address = join_uri(run_dir, REVISIONS)
    try:
        found = json.loads(store.read(address))
    except NotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(commit, str) for commit in found.values()):
        raise IncompatibleCheckpointError(f"{address} is damaged; delete it to continue with the newest commits")
    return found


def at_commits(spec: DPOJobSpec, commits: Mapping[str, str]) -> DPOJobSpec:
    """Return the spec in which each repository of ``commits`` is named with its commit."""

    def of(section: Any) -> Any:
        if section is None or not section.uri.startswith("hf://"):
            return section
        name = _repository(section.uri)
        if name not in commits:
            return section
        address = f"{name.partition('@')[0]}@{commits[name]}{section.uri[len(name) :]}"
        return section.model_copy(update={"uri": address})

    model = spec.model.model_copy(update={"hugging_face": of(spec.model.hugging_face)})
    data = spec.data.model_copy(
        update={"train": tuple(map(of, spec.data.train)), "validation": tuple(map(of, spec.data.validation))}
    )
    return spec.model_copy(update={"model": model, "data": data, "tokenizer": of(spec.tokenizer)})


def _repository(uri: str) -> str:
    return f"hf://{parse(uri).root}"
