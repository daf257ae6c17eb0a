"""The counts of the index pass, and its errors and warnings."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo_api.errors import InvalidDataError
from dpo_api.inputs import DataFormat
from dpo_api.spec import Data
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.tokens.chat import TEMPLATE_DATE
from dpo_trainer.data.tokens.encode import EncodedPair

_SHOWN = 5
_SEPARATE = "set spec.data.boundary: separate to tokenise the responses on their own"


@dataclass
class Count:
    """Sums over lines; blank lines are not counted."""

    lines: int = 0
    pairs: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for JSON, with the reasons in a fixed order."""
        return {
            "lines": self.lines,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "longest": self.longest,
            "truncated": self.truncated,
            "dropped": {reason.value: self.dropped[reason] for reason in Reason if self.dropped[reason]},
        }


class Tally:
    """Counts the lines of one data set, in total and by source, and decides which are errors and which are dropped."""

    def __init__(self, name: str, data: Data, sources: list[tuple[str, str]]) -> None:
        """``name`` of the set (train, …); ``sources``: name and uri of each."""
        self._name = name
        self._data = data
        self._sources = sources
        self.total = Count()
        self._by_source = [Count() for _ in sources]
        self._errors: Counter[Reason] = Counter()
        self._shown: list[str] = []
        self._failed_lines = 0
        self._failed_last = ""
        self._longest_seen = 0
        self._ended = 0
        self._last_ids: set[int] = set()

    @property
    def failed(self) -> bool:
        """Whether there was an error. The remaining lines are then only counted and no longer written."""
        return bool(self._errors)

    def read(self, source: int) -> None:
        """Count a line or row. A ranked list gives several pairs, or problems, of one."""
        for count in (self.total, self._by_source[source]):
            count.lines += 1

    def keep(self, source: int, pair: EncodedPair, *, ended: bool) -> None:
        """Count a usable pair. ``ended``: its chosen response ends in an end token (or was cut)."""
        for count in (self.total, self._by_source[source]):
            count.pairs += 1
            count.tokens += len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
            count.longest = max(count.longest, pair.length)
            count.truncated += pair.truncated
        self._ended += ended
        if len(self._last_ids) < 2:
            self._last_ids.add(int(pair.chosen[-1]))

    def drop(self, source: int, where: str, problem: Problem) -> None:
        """Count a line that is not used, and keep the first few errors."""
        for count in (self.total, self._by_source[source]):
            count.dropped[problem.reason] += 1
        if self._is_error(problem.reason):
            self._errors[problem.reason] += 1
            self._failed_lines += where != self._failed_last  # a ranked list can fail more than once
            self._failed_last = where
            if len(self._shown) < _SHOWN:
                self._shown.append(f"{where}: {problem.message}")

    def _is_error(self, reason: Reason) -> bool:
        if reason is Reason.OVER_LENGTH:
            return self._data.over_length == "error"
        return reason not in (Reason.NO_ROOM, Reason.TIE) and self._data.on_invalid == "error"

    def check(self) -> None:
        """Raise InvalidDataError if lines are errors, or if there are no usable pairs."""
        if self._errors:
            raise InvalidDataError(self._error_text())
        if self.total.pairs:
            return
        if not self.total.lines:
            where = ", ".join(uri for _, uri in self._sources)
            raise InvalidDataError(f"{where}: no line in the {self._name} data")
        raise InvalidDataError(self._none_text())

    def _error_text(self) -> str:
        count = self._failed_lines
        text = f"{count} of {self.total.lines} lines of the {self._name} data cannot be used"
        text += "; the first:" if sum(self._errors.values()) > len(self._shown) else ":"
        text = "\n  ".join([text, *self._shown])
        hints = []
        if self._errors[Reason.NOT_A_PREFIX]:
            hints.append(f"{self._errors[Reason.NOT_A_PREFIX]} have no clean boundary: {_SEPARATE}")
        if self._errors[Reason.BROKEN_JSON] + self._errors[Reason.NOT_AN_OBJECT] == self.total.lines:
            hints.append("a line must hold one JSON object; jq -c '.[]' FILE makes such lines of a JSON array")
        if set(self._errors) - {Reason.OVER_LENGTH} and self.total.pairs:
            hints.append("spec.data.onInvalid: skip leaves such lines out and counts them")
        if self._errors[Reason.OVER_LENGTH]:
            hints.append("spec.data.overLength: drop or truncate, or a larger spec.data.maxLength, takes long pairs")
        return "\n  ".join([text, *hints])

    def _none_text(self) -> str:
        reasons = ", ".join(f"{reason.value} {count}" for reason, count in self.total.dropped.most_common())
        text = f"no usable pair in the {self._name} data: {self.total.lines} lines, all dropped ({reasons})"
        dropped = self.total.dropped
        if dropped[Reason.OVER_LENGTH] or dropped[Reason.NO_ROOM]:
            text += f"; raise spec.data.maxLength above {self._data.max_length}"
            if self._data.over_length != "truncate" and dropped[Reason.OVER_LENGTH]:
                text += " or set spec.data.overLength: truncate"
        if dropped[Reason.NOT_A_PREFIX]:
            text += f"; {_SEPARATE}"
        return text

    def _seen(self) -> str:
        """The lines, or if ranked lists gave more, the pairs and what was dropped."""
        pairs = self.total.pairs + sum(self.total.dropped.values())
        return f"{pairs} pairs" if pairs > self.total.lines else f"{self.total.lines} lines"

    def _warnings(self, *, bare: bool) -> list[str]:
        warnings = []
        total = self.total
        broken = total.dropped[Reason.NOT_A_PREFIX]
        if broken:
            warnings.append(
                f"{broken} of {self._seen()} of the {self._name} data were skipped because the prompt's tokens are"
                f" not a prefix of prompt + response; {_SEPARATE}"
            )
        dropped = sum(total.dropped.values())
        if dropped > broken:
            parts = [f"{reason.value} {n}" for reason, n in total.dropped.items() if reason is not Reason.NOT_A_PREFIX]
            warnings.append(
                f"{dropped - broken} of {self._seen()} of the {self._name} data were dropped ({', '.join(parts)})"
            )
        if bare and not self._data.append_eos:
            warnings.append(
                f"the {self._name} data are plain strings without special tokens, and strings do not pass through the"
                " model's chat template: use messages, or write it into the text, unless the model was tuned on bare"
                " text (then set spec.data.appendEos: true, so that answers end)"
            )
        elif not self._ended and len(self._last_ids) > 1:
            warnings.append(
                f"no response of the {self._name} data ends in an end token, so the model learns no end of its answers;"
                " write it into the text, use messages with a chat template, or set spec.data.appendEos: true"
            )
        return warnings

    def stats(self, files: list[tuple[str, DataFormat]], *, template_date: bool, bare: bool = False) -> dict[str, Any]:
        """The JSON that PairIndex.stats holds. ``bare``: there is a chat template, and no text shows a trace of one.

        lines, pairs, tokens (prompt + chosen + rejected), longest (prompt with the longer response), truncated,
        dropped (by reason), endInEndToken (chosen responses that do), sources (the same counts for each, with name and
        uri), files (as read), formats (of the files), warnings, templateDate (the date that templates got as today's,
        null when they do not ask).
        """
        return {
            **self.total.as_dict(),
            "endInEndToken": self._ended,
            "sources": [
                {"name": name, "uri": uri, **count.as_dict()}
                for (name, uri), count in zip(self._sources, self._by_source, strict=True)
            ],
            "files": [uri for uri, _ in files],
            "formats": [found for _, found in files],
            "warnings": self._warnings(bare=bare),
            "templateDate": TEMPLATE_DATE.isoformat() if template_date else None,
        }
