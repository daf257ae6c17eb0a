"""Brings a model's files to the ranks of a run: each tensor is read once, by one of the ranks that need it.

The ranks of a pipeline stage share the reading. A tensor's reader reads it in blocks of rows, hashes them, and sends
them to all ranks of the stage, each of which keeps its rows or columns. All ranks have the same order of blocks, and
a rank reads its own ones ahead of their turn, so the ranks read at the same time. Besides its part of the model, a
rank holds what it has read ahead and the block being sent: less than the largest tensor, if that is of several blocks.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dpo_api.errors import DPOError
from dpo_api.models import ModelConfig
from dpo_trainer import bridge, messages
from dpo_trainer.formats.layout import Slot, pieces, place, zero_padding
from dpo_trainer.formats.safetensors_reader import DTYPES
from dpo_trainer.formats.weights import Weights

BLOCK = 64 << 20
"""Bytes that are read and sent at once."""
MOST_AHEAD = 8
"""Blocks that a rank has read, or is reading, before their turn at most."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What all ranks have read together; the same on every rank."""

    digests: dict[str, str]  #: tensor → sha256 of its bytes, of all stages
    bytes: int


def deliver(
    config: ModelConfig,
    source: Weights,
    wanted: Sequence[Slot],
    into: Callable[[Slot], Tensor],
    done: Callable[[Slot, Tensor], object] = lambda _slot, _filled: None,
) -> Delivered:
    """Fill this rank's part of each wanted slot of its pipeline stage. A collective of all ranks.

    wanted: the same on all ranks of a stage. into: the tensor to fill, of the shape of this rank's parameter and any
    float type. done: called when it is filled. A DPOError of one rank is raised on all of them.
    """
    stage = _Stage.of_this_rank()
    blocks = list(_blocks(wanted, source, len(stage.ranks)))
    own = [block for block in blocks if block.reader == stage.here]
    error: DPOError | None = None
    with _Reader(own, source, _ahead(wanted, source)) as reader:
        try:
            _Filling(config, source, stage, reader).fill(blocks, wanted, into, done)
        except DPOError as raised:
            error = raised
        except _OtherRankFailedError:
            pass
    mine = {
        "error": None if error is None else messages.words_of(error),
        "digests": {name: digest.hexdigest() for name, digest in reader.digests.items()},
        "bytes": reader.bytes,
    }
    answers: list[dict[str, Any]] = messages.from_all(mine)
    for answer in answers:
        if answer["error"] is not None:
            raise error or messages.error_of(answer["error"])
    digests = {name: digest for answer in answers for name, digest in answer["digests"].items()}
    return Delivered(digests, sum(answer["bytes"] for answer in answers))


