"""The models that can be trained: their families, and the one reader of Hugging Face model folders.

``dpo validate`` and the trainer read config.json and look for weights and tokenizers through this package, so a folder
that the trainer would refuse is refused before a GPU is held, in the same words. Nothing here needs torch.

``families`` holds one row for each family; ``reader`` turns config.json into a ``ModelConfig``; ``folder`` finds a
folder's files.
"""

from dpo_api.models.config import ModelConfig, ModelFacts
from dpo_api.models.families import FAMILIES, Activation, Family, Norm, TensorNames
from dpo_api.models.folder import read_config
from dpo_api.models.multipliers import Multipliers
from dpo_api.models.reader import parse_config
from dpo_api.models.rope import RopeScaling, YarnScaling

__all__ = [
    "FAMILIES",
    "Activation",
    "Family",
    "ModelConfig",
    "ModelFacts",
    "Multipliers",
    "Norm",
    "RopeScaling",
    "TensorNames",
    "YarnScaling",
    "parse_config",
    "read_config",
]
