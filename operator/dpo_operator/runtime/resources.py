"""The kinds of objects that the process reads and writes, and where the API server keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_operator.labels import JOB


@dataclass(frozen=True)
class Resource:
    """One kind of object."""

    group: str
    """API group; empty for the core group."""
    version: str
    plural: str
    selector: str = ""
    """Label selector that every list and watch of it uses."""

    @property
    def api(self) -> str:
        """Path of the group and version, under which discovery lists the kind."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """Return the path of a collection, an object or a subresource."""
        scope = f"/namespaces/{namespace}" if namespace is not None else ""
        tail = f"/{name}" if name is not None else ""
        return f"{self.api}{scope}/{self.plural}{tail}" + (f"/{subresource}" if subresource else "")


JOBS = Resource("dpo-operator.dev", "v1alpha1", "dpojobs")
CHILDREN = Resource("kubeflow.org", "v1", "pytorchjobs", selector=JOB)
PODS = Resource("", "v1", "pods", selector=JOB)
CONFIG_MAPS = Resource("", "v1", "configmaps")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")
EVENTS = Resource("", "v1", "events")

WATCHED = (JOBS, CHILDREN, PODS)
