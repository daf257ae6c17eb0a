"""Opens a spec's inputs: the stores of its sources, the start model's folder and the tokenizer."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

from dpo_api.models import ModelConfig
from dpo_api.models.adapter import continued, read_adapter
from dpo_api.models.folder import Files
from dpo_api.models.start import check_tokenizer, start_model
from dpo_api.spec import DPOJobSpec, StorageAccess
from dpo_store import Store, open_store
from dpo_store.access import options_of
from dpo_store.cache import cache_folder
from dpo_trainer.data.tokens.tokenizer import Tokenizer, fetch_tokenizer, load_tokenizer
from dpo_trainer.formats.adapter import AdapterMatrices


def store_for(spec: DPOJobSpec, access: StorageAccess | None = None) -> Store:
    """Return the store of one source or output. Its own access settings take precedence over spec.storage."""
    return open_store(replace(options_of(spec.storage, access), hub_cache=str(cache_folder() / "hub")))


def model_source(spec: DPOJobSpec) -> tuple[Files, str]:
    """Return the start model as a Hugging Face folder: its files and its address."""
    return start_model(store_for(spec, spec.model.source.storage), spec.model)


def open_adapter(spec: DPOJobSpec, config: ModelConfig) -> AdapterMatrices | None:
    """Return the start model's adapter, if it has one, which fits the model.

    Raises NotFoundError or InvalidModelError for one that is absent, damaged or of another model.
    """
    source = spec.model.adapter
    if source is None:
        return None
    store = store_for(spec, source.storage)
    return AdapterMatrices(store, read_adapter(store, source.uri, config))


def settled(spec: DPOJobSpec, config: ModelConfig) -> DPOJobSpec:
    """Return the spec with the settings of the adapter that it continues, if it does.

    Raises what ``open_adapter`` raises, and InvalidSpecError for a setting that differs from the adapter's.
    """
    source, lora = spec.model.adapter, spec.lora
    if source is None or lora is None or not lora.continue_adapter:
        return spec
    adapter = read_adapter(store_for(spec, source.storage), source.uri, config)
    return spec.model_copy(update={"lora": continued(lora, adapter, config)})


def open_tokenizer(spec: DPOJobSpec) -> Tokenizer:
    """Download the tokenizer's files into a temporary folder and load them."""
    if spec.tokenizer is not None:
        store, uri = store_for(spec, spec.tokenizer.storage), spec.tokenizer.uri
        files: Files = store
    else:
        files, uri = model_source(spec)
        check_tokenizer(files, uri)
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix=f"dpo-tokenizer-{name}-") as folder:
        fetched = fetch_tokenizer(files, uri, Path(folder))
        return load_tokenizer(fetched, chat_template=spec.chat_template, name=uri)
