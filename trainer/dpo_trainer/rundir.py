"""The run directory: the same layout in a local folder or under an S3 prefix. The newest attempt owns it.

metrics.jsonl, spec.json, layout.json, revisions.json, attempt, checkpoints/step-000100/, model/, export.json,
pushed.json
"""

import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_api.errors import FencedError, IncompatibleCheckpointError, NotFoundError
from dpo_store import Store, local_path_of

MARKER = "complete.json"
"""Written last into a checkpoint. A checkpoint without it is incomplete and ignored."""

EXPORT = "export.json"
"""Written last of all, once the model is whole."""

LAYOUT = "layout.json"
"""The layout that was chosen, and what for; see ``layouts``. It is no part of a checkpoint."""

_STEP = re.compile(r"/step-(\d{6,})/" + re.escape(MARKER) + "$")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint."""

    step: int
    uri: str


@dataclass(frozen=True)
class Finished:
    """The content of export.json."""

    step: int  #: the run's last one
    model: str  #: the model's address
    metrics: dict[str, float]  #: the last ones
    spec: Any
    total: int = 0  #: steps that were planned; 0: ``step``
    model_step: int | None = None  #: whose weights the model has; None: ``step``
    best: dict[str, Any] | None = None  #: a ``dpo_api.progress.Best``
    stopped_early: str = ""


@dataclass
class RunDirectory:
    """One run's files. ``attempt`` fences writes: an attempt that no longer owns the directory cannot complete any."""

    store: Store
    uri: str
    attempt: int = 0
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    """Distinguishes two attempts with the same number: the one that claimed the directory last owns it."""

    def path(self, *parts: str) -> str:
        """Return the URI of a file or folder of the run directory."""
        return "/".join([self.uri.rstrip("/"), *parts])

    @property
    def local(self) -> Path | None:
        """The run directory as a local path; None if it is not local."""
        return local_path_of(self.uri)

    def look(self, attempt: int | None) -> int:
        """Return this attempt's number: the given one, or the last one plus one. An owner keeps the directory.

        A directory without an owner is claimed at once, so that an unwritable one fails early. Raises FencedError if a
        higher attempt already owns the directory.
        """
        last, _ = self._newest()
        self.attempt = last + 1 if attempt is None else attempt
        if self.attempt < last:
            raise FencedError(self._fenced(last))
        return self.claim(self.attempt) if last == 0 else self.attempt

    def claim(self, attempt: int | None) -> int:
        """Become the directory's newest attempt, with the given number or the last one plus one.

        From now on the previous attempt cannot complete any write. Raises FencedError if a higher attempt already owns
        the directory.
        """
        last, owner = self._newest()
        if owner == self.owner and attempt in (None, last):
            return self.attempt
        self.attempt = last + 1 if attempt is None else attempt
        if self.attempt < last:
            raise FencedError(self._fenced(last))
        self.write_json("attempt", {"attempt": self.attempt, "owner": self.owner})
        return self.attempt

    @property
    def is_newest(self) -> bool:
        """Whether no later attempt has claimed the directory. For ranks other than 0, which do not know its owner."""
        return self._newest()[0] <= self.attempt

    def check_fence(self) -> None:
        """Raise FencedError if a later attempt owns the directory now."""
        last, owner = self._newest()
        if last > self.attempt or (last == self.attempt and owner not in {self.owner, ""}):
            raise FencedError(self._fenced(last))

    def _fenced(self, last: int) -> str:
        which = f"attempt {last}" if last != self.attempt else f"another attempt {last}"
        return f"{which} owns the run directory {self.uri}; attempt {self.attempt} may no longer write to it"

    def _newest(self) -> tuple[int, str]:
        """Return the number and the owner of the attempt that claimed the directory last; (0, "") if none did."""
        found = self.read_json("attempt") or {}
        number = found.get("attempt", 0)
        if not isinstance(number, int):
            raise self._damaged("attempt", f"its attempt is {number!r}, not a number")
        return number, str(found.get("owner", ""))

    def _damaged(self, name: str, why: str) -> IncompatibleCheckpointError:
        return IncompatibleCheckpointError(f"{self.path(name)} is damaged: {why}; delete it to continue")

    def finished(self) -> Finished | None:
        """Return the content of export.json, or None if the run is not finished."""
        found = self.read_json(EXPORT)
        if found is None:
            return None
        try:
            return Finished(
                step=int(found["step"]),
                model=str(found["model"]),
                metrics=dict(found["metrics"]),
                spec=found["spec"],
                total=int(found.get("total", 0)),
                model_step=found.get("model_step"),
                best=found.get("best"),
                stopped_early=str(found.get("stopped_early", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(EXPORT, f"a field is missing or has the wrong type ({error})") from None

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """Return a JSON object of the run directory, or None if it does not exist."""
        try:
            text = self.store.read(self.path(*parts))
        except NotFoundError:
            return None
        try:
            value = json.loads(text)
        except ValueError as error:
            raise self._damaged("/".join(parts), str(error)) from None
        if not isinstance(value, dict):
            raise self._damaged("/".join(parts), "not a JSON object")
        return value

    def write_json(self, *parts_and_value: Any) -> None:
        """Write a JSON object: path parts, then the value. Raises ValueError for NaN, which JSON does not have."""
        *parts, value = parts_and_value
        self.store.write(self.path(*parts), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def checkpoint_uri(self, step: int) -> str:
        """Return the address of this step's checkpoint."""
        return self.path("checkpoints", f"step-{step:06d}")

    def checkpoints(self) -> list[SavedCheckpoint]:
        """Return the complete checkpoints in order of step, without incomplete ones."""
        found = (_STEP.search(info.uri) for info in self.store.list(self.path("checkpoints", "")))
        steps = sorted(int(match.group(1)) for match in found if match)
        return [SavedCheckpoint(step, self.checkpoint_uri(step)) for step in steps]
