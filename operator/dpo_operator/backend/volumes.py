"""What a trainer pod mounts: spec, shared memory, scratch, claims, certificates, credentials and the identity token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpo_api.cluster import uris
from dpo_api.spec import CABundle, DPOJobSpec, StorageAccess
from dpo_operator.config import Settings

SPEC_FOLDER = "/etc/dpo/spec"
SPEC_FILE = "spec.json"
IMAGE_KEY = "image"
CONTRACT_KEY = "launchContract"
SCRATCH = "/tmp"  # noqa: S108 - an emptyDir of the pod
"""HOME, TMPDIR and cache: the one writable place under a read-only root."""
CACHE = "/cache"
CLAIMS = "/mnt/claims"
CREDENTIALS = "/etc/dpo/credentials"
CERTIFICATES = "/etc/dpo/ca"
METRICS = "/etc/dpo/metrics"
METRICS_KEYS = ("tls.crt", "tls.key", "token")
IDENTITY = "/var/run/secrets/dpo-operator/identity"

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
OPTIONAL_S3_KEYS = frozenset({"AWS_SESSION_TOKEN"})

INPUTS = ("spec.model", "spec.tokenizer", "spec.data")
"""Fields whose URIs are only read."""


@dataclass
class Mounts:
    """Volumes, mounts and environment variables of a container."""

    volumes: list[dict[str, Any]] = field(default_factory=list)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    env: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, path: str, source: dict[str, Any], *, read_only: bool = True) -> None:
        """Mount one volume at one path."""
        self.volumes.append({"name": name, **source})
        self.mounts.append({"name": name, "mountPath": path} | ({"readOnly": True} if read_only else {}))

    def set(self, name: str, value: str) -> None:
        """Set one environment variable."""
        self.env.append({"name": name, "value": value})

    def from_secret(self, variable: str, secret: str, key: str, *, optional: bool = False) -> None:
        """Take one environment variable from a Secret's key; its value never passes through the operator."""
        reference: dict[str, Any] = {"name": secret, "key": key} | ({"optional": True} if optional else {})
        self.env.append({"name": variable, "valueFrom": {"secretKeyRef": reference}})


def mounts_of(spec: DPOJobSpec, config_map: str, settings: Settings) -> Mounts:
    """Return everything that the trainer's container mounts, and the variables that give the paths."""
    found = Mounts()
    items = [{"key": SPEC_FILE, "path": SPEC_FILE}]
    found.add("spec", SPEC_FOLDER, {"configMap": {"name": config_map, "items": items}})
    default_shm = settings.default_gpu_shm if spec.resources.gpus_per_node else settings.default_shm
    memory = {"medium": "Memory", "sizeLimit": spec.resources.shm or default_shm}
    found.add("shm", "/dev/shm", {"emptyDir": memory}, read_only=False)  # noqa: S108
    scratch = {} if spec.resources.scratch is None else {"sizeLimit": spec.resources.scratch}
    found.add("scratch", SCRATCH, {"emptyDir": scratch}, read_only=False)
    for name in ("HOME", "TMPDIR"):
        found.set(name, SCRATCH)
    found.set("USER", "dpo")  # an arbitrary UID has no passwd entry to take HOME from
    _cache(spec, found)
    _claims(spec, found)
    _credentials(spec, found)
    _certificates(spec, found)
    _identity(spec, settings, found)
    return found


def metrics_credentials(settings: Settings, found: Mounts) -> None:
    """Mount certificate, key and token of rank 0's HTTP server, if the installation has them."""
    if settings.trainer_metrics_secret:
        items = [{"key": key, "path": key} for key in METRICS_KEYS]
        found.add("metrics", METRICS, {"secret": {"secretName": settings.trainer_metrics_secret, "items": items}})
        found.set("DPO_METRICS_CREDENTIALS", METRICS)


def _cache(spec: DPOJobSpec, found: Mounts) -> None:
    claim, size = spec.storage.cache.claim, spec.storage.cache.size
    if claim is None and size is None:
        found.set("DPO_CACHE_DIR", f"{SCRATCH}/cache")
        return
    volume = {"emptyDir": {"sizeLimit": size}} if claim is None else {"persistentVolumeClaim": {"claimName": claim}}
    found.add("cache", CACHE, volume, read_only=False)
    found.set("DPO_CACHE_DIR", CACHE)


