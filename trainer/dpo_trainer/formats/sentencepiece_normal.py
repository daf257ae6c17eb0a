"""SentencePiece's normalisation of texts as normalizers of a tokenizer.json.

SentencePiece replaces, from left to right, the longest text that is a key of its map (``precompiled_charsmap``). The
library's own normalizer for that map takes a grapheme as one, if it has fewer than 6 bytes, replaces it by the value of
the shortest key that it starts with, and drops the rest of it: "e" with two accents becomes "e" with one. It is exact
for graphemes of one character. So

1. the texts that SentencePiece replaces at once are closed by a mark, where one of their characters could join another;
2. each character that could join another is kept from it by a second mark;
3. each character is replaced by its value;
4. the second marks are removed, and NFC puts together what is between the first, as the longer keys of the map do; the
   few that it does not know are replaced;
5. the first marks are removed.

The marks are control characters that the map removes in any case. Whether each key of the map has its value after these
steps is checked here.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, normalizers

CLOSE, KEEP = "\x01", "\x02"
"""The marks."""
_JOIN = ["\n", "\u200c", "\u200d", "\uff9e", "\uff9f", "\u0e33", "\u0eb3"]
_JOIN += [chr(code) for code in (*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))]
_JOIN += [chr(code) for code in (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800))]
"""Characters beside combining marks that a grapheme continues with: of line ends, emoji, Thai, Lao and Hangul."""

_FEW = 64
_PLAIN: dict[str, Any] = {"add_dummy_prefix": False, "escape_whitespaces": False, "remove_extra_whitespaces": False}


class InexactError(ValueError):
    """What a tokenizer.json cannot say; the text names it."""


def replacements(spec: Any, protected: Collection[str]) -> list[Any]:
    """Return the normalizers for a model's map of texts (a NormalizerSpec); [] if it has none.

    protected: texts that are never replaced. Raises InexactError naming what would be replaced by something else.
    """
    if not spec.precompiled_charsmap:
        return []
    sentencepiece.set_min_log_level(1)  # it tells of each map that it reads
    single = frozenset(text for text in protected if len(text) == 1)
    found, keys = _steps(bytes(spec.precompiled_charsmap), str(spec.name), single)
    applied = normalizers.Sequence(found)
    for symbol in protected:
        if applied.normalize_str(symbol) != symbol:
            raise InexactError(f"its normalisation would change the user-defined symbol {symbol!r}")
    for key in keys:
        if any(key.startswith(symbol) for symbol in single):
            raise InexactError(f"the user-defined symbol {key[0]!r} is the start of {key!r}, which it normalises")
    return list(found)


@cache
def _steps(charsmap: bytes, name: str, single: frozenset[str]) -> tuple[list[Any], list[str]]:
    """Return the steps, and the keys that have several characters."""
    spec = sentencepiece_model_pb2.NormalizerSpec(precompiled_charsmap=charsmap)
    theirs: Any = sentencepiece.SentencePieceNormalizer(normalizer_spec=spec.SerializeToString(), **_PLAIN)
    values: dict[str, str] = dict(theirs.Decompile())
    if any(values.get(mark) != "" for mark in (CLOSE, KEEP)):
        raise InexactError(f"its normalisation {name} keeps control characters, as nmt_nfkc's does not")
    keys = [key for key in values if len(key) > 1]
    join = {character for key in keys for character in key[1:]}.union(_JOIN)
    join |= {chr(code) for code in range(0x110000) if unicodedata.category(chr(code))[0] == "M"}
    join |= {key for key, value in values.items() if len(key) == 1 and value[:1] in join}
    joining = class_of(join)
    one: Any = sentencepiece.SentencePieceNormalizer(
        norm_map=[(key, value) for key, value in values.items() if len(key) == 1 and key not in {CLOSE, KEEP, *single}],
        **_PLAIN,
    )
    spec.ParseFromString(one.serialized_normalizer_spec())
    steps = [
        normalizers.Replace(Regex(rf"(?m:(?=.{joining})(?:{_any_of(frozenset(keys))}|.))\K"), CLOSE),
        normalizers.Replace(Regex(rf"(?<=[^{CLOSE}{KEEP}])(?={joining})"), KEEP),
        normalizers.Precompiled(spec.precompiled_charsmap),
        normalizers.Replace(KEEP, ""),
        normalizers.NFC(),
        normalizers.Replace(CLOSE, ""),
    ]
    whole, texts = normalizers.Sequence(steps), [key for key in values if key not in single]
    left = sorted((key for key in texts if whole.normalize_str(key) != values[key]), key=len, reverse=True)
    if len(left) <= _FEW:  # scripts that are newer than the library's NFC
        steps[-1:-1] = [normalizers.Replace(whole.normalize_str(key), values[key]) for key in left]
        whole = normalizers.Sequence(steps)
        left = [key for key in texts if whole.normalize_str(key) != values[key]]
    if left:
        raise InexactError(
            f"its normalisation {name} replaces {left[0]!r} by {values[left[0]]!r}, and no normalizer does"
        )
    return steps, keys


def class_of(characters: Iterable[str], *, inverted: bool = False) -> str:
    """Return a regular expression for one of the characters, or for any other one."""
    found: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    inside = "".join(
        rf"\x{{{first:X}}}" if first == last else rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in found
    )
    return f"[{'^' * inverted}{inside}]"


def _any_of(texts: frozenset[str]) -> str:
    """Return a regular expression for the longest of the texts. Characters that the same texts follow are one class."""
    after: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        if text:
            after[text[0]].add(text[1:])
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for character, rest in after.items():
        groups[frozenset(rest)].append(character)
    found = [class_of(characters) + (_any_of(rest) if rest != {""} else "") for rest, characters in groups.items()]
    return f"(?:{'|'.join(found)})" + ("?" if "" in texts else "")
