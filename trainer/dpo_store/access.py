"""How a spec's storage sections become the options of a store: one rule for the client and the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dpo_api.inputs import CABundle, Storage, StorageAccess
from dpo_store.options import StorageOptions

CA_BUNDLE = "DPO_CA_BUNDLE"
"""Environment variable with the path of the certificates that stand for ``spec.storage.caBundle``."""
CA_FOLDER = "DPO_CA_DIR"
"""Where a pod mounts certificates: ``$DPO_CA_DIR/configmap|secret/<name>/<key>``."""
CREDENTIALS_FOLDER = "DPO_CREDENTIALS_DIR"
"""Where a pod mounts the keys of Secrets other than the common one: ``$DPO_CREDENTIALS_DIR/<name>/``."""


def options_of(
    storage: Storage, own: StorageAccess | None = None, environment: Mapping[str, str] = os.environ
) -> StorageOptions:
    """Return how to reach a source or output with the section ``own``, completed by ``spec.storage``.

    The keys in the environment stand for ``spec.storage.credentialsSecretRef`` where that is set: then no other
    endpoint is shown them. Where it is not set they are the machine's own, and nobody has said whose.
    """
    access = storage.access(own)
    common, chosen = storage.credentials_secret_ref, access.credentials_secret_ref
    named = common is None or (chosen is not None and chosen.name == common.name)
    folder = None if chosen is None else _credentials(chosen.name, environment)
    return StorageOptions.of(
        access,
        ca_bundle=_certificates(storage, own, environment),
        credentials=folder,
        environment_keys=named or storage.is_reached_by(own),
    )


def _certificates(storage: Storage, own: StorageAccess | None, environment: Mapping[str, str]) -> str | None:
    """Return the path of the nearest section's certificates; else of the common ones."""
    bundles = [section.ca_bundle for section in (own, storage) if section is not None and section.ca_bundle is not None]
    paths = (_path(bundle, environment.get(CA_FOLDER)) for bundle in bundles)
    return next(filter(None, paths), environment.get(CA_BUNDLE))


def _path(bundle: CABundle, folder: str | None) -> str | None:
    """Return where a bundle's certificates are; None where nothing mounts them."""
    if bundle.path is not None or folder is None:
        return bundle.path
    kind, ref = ("configmap", bundle.config_map_ref) if bundle.config_map_ref else ("secret", bundle.secret_ref)
    return f"{folder}/{kind}/{ref.name}/{bundle.key}" if ref is not None else None


def _credentials(secret: str, environment: Mapping[str, str]) -> str | None:
    """Return the folder of a Secret's keys; None where nothing mounts it, as the common one."""
    root = environment.get(CREDENTIALS_FOLDER)
    folder = Path(root) / secret if root else None
    return str(folder) if folder is not None and folder.is_dir() else None
