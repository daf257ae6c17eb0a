"""The accepted spec: its digest is in the status, and the pods read it from an immutable ConfigMap.

Acceptance writes the digest first. If the spec was edited since it was read, that write is refused, and the new spec is
judged. Afterwards the API server refuses edits, so the ConfigMap, which is created next, has the same bytes.
"""

from __future__ import annotations

import json

from dpo_api.findings import ManifestError
from dpo_api.manifest import parse_job
from dpo_operator import obstacles
from dpo_operator.backend import pytorchjob
from dpo_operator.backend.launch import FIRST, Launch
from dpo_operator.draft import Draft
from dpo_operator.obstacles import Obstacle
from dpo_operator.reasons import Reason
from dpo_operator.types import CreateConfigMap, LookUpConfigMap, Object
from dpo_operator.view import owner_uid


def is_known(draft: Draft, name: str) -> bool:
    """Whether this pass knows if there is a ConfigMap of this name; if not, ask."""
    if draft.view.observed.config_map is not None or name in draft.view.observed.absent:
        return True
    draft.act(LookUpConfigMap(name))
    return False


def name_taken(draft: Draft, found: Object) -> Obstacle | None:
    """Return the obstacle that a ConfigMap of another owner is."""
    if owner_uid(found) == draft.view.uid:
        return None
    return obstacles.name_taken("ConfigMap", found["metadata"]["name"])


def is_of_this_spec(draft: Draft, text: str) -> bool:
    """Whether a pinned text is the job's spec. Another version may have written it in another form."""
    try:
        return pytorchjob.spec_json(parse_job(json.loads(text), stored=True)) == pytorchjob.spec_json(draft.view.job)
    except (ValueError, ManifestError):
        return False


def adopt(draft: Draft) -> bool:
    """Take image, digest and launch contract from a ConfigMap that a new job finds; return whether they differ.

    The job was accepted before, with the same spec, and its status was lost.
    """
    found, accepted = draft.view.observed.config_map, draft.status.accepted_spec_digest
    if found is None or accepted is None or name_taken(draft, found) is not None:
        return False
    text = pytorchjob.pinned_spec(found)
    if not is_of_this_spec(draft, text):
        return False
    former = draft.status
    draft.update(
        image=pytorchjob.pinned_image(found) or former.image,
        accepted_spec_digest=pytorchjob.digest(text),
        launch_contract=pytorchjob.pinned_contract(found),
    )
    return draft.status != former


def launch(draft: Draft) -> Launch:
    """Return what an accepted job has pinned of its command line."""
    return Launch(draft.status.launch_contract or FIRST, draft.status.accepted_spec_digest)


def ensure(draft: Draft, name: str) -> Obstacle | None:
    """Create an accepted job's ConfigMap if there is none. Return what prevents that, or is wrong with the one there.

    A job that version 0.1.0 accepted has no digest; its spec could not be edited since.
    """
    view, accepted = draft.view, draft.status.accepted_spec_digest
    found = view.observed.config_map
    if found is not None:
        held = pytorchjob.digest(pytorchjob.pinned_spec(found))
        if (taken := name_taken(draft, found)) is not None:
            return taken
        if accepted is not None and held != accepted:
            text = f"ConfigMap {name} does not hold the accepted spec: its digest is {held}, and {accepted} was"
            return Reason.PinnedSpecChanged, f"{text} accepted. Delete it: the operator makes it again."
        return None
    refusal = view.observed.refusals.get(name)
    if refusal is not None:
        return obstacles.refused("ConfigMap", name, refusal)
    image, contract = str(draft.status.image), launch(draft).contract
    body = pytorchjob.build_config_map(view.job, view.identity, image, draft.settings, contract)
    made = pytorchjob.digest(pytorchjob.pinned_spec(body))
    if accepted is not None and made != accepted:
        text = f"ConfigMap {name} is gone, and the DPOJob no longer gives the accepted spec: its digest is {made},"
        return Reason.PinnedSpecChanged, f"{text} and {accepted} was accepted. Create the DPOJob again."
    draft.act(CreateConfigMap(body))
    return None
