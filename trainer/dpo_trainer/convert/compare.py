"""Compares a model that was written with its source: the configuration, each parameter, and log-probs of both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import InvalidModelError
from dpo_api.models.megatron.outgoing import NOT_COMPUTED
from dpo_trainer.convert.forward import Forward, check_pack
from dpo_trainer.convert.whole import LAYER, Whole
from dpo_trainer.distributed import World
from dpo_trainer.formats.layout import Slot

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
BLOCK_BYTES = 64 << 20
"""Of the embedding and of the head that are read at a time."""


def compare(source: Whole, written: Whole, *, log_probs: bool) -> None:
    """Compare the configurations, each parameter bit by bit, and with ``log_probs`` those of a few tokens.

    Memory: the parameters of one layer in fp32. Raises InvalidModelError for what differs.
    """
    ours, theirs = _computed(source), _computed(written)
    for name, value in ours.items():
        if theirs[name] != value:
            raise InvalidModelError(f"{written.uri}: its {name} is {theirs[name]}, that of {source.uri} {value}")
    if log_probs:
        compare_log_probs(source, written)
        return
    for _, pairs in _groups(source, written):
        for here, there in pairs:
            if here.parameter in (EMBEDDING, HEAD):
                for _ in _equal_blocks(source, written, here, there):
                    pass
            else:
                _equal(source, written, here, there)


def compare_log_probs(source: Whole, written: Whole) -> None:
    """Compare each parameter bit by bit, and the log-probs that each model's configuration means with them.

    What is rounded when it is written is rounded here first. Both log-probs are then made of the same bits, by the
    same operations in the same order: they are equal to the last bit. Raises InvalidModelError for what differs.
    """
    with _alone():
        ours, theirs = _log_probs(source, written)
    for model, found in ((source, ours), (written, theirs)):
        if not found.isfinite().all():
            raise InvalidModelError(
                f"{model.uri}: its log-probs are not finite{_as_written(source)}; its weights, or what is computed with"
                " them, are too large for their type, or damaged"
            )
    differences = (ours - theirs).abs()
    if differences.any():
        token = int(differences.argmax())
        raise InvalidModelError(
            f"{written.uri}: the log-prob of a token is {theirs[token]:.6f}, and {ours[token]:.6f} by {source.uri},"
            " with the same parameters: its configuration means another model; delete it and convert again"
        )


def _log_probs(source: Whole, written: Whole) -> tuple[Tensor, Tensor]:
    """Return the log-probs of both, fp32 [R], and compare the parameters on the way."""
    pack = check_pack(source.config)
    ours, theirs = Forward(source.config, pack), Forward(written.config, pack)
    for layer, pairs in _groups(source, written):
        here, there = pairs[0]
        if here.parameter == EMBEDDING:
            embedded = _rows_of(pack.tokens, here, _equal_blocks(source, written, here, there))
            for forward in (ours, theirs):
                forward.embed(embedded)
        elif here.parameter == HEAD:
            _apply_head((ours, theirs), (rows for _, rows in _equal_blocks(source, written, here, there)))
        else:
            found = {_name(here): _equal(source, written, here, there).float() for here, there in pairs}
            for forward in (ours, theirs):
                forward.module(layer, found)
            del found  # before the next layer is read
    if source.config.tied_embeddings:
        head = source.slots[0]
        _apply_head((ours, theirs), (source.tensor(head.sources[0], rows) for rows in _blocks(source, head)))
    return ours.log_probs(), theirs.log_probs()


def _apply_head(both: Iterable[Forward], blocks: Iterable[Tensor]) -> None:
    for rows in blocks:
        wide = rows.float()
        for forward in both:
            forward.head(wide)


def _rows_of(tokens: Tensor, slot: Slot, blocks: Iterator[tuple[int, Tensor]]) -> Tensor:
    """Return the embedding of each token, fp32 [S, H], from all blocks of the embedding."""
    found = torch.empty(len(tokens), slot.shapes[0][1])
    for first, rows in blocks:
        held = (tokens >= first) & (tokens < first + len(rows))
        found[held] = rows[tokens[held] - first].float()
    return found


def _groups(source: Whole, written: Whole) -> Iterator[tuple[int | None, list[tuple[Slot, Slot]]]]:
    """Yield the parameters of both, of one layer (with its number from 0) or another module (None) at a time."""
    for (layer, here), (_, there) in zip(source.groups, written.groups, strict=True):
        yield layer, list(zip(here, there, strict=True))


def _equal_blocks(source: Whole, written: Whole, here: Slot, there: Slot) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of the embedding or of the head, which are equal in both, with the number of the first one."""
    for first, last in _blocks(source, here):
        yield first, _equal(source, written, here, there, (first, last))


def _equal(source: Whole, written: Whole, here: Slot, there: Slot, rows: tuple[int, int] | None = None) -> Tensor:
    """Return a parameter, or rows of it, which are equal in both. Raises InvalidModelError if they are not."""
    ours, theirs = (
        model.parameter(slot) if rows is None else model.tensor(slot.sources[0], rows)
        for model, slot in ((source, here), (written, there))
    )
    if not torch.equal(ours, theirs):
        raise InvalidModelError(
            f"{written.uri}: {here.parameter} is not that of {source.uri}; delete it and convert again"
        )
    return ours


def _blocks(source: Whole, slot: Slot) -> Iterator[tuple[int, int]]:
    """Yield the rows [first, last) of the embedding or of the head that are read at a time."""
    rows, width = slot.shapes[0]
    step = max(1, BLOCK_BYTES // (width * source.dtype_of(slot.sources[0]).itemsize))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _name(slot: Slot) -> str:
    """Return a parameter's name in its layer, or in its module."""
    found = LAYER.match(slot.parameter)
    return found[2] if found else slot.parameter.rpartition(".")[2]


def _computed(model: Whole) -> dict[str, Any]:
    """Return the fields that change a logit."""
    return {name: value for name, value in asdict(model.config).items() if name not in NOT_COMPUTED}


def _as_written(source: Whole) -> str:
    return "" if source.dtype is None else f" in {str(source.dtype).removeprefix('torch.')}"


@contextmanager
def _alone() -> Iterator[None]:
    """Megatron-Core's groups of this process alone; those that there are, if there are any."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    world = World.join()
    try:
        yield
    finally:
        world.leave()
