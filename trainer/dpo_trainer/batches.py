"""A data set as the training loop sees it: pairs, rewards, reference sums, and packs of any batch of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_api.plan import Plan
from dpo_api.spec import Dpo, DPOJobSpec
from dpo_trainer.data.index.spill import PairIndex
from dpo_trainer.data.packs.collate import make_pack
from dpo_trainer.data.packs.packing import deal, pack_batch
from dpo_trainer.distributed import World
from dpo_trainer.model.context import share_of
from dpo_trainer.model.pack import Pack
from dpo_trainer.reference import Pairs, ReferenceTable

CPU_PACK_TOKENS = 1024
"""Most tokens of a pack on a CPU where nothing is set; a longer pair is a pack of its own.

Larger packs take more memory and are no faster: their activations do not stay in the cache.
"""


@dataclass
class DataSet:
    """The training pairs, or one validation source."""

    name: str
    index: PairIndex
    settings: Dpo
    weight: float = 1.0  #: of a pair in the means over all validation sources
    reference: ReferenceTable | None = None  #: None if the loss needs none

    def rewards(self, pairs: Tensor) -> Tensor:
        """Return rewards [P, 2] float64, from the data or the spec's defaults; 0 for filler pairs."""
        ids = pairs.cpu()
        found = self.index.rewards(
            ids.clamp(min=0).numpy(), self.settings.default_chosen_reward, self.settings.default_rejected_reward
        )
        return torch.where((ids >= 0).unsqueeze(1), torch.from_numpy(found).double(), 0.0)

    def reference_sums(self, pairs: Tensor) -> Tensor:
        """Return reference sums [P, 2] float64; 0 for filler pairs."""
        assert self.reference is not None  # noqa: S101 - computed before training starts
        return self.reference.of(pairs.cpu())


@dataclass(frozen=True)
class Packer:
    """Turns a set of pairs into this rank's packs. How pairs are split over packs and ranks changes no sum."""

    max_tokens: int
    max_pairs: int | None
    share: bool
    with_rejected: bool
    pad_to_multiple: int = 1

    @classmethod
    def of(cls, spec: DPOJobSpec, plan: Plan, device: torch.device) -> "Packer":
        """Return the packer for a spec and its plan, on this kind of device."""
        is_set = spec.training.packing.max_tokens is not None
        most = plan.pack_max_tokens if is_set or device.type != "cpu" else CPU_PACK_TOKENS
        return cls(
            max_tokens=min(most, plan.pack_max_tokens),
            max_pairs=plan.pack_max_pairs,
            share=spec.training.prefix_sharing,
            with_rejected=plan.with_rejected,
            pad_to_multiple=spec.pack_multiple,
        )

    def packs(self, data: DataSet, pairs: Pairs | Sequence[int], world: World) -> tuple[list[Pack], int]:
        """Return this rank's packs of these pairs, and the number of tokens in all ranks' packs."""
        ids = np.asarray(pairs, dtype=np.int64)
        costs = data.index.costs(ids, share=self.share, with_rejected=self.with_rejected)
        packs = pack_batch(costs, self.max_tokens, self.max_pairs, ranks=world.data_size)
        sizes = [sum(costs[position] for position in pack) for pack in packs]
        hand = deal(packs, sizes, world.data_size)[world.data_rank]
        mine = [
            share_of(
                make_pack(
                    data.index,
                    [int(ids[position]) for position in pack],
                    share=self.share,
                    pad_to_multiple=self.pad_to_multiple,
                    with_rejected=self.with_rejected,
                ),
                world.context_rank,
                world.context_size,
                self.pad_to_multiple,
            )
            for pack in hand
        ]
        return mine, sum(sizes)


class Ahead:
    """A step's packs, made in a thread while the step before it runs. They depend on the step alone."""

    def __init__(self, make: Callable[[int], tuple[list[Pack], int]]) -> None:
        """``make``: a number of updates → the packs of the update after them, and the tokens of all ranks' packs."""
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dpo-packs")
        self._next: tuple[int, Future[tuple[list[Pack], int]]] | None = None

    def start(self, step: int) -> None:
        """Make the packs of this step in the thread."""
        self._next = step, self._thread.submit(self._make, step)

    def packs(self, step: int) -> tuple[list[Pack], int]:
        """Return a step's packs: the thread's, or made here if it has not started. Raises what making them raised."""
        started, self._next = self._next, None
        return started[1].result() if started is not None and started[0] == step else self._make(step)

    def close(self) -> None:
        """Give up what was started."""
        self._thread.shutdown(cancel_futures=True)
