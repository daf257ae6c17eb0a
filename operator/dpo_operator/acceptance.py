"""Whether a job is accepted: all errors are reported at once, and nothing is created until there are none.

At acceptance image and spec are pinned in one immutable ConfigMap that every attempt uses.
"""

from __future__ import annotations

from dpo_api.findings import Finding, ManifestError
from dpo_api.status import ConditionType
from dpo_api.validation import check
from dpo_operator import conditions, names
from dpo_operator.backend import pytorchjob
from dpo_operator.creation import RETRY_SECONDS
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean
from dpo_operator.types import CheckChild, CreateConfigMap, Refusal
from dpo_operator.view import owner_uid

INVALID = frozenset({400, 422})
"""HTTP status codes of an invalid object. 403 is about permissions, quotas and policies."""

DENIALS = ("denied the request", "denied request")
"""Words of admission webhooks and ValidatingAdmissionPolicies, which answer 400 or 422 too. A policy may be relaxed; an
invalid object stays invalid."""


def is_accepted(draft: Draft) -> bool:
    """Whether the stored status says that the job was accepted."""
    accepted = conditions.holds(draft.status.conditions, ConditionType.Accepted)
    return accepted and draft.status.config_map is not None and draft.status.image is not None


def unreadable(draft: Draft, error: ManifestError) -> None:
    """Report a spec that cannot be parsed: a mistake in it or, after acceptance, an operator that is too old."""
    if is_accepted(draft):
        text = f"This operator cannot read the accepted spec and does not touch the job: {error}"
        draft.update(message=clean(text, 4000))
        draft.condition(ConditionType.Progressing, "False", Reason.SpecUnreadable, text)
    else:
        _reject(draft, Reason.Rejected, list(error.findings))


def accept(draft: Draft) -> bool:
    """Accept the job, or report why not; return whether it is accepted."""
    if is_accepted(draft):
        return True
    view = draft.view
    found = check(view.spec, on_cluster=True)
    wrong = [finding for finding in found if finding.level == "error"]
    if wrong:
        _reject(draft, Reason.Rejected, wrong)
        return False
    if not view.observed.backend_installed:
        text = "The cluster has no PyTorchJob resource: install training-operator v1. The job then continues by itself."
        draft.place("Pending", Reason.PyTorchJobMissing, text, progressing=False)
        draft.wake_in(RETRY_SECONDS)
        return False
    image = view.spec.image or draft.settings.trainer_image
    name = names.config_map(view.name, view.uid)
    pinned = view.observed.config_map
    if pinned is not None:
        if owner_uid(pinned) != view.uid:
            text = f"ConfigMap {name} already exists and belongs to another owner: delete it."
            draft.place("Pending", Reason.ChildNameTaken, text, progressing=False)
            draft.wake_in(RETRY_SECONDS)
            return False
        image = pytorchjob.pinned_image(pinned) or image
    elif not _passes(draft, image, name):
        return False
    else:
        draft.act(CreateConfigMap(pytorchjob.build_config_map(view.job, view.identity, image, draft.settings)))
    draft.update(
        image=image,
        config_map=name,
        nodes=view.spec.resources.nodes,
        run_directory=view.spec.checkpoint.uri,
        restarts=draft.status.restarts or 0,
        charged_restarts=draft.status.charged_restarts or 0,
    )
    doubts = [f"{finding}." for finding in found if finding.level == "warning"]
    text = " ".join(["The spec is valid. Image and spec are pinned.", *(["Warnings:"] if doubts else []), *doubts])
    draft.condition(ConditionType.Accepted, "True", Reason.Accepted, text)
    return True


def _passes(draft: Draft, image: str, name: str) -> bool:
    """Whether the API server accepts the PyTorchJob; only it can check open fields such as affinity and volumes."""
    view, answer = draft.view, draft.view.observed.check
    refusal = view.observed.refusals.get(name)
    if answer is None or answer.generation != view.generation:
        known = conditions.find(draft.status.conditions, ConditionType.Accepted)
        if (
            known is not None
            and known.reason == Reason.ChildInvalid.value
            and known.observed_generation == view.generation
        ):
            return False
        body = pytorchjob.build_child(view.job, view.identity, 1, image, draft.settings)
        draft.act(CheckChild(body, view.generation))
        return False
    if answer.refusal is not None and _is_invalid(answer.refusal):
        found = Finding("error", "spec.podTemplate", f"rejected by the API server: {answer.refusal.message}")
        _reject(draft, Reason.ChildInvalid, [found])
        return False
    refusal = answer.refusal or refusal
    if refusal is not None:
        text = f"The API server refused to create this job's objects: {clean(refusal.message, 2000)}"
        draft.place("Pending", Reason.ChildRefused, text, progressing=False)
        draft.wake_in(RETRY_SECONDS)
        return False
    return True


def _is_invalid(refusal: Refusal) -> bool:
    """Whether the PyTorchJob is invalid, as opposed to refused by a policy that may change."""
    return refusal.code in INVALID and not any(words in refusal.message for words in DENIALS)


def _reject(draft: Draft, reason: Reason, findings: list[Finding]) -> None:
    count = "1 error" if len(findings) == 1 else f"{len(findings)} errors"
    text = f"{count}: " + "; ".join(str(finding) for finding in findings)
    draft.condition(ConditionType.Accepted, "False", reason, text)
    draft.place("Rejected", reason, text, progressing=False)
