"""A small, strict Kubernetes client for tests: JSON in, JSON out, and nothing retried behind one's back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import urllib3

Object = dict[str, Any]

DPOJOBS = ("dpo-operator.dev/v1alpha1", "dpojobs")
PYTORCHJOBS = ("kubeflow.org/v1", "pytorchjobs")
PODS = ("v1", "pods")
EVENTS = ("v1", "events")
CONFIGMAPS = ("v1", "configmaps")
NETWORK_POLICIES = ("networking.k8s.io/v1", "networkpolicies")


class ApiError(Exception):
    """The API server refused: ``status`` is the HTTP status, ``reason`` Kubernetes' word for it."""

    def __init__(self, status: int, reason: str, message: str, causes: Sequence[Object] = ()) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.causes = tuple(causes)
        self.status = status
        self.reason = reason
        self.message = message


def path_of(resource: tuple[str, str], namespace: str | None = None, name: str | None = None, sub: str = "") -> str:
    """Return the URL path of a collection or of one object: ("v1", "pods"), "ns", "a", "status" → …/pods/a/status."""
    version, plural = resource
    parts = ["api" if "/" not in version else "apis", version]
    if namespace is not None:
        parts += ["namespaces", namespace]
    parts.append(plural)
    if name is not None:
        parts.append(name)
    if sub:
        parts.append(sub)
    return "/" + "/".join(parts)


class Api:
    """One identity at one API server. Safe for use by several threads."""

    def __init__(self, url: str, ca: str | None = None, certificate: str | None = None, key: str | None = None) -> None:
        self.url = url
        self._pool = urllib3.PoolManager(
            maxsize=16, ca_certs=ca, cert_file=certificate, key_file=key, retries=False, timeout=30.0
        )

    def call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        content_type: str = "application/json",
        timeout: float = 30.0,
        **query: Any,
    ) -> Any:
        """Send one request; return the answer's JSON, or its text where it is none. Raises ApiError from 400 on."""
        url = self.url + path + ("?" + urlencode(query) if query else "")
        data = None if body is None else json.dumps(body).encode()
        answer = self._pool.request(
            method,
            url,
            body=data,
            headers={"Content-Type": content_type, "Accept": "application/json"},
            timeout=timeout,
        )
        text = answer.data.decode()
        try:
            parsed: Any = json.loads(text)
        except ValueError:
            parsed = text
        if answer.status >= 400:
            reason = parsed.get("reason", "") if isinstance(parsed, dict) else ""
            message = parsed.get("message", text) if isinstance(parsed, dict) else text
            causes = (parsed.get("details") or {}).get("causes") if isinstance(parsed, dict) else None
            raise ApiError(answer.status, reason or "", message, causes or ())
        return parsed

    def stream(self, url: str) -> Iterator[bytes]:
        """Yield the lines of a watch until the server ends it."""
        answer = self._pool.request("GET", url, preload_content=False, timeout=urllib3.Timeout(connect=5.0, read=None))
        rest = b""
        for part in answer.stream(65536):
            *lines, rest = (rest + part).split(b"\n")
            yield from lines

    def watch(self, resource: tuple[str, str], version: str) -> Iterator[Object]:
        """Yield what happens to all objects of a kind after ``version``, for 2 s. Raises ApiError if there is a gap."""
        query = f"watch=true&timeoutSeconds=2&resourceVersion={version}"
        for line in self.stream(f"{self.url}{path_of(resource)}?{query}"):
            event = json.loads(line)
            if event.get("type") not in {"ADDED", "MODIFIED", "DELETED"}:  # too old, or the CRD was changed
                raise ApiError(410, "Gone", f"the watch has a gap: {event}")
            yield event

    def get(self, resource: tuple[str, str], namespace: str | None, name: str) -> Object:
        found: Object = self.call("GET", path_of(resource, namespace, name))
        return found

    def find(self, resource: tuple[str, str], namespace: str | None, name: str) -> Object | None:
        """Return the object, or None if there is none."""
        try:
            return self.get(resource, namespace, name)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, resource: tuple[str, str], namespace: str | None = None, **query: Any) -> list[Object]:
        found: list[Object] = self.call("GET", path_of(resource, namespace), **query)["items"]
        return found

    def create(self, resource: tuple[str, str], namespace: str | None, body: Object) -> Object:
        made: Object = self.call("POST", path_of(resource, namespace), body)
        return made

    def patch(
        self, resource: tuple[str, str], namespace: str | None, name: str, body: Object, *, sub: str = ""
    ) -> Object:
        """Merge-patch an object, or one of its subresources."""
        done: Object = self.call(
            "PATCH", path_of(resource, namespace, name, sub), body, content_type="application/merge-patch+json"
        )
        return done

    def apply(self, resource: tuple[str, str], namespace: str | None, body: Object) -> Object:
        """Server-side apply, as `kubectl apply --server-side` does."""
        done: Object = self.call(
            "PATCH", path_of(resource, namespace, body["metadata"]["name"]), body,
            content_type="application/apply-patch+yaml", fieldManager="tests", force="true", fieldValidation="Strict",
        )  # fmt: skip
        return done

    def delete(self, resource: tuple[str, str], namespace: str | None, name: str, **options: Any) -> None:
        """Delete an object; one that is gone already is no error."""
        try:
            self.call(
                "DELETE", path_of(resource, namespace, name), {"apiVersion": "v1", "kind": "DeleteOptions", **options}
            )
        except ApiError as error:
            if error.status != 404:
                raise


PATIENCE = 4
"""Factor of every limit below: a busy machine makes nothing wrong, only slow."""


def eventually[T](
    look: Callable[[], T], *, until: Callable[[T], object] = bool, seconds: float = 30.0, what: str = ""
) -> T:
    """Call ``look`` until ``until`` of its result is true and return that result; fail with the last one seen.

    The limit only bounds a failing test; nothing is asserted about time.
    """
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    pause = 0.05
    while True:
        seen = look()
        if until(seen):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}; last seen: {_short(seen)}")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.25)  # many tests wait at once, and each look costs several processes milliseconds


def _short(seen: object) -> str:
    text = json.dumps(seen, default=str, indent=1) if isinstance(seen, dict | list) else repr(seen)
    return text if len(text) < 6000 else text[:6000] + "…"
