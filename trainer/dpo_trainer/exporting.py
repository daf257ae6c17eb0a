"""Exports the trained model as a Hugging Face folder, and with LoRA the adapter as a PEFT folder."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_api.models import read_config
from dpo_api.models.folder import Files
from dpo_api.models.megatron.checkpoint import LATEST
from dpo_api.spec import DPOJobSpec
from dpo_store import Store, join_uri
from dpo_trainer import messages
from dpo_trainer.convert.command import write_as
from dpo_trainer.convert.nemo import PARTS
from dpo_trainer.convert.whole import Whole
from dpo_trainer.data.tokens.tokenizer import fetch_tokenizer
from dpo_trainer.distributed import World
from dpo_trainer.formats.adapter import AdapterMatrices
from dpo_trainer.formats.export import OUTPUT_DTYPES, Collect, export
from dpo_trainer.formats.layout import Value
from dpo_trainer.formats.peft import export_adapter
from dpo_trainer.formats.start import StartWeights
from dpo_trainer.masters import Masters
from dpo_trainer.model.lora import adapters, merged_value
from dpo_trainer.sources import store_for

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of the files that hold a whole model's weights, and say which holds what."""

ADAPTER = "adapter"
"""The adapter's subfolder."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_CONVERTED = {"megatron": "megatron", "nemo": "model.nemo"}
"""Format → its name in the model's folder."""
_MARKS = {"megatron": f"megatron/{LATEST}", "nemo": "model.nemo"}
"""Format → what is written last."""

Place = tuple[Store, str]
"""A folder, and the store to access it with."""


class Result:
    """The weights after training, before they are rounded to the type that the model computes with.

    Trained weights are the optimizer's fp32 masters; frozen ones are the start model's bytes.
    """

    def __init__(self, model: Any, masters: Masters, start: StartWeights, *, lora: bool) -> None:
        """With LoRA, a collective over the data-parallel ranks, all of which get the adapters' (small) masters."""
        self.model, self._masters, self._start, self._lora = model, masters, start, lora
        matrices = [matrix for adapter in adapters(model) for matrix in adapter.parameters()]
        self._adapters: dict[Tensor, Tensor | None] = {matrix: masters.whole(matrix) for matrix in matrices}

    @property
    def collect(self) -> Collect | None:
        """For ``formats.export.export``: the masters, without LoRA."""
        return None if self._lora else self._masters.whole

    @property
    def value_of(self) -> Value | None:
        """For ``formats.export.export``: the merged weights, with LoRA."""
        return merged_value(self.model, base=self._frozen, trained=self.trained) if self._lora else None

    def trained(self, matrix: Tensor) -> Tensor:
        """Return the fp32 master of an adapter's matrix, on the matrix's device."""
        found = self._adapters[matrix]
        assert found is not None  # noqa: S101 - every rank has it
        return found.to(matrix.device)

    def _frozen(self, name: str, parameter: Tensor) -> Tensor:
        return self._start.value(name) if self._start.rounded(name) else parameter.detach()


def export_model(
    result: Result,
    spec: DPOJobSpec,
    world: World,
    source: tuple[Files, str],
    target: Place,
    below: AdapterMatrices | None = None,
) -> None:
    """Write the result: with LoRA merged (unless ``output.merge`` is false) and as an adapter.

    below: the start model's own adapter, which the written one then contains. A collective; when it returns, all is
    written. An interrupted export is written again from the last checkpoint; export.json marks a complete one.
    """
    store, uri = target
    messages.agreed(lambda: _remove_earlier(store, uri))
    source_store, base = source
    whole, adapter = forms_of(spec)
    if whole:
        with _tokenizer(spec, here=world.is_main) as tokenizer:
            export(
                result.model,
                source_store,
                base,
                uri,
                target_store=store,
                dtype=OUTPUT_DTYPES[spec.output.dtype] if spec.output.dtype else None,
                tokenizer=tokenizer,
                collect=result.collect,
                value_of=result.value_of,
            )
    if adapter and spec.lora is not None and world.data_rank == 0 and world.context_rank == 0:
        export_adapter(
            result.model, spec.lora, base, join_uri(uri, ADAPTER), store=store, trained=result.trained, below=below
        )
    world.barrier()
    if spec.output.converted:
        messages.agreed(lambda: _convert(store, uri, spec))


def _convert(store: Store, uri: str, spec: DPOJobSpec) -> None:
    """Write the folder in other formats: by one rank, a layer at a time. An earlier one's parts are removed before."""
    source = Whole.open(store, uri, read_config(store, uri))
    for form in spec.output.converted:
        write_as(form, source, store, join_uri(uri, _CONVERTED[form]))


def _remove_earlier(store: Store, uri: str) -> None:
    """Delete the weights of an earlier export to the same place.

    Otherwise old files could remain next to the new ones, and readers differ in whether they prefer model.safetensors
    or an index.
    """
    for name in store.children(uri + "/"):
        if WEIGHTS.fullmatch(name):
            store.delete(join_uri(uri, name))
    for name in ADAPTER_FILES:
        store.delete(join_uri(uri, ADAPTER, name))
    store.delete(join_uri(uri, _CONVERTED["nemo"]))
    for folder in (_CONVERTED["megatron"], _CONVERTED["nemo"] + PARTS):
        if store.children(join_uri(uri, folder)):
            store.delete_tree(join_uri(uri, folder))


def forms_of(spec: DPOJobSpec) -> tuple[bool, bool]:
    """Return whether the spec asks for a whole model, and whether for an adapter."""
    wanted = set(spec.output.formats)
    if "formats" not in spec.output.model_fields_set:
        wanted.add("peft")
    return "huggingFace" in wanted and (
        spec.lora is None or spec.output.merge
    ), spec.lora is not None and "peft" in wanted


def is_there(spec: DPOJobSpec, place: Place) -> bool:
    """Return whether each form that the spec asks for has weights in the folder."""
    store, uri = place
    whole, adapter = forms_of(spec)
    names = store.children(uri + "/")
    files = [f"{ADAPTER}/{ADAPTER_FILES[-1]}"] if adapter else []
    files += [_MARKS[form] for form in spec.output.converted]
    return (not whole or any(WEIGHTS.fullmatch(name) for name in names)) and all(
        store.exists(join_uri(uri, file)) for file in files
    )


@contextmanager
def _tokenizer(spec: DPOJobSpec, *, here: bool) -> Iterator[str | None]:
    """Yield a local folder with the tokenizer's files, or None for the model's tokenizer, or if not wanted ``here``."""
    if spec.tokenizer is None or not here:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dpo-tokenizer-") as name:
        yield str(fetch_tokenizer(store_for(spec, spec.tokenizer.storage), spec.tokenizer.uri, Path(name)))
