"""Encodes records as token ids: the rules for BOS, EOS, the boundary of prompt and response, and length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_api.errors import InvalidSpecError
from dpo_api.spec import Data
from dpo_trainer.data.problems import Problem, Reason
from dpo_trainer.data.reading.records import Messages, Record, with_parsed_arguments
from dpo_trainer.data.tokens.chat import ChatTemplate, TemplateFailedError
from dpo_trainer.data.tokens.tokenizer import Ids, Tokenizer

_NONE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as token ids; ``rejected`` is empty if it is not needed. A missing reward is NaN."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    chosen_reward: float
    rejected_reward: float
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer response, which maxLength limits."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class _Texts:
    """A record as text. ``templated``: the chat template has already added the special tokens."""

    prompt: str
    responses: tuple[str, ...]
    templated: bool


def _rendered(chat: ChatTemplate, conversations: list[Messages], tools: list[dict[str, Any]] | None) -> list[str]:
    """Render the first conversation with the generation prompt at its end, the others without."""
    return [
        chat.render(messages, add_generation_prompt=number == 0, tools=tools)
        for number, messages in enumerate(conversations)
    ]


class PairEncoder:
    """Encodes records according to a spec's data section. A record's ids do not depend on other records."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        """Raise InvalidSpecError if the tokenizer lacks a token that the section requires."""
        if data.add_bos == "always" and tokenizer.bos_id is None:
            raise InvalidSpecError("spec.data.addBos: always, but the tokenizer has no BOS token; use auto or never")
        if data.append_eos and tokenizer.eos_id is None:
            raise InvalidSpecError("spec.data.appendEos: true, but the tokenizer has no EOS token; leave it out")
        self._tokenizer = tokenizer
        self._data = data
        self._blank: dict[int, bool] = {}

    def encode(self, records: Sequence[Record]) -> list[EncodedPair | Problem]:
        """Encode a batch; there is one result per record, in the same order."""
        texts = [self._texts(record) for record in records]
        flat = [text for item in texts if isinstance(item, _Texts) for text in self._to_tokenise(item)]
        ids = iter(self._tokenizer.encode(flat))
        results: list[EncodedPair | Problem] = []
        for record, item in zip(records, texts, strict=True):
            if isinstance(item, Problem):
                results.append(item)
            else:
                prompt = next(ids)
                results.append(self._pair(record, item, prompt, [next(ids) for _ in item.responses]))
        return results

    def ends(self, response: Ids) -> bool:
        """Return whether the response's last token, ignoring white space, is an end token."""
        last = int(response[-1])
        if len(response) > 1 and last not in self._tokenizer.end_ids and self._is_blank(last):
            last = int(response[-2])
        return last in self._tokenizer.end_ids

    def has_special(self, pair: EncodedPair) -> bool:
        """Return whether the prompt or the chosen response has a special token other than BOS."""
        return any(not self._tokenizer.end_ids.isdisjoint(part.tolist()) for part in (pair.prompt, pair.chosen))

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]

    def _texts(self, record: Record) -> _Texts | Problem:
        responses = [record.chosen] if record.rejected is None else [record.chosen, record.rejected]
        if isinstance(record.prompt, str):
            return _Texts(record.prompt, tuple(text for text in responses if isinstance(text, str)), templated=False)
        chat = self._tokenizer.chat
        if chat is None:
            return Problem(Reason.TEMPLATE, "messages, but the tokenizer has no chat template; set spec.chatTemplate")
        unset = sorted(chat.reads & record.columns)
        if unset:
            return Problem(
                Reason.UNSUPPORTED_COLUMN,
                f'"{unset[0]}" is a variable of the chat template that no column can set; set it in spec.chatTemplate'
                " ({% set name = value %}), or rename the column",
            )
        sides = [side for side in responses if isinstance(side, list)]
        return self._render(chat, record.prompt, sides, record.tools)

    def _render(
        self, chat: ChatTemplate, prompt: Messages, responses: list[Messages], tools: list[dict[str, Any]] | None
    ) -> _Texts | Problem:
        """Render the prompt with the generation prompt. A response is what the whole conversation's text adds to it."""
        conversations = [prompt, *(prompt + response for response in responses)]
        try:
            if tools is not None and not chat.writes(tools, prompt):
                return Problem(
                    Reason.TEMPLATE,
                    "there are tools, but the chat template does not write them; set spec.chatTemplate to one that"
                    " does, or remove the tools",
                )
            try:
                texts = _rendered(chat, [with_parsed_arguments(each) for each in conversations], tools)
            except TemplateFailedError:  # the template may need a call's arguments as JSON text
                texts = _rendered(chat, conversations, tools)
        except TemplateFailedError as error:
            return Problem(Reason.TEMPLATE, f"the chat template refuses the messages: {error}")
        head, *wholes = texts
        if not all(whole.startswith(head) for whole in wholes):
            return Problem(
                Reason.TEMPLATE,
                "the chat template renders the prompt differently when a response follows, so the response cannot be"
                " separated",
            )
        return _Texts(head, tuple(whole[len(head) :] for whole in wholes), templated=True)

    def _to_tokenise(self, texts: _Texts) -> list[str]:
        if self._data.boundary == "separate":
            return [texts.prompt, *texts.responses]
        return [texts.prompt, *(texts.prompt + response for response in texts.responses)]

    def _pair(self, record: Record, texts: _Texts, prompt: Ids, encoded: list[Ids]) -> EncodedPair | Problem:
        if self._data.boundary == "strict":
            size = len(prompt)
            if any(not np.array_equal(whole[:size], prompt) for whole in encoded):
                return Problem(
                    Reason.NOT_A_PREFIX,
                    "the prompt's tokens are not a prefix of prompt + response (their texts merge where they meet)",
                )
            encoded = [whole[size:] for whole in encoded]
        if any(len(response) == 0 for response in encoded):
            return Problem(Reason.EMPTY_RESPONSE, "a response has no tokens")
        prompt = self._begin(prompt, templated=texts.templated)
        if len(prompt) == 0:
            return Problem(
                Reason.EMPTY_PROMPT,
                "the prompt has no tokens, so that nothing predicts the response's first; start it with a BOS"
                " (spec.data.addBos: always) or give it text",
            )
        if not texts.templated:
            encoded = [self._finish(response) for response in encoded]
        return self._fit(record, prompt, encoded)

    def _begin(self, prompt: Ids, *, templated: bool) -> Ids:
        """Add a BOS according to addBos. A BOS from the text or the template counts: there are never two."""
        bos, prefix = self._tokenizer.bos_id, np.array(self._tokenizer.prefix, dtype=np.int32)
        written = 0
        while bos is not None and written < len(prompt) and prompt[written] == bos:
            written += 1
        rest = prompt[written:]
        start = _NONE
        if self._data.add_bos == "always" or (self._data.add_bos == "auto" and written):
            start = np.array([bos], dtype=np.int32)
        if self._data.add_bos == "auto" and not templated and len(prefix):
            start = _NONE if np.array_equal(rest[: len(prefix)], prefix) else prefix
        return np.concatenate([start, rest])

    def _finish(self, response: Ids) -> Ids:
        """Add the end token to a plain string as the tokenizer does and as appendEos says, never twice."""
        suffix = list(self._tokenizer.suffix)
        if self._data.append_eos and self._tokenizer.eos_id not in suffix:
            suffix.append(self._tokenizer.eos_id or 0)
        if not suffix or response[-len(suffix) :].tolist() == suffix:
            return response
        return np.concatenate([response, np.array(suffix, dtype=np.int32)])

    def _fit(self, record: Record, prompt: Ids, responses: list[Ids]) -> EncodedPair | Problem:
        most = self._data.max_length
        length = len(prompt) + max(len(response) for response in responses)
        truncated = length > most
        if truncated and self._data.over_length != "truncate":
            return Problem(Reason.OVER_LENGTH, f"{length} tokens, more than spec.data.maxLength {most}")
        if truncated:
            if len(prompt) >= most:
                return Problem(
                    Reason.NO_ROOM,
                    f"the prompt alone has {len(prompt)} tokens; spec.data.maxLength {most} leaves no room",
                )
            responses = [response[: most - len(prompt)] for response in responses]
        return EncodedPair(
            prompt,
            responses[0],
            responses[1] if len(responses) > 1 else _NONE,
            np.nan if record.chosen_reward is None else record.chosen_reward,
            np.nan if record.rejected_reward is None else record.rejected_reward,
            truncated,
        )
