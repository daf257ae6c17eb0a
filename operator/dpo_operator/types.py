"""The input and output of a pass: the interface between the pure ``reconcile`` and ``runtime``.

How ``runtime`` runs a pass:

1. Fill an ``Observed`` from the caches and call ``reconcile(observed, now, settings)``.
2. Perform ``Decision.actions`` in order. All of them are safe to repeat.
3. If an action returns new information, add it to the ``Observed`` and go to 1 at once (a few rounds at most, then the
   queue's back-off). The rest of the old decision, including its status, is dropped:
   - ``CreateConfigMap``, ``CreateNetworkPolicy`` or ``CreateChild`` answered 409 AlreadyExists: GET the object; put it
     into ``config_map``, ``network_policy`` or ``children``, whatever its owner: reconcile adopts it, waits or refuses
     it.
   - an action answered 400, 403, 404 or 422: add a ``Refusal`` under the object's name to ``refusals``.
   - ``CheckChild`` (a dry run) answered: put the ``ChildCheck`` into ``check``. 409 counts as accepted: names
     are checked last.
   - ``LookUpChild`` or ``LookUpConfigMap`` answered: add the object to ``children`` or put it into ``config_map``, or
     add its name to ``absent``.
   404 for a delete, and 409 for an event, are successes. 429, 5xx and lost connections: drop the decision, back off.
   ``config_map``, ``network_policy``, ``check``, ``absent`` and ``refusals`` belong to one pass; the next pass starts
   with them empty (but see 6).
4. ``PatchStatus`` is the last action and carries the resourceVersion; on 409 drop it and reconcile the newer object.
   If it is refused because the object is too large, set ``status_limit`` to ``size.smaller`` of it and go to 1 at once.
5. With ``Decision.follow``, put the stored DPOJob into the ``Observed`` and go to 1 at once; perform ``Decision.later``
   before that round's actions.
6. Call again after ``Decision.wake`` seconds, or as soon as anything about the job changes. Tell the next pass when the
   status was last written. With ``Decision.delayed``, it must also see the pods that were deleted since, and a
   NetworkPolicy that was created: no status names them yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_api.progress import Progress

Object = Mapping[str, Any]
"""A Kubernetes object as JSON holds it."""


@dataclass(frozen=True)
class Refusal:
    """A request that the API server refused. Retryable errors are never refusals."""

    code: int
    """HTTP status: 400, 403, 404 or 422."""
    message: str
    """The server's message."""


@dataclass(frozen=True)
class ChildCheck:
    """The result of creating the PyTorchJob with a dry run."""

    generation: int
    """metadata.generation of the DPOJob that it was made for."""
    refusal: Refusal | None = None
    """None: the API server accepts it."""


@dataclass(frozen=True)
class Scrape:
    """Rank 0's newest response to GET /status, or why there is none."""

    at: float
    """Time of the request, Unix seconds."""
    child: str
    """Name of the PyTorchJob whose rank 0 was asked."""
    progress: Progress | None = None
    error: str = ""
    """Why there is no progress, in one sentence."""


@dataclass(frozen=True)
class ScrapeTarget:
    """Where to GET /status."""

    child: str
    namespace: str
    pod: str
    ip: str
    port: int
    https: bool = False
    """Whether the pod was created with a certificate and a token."""


@dataclass(frozen=True)
class Observed:
    """The input of a pass. Caches may lag: reconcile never deletes or repeats anything on their evidence alone."""

    job: Object
    """The DPOJob with metadata, spec and status."""
    children: Sequence[Object] = ()
    """PyTorchJobs of the job's namespace with its label ``dpo-operator.dev/job``, of any owner."""
    pods: Sequence[Object] = ()
    """Pods of the job's namespace with that label, of any attempt and any owner."""
    events: Sequence[Object] = ()
    """Core v1 Events about those children and pods, as far as they are known. Only their messages are used."""
    config_map: Object | None = None
    """The job's ConfigMap, of any owner, once a request has found it."""
    network_policy: Object | None = None
    """Set after CreateNetworkPolicy found one that exists already, or created one that no stored status names yet."""
    check: ChildCheck | None = None
    absent: frozenset[str] = frozenset()
    """Names of PyTorchJobs, and of the ConfigMap, that a GET (not a cache) did not find."""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By object name: what the API server refused in this pass."""
    status_limit: int | None = None
    """Bytes that the status may have, once the API server has refused a larger one in this pass."""
    scrape: Scrape | None = None
    backend_installed: bool = True
    """Whether the cluster serves PyTorchJob."""
    written: float | None = None
    """Time of this operator's last write of the job's status, Unix seconds; None if it has made none."""


@dataclass(frozen=True)
class CreateConfigMap:
    """POST the ConfigMap that pins spec and image."""

    body: dict[str, Any]


@dataclass(frozen=True)
class CreateNetworkPolicy:
    """POST the NetworkPolicy that restricts who reaches a job's pods."""

    body: dict[str, Any]


@dataclass(frozen=True)
class CheckChild:
    """POST the PyTorchJob with dryRun=All and fieldValidation=Strict."""

    body: dict[str, Any]
    generation: int
    likeness: str
    """Equal for PyTorchJobs that get the same answer: after one was accepted, others need no request for a while."""


@dataclass(frozen=True)
class CreateChild:
    """POST the PyTorchJob."""

    body: dict[str, Any]


@dataclass(frozen=True)
class LookUpChild:
    """GET a PyTorchJob that is not in the cache."""

    name: str


@dataclass(frozen=True)
class LookUpConfigMap:
    """GET the job's ConfigMap."""

    name: str


@dataclass(frozen=True)
class DeleteChild:
    """DELETE a PyTorchJob in the background, if it still has this UID."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """DELETE the DPOJob itself in the background, if it still has this UID (TTL)."""

    name: str
    uid: str


@dataclass(frozen=True)
class EmitEvent:
    """POST a core v1 Event; its name is deterministic, so 409 means that it exists already."""

    body: dict[str, Any]


@dataclass(frozen=True)
class PatchStatus:
    """Merge-PATCH of the status subresource; carries metadata.resourceVersion."""

    body: dict[str, Any]


Action = (
    CreateConfigMap
    | CreateNetworkPolicy
    | CheckChild
    | CreateChild
    | LookUpChild
    | LookUpConfigMap
    | DeleteChild
    | DeleteJob
    | EmitEvent
    | PatchStatus
)


@dataclass(frozen=True)
class Decision:
    """The output of a pass."""

    actions: tuple[Action, ...] = ()
    """In order. Events precede the status that they report, unless ``follow``; at most one PatchStatus, the last."""
    status: dict[str, Any] = field(default_factory=dict)
    """The whole status after PatchStatus, as JSON; the stored one if there is no PatchStatus."""
    wake: float | None = None
    """Seconds until the next pass is due even if nothing changes; None: only a change matters."""
    scrape: ScrapeTarget | None = None
    """The pod to ask for progress; None: no pod."""
    follow: bool = False
    """Whether the next step only waits for the status to be stored: another round may run at once."""
    later: tuple[EmitEvent, ...] = ()
    """With ``follow``: events of the stored status, for the start of that round, whose objects do not wait for them."""
    delayed: bool = False
    """Whether the status is to be written by a later pass, which must see again all that this one saw."""
