"""The one batch form: a token stream with the bounds of its segments.

A pack is one stream of S tokens. Linear layers, norms and the MLP run once over the stream; attention reads the
segments, and rotary embedding and sliding windows read the position ids. Packing many pairs, sharing a pair's prompt
and running an unpacked batch are the same code with other segments.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from dpo_trainer.model.varlen import VarlenPlan


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of the stream: they attend causally to themselves and, wholly, to their parent.

    ``parent`` is an index into the pack's segments and comes before this one; a parent has no parent itself.
    """

    start: int
    end: int
    parent: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Pack:
    """A stream of S tokens holding P pairs with R response tokens.

    With context parallelism, a rank's share of it (see ``model.context``): S and R are then what this rank has, and
    ``segments`` and ``pairs`` those of the whole pack.

    Tokens after the last segment are padding: they belong to no segment, attention gives zero for them and nothing
    reads their hidden states.
    """

    tokens: Tensor  #: [S] int64, vocabulary ids
    position_ids: Tensor  #: [S] int64; both responses of a shared pair start at their prompt's length
    origins: Tensor  #: [S] int64, 3 · dataset index + 0 in a prompt, 1 in a chosen, 2 in a rejected; negative if unused
    segments: tuple[Segment, ...]
    rows: Tensor  #: [R] int64, index into the stream of the hidden state that predicts ``labels[r]``
    labels: Tensor  #: [R] int64, response tokens
    owners: Tensor  #: [R] int64, 2·i for the chosen and 2·i+1 for the rejected response of the pack's i-th pair
    pairs: Tensor  #: [P] int64, dataset index of each pair; -1 marks a filler pair of zero weight
    common: Tensor | None = None  #: [P] int64, the position whose hidden state predicts the first token that a response
    #: may have beyond the length of the other one of its pair; None without rejected responses
    context_rank: int = 0  #: of the ranks that share the pack
    context_size: int = 1  #: how many share it
    plan: "VarlenPlan | None" = None  #: of its attention, on the tensors' device, once ``transfer.loaded`` has made it

    @property
    def length(self) -> int:
        """S, padding included."""
        return int(self.tokens.shape[0])

    @cached_property
    def used(self) -> int:
        """Tokens that belong to a segment, of the whole pack."""
        return sum(segment.length for segment in self.segments)

    def validate(self) -> None:
        """Raise ValueError when a whole pack breaks its own rules (a bug in this software, not a user's mistake)."""
        size = self.length
        for name, values in (("position_ids", self.position_ids), ("origins", self.origins)):
            if values.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({size},)")
        if not self.rows.shape == self.labels.shape == self.owners.shape:
            raise ValueError("rows, labels and owners differ in length")
        self._validate_segments()
        if self.rows.numel() and (int(self.rows.min()) < 0 or int(self.rows.max()) >= size):
            raise ValueError("a row is outside the stream")
        if self.owners.numel() and int(self.owners.max()) >= 2 * int(self.pairs.shape[0]):
            raise ValueError("an owner names a pair that the pack does not hold")

    def _validate_segments(self) -> None:
        size, cursor = self.length, 0
        for index, segment in enumerate(self.segments):
            if segment.start < cursor or segment.end <= segment.start or segment.end > size:
                raise ValueError(f"segment {index} ({segment}) overlaps its predecessor, is empty or leaves the stream")
            cursor = segment.end
            if segment.parent is None:
                continue
            if not 0 <= segment.parent < index:
                raise ValueError(f"segment {index} names parent {segment.parent}, which does not come before it")
            if self.segments[segment.parent].parent is not None:
                raise ValueError(f"segment {index}'s parent {segment.parent} has a parent itself")
