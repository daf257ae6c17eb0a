"""Who may read /metrics: the API server checks the bearer token (TokenReview) and the right (SubjectAccessReview)."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_operator.runtime.client import ApiError, Client, Unreachable

TOKEN_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105 - a path, no password
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"

KEPT_SECONDS = 60.0
"""How long an answer is used again: a scrape must not cost two requests each time."""
_KEPT = 256


@dataclass(frozen=True)
class Answer:
    """What a client gets instead of the metrics."""

    status: int
    """HTTP: 401 without a valid token, 403 without the right, 503 where the API server does not answer."""
    text: str


class Gate:
    """Checks one request after the other. Answers are kept for a minute, by the token's digest."""

    def __init__(self, client: Client, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Ask through ``client``, whose account needs the rights of ``rbac.AUTHENTICATION``."""
        self._client = client
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[float, Answer | None]] = OrderedDict()

    async def refuses(self, authorization: str, path: str) -> Answer | None:
        """Return why a GET of ``path`` is refused, or None. ``authorization``: the header of this name."""
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return Answer(401, "send a service account's token: Authorization: Bearer TOKEN")
        key = (hashlib.sha256(token.encode()).hexdigest(), path)
        now = self._clock()
        known = self._known.get(key)
        if known is not None and now - known[0] < KEPT_SECONDS:
            return known[1]
        try:
            answer = await self._ask(token, path)
        except (ApiError, Unreachable) as error:
            return Answer(503, f"the API server cannot check the token: {error}")
        self._known[key] = (now, answer)
        self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return answer

    async def _ask(self, token: str, path: str) -> Answer | None:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        found: dict[str, Any] = (await self._client.request("POST", TOKEN_REVIEWS, review)).get("status") or {}
        if not found.get("authenticated"):
            return Answer(401, "the token is not valid")
        user: dict[str, Any] = found.get("user") or {}
        spec = {"user": user.get("username"), "nonResourceAttributes": {"path": path, "verb": "get"}}
        spec |= {name: user[name] for name in ("uid", "groups", "extra") if user.get(name)}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        allowed = (await self._client.request("POST", ACCESS_REVIEWS, review)).get("status") or {}
        if allowed.get("allowed"):
            return None
        return Answer(
            403, f"{user.get('username')} cannot get the nonResourceURL {path}: bind a ClusterRole that allows it"
        )
