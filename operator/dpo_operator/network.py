"""The NetworkPolicy of a job exists before its pods do; a job of an earlier version gets it while it runs."""

from __future__ import annotations

from dpo_api.status import ConditionType
from dpo_operator import invariants, obstacles
from dpo_operator.backend.network import build_network_policy
from dpo_operator.draft import Draft
from dpo_operator.obstacles import Obstacle
from dpo_operator.types import CreateNetworkPolicy
from dpo_operator.view import owner_uid

RETRY_SECONDS = 60.0
"""Delay before the next try after a refusal."""


def create(draft: Draft) -> Obstacle | None:
    """Create the job's NetworkPolicy, or adopt the one that exists; return why there is none.

    It is created again before every attempt, so that one that was deleted is back.
    """
    if not draft.settings.network_policies:
        return None
    body = build_network_policy(draft.view.identity, draft.settings)
    name = str(body["metadata"]["name"])
    refusal, found = draft.view.observed.refusals.get(name), draft.view.observed.network_policy
    if refusal is not None:
        return obstacles.refused("NetworkPolicy", name, refusal)
    if found is None:
        draft.act(CreateNetworkPolicy(body))
    elif owner_uid(found) != draft.view.uid:
        return obstacles.name_taken("NetworkPolicy", name)
    draft.update(network_policy=name)
    invariants.withdraw(draft, (ConditionType.NetworkRestricted,))
    return None


def cover(draft: Draft) -> None:
    """Create the NetworkPolicy of a job that already runs, if its status does not name the one that it should have.

    That is a job of an earlier version, or of other settings. The job continues even if there can be none.
    """
    if not draft.settings.network_policies:
        return
    if draft.status.network_policy == build_network_policy(draft.view.identity, draft.settings)["metadata"]["name"]:
        return
    obstacle = create(draft)
    if obstacle is not None:
        reason, text = obstacle
        text = f"{text} Other pods of the cluster can connect to this job's pods."
        draft.condition(ConditionType.NetworkRestricted, "False", reason, text)
        draft.wake_in(RETRY_SECONDS)
