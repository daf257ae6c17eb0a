"""What a model is: everything that its weights and its forward pass depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from dpo_api.models.families import FAMILIES, GATED, NORMS_WITH_BIAS, Activation, Family, Norm, NormPlaces
from dpo_api.models.multipliers import Multipliers
from dpo_api.models.rope import Scaling


@dataclass(frozen=True)
class ModelFacts:
    """What the validation of a spec needs to know of a model."""

    layers: int
    heads: int
    """Attention (query) heads."""
    kv_heads: int
    """Key-value heads; equal to ``heads`` without grouping."""
    hidden: int
    ffn: int
    vocab: int
    max_positions: int
    """Positions that the model was made for; 0 when it does not say."""
    family: str
    """Architecture name, such as ``llama``."""
    head_dim: int | None = None
    """Width of one attention head; None: hidden / heads."""
    tied_embeddings: bool = False
    """Whether the LM head is the embedding."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether each query and key head passes a norm."""
    norm_bias: bool = False
    """Whether norms have a bias beside their weight."""
    qk_norm_over_all: bool = False
    """Whether the norms of queries and of keys are each over all heads together."""
    norms: int = 2
    """A layer's norms over the hidden state."""
    gated: bool = True
    """Whether the MLP has a gate beside its up projection."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with rotary positions and grouped heads; its family decides the rest."""

    family: str  #: a key of FAMILIES
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int  #: key/value heads; each serves num_attention_heads / num_query_groups query heads
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    window: int | None = None  #: tokens a windowed layer sees, the query's own included
    windowed_layers: tuple[bool, ...] = ()  #: one a layer; empty means all layers when ``window`` is set
    qkv_bias: bool = False
    qk_norm: bool = False  #: a norm over each query and key head before the rotary embedding
    tied_embeddings: bool = False
    max_positions: int = 4096
    dtype: str | None = None  #: "bfloat16", "float16" or "float32" as config.json says; None when it does not
    # From here on: fields that came later. Their defaults say what every model had before (see ``fingerprint``).
    norm: Norm = "rms"
    activation: Activation = "swiglu"
    rotary_dim: int | None = None  #: channels of a head that the rotary embedding turns, its first ones; None: all
    rope_layers: tuple[bool, ...] = ()  #: whether each layer has the rotary embedding; empty: all of them
    multipliers: Multipliers = field(default_factory=Multipliers)
    norm_places: NormPlaces = "before"
    qk_norm_over_all: bool = False  #: one norm over all query heads and one over all key heads, not one over each head
    local_rope_theta: float | None = None  #: rotary base of windowed layers, unscaled; None: that of the others

    @property
    def row(self) -> Family:
        """The family's row: the names of the tensors."""
        return FAMILIES[self.family]

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return self.activation in GATED

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias beside their weight."""
        return self.norm in NORMS_WITH_BIAS

    def window_of(self, layer: int) -> int | None:
        """Return the window of the 0-based ``layer``, or None if it sees all earlier tokens."""
        if self.window is None or (self.windowed_layers and not self.windowed_layers[layer]):
            return None
        return self.window

    def rope_of(self, layer: int) -> int | None:
        """Return which rotary embedding the 0-based ``layer`` has: 0, or 1 for the one of windowed layers, or None."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        return 0 if self.local_rope_theta is None or self.window_of(layer) is None else 1

    @property
    def facts(self) -> ModelFacts:
        """What the spec's validation needs to know of the model."""
        return ModelFacts(
            layers=self.num_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_query_groups,
            hidden=self.hidden_size,
            ffn=self.ffn_hidden_size,
            vocab=self.vocab_size,
            max_positions=self.max_positions,
            family=self.family,
            head_dim=self.head_dim,
            tied_embeddings=self.tied_embeddings,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_bias=self.norm_bias,
            qk_norm_over_all=self.qk_norm_over_all,
            norms=4 if self.norm_places == "both" else 2,
            gated=self.gated,
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of what changes the model's output (the weights' dtype and the position limit do not)."""
        values = asdict(self)
        del values["dtype"], values["max_positions"]
        # A field that came later is left out at its default: a model's fingerprint never changes.
        for later in fields(self)[_FIELDS_OF_THE_FIRST_FINGERPRINT:]:
            if getattr(self, later.name) == _default_of(later):
                del values[later.name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _default_of(later: Field[Any]) -> Any:
    return later.default if later.default_factory is MISSING else later.default_factory()


_FIELDS_OF_THE_FIRST_FINGERPRINT = [one.name for one in fields(ModelConfig)].index("dtype") + 1
