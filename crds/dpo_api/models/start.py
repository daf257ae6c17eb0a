"""A job's start model, whatever its format, as a Hugging Face folder.

Whatever reads a start model reads a folder's files, ``config.json`` and the tokenizer's, through ``Files``, and its
tensors by Hugging Face's names (``dpo_trainer.formats.weights``). A folder is one itself; the other formats present
themselves as one.
"""

from __future__ import annotations

from dpo_api.inputs import Model
from dpo_api.models import folder
from dpo_api.models.folder import Archives, Files
from dpo_api.models.megatron.checkpoint import MegatronModel
from dpo_api.models.megatron.nemo import NemoModel
from dpo_api.models.megatron.presented import PresentedModel


def start_model(files: Archives, model: Model) -> tuple[Files, str]:
    """Return the model's files as those of a folder, and the folder's address. Nothing is read yet."""
    if model.nemo is not None:
        found: PresentedModel = NemoModel(files, model.nemo.uri)
        return found, found.uri
    if model.megatron is not None:
        source = model.megatron
        found = MegatronModel(files, source.uri, source.iteration, source.architecture_uri)
        return found, found.uri
    return files, model.source.uri


def check_weights(files: Files, uri: str) -> None:
    """Raise NotFoundError or InvalidModelError for what is wrong with the weights without reading them."""
    if isinstance(files, PresentedModel):
        files.check_weights()
    else:
        folder.check_weights(files, uri)


def check_tokenizer(files: Files, uri: str) -> None:
    """Raise NotFoundError or InvalidModelError that says why the model has no tokenizer that is read, if so."""
    if isinstance(files, PresentedModel):
        files.check_tokenizer()
    else:
        folder.check_tokenizer(uri, files.children(uri))


def weight_bytes(files: Files, uri: str) -> int:
    """Return the bytes of the model's weights."""
    if isinstance(files, PresentedModel):
        return files.weight_bytes
    return sum(info.size for info in files.list(uri) if info.uri.endswith(".safetensors"))
