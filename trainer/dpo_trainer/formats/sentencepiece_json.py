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

from dpo_trainer.formats.sentencepiece_normal import InexactError, class_of, replacements

PROBES = (
    "Which year was the Magna Carta signed?",
    "<extra_id_0>System\n\n<extra_id_1>User\nName a painter.\n<extra_id_1>Assistant\n",
    "  two  spaces, a\ttab\r\nand lines\n\n",
    "naïve über e\u0301 ﬁ ① 東京は大きい。Привет, мир! مرحبا 🙂👍🏽",
    "e\u0301\u0302 a\u0302\u0301 ①\u0301 か\u3099 ｶﾞ \u1112\u1161\u11ab ㅎㅏ 0\ufe0f\u20e3 שּׁ بَّ",
    "def f(x):\n    return {'a': [x ** 2, 0x1F]}  # ▁",
    "<s> </s> <unk> <pad> <0x41> <0xFF> 1234567890 \u200b\u00a0\u3000\ufeff",
    "\x00a\x01e\x01\u0301\x02\x1b\x7f\x85\u2028\ufffd\U0010ffff",
    "<<s>> ab<s>c</s></s><s ><unk><unk>",
    "",
    " ",
    "▁",
)
"""Texts whose tokens are compared before a tokenizer.json is used."""

_BPE, _UNIGRAM = 2, 1
_KIND = sentencepiece_model_pb2.ModelProto.SentencePiece
_TEXTS = (_KIND.NORMAL, _KIND.USER_DEFINED)
"""Kinds of pieces that texts consist of."""
_SYMBOL = -0.1
"""Score of a text that is always one token, in SentencePiece's search (its ``max_score`` starts near 0)."""


def tokenizer_files(model: bytes) -> dict[str, bytes]:
    """Return tokenizer.json and its settings for a tokenizer.model.

    Raises InexactError naming why its tokens would not all be the same.
    """
    proto: Any = sentencepiece_model_pb2.ModelProto()
    processor: Any = sentencepiece.SentencePieceProcessor()
    try:
        proto.ParseFromString(model)
        processor.LoadFromSerializedProto(model)
    except Exception as error:
        raise InexactError("SentencePiece does not read it") from error
    found = _tokenizer(proto, processor)
    probes = [
        *PROBES,
        *(f"a {symbol}b\n{symbol} c  {symbol}<0x3C>{symbol}</s>{symbol}" for symbol in _user_symbols(proto)),
    ]
    for text in probes:
        if found.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text):
            raise InexactError(f"the tokens of {text!r} would be others")
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


def _tokenizer(proto: Any, processor: Any) -> Tokenizer:
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise InexactError("it puts spaces at the end of words (treat_whitespace_as_suffix)")
    if proto.denormalizer_spec.precompiled_charsmap:
        raise InexactError("it changes texts when it decodes (denormalizer_spec)")
    kind, symbols = proto.trainer_spec.model_type, _user_symbols(proto)
    if kind not in (_BPE, _UNIGRAM):
        raise InexactError(f"its model_type is {kind}: only unigram and BPE are converted")
    found = Tokenizer(_bpe(proto) if kind == _BPE else _unigram(proto))
    splits = _words(proto, processor) if kind == _BPE else _apart(proto)
    if splits:
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
        )
    found.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec, symbols))
    spec = proto.normalizer_spec
    leading = 1_000_000 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    found.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=leading)] if leading else []),
        ]
    )
    return found


def _bpe(proto: Any) -> models.BPE:
    pieces = list(proto.pieces)
    usable = {piece.piece: index for index, piece in enumerate(pieces) if piece.type in _TEXTS}
    merges: list[tuple[float, int, int, int]] = []
    for text, index in usable.items():
        for cut in range(1, len(text)):
            left, right = usable.get(text[:cut]), usable.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-pieces[index].score, index, left, right))
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(pieces)},
        merges=[(pieces[left].piece, pieces[right].piece) for _, _, left, right in sorted(merges)],
        unk_token=pieces[_unknown(proto)].piece,
        fuse_unk=True,
        byte_fallback=bool(proto.trainer_spec.byte_fallback),
        ignore_merges=bool(_user_symbols(proto)),  # a symbol of the user's is one token, and no merges lead to it
    )


