"""A SentencePiece model as tokenizer.json, so that transformers reads the same tokens from it.

transformers makes a tokenizer out of a bare tokenizer.model by itself, but leaves out the model's normalisation, and
takes control symbols that are typed in a text for the symbols. Both give other tokens than the model was trained on.
"""

import json
import re
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PROBES = (
    "Which year was the Magna Carta signed?",
    "<extra_id_0>System\n\n<extra_id_1>User\nName a painter.\n<extra_id_1>Assistant\n",
    "  two  spaces, a\ttab\r\nand lines\n\n",
    "naïve über e\u0301 ﬁ ① 東京は大きい。Привет, мир! مرحبا 🙂👍🏽",
    "def f(x):\n    return {'a': [x ** 2, 0x1F]}  # ▁",
    "<s> </s> <unk> <pad> <0x41> 1234567890 \u200b\u00a0\u3000",
    "",
    " ",
)
"""Texts whose tokens are compared before a tokenizer.json is used."""

_BPE, _UNIGRAM = 2, 1
_NEVER = -1e6
"""Score of a piece that text never becomes: a control symbol, a byte, the unknown."""


def tokenizer_files(model: bytes) -> dict[str, bytes]:
    """Return tokenizer.json and its settings for a tokenizer.model; {} if its tokens would not all be the same."""
    proto: Any = sentencepiece_model_pb2.ModelProto()
    processor: Any = sentencepiece.SentencePieceProcessor()
    try:
        proto.ParseFromString(model)
        processor.LoadFromSerializedProto(model)
        found = _tokenizer(proto)
    except Exception:  # noqa: BLE001 - of either library, for a model that is damaged or of another kind
        return {}
    probes = [*PROBES, *(f"a {symbol}b\n{symbol} c  {symbol}{symbol}" for symbol in _user_symbols(proto))]
    if any(found.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text) for text in probes):
        return {}
    ids = {name: int(getattr(processor, f"{name}_id")()) for name in ("bos", "eos", "unk", "pad")}
    tokens = {f"{name}_token": processor.IdToPiece(number) for name, number in ids.items() if number >= 0}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a control symbol that is typed in a text is text
        **tokens,
    }
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if ids[name] >= 0}
    return {
        "tokenizer.json": found.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
    }


def _tokenizer(proto: Any) -> Tokenizer:
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = list(proto.pieces)
    unknown = next(index for index, piece in enumerate(pieces) if piece.type == kind.UNKNOWN)
    fallback = bool(proto.trainer_spec.byte_fallback)
    symbols = _user_symbols(proto)
    model: Any
    if proto.trainer_spec.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
        usable = {
            piece.piece: index for index, piece in enumerate(pieces) if piece.type in (kind.NORMAL, kind.USER_DEFINED)
        }
        merges: list[tuple[float, int, int, int]] = []
        for text, index in usable.items():
            for cut in range(1, len(text)):
                left, right = usable.get(text[:cut]), usable.get(text[cut:])
                if left is not None and right is not None:
                    merges.append((-pieces[index].score, index, left, right))
        ordered = [(pieces[left].piece, pieces[right].piece) for _, _, left, right in sorted(merges)]
        model = models.BPE(
            vocab=vocabulary,
            merges=ordered,
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=fallback,
            ignore_merges=bool(symbols),  # a symbol of the user's is one token, and no merges lead to it
        )
    elif proto.trainer_spec.model_type == _UNIGRAM:
        in_text = (kind.NORMAL, kind.USER_DEFINED)
        scores = [(piece.piece, piece.score if piece.type in in_text else _NEVER) for piece in pieces]
        model = models.Unigram(scores, unk_id=unknown, byte_fallback=fallback)
    else:
        raise ValueError(f"model_type {proto.trainer_spec.model_type}")
    found = Tokenizer(model)
    if symbols:
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        found.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    found.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    found.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    return found


def _user_symbols(proto: Any) -> list[str]:
    """Texts that are always one token."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    return [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]


def _normalizers(spec: Any) -> list[Any]:
    """SentencePiece's normalisation, in its order."""
    found: list[Any] = []
    if spec.precompiled_charsmap:
        found.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        found.append(normalizers.Prepend("▁"))
    if spec.escape_whitespaces:
        found.append(normalizers.Replace(" ", "▁"))
    return found
