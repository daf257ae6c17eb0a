"""Which image an attempt's pods run. A tag may move between two pulls, so that pods run different code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpo_api.status import IMAGE_IDS_MAX, Attempt
from dpo_operator.backend import pytorchjob
from dpo_operator.types import Object

_LENGTH_MAX = 512


def of_pods(pods: Iterable[Object]) -> tuple[str, ...]:
    """Return the different IDs of the trainer's image in an attempt's pods, rank 0's first."""
    found: dict[str, str] = {}
    for pod in pods:
        image = str((pytorchjob.trainer_status(pod) or {}).get("imageID") or "")
        if image and len(image) <= _LENGTH_MAX:
            found.setdefault(_digest(image), image)
    return tuple(found.values())[:IMAGE_IDS_MAX]


def _digest(image: str) -> str:
    """Return the part of an ID that does not depend on the registry that a node pulled from."""
    return image.rpartition("@")[2]


def difference(attempt: Attempt, earlier: Sequence[Attempt]) -> str | None:
    """Return a sentence about the images of an attempt, if they differ among its pods or from the attempt before."""
    if len(attempt.image_ids) > 1:
        return f"Pods of attempt {attempt.number} run different images: {', '.join(attempt.image_ids)}."
    last = next((other for other in reversed(earlier) if other.image_ids), None)
    if last is None or not attempt.image_ids or _digest(last.image_ids[0]) == _digest(attempt.image_ids[0]):
        return None
    return f"Attempt {attempt.number} runs image {attempt.image_ids[0]}; attempt {last.number} ran {last.image_ids[0]}."