def _unigram(proto: Any) -> models.Unigram:
    """The model with scores that keep a text from becoming a control symbol, a byte or the unknown.

    The library searches for the best sum of scores as SentencePiece does, but takes every piece for one that is found
    in texts, and the unknown to score less than all of them. So what is no text gets a score below every sum of the
    single characters that it consists of.
    """
    known = _characters(proto)
    for piece in proto.pieces:
        if piece.type == _KIND.NORMAL and not known.issuperset(piece.piece):
            odd = min(set(piece.piece) - known)
            raise InexactError(
                f"{odd!r} of the piece {piece.piece!r} is no piece itself, and what it scores is not kept"
            )
    scores = {piece.piece: float(piece.score) for piece in proto.pieces if piece.type == _KIND.NORMAL}
    never = min(*scores.values(), -1.0) * (2 + max(len(piece.piece) for piece in proto.pieces))
    scores |= dict.fromkeys(_user_symbols(proto), _SYMBOL)
    listed = [(piece.piece, scores[piece.piece] if piece.type in _TEXTS else never) for piece in proto.pieces]
    return models.Unigram(listed, unk_id=_unknown(proto), byte_fallback=bool(proto.trainer_spec.byte_fallback))


def _words(proto: Any, processor: Any) -> list[str]:
    """Return where BPE divides texts: around the user's symbols, which are words of one token.

    A control symbol or a byte that is typed as a word of its own would then be one token too; it is divided at the end
    of its first token.
    """
    symbols = _user_symbols(proto)
    if not symbols:
        return []
    inside = []
    for piece in proto.pieces:
        if piece.type not in _TEXTS:
            ids = processor.EncodeAsIds(symbols[0] + piece.piece + symbols[0])
            token = ids[ids.index(processor.PieceToId(symbols[0])) + 1]
            # A character that is no piece has become bytes, or the unknown.
            odd = processor.IsByte(token) or processor.IsUnknown(token)
            first = piece.piece[0] if odd else processor.IdToPiece(token)
            inside.append(rf"\A{re.escape(first)}(?={re.escape(piece.piece.removeprefix(first))}\z)")
    return ["|".join(map(re.escape, sorted(symbols, key=len, reverse=True))), "|".join(inside)]


def _apart(proto: Any) -> list[str]:
    """Return where unigram divides texts, so that none with unknown characters becomes a control symbol or a byte.

    No piece but the user's symbols has unknown characters, and a symbol scores more than any other reading of it, so
    that no other token changes. [] if every character of those pieces is known.
    """
    known = _characters(proto)
    texts = [piece.piece for piece in proto.pieces if piece.type not in _TEXTS]
    if all(known.issuperset(text) for text in texts):
        return []
    unknown = class_of(known, inverted=True)
    if not proto.trainer_spec.byte_fallback:
        for text in texts:
            if known.isdisjoint(text):
                raise InexactError(f"no character of its symbol {text!r} is a piece")
        unknown += "+"  # a run of unknown characters is one token
    symbols = [symbol for symbol in _user_symbols(proto) if not known.issuperset(symbol)]
    return ["|".join([*map(re.escape, sorted(symbols, key=len, reverse=True)), unknown])]


def _characters(proto: Any) -> set[str]:
    """Characters that are pieces."""
    return {piece.piece for piece in proto.pieces if len(piece.piece) == 1 and piece.type in _TEXTS}


def _unknown(proto: Any) -> int:
    return next(index for index, piece in enumerate(proto.pieces) if piece.type == _KIND.UNKNOWN)


def _user_symbols(proto: Any) -> list[str]:
    """Texts that are always one token."""
    return [piece.piece for piece in proto.pieces if piece.type == _KIND.USER_DEFINED]


def _normalizers(spec: Any, symbols: list[str]) -> list[Any]:
    """SentencePiece's normalisation, in its order."""
    found = replacements(spec, symbols)
    first = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    if spec.remove_extra_whitespaces:
        last = "[ ▁]" if spec.escape_whitespaces else " "  # it cuts after it has written spaces as ▁
        found += [normalizers.Replace(Regex(rf"\A +|{last}+\z"), ""), normalizers.Replace(Regex(" {2,}"), " "), *first]
    else:
        found = [*first, *found]  # a text of which nothing is left still has its first space
    if spec.escape_whitespaces:
        found.append(normalizers.Replace(" ", "▁"))
    return found
