"""Where a spec's inputs lie, and how they become what training needs: stores, tokenizer, indices."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dpo_api.errors import InvalidSpecError
from dpo_api.spec import CABundle, DPOJobSpec, StorageAccess
from dpo_store import StorageOptions, Store, open_store
from dpo_trainer.data.tokenizer import Tokenizer, fetch_tokenizer, load_tokenizer


def store_for(spec: DPOJobSpec, access: StorageAccess | None = None) -> Store:
    """The store of one source or output: its own access settings first, then spec.storage's.

    What a pod gets from ConfigMaps and Secrets is mounted: certificates at
    ``$DPO_CA_DIR/configmap|secret/<name>/<key>`` (``DPO_CA_BUNDLE`` names the common ones), keys of a source's own at
    ``$DPO_CREDENTIALS_DIR/<name>/``. Without these variables, as on one machine, boto3's usual chain has the keys.
    """
    sections = [section for section in (access, spec.storage) if section is not None]
    bundles = [_certificates(section.ca_bundle) for section in sections if section.ca_bundle is not None]
    bundle = next(filter(None, bundles), os.environ.get("DPO_CA_BUNDLE"))
    secrets = [s.credentials_secret_ref.name for s in sections if s.credentials_secret_ref is not None]
    return open_store(StorageOptions.of(*sections, ca_bundle=bundle, credentials=_credentials(secrets)))


def _certificates(bundle: CABundle) -> str | None:
    """Where a bundle's certificates are; None where nothing mounts them."""
    root = os.environ.get("DPO_CA_DIR")
    if bundle.path is not None or root is None:
        return bundle.path
    kind, ref = ("configmap", bundle.config_map_ref) if bundle.config_map_ref else ("secret", bundle.secret_ref)
    return f"{root}/{kind}/{ref.name}/{bundle.key}" if ref is not None else None


def _credentials(secrets: Sequence[str]) -> str | None:
    """The folder of the nearest Secret's keys; None where they are in the environment, as the common ones are."""
    root = os.environ.get("DPO_CREDENTIALS_DIR")
    folder = Path(root) / secrets[0] if root is not None and secrets else None
    return str(folder) if folder is not None and folder.is_dir() else None


def model_source(spec: DPOJobSpec) -> tuple[Store, str]:
    """The start model's store and folder."""
    source = spec.model.hugging_face
    if source is None:
        raise InvalidSpecError("spec.model: only huggingFace is implemented so far; convert the model to that form")
    return store_for(spec, source.storage), source.uri


def open_tokenizer(spec: DPOJobSpec) -> Tokenizer:
    """Fetch the tokenizer's files into a folder of this process and load them."""
    if spec.tokenizer is not None:
        store, uri = store_for(spec, spec.tokenizer.storage), spec.tokenizer.uri
    else:
        store, uri = model_source(spec)
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix=f"dpo-tokenizer-{name}-") as folder:
        fetched = fetch_tokenizer(store, uri, Path(folder))
        return load_tokenizer(fetched, chat_template=spec.chat_template, name=uri)
