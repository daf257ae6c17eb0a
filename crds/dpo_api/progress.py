"""What a trainer reports: its progress while it runs, and a termination message when it ends.

Rank 0 appends each ``Progress`` as a JSON line to its events file and serves the newest at ``GET /status``.
``LastWords`` is the content of the termination message. Both are strict JSON: no NaN, no infinity.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

from dpo_api.errors import Outcome

Phase = Literal["starting", "index", "reference", "validate", "train", "checkpoint", "export", "done", "failed"]

PHASE_TEXTS: dict[Phase, str] = {
    "starting": "starting the trainer",
    "index": "reading the data",
    "reference": "computing reference log-probs",
    "validate": "validating",
    "train": "training",
    "checkpoint": "writing a checkpoint",
    "export": "exporting the model",
    "done": "done",
    "failed": "failing",
}
"""What a run does in a phase, for the rows of `dpo run` and the message of a DPOJob."""

PHASE_UNITS: dict[Phase, str] = {"index": "pairs", "reference": "pairs", "validate": "batches"}
"""What ``done`` and ``of`` count, in the phases that have them."""

LAST_WORDS_MAX_BYTES = 4096
"""Kubernetes keeps this much of a container's termination message."""


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that JSON can carry: NaN and the infinities are left out."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


class _Message(BaseModel):
    # Unknown fields are ignored: an operator must be able to read the messages of a newer trainer.
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    @field_validator("metrics", mode="after", check_fields=False)
    @classmethod
    def _finite_metrics(cls, metrics: dict[str, float]) -> dict[str, float]:
        return finite(metrics)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse one message. Raises pydantic's ValidationError if it is not valid."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """Return one line of strict JSON; unset fields are left out."""
        return json.dumps(self.model_dump(by_alias=True, exclude_none=True), ensure_ascii=False, allow_nan=False)


class Best(_Message):
    """A validation that is the best so far."""

    metric: str = Field(max_length=128, description="Key of the metric, such as `val/loss`.")
    step: int = Field(ge=0, description="Optimizer steps before it.")
    value: float = Field(description="The metric's value.")


