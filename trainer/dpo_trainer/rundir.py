"""The run directory: one layout, in a local folder or under an S3 prefix, that an attempt owns while it is the newest.

metrics.jsonl, spec.json, attempt, checkpoints/step-000100/, model/, export.json
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
"""Written last into a checkpoint: a checkpoint without it does not exist."""

_STEP = re.compile(r"/step-(\d{6,})/" + re.escape(MARKER) + "$")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint."""

    step: int
    uri: str


@dataclass(frozen=True)
class Finished:
    """What export.json says: the run's last step, where the model is, its last metrics, and of which spec it is."""

    step: int
    model: str
    metrics: dict[str, float]
    spec: Any


@dataclass
class RunDirectory:
    """One run's files. ``attempt`` fences writes: who does not own the directory any more completes nothing."""

    store: Store
    uri: str
    attempt: int = 0
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells two attempts apart that took the same number: the directory is the later one's."""

    def path(self, *parts: str) -> str:
        """The URI of something inside."""
        return "/".join([self.uri.rstrip("/"), *parts])

    @property
    def local(self) -> Path | None:
        """The folder itself where the run directory is local."""
        return local_path_of(self.uri)

    def look(self, attempt: int | None) -> int:
        """The number that this attempt will have: the given one, or one more than the last. Disturbs nobody yet.

        A directory that nobody has claimed is claimed at once, so that one that cannot be written to is found early.
        Raises FencedError when a higher attempt already owns it.
        """
        last, _ = self._newest()
        self.attempt = last + 1 if attempt is None else attempt
        if self.attempt < last:
            raise FencedError(self._fenced(last))
        return self.claim(self.attempt) if last == 0 else self.attempt

    def claim(self, attempt: int | None) -> int:
        """Become the directory's newest attempt: the given number, or one more than the last.

        From now on the attempt before completes nothing. Raises FencedError when a higher attempt already owns it.
        """
        last, owner = self._newest()
        if owner == self.owner and attempt in (None, last):
            return self.attempt
        self.attempt = last + 1 if attempt is None else attempt
        if self.attempt < last:
            raise FencedError(self._fenced(last))
        self.write_json("attempt", {"attempt": self.attempt, "owner": self.owner})
        return self.attempt

    def check_fence(self) -> None:
        """Raise FencedError when a later attempt has taken the directory over."""
        last, owner = self._newest()
        if last > self.attempt or (last == self.attempt and owner not in {self.owner, ""}):
            raise FencedError(self._fenced(last))

    def _fenced(self, last: int) -> str:
        which = f"attempt {last}" if last != self.attempt else f"another attempt {last}"
        return f"{which} owns the run directory {self.uri}: attempt {self.attempt} must not write to it any more"

    def _newest(self) -> tuple[int, str]:
        """The number and the owner of the attempt that claimed the directory last; 0 where none did."""
        found = self.read_json("attempt") or {}
        number = found.get("attempt", 0)
        if not isinstance(number, int):
            raise self._damaged("attempt", f"its attempt is {number!r}, not a number")
        return number, str(found.get("owner", ""))

    def _damaged(self, name: str, why: str) -> IncompatibleCheckpointError:
        return IncompatibleCheckpointError(f"{self.path(name)} is damaged: {why}; delete it to go on")

    def finished(self) -> Finished | None:
        """What the attempt that finished the run left, or None while it is not finished."""
        found = self.read_json("export.json")
        if found is None:
            return None
        try:
            return Finished(int(found["step"]), str(found["model"]), dict(found["metrics"]), found["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("export.json", f"it lacks what a finished run says ({error})") from None

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """An object inside, or None when there is none."""
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
        """Write an object: path parts, then the value. Strict JSON: NaN is a bug here."""
        *parts, value = parts_and_value
        self.store.write(self.path(*parts), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def checkpoint_uri(self, step: int) -> str:
        """Where the checkpoint of this step lies."""
        return self.path("checkpoints", f"step-{step:06d}")

    def checkpoints(self) -> list[SavedCheckpoint]:
        """The complete checkpoints by step; half-written ones are not among them."""
        found = (_STEP.search(info.uri) for info in self.store.list(self.path("checkpoints", "")))
        steps = sorted(int(match.group(1)) for match in found if match)
        return [SavedCheckpoint(step, self.checkpoint_uri(step)) for step in steps]
