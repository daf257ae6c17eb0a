"""Message lists → text by a chat template, in a sandbox and with one fixed date."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_api.errors import InvalidModelError

TEMPLATE_DATE = dt.date(2024, 7, 26)
"""What every template is told that today is, so that a run's tokens do not depend on the day it starts.

The day that Llama 3's template itself falls back to. A tokenizer's user who lets templates print the real date meets a
model trained on another one, as with any data set.
"""


class TemplateFailedError(Exception):
    """The template refused these messages or could not render them."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text in some templates; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own class attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body's nodes."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters; transformers replaces it the same way.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template, rendered as transformers' ``apply_chat_template`` does, but for today's date."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens`` (``bos_token``, …) are variables of the template.

        Raises InvalidModelError when the template is not valid Jinja.
        """
        self.source = source
        self.uses_date = "strftime_now" in source or "date_string" in source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self._variables = {**special_tokens, "tools": None, "documents": None}
        if "date_string" in source:
            self._variables["date_string"] = TEMPLATE_DATE.strftime("%d %b %Y")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidModelError(f"the chat template is not valid, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Return the conversation's text. Raises TemplateFailedError when the template refuses the messages."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise TemplateFailedError(str(error).strip().split("\n")[0] or type(error).__name__) from error
