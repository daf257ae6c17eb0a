"""A data set as the training loop sees it: pairs, their rewards, their reference sums, and packs of any batch of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_api.spec import DPOJobSpec
from dpo_trainer.data.collate import make_pack
from dpo_trainer.data.index import PairIndex
from dpo_trainer.data.packing import deal, pack_batch, pair_cost
from dpo_trainer.distributed import World
from dpo_trainer.model.pack import Pack
from dpo_trainer.reference import Pairs, ReferenceTable


@dataclass
class DataSet:
    """The training pairs, or one validation source."""

    name: str
    index: PairIndex
    reference: ReferenceTable | None = None  #: None for SFT alone

    def rewards(self, pairs: Tensor) -> Tensor:
        """[P, 2] float64 rewards of the data; a filler's are 0."""
        found = torch.from_numpy(self.index.rewards[pairs.clamp(min=0).cpu().numpy()].astype(np.float64))
        return torch.where((pairs >= 0).unsqueeze(1).cpu(), found, 0.0)

    def reference_sums(self, pairs: Tensor) -> Tensor:
        """[P, 2] float64 reference sums; a filler's are 0."""
        assert self.reference is not None  # noqa: S101 - computed before training starts
        return self.reference.of(pairs.cpu())


@dataclass(frozen=True)
class Packer:
    """Turns any set of pairs into this rank's packs. Which pairs is not its business, nor does the split change a sum."""

    max_tokens: int
    max_pairs: int | None
    share: bool
    with_rejected: bool
    pad_to_multiple: int = 1

    @classmethod
    def of(cls, spec: DPOJobSpec) -> "Packer":
        """The packer that a spec asks for."""
        packing = spec.training.packing
        return cls(
            max_tokens=packing.max_tokens or 2 * spec.data.max_length,
            max_pairs=spec.training.micro_batch_size if packing.enabled else 1,
            share=spec.training.prefix_sharing,
            with_rejected=spec.dpo.preference_weight > 0,
        )

    def packs(self, data: DataSet, pairs: Pairs | Sequence[int], world: World) -> tuple[list[Pack], int]:
        """This rank's packs of these pairs, and the tokens of all ranks' packs together."""
        ids = np.asarray(pairs, dtype=np.int64)
        lengths = data.index.lengths[ids]  # [n, 3]: prompt, chosen, rejected
        costs = [
            pair_cost(int(p), int(c), int(r) if self.with_rejected else 0, share=self.share) for p, c, r in lengths
        ]
        packs = pack_batch(costs, self.max_tokens, self.max_pairs, ranks=world.data_size)
        sizes = [sum(costs[position] for position in pack) for pack in packs]
        hand = deal(packs, sizes, world.data_size)[world.data_rank]
        mine = [
            make_pack(
                data.index,
                [int(ids[position]) for position in pack],
                share=self.share,
                pad_to_multiple=self.pad_to_multiple,
                with_rejected=self.with_rejected,
            )
            for pack in hand
        ]
        return mine, sum(sizes)
