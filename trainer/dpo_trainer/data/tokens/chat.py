"""Renders message lists with a chat template, in a sandbox and with a fixed date."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing

from dpo_api.errors import InvalidModelError

TEMPLATE_DATE = dt.date(2024, 7, 26)
"""The current date in every template, fixed so that a run's tokens do not depend on the day it starts.

It is the default of Llama 3's own template. At inference a template may print the real date, which then differs from
the one in training, as with any data set.
"""


class TemplateFailedError(Exception):
    """The template refused these messages or could not render them."""


class _Generation(jinja2.ext.Extension):
    """Renders the body of ``{% generation %}…{% endgeneration %}``, which marks assistant text in some templates."""

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


class _Unset(jinja2.Undefined):
    """A variable that is not set: false in a test, as in Jinja, but an error if its text is needed.

    Jinja would write an empty string. That is right only for special tokens, which a tokenizer may lack.
    """

    def __str__(self) -> str:
        name = self._undefined_name
        if self._undefined_obj is missing and name is not None and not name.endswith("_token"):
            raise jinja2.UndefinedError(f"it needs the variable {name!r}, which is not set")
        return ""


_OURS = frozenset({"messages", "add_generation_prompt", "tools"})
"""The variables that come from a record."""


class ChatTemplate:
    """A compiled chat template, rendered like transformers' ``apply_chat_template`` except for the date."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, tool_source: str | None = None) -> None:
        """``special_tokens`` (``bos_token``, …) are variables of the template. ``tool_source``: a separate template for
        conversations with tools.

        Raises InvalidModelError if a template is not valid Jinja.
        """
        self.source = source
        self._plain = _Compiled(source, special_tokens)
        self._with_tools = self._plain if tool_source is None else _Compiled(tool_source, special_tokens)
        self.uses_date = self._plain.uses_date or self._with_tools.uses_date
        self.reads = self._plain.reads | self._with_tools.reads
        """Names of variables that the templates may read and that are never set."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the conversation's text. Raises TemplateFailedError if the template refuses the messages."""
        compiled = self._plain if tools is None else self._with_tools
        return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, tools=tools)

    def writes(self, tools: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the tools change the text. Raises TemplateFailedError, as ``render`` does."""
        given = {"messages": list(messages), "add_generation_prompt": True}
        with_tools = self._with_tools.render(**given, tools=tools)
        try:
            return with_tools != self._with_tools.render(**given, tools=None)
        except TemplateFailedError:
            return True


class _Compiled:
    """One template, ready to render."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.uses_date = "strftime_now" in source or "date_string" in source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], undefined=_Unset
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self._variables = {**special_tokens, "documents": None}
        if "date_string" in source:
            self._variables["date_string"] = TEMPLATE_DATE.strftime("%d %b %Y")
        try:
            self._template = environment.from_string(source)
            named = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise InvalidModelError(f"the chat template is not valid, line {error.lineno}: {error.message}") from error
        self.reads = frozenset(named) - _OURS - special_tokens.keys() - environment.globals.keys() - {"date_string"}

    def render(self, **variables: Any) -> str:
        """Return the text. Raises TemplateFailedError."""
        try:
            return self._template.render(**variables, **self._variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise TemplateFailedError(str(error).strip().split("\n")[0] or type(error).__name__) from error