def _claims(spec: DPOJobSpec, found: Mounts) -> None:
    """Mount each claim of a pvc:// URI under its own name; those that only inputs name are read-only."""
    written: dict[str, bool] = {}
    for name, uri, _ in uris(spec):
        if uri.startswith("pvc://"):
            claim = uri.removeprefix("pvc://").partition("/")[0]
            written[claim] = written.get(claim, False) or not name.startswith(INPUTS)
    for index, claim in enumerate(sorted(written)):
        source = {"persistentVolumeClaim": {"claimName": claim}}
        found.add(f"claim-{index}", f"{CLAIMS}/{claim}", source, read_only=not written[claim])
    if written:
        found.set("DPO_PVC_ROOT", CLAIMS)


def accesses(spec: DPOJobSpec) -> list[StorageAccess]:
    """Return the `storage` sections of the sources and outputs that have one, in the order of their fields."""
    return [access for _, uri, access in uris(spec) if access is not None and uri.startswith("s3://")]


def _credentials(spec: DPOJobSpec, found: Mounts) -> None:
    """The job's keys and its token for the Hugging Face Hub become environment variables.

    Those of one source become files in a folder named after the Secret.

    For a ``credentialsSecretRef`` the trainer reads ``$DPO_CREDENTIALS_DIR/<name>/AWS_ACCESS_KEY_ID`` and so on, or
    the environment if there is no such folder.
    """
    common = spec.storage.credentials_secret_ref
    if common is not None:
        for key in S3_KEYS:
            found.from_secret(key, common.name, key, optional=key in OPTIONAL_S3_KEYS)
    token = spec.storage.hub.token_secret_ref
    if token is not None:
        found.from_secret("HF_TOKEN", token.name, token.key)
    own = {access.credentials_secret_ref.name for access in accesses(spec) if access.credentials_secret_ref is not None}
    own -= {common.name} if common is not None else set()
    for index, name in enumerate(sorted(own)):
        found.add(f"credentials-{index}", f"{CREDENTIALS}/{name}", {"secret": {"secretName": name}})
    if own:
        found.set("DPO_CREDENTIALS_DIR", CREDENTIALS)


def certificate_folder(bundle: CABundle) -> str | None:
    """Return where a bundle that comes from a ConfigMap or Secret is mounted; None for a path inside the image."""
    if bundle.config_map_ref is not None:
        return f"{CERTIFICATES}/configmap/{bundle.config_map_ref.name}"
    if bundle.secret_ref is not None:
        return f"{CERTIFICATES}/secret/{bundle.secret_ref.name}"
    return None


def _certificates(spec: DPOJobSpec, found: Mounts) -> None:
    """Mount every bundle at ``$DPO_CA_DIR/configmap|secret/<name>/<key>``; the job's own one also applies to S3."""
    common = spec.storage.ca_bundle
    bundles = [*([common] if common is not None else []), *(a.ca_bundle for a in accesses(spec) if a.ca_bundle)]
    keys: dict[str, tuple[CABundle, set[str]]] = {}
    for bundle in bundles:
        folder = certificate_folder(bundle)
        if folder is not None:
            keys.setdefault(folder, (bundle, set()))[1].add(bundle.key)
    for index, (folder, (bundle, wanted)) in enumerate(sorted(keys.items())):
        items = [{"key": key, "path": key} for key in sorted(wanted)]
        if bundle.config_map_ref is not None:
            source: dict[str, Any] = {"configMap": {"name": bundle.config_map_ref.name, "items": items}}
        else:
            assert bundle.secret_ref is not None  # noqa: S101 - a folder has one or the other
            source = {"secret": {"secretName": bundle.secret_ref.name, "items": items}}
        found.add(f"ca-{index}", folder, source)
    if keys:
        found.set("DPO_CA_DIR", CERTIFICATES)
    if common is not None:
        folder = certificate_folder(common)
        path = f"{folder}/{common.key}" if folder is not None else str(common.path)
        found.set("DPO_CA_BUNDLE", path)
        found.set("AWS_CA_BUNDLE", path)


def _identity(spec: DPOJobSpec, settings: Settings, found: Mounts) -> None:
    """A token for the cloud, not for the cluster's API, and only if the job names a service account.

    The variables of boto3 are set only if the job names a role: clouds that inject them (IRSA) do not change a pod in
    which one of them is already set.
    """
    if spec.service_account_name is None or not settings.identity_audience:
        return
    token = {
        "audience": settings.identity_audience,
        "expirationSeconds": settings.identity_token_seconds,
        "path": "token",
    }
    found.add("identity", IDENTITY, {"projected": {"sources": [{"serviceAccountToken": token}]}})
    named = {variable.name for variable in spec.pod_template.env}
    if "AWS_ROLE_ARN" in named and "AWS_WEB_IDENTITY_TOKEN_FILE" not in named:
        found.set("AWS_WEB_IDENTITY_TOKEN_FILE", f"{IDENTITY}/token")
