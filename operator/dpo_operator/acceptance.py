"""Whether a job is accepted: all errors are reported at once, and nothing is created until there are none.

A rejected job has ended, but its spec can still be edited: then it is judged again. At acceptance the status gets the
digest of the spec, from which point the API server refuses edits; ``pinning`` then makes the ConfigMap.
"""

from __future__ import annotations

from dpo_api.findings import Finding, ManifestError
from dpo_api.status import ConditionType
from dpo_api.validation import check
from dpo_operator import conditions, ends, names, pinning
from dpo_operator.backend import pytorchjob
from dpo_operator.backend.launch import CONTRACTS, FIRST, NEWEST
from dpo_operator.creation import RETRY_SECONDS
from dpo_operator.draft import Draft
from dpo_operator.reasons import Reason
from dpo_operator.texts import clean
from dpo_operator.types import CheckChild, Refusal

INVALID = frozenset({400, 422})
"""HTTP status codes of an invalid object. 403 is about permissions, quotas and policies."""

DENIALS = ("denied the request", "denied request")
"""Words of admission webhooks and ValidatingAdmissionPolicies, which answer 400 or 422 too. A policy may be relaxed; an
invalid object stays invalid."""


def is_accepted(draft: Draft) -> bool:
    """Whether the stored status says that the job was accepted."""
    status = draft.view.status
    accepted = conditions.holds(status.conditions, ConditionType.Accepted)
    return accepted and status.config_map is not None and status.image is not None


def is_corrected(draft: Draft) -> bool:
    """Whether a rejected job was edited since: it is judged again."""
    judged = conditions.find(draft.view.status.conditions, ConditionType.Accepted)
    return not is_accepted(draft) and (judged is None or judged.observed_generation != draft.view.generation)


def reopen(draft: Draft) -> None:
    """Forget the rejection of a job that was edited."""
    ends.reopen(draft)
    draft.update(conditions=conditions.without(draft.status.conditions, ConditionType.Accepted))


def is_newer(draft: Draft) -> bool:
    """Report a job that a newer operator accepted, whose command line this one cannot write; return whether it is."""
    contract = draft.view.status.launch_contract or FIRST
    if not is_accepted(draft) or contract in CONTRACTS:
        return False
    text = f"A newer operator accepted the job with launch contract {contract}, which this one does not know."
    _leave(draft, f"{text} It does not touch the job.")
    return True


def _leave(draft: Draft, text: str) -> None:
    draft.update(message=clean(text, 4000))
    draft.condition(ConditionType.Progressing, "False", Reason.SpecUnreadable, text)


def unreadable(draft: Draft, error: ManifestError) -> None:
    """Report a spec that cannot be parsed: a mistake in it or, after acceptance, an operator that is too old."""
    if is_accepted(draft):
        _leave(draft, f"This operator cannot read the accepted spec and does not touch the job: {error}")
    else:
        _reject(draft, Reason.Rejected, list(error.findings))


def accept(draft: Draft) -> bool:
    """Accept the job, or report why not. Return whether the stored status says that it is accepted."""
    if is_accepted(draft):
        return True
    found = check(draft.view.spec, on_cluster=True)
    wrong = [finding for finding in found if finding.level == "error"]
    if wrong:
        _reject(draft, Reason.Rejected, wrong)
    elif not draft.view.observed.backend_installed:
        text = "The cluster has no PyTorchJob resource: install training-operator v1. The job then continues by itself."
        _wait(draft, Reason.PyTorchJobMissing, text)
    elif (pinned := _to_pin(draft)) is not None:
        _accept(draft, *pinned, [finding for finding in found if finding.level == "warning"])
    return False


