"""One row of a preference file → one record, or the reason why it cannot be used.

A record's three texts are either all strings or all message lists; the forms found in public data sets are brought to
these two here, so that nothing later has to ask again:

- strings: ``prompt``, ``chosen_response`` | ``chosen``, ``rejected_response`` | ``rejected``;
- message lists, with the prompt as a list or a string (one user message), the responses as lists or strings (one
  assistant message), and the prompt repeated at the start of the responses or not;
- whole conversations without a prompt: split at the last common message.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dpo_api.spec import Columns
from dpo_trainer.data.problems import Problem, Reason, UnusableError, kind_of
from dpo_trainer.data.reading.keys import root_of, value_at, why_absent

Message = dict[str, Any]
Messages = list[Message]


@dataclass(frozen=True, slots=True)
class Record:
    """One preference pair as text. ``prompt``, ``chosen`` and ``rejected`` are all str or all message lists.

    ``rejected`` is None where it is not needed (SFT alone). A reward that the line does not give is None. ``tools``
    are JSON schemas for the chat template. ``columns``: the names of all that the line holds.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages | None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    tools: list[dict[str, Any]] | None = None
    columns: frozenset[str] = field(default=frozenset(), compare=False)


_USUAL = {
    "prompt": ("prompt",),
    "chosen": ("chosen_response", "chosen"),
    "rejected": ("rejected_response", "rejected"),
    "chosen_reward": ("chosen_reward",),
    "rejected_reward": ("rejected_reward",),
    "tools": ("tools",),
}
_OTHER_FORMS = {
    "completions": ("completions",),
    "scores": ("scores",),
    "ranks": ("ranks",),
    "preference": ("overall_preference", "preference_strength"),
    "response1": ("response1", "response_1"),
    "response2": ("response2", "response_2"),
    "context": ("context",),
}
"""Keys of the forms of ``ranked``."""
_UNSUPPORTED = {
    "chat_template_kwargs": "variables for the chat template; set them in spec.chatTemplate ({% set name = value %})",
    "images": "images, and only text can be trained on",
    "videos": "videos, and only text can be trained on",
}
"""Columns that other trainers read and this one does not."""


def record_of(row: Mapping[str, Any], columns: Columns, *, rejected_needed: bool = True) -> Record | Problem:
    """Read one row.

    ``rejected_needed=False`` is SFT alone: the rejected response is neither asked for nor looked at.
    """
    try:
        return _parse(row, columns, rejected_needed)
    except UnusableError as error:
        return error.problem


def names_read(columns: Columns, *, rejected_needed: bool = True) -> frozenset[str]:
    """Return the keys of a row that ``record_of`` may read."""
    found = set(_UNSUPPORTED)
    for role in _USUAL:
        if rejected_needed or not role.startswith("rejected"):
            found.update(keys_of(role, columns))
    return frozenset(found)


def keys_of(role: str, columns: Columns) -> tuple[str, ...]:
    """Return the keys of a row that a role may be read from."""
    own: str | None = getattr(columns, role, None)
    return (own, root_of(own)) if own else _usual(role)


def _usual(role: str) -> tuple[str, ...]:
    return _USUAL[role] if role in _USUAL else _OTHER_FORMS[role]


def _parse(row: Mapping[str, Any], columns: Columns, rejected_needed: bool) -> Record:
    for name, what in _UNSUPPORTED.items():
        if row.get(name):
            raise UnusableError(
                Reason.UNSUPPORTED_COLUMN, f'"{name}" holds {what}; remove the column if it is not needed'
            )
    chosen_reward = _reward(row, "chosen_reward", columns.chosen_reward)
    rejected_reward = _reward(row, "rejected_reward", columns.rejected_reward) if rejected_needed else None
    chosen = _text(row, "chosen", columns.chosen)
    rejected = _text(row, "rejected", columns.rejected) if rejected_needed else None
    prompt = _prompt(row, columns.prompt)
    tools = _tools(row, columns.tools)
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        prompt, chosen, rejected = _as_messages(prompt, chosen, rejected)
    elif prompt is None:
        _missing(row, "prompt", columns.prompt)
    elif tools:
        raise UnusableError(
            Reason.BAD_TOOLS,
            "there are tools, but plain strings are not templated, so the model would not see them; write messages, or"
            " remove the tools if the text holds them already",
        )
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if response is not None and _is_empty(response):
            raise UnusableError(Reason.EMPTY_RESPONSE, f"the {side} response is empty")
    held = frozenset(name for name, value in row.items() if value is not None)
    return Record(prompt, chosen, rejected, chosen_reward, rejected_reward, tools or None, held)


