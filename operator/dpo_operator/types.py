"""What one pass looks at and what it decides: the seam between the pure reconcile and the process around it.

How the process runs a pass:

1. Fill an ``Observed`` from its caches and call ``reconcile(observed, now, settings)``.
2. Perform ``Decision.actions`` in order. All of them are safe to repeat.
3. Where an action brings news, put the news into the ``Observed`` and go to 1 at once (a few rounds at most, then the
   queue's back-off); the rest of the old decision, its status included, is dropped:
   - ``CreateConfigMap`` or ``CreateChild`` answered 409 AlreadyExists: GET the object; put it into ``config_map`` or
     ``children`` (whoever owns it: reconcile adopts, waits or refuses).
   - an action answered 400, 403, 404 or 422: add a ``Refusal`` under the object's name to ``refusals``.
   - ``CheckChild`` (a dry run) answered: put the ``ChildCheck`` into ``check``. 409 counts as yes: names are looked
     at last.
   - ``LookUpChild`` answered: add the object to ``children``, or its name to ``absent``.
   404 for a delete, and 409 for an event, are successes. 429, 5xx and lost connections: drop the decision, back off.
   ``config_map``, ``check``, ``absent`` and ``refusals`` hold the news of this round alone; the next one starts empty.
4. ``PatchStatus`` is the last action and carries the resourceVersion; on 409 drop it and reconcile the newer object.
5. Call again after ``Decision.wake`` seconds, or as soon as anything about the job changes.
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
    """The API server's no to a request. Never its retryable errors."""

    code: int
    """HTTP status: 400, 403, 404 or 422."""
    message: str
    """The server's own words."""


@dataclass(frozen=True)
class ChildCheck:
    """What a dry-run create of the child said."""

    generation: int
    """metadata.generation of the DPOJob that it was made for."""
    refusal: Refusal | None = None
    """None: the child would be admitted."""


@dataclass(frozen=True)
class Scrape:
    """The newest answer of rank 0 to GET /status, or the lack of one."""

    at: float
    """When it was asked, Unix seconds."""
    child: str
    """Name of the child whose rank 0 was asked."""
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


@dataclass(frozen=True)
class Observed:
    """Everything that a pass looks at. Caches may lag: reconcile never destroys or repeats on a cache's word alone."""

    job: Object
    """The DPOJob with metadata, spec and status."""
    children: Sequence[Object] = ()
    """PyTorchJobs of the job's namespace with its label ``dpo-operator.dev/job``, of any owner."""
    pods: Sequence[Object] = ()
    """Pods of the job's namespace with that label, of any attempt and any owner."""
    events: Sequence[Object] = ()
    """Core v1 Events about those children and pods, as far as they are known; only words are taken from them."""
    config_map: Object | None = None
    """Set after CreateConfigMap met one that exists already."""
    check: ChildCheck | None = None
    absent: frozenset[str] = frozenset()
    """Names of children that a GET (not a cache) has just not found."""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By object name: what the API server refused in this round."""
    scrape: Scrape | None = None
    backend_installed: bool = True
    """Whether the cluster knows the child's kind (PyTorchJob)."""


@dataclass(frozen=True)
class CreateConfigMap:
    """POST the ConfigMap that pins spec and image."""

    body: dict[str, Any]


@dataclass(frozen=True)
class CheckChild:
    """POST the child with dryRun=All and fieldValidation=Strict."""

    body: dict[str, Any]
    generation: int


@dataclass(frozen=True)
class CreateChild:
    """POST the child."""

    body: dict[str, Any]


@dataclass(frozen=True)
class LookUpChild:
    """GET a child that the cache does not show."""

    name: str


@dataclass(frozen=True)
class DeleteChild:
    """DELETE a child in the background, only while it has this UID."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """DELETE the DPOJob itself in the background, only while it has this UID (TTL)."""

    name: str
    uid: str


@dataclass(frozen=True)
class EmitEvent:
    """POST a core v1 Event; its name is deterministic, so that 409 means it was told before."""

    body: dict[str, Any]


@dataclass(frozen=True)
class PatchStatus:
    """Merge-PATCH of the status subresource; carries metadata.resourceVersion."""

    body: dict[str, Any]


Action = CreateConfigMap | CheckChild | CreateChild | LookUpChild | DeleteChild | DeleteJob | EmitEvent | PatchStatus


@dataclass(frozen=True)
class Decision:
    """What one pass wants done."""

    actions: tuple[Action, ...] = ()
    """In this order; events before the status that they tell of, at most one PatchStatus, as the last."""
    status: dict[str, Any] = field(default_factory=dict)
    """The whole status that PatchStatus leads to, as JSON; the present one where there is no PatchStatus."""
    wake: float | None = None
    """Seconds until the next pass is due even if nothing changes; None: only a change matters."""
    scrape: ScrapeTarget | None = None
    """Whom to ask for progress; None: nobody is to be asked."""