def _to_pin(draft: Draft) -> tuple[str, str, int] | None:
    """Return the image, the text of the spec and the launch contract to pin; None if the job cannot be accepted yet."""
    view = draft.view
    name = names.config_map(view.name, view.uid)
    image = view.spec.image or draft.settings.trainer_image
    # A job with PyTorchJobs was accepted before, and its status was lost. Any other one finds an earlier ConfigMap when
    # it creates its own.
    if view.children and not pinning.is_known(draft, name):
        return None
    before = view.observed.config_map
    if before is None:
        return (image, pytorchjob.spec_json(view.job), NEWEST) if _passes(draft, image) else None
    if (taken := pinning.name_taken(draft, before)) is not None:
        _wait(draft, *taken)
        return None
    text = pytorchjob.pinned_spec(before)
    if pinning.is_of_this_spec(draft, text):
        return pytorchjob.pinned_image(before) or image, text, pytorchjob.pinned_contract(before)
    lost = f"The job's status was lost, and its ConfigMap {name} holds another spec than the DPOJob."
    _wait(draft, Reason.PinnedSpecChanged, f"{lost} Delete the ConfigMap to accept this spec.")
    return None


def _accept(draft: Draft, image: str, text: str, contract: int, warnings: list[Finding]) -> None:
    view = draft.view
    draft.update(
        image=image,
        config_map=names.config_map(view.name, view.uid),
        accepted_spec_digest=pytorchjob.digest(text),
        launch_contract=contract,
        nodes=view.spec.resources.nodes,
        run_directory=view.spec.checkpoint.uri,
        restarts=draft.status.restarts or 0,
        charged_restarts=draft.status.charged_restarts or 0,
    )
    doubts = ["Warnings:", *(f"{finding}." for finding in warnings)] if warnings else []
    said = " ".join(["The spec is valid. Image and spec are pinned.", *doubts])
    draft.condition(ConditionType.Accepted, "True", Reason.Accepted, said)
    draft.place("Pending", Reason.Accepted, said)
    draft.follow()  # the ConfigMap must not be created for a spec that was edited meanwhile


def _wait(draft: Draft, reason: Reason, text: str) -> None:
    """Report what keeps a job from being accepted; it is tried again."""
    draft.place("Pending", reason, text, progressing=False)
    draft.wake_in(RETRY_SECONDS)


def _passes(draft: Draft, image: str) -> bool:
    """Whether the API server accepts the PyTorchJob; only it can check open fields such as affinity and volumes."""
    if not _is_checked(draft, image):
        return False
    answer = draft.view.observed.check
    assert answer is not None  # noqa: S101 - it is checked
    if answer.refusal is None:
        return True
    if _is_invalid(answer.refusal):
        found = Finding("error", "spec.podTemplate", f"rejected by the API server: {answer.refusal.message}")
        _reject(draft, Reason.ChildInvalid, [found])
    else:
        text = f"The API server refused to create this job's objects: {clean(answer.refusal.message, 2000)}"
        _wait(draft, Reason.ChildRefused, text)
    return False


def _is_checked(draft: Draft, image: str) -> bool:
    """Whether this pass knows if the API server accepts the PyTorchJob; if not, ask."""
    view, answer = draft.view, draft.view.observed.check
    if answer is not None and answer.generation == view.generation:
        return True
    body = pytorchjob.build_child(view.job, view.identity, 1, image, draft.settings)
    likeness = pytorchjob.likeness(view.job, view.identity, image, draft.settings)
    draft.act(CheckChild(body, view.generation, likeness))
    return False


def _is_invalid(refusal: Refusal) -> bool:
    """Whether the PyTorchJob is invalid, as opposed to refused by a policy that may change."""
    return refusal.code in INVALID and not any(words in refusal.message for words in DENIALS)


def _reject(draft: Draft, reason: Reason, findings: list[Finding]) -> None:
    count = "1 error" if len(findings) == 1 else f"{len(findings)} errors"
    text = f"{count}: " + "; ".join(str(finding) for finding in findings)
    draft.condition(ConditionType.Accepted, "False", reason, text)
    ends.reject(draft, reason, text)
    draft.wake_in(0)