def find(row: Mapping[str, Any], role: str, name: str | None) -> tuple[str, Any]:
    """Return the role's key in this row and its value; a null counts as absent (then the value is None)."""
    if name:
        return name, value_at(row, name)
    names = _usual(role)
    return next(((key, row[key]) for key in names if row.get(key) is not None), (names[0], None))


def _missing(row: Mapping[str, Any], role: str, name: str | None) -> NoReturn:
    names = (name,) if name else _usual(role)
    wanted = " or ".join(f'"{key}"' for key in names)
    raise UnusableError(
        Reason.MISSING_KEY, f"no {wanted} ({why_absent(row, names)}); spec.data.columns.{_camel(role)} names it"
    )


def _camel(role: str) -> str:
    head, _, tail = role.partition("_")
    return head + tail.capitalize()


def _reward(row: Mapping[str, Any], role: str, name: str | None) -> float | None:
    key, value = find(row, role, name)
    if value is None:
        if name:
            _missing(row, role, name)
        return None
    check_number(f'"{key}"', value, Reason.BAD_REWARD)
    return float(value)


def required(row: Mapping[str, Any], role: str, name: str | None) -> tuple[str, Any]:
    """Return the role's key in this row and its value. Raises UnusableError if it is absent."""
    key, value = find(row, role, name)
    if value is None:
        _missing(row, role, name)
    return key, value


def check_number(what: str, value: object, reason: Reason) -> None:
    """Raise UnusableError unless the value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableError(reason, f"{what} is {kind_of(value)}, expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError as error:
        raise UnusableError(reason, f"{what} is too large for a number") from error
    if not finite:
        raise UnusableError(reason, f"{what} is {value}, not a finite number")


def _tools(row: Mapping[str, Any], name: str | None) -> list[dict[str, Any]]:
    """The tools' JSON schemas, each of them or all as JSON text or not; an empty list where there are none."""
    key, value = find(row, "tools", name)
    if value is None or value == "":
        return []
    tools = _from_json(value)
    if not isinstance(tools, list):
        raise UnusableError(Reason.BAD_TOOLS, f'"{key}" is {kind_of(tools)}, expected a list of JSON schemas')
    schemas = [_from_json(tool) for tool in tools]
    for number, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise UnusableError(Reason.BAD_TOOLS, f'"{key}"[{number}] is {kind_of(schema)}, expected a JSON schema')
    return schemas


