"""A layout: how one model is divided among a run's processes, and what its activations may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dpo_api.models import ModelFacts
from dpo_api.spec import DPOJobSpec, Section

Recomputation = Literal["none", "selective", "full"]

SIZES = {
    "tensor": "parallelism.tensor",
    "pipeline": "parallelism.pipeline",
    "sequence": "parallelism.sequence",
    "recomputation": "training.activationRecomputation",
    "pack_tokens": "training.packing.maxTokens",
}
"""The sizes that are chosen where the spec leaves them out: attribute of Layout → field of the spec."""


@dataclass(frozen=True)
class Layout:
    """The sizes of one run. ``data`` is what the others leave of the processes."""

    tensor: int
    pipeline: int
    context: int
    data: int
    sequence: bool
    """Whether norms and residuals are divided by tokens among the tensor-parallel ranks."""
    recomputation: Recomputation
    pack_tokens: int
    """Most tokens of a pack."""

    @property
    def short(self) -> str:
        """The sizes in a few characters, as the status shows them: T8 P2 D2."""
        context = f" C{self.context}" if self.context > 1 else ""
        return f"T{self.tensor} P{self.pipeline}{context} D{self.data}"

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


def set_sizes(spec: DPOJobSpec) -> frozenset[str]:
    """Return the sizes (attributes of Layout) that the author of a spec has set."""
    found = {name for name, field in SIZES.items() if _is_set(spec, field.split("."))}
    # A pack of one pair is as large as its pair.
    return frozenset(found | (set() if spec.training.packing.enabled else {"pack_tokens"}))


def _is_set(section: Section, path: list[str]) -> bool:
    for attribute, field in type(section).model_fields.items():
        if (field.alias or attribute) == path[0]:
            value = getattr(section, attribute)
            inner = len(path) == 1 or (isinstance(value, Section) and _is_set(value, path[1:]))
            return attribute in section.model_fields_set and inner
    raise AssertionError(f"the API has no field {path[0]}")


def layout_of(spec: DPOJobSpec, processes: int) -> Layout:
    """Return the layout that a spec has if nothing is chosen: sizes that are not set have their defaults."""
    sizes, training = spec.parallelism, spec.training
    model_size = sizes.tensor * sizes.pipeline * sizes.context
    return Layout(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        context=sizes.context,
        data=max(1, processes // model_size),
        sequence=sizes.sequence,
        recomputation=training.activation_recomputation,
        pack_tokens=smallest_pack(spec) if training.packing.max_tokens is None else largest_pack(spec),
    )


def smallest_pack(spec: DPOJobSpec) -> int:
    """Return the tokens that every pair fits into: prompt and response twice."""
    return 2 * spec.data.max_length


def largest_pack(spec: DPOJobSpec) -> int:
    """Return the tokens of the largest pack that a spec with ``packing.maxTokens`` allows."""
    packing, pairs = spec.training.packing, spec.training.micro_batch_size
    if not packing.enabled:
        return smallest_pack(spec)
    most = packing.max_tokens or smallest_pack(spec)
    return most if pairs is None else min(most, pairs * smallest_pack(spec))


def with_layout(spec: DPOJobSpec, layout: Layout) -> DPOJobSpec:
    """Return the spec with all sizes of a layout set: what the trainer runs. The author's spec stays as it is."""
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "sequence": layout.sequence}
    training = spec.training
    changes: dict[str, object] = {"activation_recomputation": layout.recomputation}
    if training.packing.enabled:
        largest = max(layout.pack_tokens, training.packing.max_tokens or 0)  # microBatchSize may allow less
        changes["packing"] = training.packing.model_copy(update={"max_tokens": largest})
    return spec.model_copy(
        update={
            "parallelism": spec.parallelism.model_copy(update=sizes),
            "training": training.model_copy(update=changes),
        }
    )


def divides_heads(model: ModelFacts, tensor: int) -> bool:
    """Whether the attention of a model can be divided: by whole heads, and groups shared by whole ranks."""
    return model.heads % tensor == 0 and (model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0)


def divisors(number: int) -> Iterator[int]:
    """Yield the divisors of a number in order."""
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)
