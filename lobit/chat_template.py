"""Chat templates: a conversation rendered as Hugging Face's `apply_chat_template` does, by Jinja in a sandbox.

Source: transformers `utils/chat_template_utils.py`. A template comes with the model and is not trusted: it sees plain values, it
cannot reach files or Python's internals, and what it writes is bounded. It can still spend time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lobit.errors import InputError, ModelError

LARGEST_TEXT = 1 << 24
"""Characters that a rendered conversation may have; no model's context holds more."""


class RefusalError(TemplateError):
    """The template called `raise_exception`: it was not made for these messages."""


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks answers for training; here the text between is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on products and powers, because a template as short as `'a' * 10**10` would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not (abs(left) < LARGEST_TEXT and abs(right) < 64):
                raise SecurityError(f"{left} ** {right} is too large")
        else:
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int) and len(value) * times > LARGEST_TEXT:
                    raise SecurityError(f"a text of {len(value)} characters repeated {times} times is too long")
        return super().call_binop(context, operator, left, right)


class PublicNamespace(Namespace):
    """Jinja's `namespace` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class PublicDict:
    """`dict` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise RefusalError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` without the escapes for HTML that Jinja's own makes: templates expect plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PublicDict(),
        "namespace": PublicNamespace,
    }
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], add_generation_prompt: bool) -> str:
    """The conversation as one text.

    Args:
        template: Jinja source.
        messages: JSON values; entries that are None count as absent.
        special: special tokens by name, which become variables of the template.
        add_generation_prompt: a variable of the template that asks it to end with the words that begin an answer.

    Raises:
        InputError: there are no messages, they are not JSON values, or the template refuses them.
        ModelError: the template is broken, reaches outside the sandbox or writes too much.
    """
    if not messages:
        raise InputError("there are no messages to render: a chat needs at least one")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        plain = json.loads(json.dumps(present))  # a copy of plain types: the sandbox does not know what other objects can do
    except (TypeError, ValueError) as error:
        raise InputError(f"the messages are not plain text and numbers ({error}): give `role` and `content` as text") from None
    variables = {**special, "messages": plain, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > LARGEST_TEXT:
                raise SecurityError(f"it writes more than {LARGEST_TEXT} characters")
    except RefusalError as error:
        raise InputError(
            f"the model's chat template refuses these {len(messages)} messages: {error}: change them, or give a text to continue"
        ) from None
    except Exception as error:  # a template is a program: it can fail in any way
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ModelError(
            f"the model's chat template of {len(template)} characters does not work ({type(error).__name__}{where}: {error}): "
            "give a text to continue, or mend the template and export again"
        ) from None
    return "".join(pieces)