def readers(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return which of a stage's ranks reads each tensor: the one that has the fewest bytes to read so far."""
    bytes_of = [0] * ranks
    found = []
    for size in sizes:
        found.append(bytes_of.index(min(bytes_of)))
        bytes_of[found[-1]] += size
    return found


class _Block(NamedTuple):
    """Rows [first, last) of one Hugging Face tensor of a slot."""

    slot: Slot
    source: int  #: index in slot.sources
    first: int
    last: int
    bytes: int
    reader: int  #: which of the stage's ranks reads it

    @property
    def name(self) -> str:
        return self.slot.sources[self.source]


def _blocks(wanted: Sequence[Slot], weights: Weights, ranks: int) -> Iterator[_Block]:
    """The blocks of a stage in the order in which they are sent."""
    sources = [(slot, index) for slot in wanted if not slot.duplicate for index in range(len(slot.sources))]
    infos = [weights.info(slot.sources[index]) for slot, index in sources]
    dealt = readers([info.bytes for info in infos], ranks)
    for (slot, index), info, reader in zip(sources, infos, dealt, strict=True):
        rows = info.shape[0]
        row_bytes = info.bytes // rows
        step = max(1, BLOCK // row_bytes)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield _Block(slot, index, first, last, (last - first) * row_bytes, reader)


def _ahead(wanted: Sequence[Slot], weights: Weights) -> int:
    """Return how many blocks to read ahead: with the one in use and the one being sent, one tensor's."""
    largest = max((weights.info(name).bytes for slot in wanted for name in slot.sources), default=0)
    return min(MOST_AHEAD, max(1, largest // BLOCK - 2))


class _Reader:
    """Reads this rank's blocks in their order, in a thread, ahead of their turn."""

    def __init__(self, own: Sequence[_Block], weights: Weights, ahead: int) -> None:
        self.digests = {block.name: hashlib.sha256() for block in own}
        self.bytes = 0
        self._weights = weights
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dpo-load")
        self._left = iter(own)
        self._waiting: deque[Future[Tensor]] = deque()
        self._submit(ahead)

    def next(self) -> Tensor:
        """Return the next block's bytes, [n] uint8 on the CPU."""
        found = self._waiting.popleft()
        self._submit(1)
        return found.result()

    def _submit(self, count: int) -> None:
        self._waiting.extend(self._pool.submit(self._read, block) for block in islice(self._left, count))

    def _read(self, block: _Block) -> Tensor:
        rows = self._weights.read(block.name, (block.first, block.last), self.digests[block.name].update)
        self.bytes += block.bytes
        return rows.view(-1).view(torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class _OtherRankFailedError(Exception):
    """A rank could not read what this one waits for. All ranks learn the reason at the end."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """The ranks of this rank's pipeline stage."""

    group: Any
    ranks: list[int]  #: their ranks in the run
    here: int  #: this rank's place among them

    @classmethod
    def of_this_rank(cls) -> Self:
        group: Any = dist.group.WORLD  # where it is the whole run: with NCCL, a group of its own would take GPU memory
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        return cls(group, dist.get_process_group_ranks(group), dist.get_rank(group))


class _Filling:
    """Sends a stage's blocks and puts them in their places."""

    def __init__(self, config: ModelConfig, weights: Weights, stage: _Stage, reader: _Reader) -> None:
        self._config, self._weights, self._stage, self._reader = config, weights, stage, reader
        self._rank = parallel_state.get_tensor_model_parallel_rank()
        self._size = parallel_state.get_tensor_model_parallel_world_size()
        self._embedding = f"{config.row.tensors.embedding}.weight"
        several = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self._two_copies = config.tied_embeddings and several  # of the embedding: on the first stage and on the last

    def fill(
        self,
        blocks: Sequence[_Block],
        wanted: Sequence[Slot],
        into: Callable[[Slot], Tensor],
        done: Callable[[Slot, Tensor], object],
    ) -> None:
        of_slot: defaultdict[Slot, list[_Block]] = defaultdict(list)
        for block in blocks:
            of_slot[block.slot].append(block)
        # The copy first: the first stage sends it after its first slot, and would wait for a stage that is busy.
        for slot in sorted(wanted, key=lambda slot: not slot.duplicate):
            parameter = into(slot)
            if slot.duplicate:
                self._receive(parameter)
            elif self._two_copies and slot.sources == (self._embedding,):
                self._fill_and_send(slot, of_slot[slot], parameter)
            else:
                self._fill(slot, of_slot[slot], parameter)
            done(slot, parameter)

    def _fill(self, slot: Slot, blocks: Sequence[_Block], parameter: Tensor) -> None:
        held = pieces(slot, self._config, self._rank, self._size)
        for block in blocks:
            dtype = DTYPES[self._weights.info(block.name).dtype]
            shape = (block.last - block.first, *slot.shapes[block.source][1:])
            place(held, parameter, block.source, self._share(block).view(dtype).view(shape), block.first)
        zero_padding(slot, held, parameter)

    def _share(self, block: _Block) -> Tensor:
        """Return the block's bytes, [n] uint8, on every rank of the stage. Raises on all of them if it is not read."""
        stage, mine = self._stage, block.reader == self._stage.here
        if len(stage.ranks) == 1:
            return self._reader.next()
        box = torch.zeros(block.bytes + 1, dtype=torch.uint8, device=bridge.device())  # the last one: that it was read
        error: DPOError | None = None
        if mine:
            try:
                box[:-1].copy_(self._reader.next())
                box[-1] = 1
            except DPOError as raised:
                error = raised
        dist.broadcast(box, src=stage.ranks[block.reader], group=stage.group)
        if not box[-1]:
            raise error or _OtherRankFailedError
        return box[:-1]

    def _fill_and_send(self, slot: Slot, blocks: Sequence[_Block], parameter: Tensor) -> None:
        """Fill this rank's part of a tied embedding, and send it to the last stage's rank that has the same part."""
        group: Any = parallel_state.get_embedding_group()
        filled = torch.zeros(1, dtype=torch.int64, device=bridge.device())
        try:
            self._fill(slot, blocks, parameter)
            filled += 1
        finally:
            dist.broadcast(filled, src=dist.get_rank(), group=group)
        dist.broadcast(parameter.to(bridge.device()), src=dist.get_rank(), group=group)

    def _receive(self, parameter: Tensor) -> None:
        group: Any = parallel_state.get_embedding_group()
        first = dist.get_process_group_ranks(group)[0]
        filled = torch.zeros(1, dtype=torch.int64, device=bridge.device())
        dist.broadcast(filled, src=first, group=group)
        if not filled:
            raise _OtherRankFailedError
        box = parameter.to(bridge.device())
        dist.broadcast(box, src=first, group=group)
        parameter.copy_(box)