class Progress(_Message):
    """The progress of a run at one moment."""

    phase: Phase = Field(description="What the run is doing.")
    step: int = Field(default=0, ge=0, description="Optimizer steps done.")
    total: int = Field(default=0, ge=0, description="Optimizer steps planned; 0 while unknown.")
    epoch: float = Field(default=0.0, ge=0, description="Epochs done, with a fraction.")
    eta_seconds: float | None = Field(default=None, ge=0, description="Estimated seconds until the last step.")
    tokens_per_second: float | None = Field(
        default=None, ge=0, description="Tokens trained per second by all processes."
    )
    pairs_per_second: float | None = Field(default=None, ge=0, description="Pairs trained per second by all processes.")
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Newest value of each metric, such as `train/loss`."
    )
    first_preference_loss: float | None = Field(
        default=None,
        description="Preference loss of the first validation, if it was before step 1, else of step 1. Not set after a"
        " resume.",
    )
    expected_first_preference_loss: float | None = Field(
        default=None,
        description="The value of `firstPreferenceLoss` if policy and reference are equal. Not set if they differ at"
        " the start, or if the loss needs no reference.",
    )
    done: int | None = Field(default=None, ge=0, description="Units of the phase that are done, e.g. reference pairs.")
    of: int | None = Field(default=None, ge=0, description="Total units of the phase.")
    message: str = Field(default="", max_length=1024, description="One plain sentence, or empty.")
    warnings: tuple[str, ...] = Field(
        default=(), description="Warnings, one sentence each. The events file has each of them once."
    )
    last_checkpoint_step: int | None = Field(default=None, ge=0, description="Step of the newest complete checkpoint.")
    best: Best | None = Field(
        default=None, description="The best validation so far by `checkpoint.monitor`, whose checkpoint is kept."
    )
    from_step: int | None = Field(
        default=None, ge=0, description="Step that this attempt started at: a checkpoint's, or 0."
    )
    layout: str = Field(
        default="", max_length=64, description="Sizes of tensor, pipeline and data parallelism, such as `T8 P2 D2`."
    )
    revisions: tuple[str, ...] = Field(
        default=(),
        description="Repositories of the Hugging Face Hub that the run reads, each at its commit:"
        " `hf://org/name@<commit>`.",
    )
    layout_verified: bool | None = Field(
        default=None,
        description="Whether the layout computes what one process does. Not set: not compared; see `layoutVerdict`.",
    )
    layout_verdict: str = Field(
        default="",
        max_length=1024,
        description="The largest differences, or why they are not known. Empty: no verdict.",
    )
    slow_rank: int | None = Field(
        default=None, ge=0, description="Process that has been much slower than the others for several steps, from 0."
    )
    slow_rank_ratio: float | None = Field(
        default=None, ge=0, description="Its time for its own part of a step, divided by the others' median."
    )
    slow_rank_host: str = Field(default="", max_length=253, description="Host of that process; in a pod, its name.")
    observed_at: float = Field(default=0.0, ge=0, description="When this was observed, in Unix seconds.")
    attempt: int = Field(default=1, ge=0, description="Number of the attempt, from 1.")

    @field_validator(
        "eta_seconds",
        "tokens_per_second",
        "pairs_per_second",
        "first_preference_loss",
        "expected_first_preference_loss",
        "slow_rank_ratio",
        mode="before",
    )
    @classmethod
    def _unknown_if_not_finite(cls, value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value


class LastWords(_Message):
    """How a run ended: its termination message, at most LAST_WORDS_MAX_BYTES of JSON."""

    outcome: str = Field(description="Name of the outcome (dpo_api.errors.Outcome), e.g. `InvalidData`.")
    message: str = Field(
        default="", description="One plain sentence that names the field or file, the value and the fix."
    )
    step: int = Field(default=0, ge=0, description="Optimizer steps done.")
    total: int = Field(default=0, ge=0, description="Optimizer steps planned; 0 if unknown.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Last value of each metric.")
    run_dir: str | None = Field(default=None, description="URI of the run directory.")
    model_uri: str | None = Field(default=None, description="URI of the exported model, if there is one.")
    hub_uri: str | None = Field(
        default=None, description="Commit that the model was pushed to, if it was: `hf://org/name@<commit>`."
    )
    attempt: int = Field(default=1, ge=0, description="Number of the attempt, from 1.")
    last_checkpoint_step: int | None = Field(
        default=None, ge=0, description="Step of the newest complete checkpoint, of this attempt or an earlier one."
    )
    already_complete: bool = Field(
        default=False, description="Whether the run directory already held this finished run, so nothing was trained."
    )
    best: Best | None = Field(default=None, description="The best validation by `checkpoint.monitor`.")
    model_step: int | None = Field(
        default=None, ge=0, description="Step whose weights the exported model has, if there is one."
    )
    stopped_early: str = Field(
        default="",
        description="Why `training.earlyStopping` ended the run before its last step. Empty: it did not.",
    )

    @property
    def known_outcome(self) -> Outcome:
        """The outcome, or Internal if this version does not know its name."""
        return Outcome.__members__.get(self.outcome, Outcome.Internal)

    def to_json(self) -> str:
        """Return strict JSON of at most LAST_WORDS_MAX_BYTES: if too long, cut the message, then drop the metrics."""
        text = super().to_json()
        if len(text.encode()) <= LAST_WORDS_MAX_BYTES:
            return text
        spare = self.model_copy(update={"message": _cut(self.message, 1536)})
        text = _Message.to_json(spare)
        if len(text.encode()) <= LAST_WORDS_MAX_BYTES:
            return text
        bare: dict[str, Any] = {"run_dir": _fitting(self.run_dir), "model_uri": _fitting(self.model_uri), "metrics": {}}
        return _Message.to_json(spare.model_copy(update=bare))


def _cut(text: str, max_bytes: int) -> str:
    """Return the text's longest prefix whose JSON form has at most max_bytes bytes, with an ellipsis if cut."""
    if len(json.dumps(text, ensure_ascii=False).encode()) <= max_bytes:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(json.dumps(text[:middle], ensure_ascii=False).encode()) <= max_bytes - 3
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low] + "…"


def _fitting(uri: str | None) -> str | None:
    """Return the URI, or None if it is too long: a shortened URI would name something else."""
    return uri if uri is not None and len(json.dumps(uri, ensure_ascii=False).encode()) <= 1024 else None
