"""A tokenizer from a folder: token ids of text, its special tokens, its chat template. Nothing is fetched, no code is
run.

Texts are always encoded without special tokens; what the tokenizer itself would add around a text (``prefix``,
``suffix``) is found once, when it is loaded, so that the rules about BOS and EOS are in one place (``encode``).
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from dpo_api.errors import InvalidModelError
from dpo_api.models.folder import VOCABULARIES, Files, check_tokenizer
from dpo_store import base_name, join_uri
from dpo_trainer.data.tokens.chat import ChatTemplate

Ids = NDArray[np.int32]
"""[n] int32 token ids."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "config.json",
)
"""Every file of a model folder that can change how text becomes ids."""

_TEMPLATES = "additional_chat_templates"
_PROBE = "a"
_SMALL_SHARE = 0.5  # a tokenizer with fewer ids than this share of the model's is suspicious: padding is a few percent


class _Backend(Protocol):
    """A library's tokenizer."""

    size: int  # largest id + 1
    base_size: int  # the same without tokens added on top of the vocabulary
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]
    special_tokens: dict[str, str]
    chat_template: str | None
    tool_template: str | None  # a template of its own for conversations with tools

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a text as the tokenizer itself gives them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""


class _HuggingFace:
    def __init__(self, folder: Path, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(
                folder, config=_configuration(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises nearly every class there is for a damaged file
            text = str(error).strip().split("\n")[0][:300] or type(error).__name__
            raise InvalidModelError(
                f"{name}: the tokenizer cannot be loaded: {text}; copy its files again, or set spec.tokenizer"
            ) from error
        self._tokenizer: Any = loaded
        self._rust = getattr(loaded, "backend_tokenizer", None)
        if self._rust is not None:  # tokenizer.json may carry the truncation and padding of somebody's training
            self._rust.no_truncation()
            self._rust.no_padding()
        vocabulary: dict[str, int] = loaded.get_vocab()
        added = {int(number) for number in loaded.added_tokens_decoder}
        self.size = max(vocabulary.values(), default=-1) + 1
        self.base_size = max((number for number in vocabulary.values() if number not in added), default=-1) + 1
        self.bos_id: int | None = loaded.bos_token_id
        self.eos_id: int | None = loaded.eos_token_id
        self.special_ids = frozenset(
            {int(n) for n, token in loaded.added_tokens_decoder.items() if token.special} | set(loaded.all_special_ids)
        )
        self.special_tokens = {name: str(token) for name, token in loaded.special_tokens_map.items()}
        template = loaded.chat_template
        named: dict[str, str] = template if isinstance(template, dict) else {"default": template}
        self.chat_template = named.get("default")
        self.tool_template = named.get("tool_use")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._rust is not None:
            return [item.ids for item in self._rust.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def encode_with_special(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


class _SentencePiece:
    """A bare tokenizer.model, as in a .nemo archive: text never turns into control symbols and nothing is added."""

    chat_template: str | None = None
    tool_template: str | None = None

    def __init__(self, file: Path, name: str) -> None:
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except (RuntimeError, OSError) as error:
            raise InvalidModelError(f"{name}: {file.name} is not a SentencePiece model") from error
        self.size: int = self._processor.vocab_size()
        self.base_size = self.size
        self.bos_id: int | None = self._id("bos_id")
        self.eos_id: int | None = self._id("eos_id")
        self.special_ids = frozenset(number for number in range(self.size) if self._processor.IsControl(number))
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        self.special_tokens = {
            name: self._processor.IdToPiece(number) for name, number in named.items() if number is not None
        }

    def _id(self, name: str) -> int | None:
        number: int = getattr(self._processor, name)()
        return number if number >= 0 else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.EncodeAsIds(list(texts))
        return ids

    def encode_with_special(self, text: str) -> list[int]:
        return self.encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.DecodeIds(list(ids))
        return text


class Tokenizer:
    """Token ids of text.

    size: one more than the largest id. base_size: the same without tokens added on top of the vocabulary.
    bos_id, eos_id: None when the tokenizer names none. end_ids: every id that can end a text.
    prefix, suffix: what the tokenizer itself puts around a text. chat: the chat template or None.
    fingerprint: sha256 of everything that changes ids (files, template, versions of the libraries).
    """

    def __init__(self, backend: _Backend, fingerprint: str, end_ids: frozenset[int], chat_template: str | None) -> None:
        self._backend = backend
        self.size, self.base_size = backend.size, backend.base_size
        self.bos_id, self.eos_id = backend.bos_id, backend.eos_id
        starts = {backend.bos_id} - {backend.eos_id}  # GPT-2's one special token is both
        self.end_ids = (end_ids | backend.special_ids) - starts
        template = chat_template or backend.chat_template
        for_tools = None if chat_template else backend.tool_template
        self.chat = ChatTemplate(template, backend.special_tokens, tool_source=for_tools) if template else None
        self.fingerprint = hashlib.sha256(f"{fingerprint}\n{template}".encode()).hexdigest()
        bare, full = backend.encode([_PROBE])[0], backend.encode_with_special(_PROBE)
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = tuple(full[:start]), tuple(full[start + len(bare) :])

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text alone: no special token is added; those written in the text are read as the library does."""
        return [np.array(ids, dtype=np.int32) for ids in self._backend.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self._backend.decode([int(number) for number in ids])

    def check_vocabulary(self, model_size: int) -> list[str]:
        """Compare with the model's vocabulary size (rows of its embedding); return warnings.

        Raises InvalidModelError when the tokenizer's own vocabulary does not fit. Tokens added on top of it may exceed
        the model as long as no text uses them (a [PAD] that training never resized for): the index pass sees to that.
        """
        if self.base_size > model_size:
            raise InvalidModelError(
                f"the tokenizer has {self.base_size} ids but the model's vocabulary holds {model_size}; they are not of"
                " the same model: check spec.model and spec.tokenizer"
            )
        if self.size > model_size:
            more = self.size - model_size
            return [
                f"the tokenizer has {more} added tokens beyond the model's vocabulary of {model_size}; do not use them"
            ]
        if self.size < _SMALL_SHARE * model_size:
            return [
                f"the tokenizer has {self.size} ids, the model's vocabulary {model_size}: are they of the same model?"
            ]
        return []


def _configuration(folder: Path) -> Any:
    """What AutoTokenizer needs of config.json: the model's type. None: let it read the file itself.

    It would import the configuration class of that model, and with it accelerate and torch's compiler: a second of CPU
    time for each process. The class decides only where tokenizer_config.json names no tokenizer, or code of its own.
    """
    from transformers import PreTrainedConfig

    try:
        model, tokenizer = (
            json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")
        )
        if "auto_map" in tokenizer or not isinstance(tokenizer["tokenizer_class"], str):
            return None
        found = PreTrainedConfig(
            name_or_path=str(folder),
            **{name: model[name] for name in ("model_name", "tokenizer_class") if name in model},
        )
        found.model_type = str(model["model_type"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # whatever is wrong, AutoTokenizer finds the words for it
    return found


def load_tokenizer(folder: Path, *, chat_template: str | None = None, name: str | None = None) -> Tokenizer:
    """Load the tokenizer of a local folder; ``chat_template`` (Jinja) replaces its own, ``name`` is used in errors.

    A folder with ``tokenizer.model`` and no other tokenizer file is plain SentencePiece; otherwise transformers reads
    it (local files only, no remote code). Raises NotFoundError when there is none, InvalidModelError when it is
    damaged.
    """
    name = name or str(folder)
    present = [file for file in TOKENIZER_FILES if (folder / file).is_file()]
    check_tokenizer(name, present)
    bare = "tokenizer.model" in present and not {"tokenizer.json", "tokenizer_config.json"} & set(present)
    backend: _Backend = _SentencePiece(folder / "tokenizer.model", name) if bare else _HuggingFace(folder, name)
    return Tokenizer(backend, _fingerprint(folder, present), _end_ids(folder), chat_template)


def fetch_tokenizer(files: Files, uri: str, folder: Path) -> Path:
    """Copy the tokenizer's files of a model folder at ``uri``, or the one file that it names, to the local ``folder``.

    Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)  # of an earlier model at the same place
    names = files.children(uri)
    if not names and base_name(uri) in VOCABULARIES:
        (folder / base_name(uri)).write_bytes(files.read(uri))
    more = files.children(join_uri(uri, _TEMPLATES)) if names else []
    names = [*names, *(f"{_TEMPLATES}/{name}" for name in more)]
    for name in set(names).intersection(TOKENIZER_FILES):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(files.read(join_uri(uri, name)))
    return folder


def _fingerprint(folder: Path, names: Sequence[str]) -> str:
    versions = [version(library) for library in ("tokenizers", "transformers", "sentencepiece")]
    digest = hashlib.sha256(json.dumps(versions).encode())
    for name in names:
        digest.update(f"\n{name}\n".encode())
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def _end_ids(folder: Path) -> frozenset[int]:
    """The end tokens that the model's own files name: Llama 3's end of turn is not its tokenizer's EOS."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # absent or damaged: the model's own reader has more to say about it
        found.update(number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int))
    return frozenset(found)