def _from_json(value: Any) -> Any:
    """What JSON text says; the value itself if it is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _prompt(row: Mapping[str, Any], name: str | None) -> str | Messages | None:
    """None when the usual key is absent: whole conversations need no prompt. A key that was asked for must be there."""
    return _text(row, "prompt", name) if name or find(row, "prompt", None)[1] is not None else None


def _text(row: Mapping[str, Any], role: str, name: str | None) -> str | Messages:
    key, value = required(row, role, name)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_message(key, number, message) for number, message in enumerate(value)]
    raise UnusableError(Reason.WRONG_TYPE, f'"{key}" is {kind_of(value)}, expected a string or a list of messages')


def _message(key: str, number: int, message: object) -> Message:
    where = f'"{key}"[{number}]'
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        hint = ' (keys "from" and "value" are not read)' if isinstance(message, dict) and "from" in message else ""
        raise UnusableError(Reason.BAD_MESSAGE, f'{where} is not a message with a "role" and a "content"{hint}')
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(where, content)
    # As transformers does: a template asks whether a key is there, and might write a null as "None".
    message = {name: value for name, value in message.items() if value is not None}
    _check_calls(where, message.get("tool_calls"))
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise UnusableError(Reason.BAD_MESSAGE, f'{where} has {kind_of(content)} as "content", expected a string')
    return {**message, "content": content}


def _check_calls(where: str, calls: object) -> None:
    """Arguments are an object or JSON text of one; which of the two a template takes is found when it is rendered."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise UnusableError(Reason.BAD_MESSAGE, f'{where} has {kind_of(calls)} as "tool_calls", expected a list')
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            text = f'{where} has a "tool_calls"[{number}] that is not an object with a function'
            raise UnusableError(Reason.BAD_MESSAGE, text)
        arguments = function.get("arguments", {})
        if not isinstance(_from_json(arguments), dict):
            text = (
                f'{where} has a call whose "arguments" are {kind_of(arguments)}, expected an object or JSON text of one'
            )
            raise UnusableError(Reason.BAD_MESSAGE, text)


def with_parsed_arguments(messages: Messages) -> Messages:
    """The messages with every call's arguments as an object, where they are JSON text."""
    return [
        {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _parsed_call(call["function"])}
    return {**call, "arguments": _from_json(call["arguments"])} if "arguments" in call else call


def _join_parts(where: str, parts: list[Any]) -> str:
    """Content as a list of parts: their texts, joined. A part that is no text (an image) cannot be trained on."""
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UnusableError(Reason.BAD_MESSAGE, f"{where} holds a part that is not text")
        texts.append(text)
    return "".join(texts)


def _is_empty(response: str | Messages) -> bool:
    if isinstance(response, str):
        return not response
    return not any(message.get("content") or message.get("tool_calls") for message in response)


def _as_messages(
    prompt: str | Messages | None, chosen: str | Messages, rejected: str | Messages | None
) -> tuple[Messages, Messages, Messages | None]:
    """Bring every mixture of strings and lists to three message lists."""
    if rejected is not None and isinstance(chosen, list) is not isinstance(rejected, list):
        raise UnusableError(Reason.WRONG_TYPE, "one response is a string and the other a list of messages")
    sides = [_response(side) for side in (chosen, rejected) if side is not None]
    if prompt is None or (isinstance(prompt, str) and _is_conversation(sides)):
        # A string beside whole conversations repeats their first user message (UltraFeedback's form): they say more.
        prompt, sides = _split(sides)
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    else:
        size, start = len(prompt), prompt
        if size and all(side[:size] == start for side in sides):
            sides = [side[size:] for side in sides]
    if not prompt:
        raise UnusableError(Reason.EMPTY_PROMPT, "the prompt holds no message")
    for side in sides:
        if side and side[0]["role"] in ("user", "system"):
            raise UnusableError(
                Reason.NO_COMMON_PROMPT,
                f'a response begins with a message of role "{side[0]["role"]}", not "assistant"',
            )
    return prompt, sides[0], sides[1] if len(sides) > 1 else None


def _response(side: str | Messages) -> Messages:
    if isinstance(side, list):
        return side
    return [{"role": "assistant", "content": side}] if side else []


def _is_conversation(sides: list[Messages]) -> bool:
    return all(side and side[0]["role"] != "assistant" for side in sides)


def _split(sides: list[Messages]) -> tuple[Messages, list[Messages]]:
    """Split at the last message that both conversations share; each keeps at least its last message as the response."""
    most = max(min(len(side) for side in sides) - 1, 0)
    common = most
    if len(sides) > 1:
        pairs = zip(sides[0][:most], sides[1][:most], strict=True)
        common = next((number for number, (left, right) in enumerate(pairs) if left != right), most)
    if common == 0:
        raise UnusableError(Reason.NO_COMMON_PROMPT, "there is no prompt, and the conversations share no first message")
    return sides[0][:common], [side[common:] for side in sides]
