"""What the ranks of a run tell each other: JSON in tensors. All functions are collectives of all ranks."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_api.errors import DPOError, Outcome
from dpo_trainer import bridge, peers

LARGEST = 1 << 26
"""Most bytes of a message that is accepted. The largest is the list of a model's tensors, or the spec of a run."""


def from_first[T](value: T | None) -> T:
    """Return rank 0's value on every rank. It must be of JSON's types, and no tuple.

    Raises InternalError if what arrives cannot come from a rank 0 of this run.
    """
    first = dist.get_rank() == 0
    text = json.dumps(value).encode() if first else b""
    length = torch.tensor([len(text)], dtype=torch.int64, device=bridge.device())
    dist.broadcast(length, src=0)
    size = _accepted(int(length.item()), 0)
    box = (_packed(text) if first else torch.empty(size, dtype=torch.uint8)).to(bridge.device())
    dist.broadcast(box, src=0)
    found: T = _read(box, 0)
    return found


def from_all[T](value: T) -> list[T]:
    """Return every rank's value, in the order of ranks. They must be of JSON's types, and no tuple.

    Raises InternalError if one of them cannot come from a rank of this run.
    """
    box, sizes = _box(value)
    boxes = [torch.empty_like(box) for _ in sizes]
    dist.all_gather(boxes, box)
    return _read_all(boxes, sizes)


def to_first[T](value: T) -> list[T] | None:
    """Return every rank's value, in the order of ranks, on rank 0, and None on the others. See ``from_all``."""
    box, sizes = _box(value)
    boxes = [torch.empty_like(box) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(box, boxes, dst=0)
    return None if boxes is None else _read_all(boxes, sizes)


def agreed[T](action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its value on every rank. A DPOError is raised on every rank."""
    error: DPOError | None = None
    answer: dict[str, Any] | None = None
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except DPOError as raised:
            error, answer = raised, {"error": words_of(raised)}
    found = from_first(answer)
    if "error" in found:
        raise error or error_of(found["error"])
    value: T = found["value"]
    return value


def words_of(error: DPOError) -> list[str]:
    """Return what other ranks need to raise the error too."""
    return [error.outcome.name, str(error)]


def error_of(words: Sequence[str]) -> DPOError:
    """Return the error that another rank has described by ``words_of``."""
    outcome, text = words
    return Outcome[outcome].error(text)


def _box(value: object) -> tuple[Tensor, list[int]]:
    """Return the value's bytes, filled up to the length of the longest one, and the lengths of all."""
    text = json.dumps(value).encode()
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=bridge.device())
    lengths[dist.get_rank()] = len(text)
    dist.all_reduce(lengths)
    sizes = [_accepted(int(length), rank) for rank, length in enumerate(lengths.tolist())]
    box = torch.zeros(max(sizes), dtype=torch.uint8, device=bridge.device())
    box[: len(text)].copy_(_packed(text))
    return box, sizes


def _read_all(boxes: list[Tensor], sizes: list[int]) -> list[Any]:
    return [_read(box[:size], rank) for rank, (box, size) in enumerate(zip(boxes, sizes, strict=True))]


def _packed(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _accepted(size: int, rank: int) -> int:
    if not 0 < size <= LARGEST:
        raise peers.not_of_this_run(f"as rank {rank} a message of {size:,} bytes; the limit is {LARGEST:,}")
    return size


def _read(box: Tensor, rank: int) -> Any:
    try:
        return json.loads(box.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise peers.not_of_this_run(f"as rank {rank} a message that is not JSON ({error})") from error
