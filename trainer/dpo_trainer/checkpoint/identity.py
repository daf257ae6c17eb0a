"""Identifies the run that a checkpoint belongs to: its model, data, loss and other settings that must not change."""

import re

from pydantic import BaseModel

from dpo_api.errors import IncompatibleCheckpointError
from dpo_api.spec import Dpo, DPOJobSpec, Lora

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

Identity = dict[str, str]
"""Name of a field of the spec (or of what it refers to) → its value as text."""


def identity_of(spec: DPOJobSpec, *, model: str, data: str) -> Identity:
    """Return everything that must stay the same for a resumed run to continue the interrupted one exactly.

    ``model`` and ``data`` are the fingerprints of the start model's weights and of the training pairs. All other
    settings may change between attempts: processes, micro-batches, packing, intervals, logging, and the length of the
    run (``maxSteps``, ``epochs``). The length changes the schedule; `dpo validate` reports that.
    """
    training = spec.training
    fields: dict[str, object] = {
        "model": model,
        "data.train": data,
        **_fields("dpo", spec.dpo),
        "lora": "given" if spec.lora else "absent",
        **(_fields("lora", spec.lora) if spec.lora else {}),
        "training.globalBatchSize": training.global_batch_size,
        "training.seed": training.seed,
        "training.dropLast": training.drop_last,
        "training.precision": training.precision,
        "training.limitTrainBatches": training.limit_train_batches,
        "training.learningRate": training.learning_rate,
        **_fields("training.schedule", training.schedule),
        "training.weightDecay": training.weight_decay,
        "training.betas": training.betas,
        "training.eps": training.eps,
        "training.gradientClip": training.gradient_clip,
        "transformerEngine.fp8": spec.transformer_engine.fp8,
    }
    return {name: str(value) for name, value in fields.items()}


def _fields(path: str, section: BaseModel) -> dict[str, object]:
    """Return a section's fields by their names in the manifest."""
    return {f"{path}.{name}": value for name, value in section.model_dump(mode="json", by_alias=True).items()}


def _completed(saved: Identity) -> Identity:
    """Add the fields that a checkpoint of an earlier version lacks: it was as if they had their defaults."""
    new = _fields("dpo", Dpo()) | (_fields("lora", Lora()) if saved.get("lora") == "given" else {})
    return {name: str(value) for name, value in new.items()} | saved


def check_identity(saved: Identity, now: Identity, uri: str) -> None:
    """Raise IncompatibleCheckpointError naming each field that differs, with both values."""
    saved = _completed(saved)
    differing = [name for name in now if name in saved and saved[name] != now[name]]
    if not differing:
        return
    said = "; ".join(f"spec.{name} was {_short(saved[name])}, now {_short(now[name])}" for name in differing)
    raise IncompatibleCheckpointError(
        f"{uri} belongs to another run: {said}. Undo the change, or give this run a directory of its own "
        "(checkpoint.uri, or --output)."
    )


def _short(value: str) -> str:
    value = _DIGEST.sub(r"\1", value)
    return value if len(value) <= 120 else value[:117] + "…"
