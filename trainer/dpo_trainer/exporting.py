"""The aligned model leaves: a Hugging Face folder, and with LoRA the adapter as a PEFT folder."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dpo_api.spec import DPOJobSpec
from dpo_store import Store, join_uri, local_path_of
from dpo_trainer.data.tokenizer import fetch_tokenizer
from dpo_trainer.distributed import World
from dpo_trainer.formats.export import export
from dpo_trainer.formats.peft import export_adapter
from dpo_trainer.model.lora import merged_value
from dpo_trainer.sources import store_for

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

Place = tuple[Store, str]
"""A folder and the store that reaches it."""


def export_model(model: Any, spec: DPOJobSpec, world: World, source: Place, target: Place) -> None:
    """Write the result from rank 0: with LoRA merged (unless ``output.merge`` is false) and as an adapter.

    An interrupted export is written again from the last checkpoint: only export.json says that it is whole.
    """
    if not world.is_main:
        return
    store, uri = target
    _remove_earlier(store, uri)
    folder = local_path_of(uri)
    scratch = tempfile.TemporaryDirectory(prefix="dpo-export-") if folder is None else nullcontext(str(folder))
    with scratch as name:
        path = Path(name)
        path.mkdir(parents=True, exist_ok=True)
        write_formats(model, spec, source, path)
        if folder is None:
            store.upload_tree(path, uri + "/")


def _remove_earlier(store: Store, uri: str) -> None:
    """Delete the weights of an earlier export to the same place.

    Another number of files, or no adapter this time, would leave old ones beside the new, and readers differ in which
    of model.safetensors and an index they take.
    """
    for name in store.children(uri + "/"):
        if _WEIGHTS.fullmatch(name):
            store.delete(join_uri(uri, name))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        store.delete(join_uri(uri, f"adapter/{name}"))


def write_formats(model: Any, spec: DPOJobSpec, source: Place, folder: Path) -> None:
    """Write what the spec asks for into a local folder."""
    store, base = source
    lora = spec.lora
    wanted = set(spec.output.formats)
    if "formats" not in spec.output.model_fields_set:
        wanted.add("peft")
    if "huggingFace" in wanted and (lora is None or spec.output.merge):
        with _tokenizer(spec) as tokenizer:
            export(
                model,
                store,
                base,
                folder,
                dtype=_DTYPES[spec.output.dtype] if spec.output.dtype else None,
                tokenizer=tokenizer,
                value_of=merged_value(model) if lora is not None else None,
            )
    if lora is not None and "peft" in wanted:
        export_adapter(model, lora, base, folder / "adapter")


@contextmanager
def _tokenizer(spec: DPOJobSpec) -> Iterator[str | None]:
    """A local folder with the tokenizer's files where it is not the model's own: it has its own access settings."""
    if spec.tokenizer is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dpo-tokenizer-") as name:
        yield str(fetch_tokenizer(store_for(spec, spec.tokenizer.storage), spec.tokenizer.uri, Path(name)))
