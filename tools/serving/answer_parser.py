"""Divides the text of an answer into content, reasoning and tool calls, with transformers' own response parsing.

What marks them in a model's text is in its response template, which comes with the tokenizer.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["AnswerParser", "MadeCall", "Parsed", "call_opening", "find_response_template"]

logger = logging.getLogger(__name__)

_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeCall:
    """A call of a tool that a model made."""

    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a piece of an answer's text adds to it."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[MadeCall] = ()


def find_response_template(tokenizer: Any, module: Any, given: dict[str, Any] | None) -> Any:
    """The response template of a model, ready for use; None if it has none.

    Args:
        tokenizer: Its tokenizer, from transformers.
        module: The model itself: transformers knows the templates of some families that come without one.
        given: Replaces both.

    Raises:
        ModelError: The template is invalid.
    """
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError:  # before transformers 5.20
        if given is not None:
            raise ModelError("A response template needs a newer version of transformers.") from None
        return None
    template = given
    if template is None:
        try:
            from transformers.cli.serving.utils import get_response_template
        except ImportError:
            template = getattr(tokenizer, "response_template", None)
        else:
            template = get_response_template(tokenizer, module)
    if template is None:
        return None
    try:
        return load_response_template(template)
    except (ValueError, TypeError) as error:
        raise ModelError(f"The model's response template is invalid: {error}") from error


def call_opening(template: Any, prefix: str) -> str | None:
    """The text to add to ``prefix``, a prompt, so that its answer is a call; None if ``template`` does not tell."""
    from transformers.utils.chat_parsing import ResponseParser

    field = template.fields.get("tool_calls")
    opening = "" if field is None else _first_literal(field.open_literals, field.open_re)
    open_name = None
    for event in ResponseParser(template, prefix=prefix).initial_events:
        if event["type"] != "region_chunk":
            open_name = event["field"] if event["type"] == "region_open" else None
    if open_name is None or open_name == template.implicit:
        return opening or None
    # The chat template has begun something else, as reasoning, which has to end before.
    begun = template.fields[open_name]
    closing = _first_literal(begun.close_literals, begun.close_re)
    return closing + opening if opening and closing else None


def _first_literal(literals: Sequence[str] | None, pattern: Any) -> str:
    """A mark that opens or closes a part of an answer: the first of ``literals``, or what ``pattern`` begins with."""
    if literals:
        return literals[0]
    if pattern is None:
        return ""
    # Blanks before and within a mark are optional; a name that is captured is for the model to write.
    source = str(pattern.pattern).replace(r"\s*", "")
    found = re.match(r"(?:\\[^\w\s]|[^\\\[\](){}.*+?^$|](?![*+?{]))*", source)
    return re.sub(r"\\(.)", r"\1", found[0]) if found else ""


class AnswerParser:
    """Parses one answer as its text comes.

    Args:
        template: The response template.
        prefix: The text of the prompt, whose end may begin the answer.
        tools: The tools that the model was told of, whose schemas tell the types of arguments.
    """

    def __init__(self, template: Any, *, prefix: str, tools: Sequence[dict[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser: Any | None = ResponseParser(template, prefix=prefix, tools=list(tools))
        self._structured = ""  # of the region that is open, if its text is no text for the reader

    def add(self, text: str) -> Parsed:
        """Parse ``text``; what may be part of a mark is held back."""
        if self._parser is None:
            return Parsed(text=text)
        return self._parsed(text, lambda parser: parser.feed(text))

    def finish(self) -> Parsed:
        """Parse what was held back."""
        if self._parser is None:
            return Parsed()
        return self._parsed("", lambda parser: parser.finalize()[1])

    def _parsed(self, text: str, parse: Any) -> Parsed:
        try:
            events = parse(self._parser)
        except Exception as error:  # noqa: BLE001 - whatever a template's parsers raise for a model's text
            # The model made a call that is none: the reader gets the rest as it is.
            logger.info("an answer does not follow the response template: %s", error)
            self._parser = None
            return Parsed(text=self._structured + text)
        content, reasoning, calls = "", "", list[MadeCall]()
        for event in events:
            field = event["field"]
            if event["type"] == "region_open":
                self._structured = ""
            elif event["type"] == "region_close" and field == "tool_calls":
                calls += _made_calls(event["value"])
            elif event["type"] == "region_chunk" and event["dirty"]:
                self._structured += event["text"]
            elif event["type"] == "region_chunk" and field == "content":
                content += event["text"]
            elif event["type"] == "region_chunk" and field in _REASONING:
                reasoning += event["text"]
        return Parsed(text=content, reasoning=reasoning, calls=calls)


def _made_calls(value: Any) -> list[MadeCall]:
    """The calls in the value of a region: one, or a list of them."""
    if isinstance(value, list):
        return [call for each in value for call in _made_calls(each)]
    function = value.get("function", value)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [MadeCall(name=str(function["name"]), arguments=text)]
