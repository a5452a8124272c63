"""Jinja chat templates, rendered as transformers renders them, in a sandbox: a template is a stranger's program."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llava_deploy.engines.errors import PromptError

if TYPE_CHECKING:
    from jinja2 import Template

_PROBE = "llava-deploy-probe"
_DATE = "strftime_now"  # what transformers calls it


def tells_the_date(template: str | None) -> bool:
    """Whether a template may ask what day it is, so that its prompts are not the same tomorrow."""
    return template is not None and _DATE in template


class ContentForm(Enum):
    """What a template takes as a message's content: a text, or a list of parts."""

    TEXT = "text"
    PARTS = "parts"


def render_template(
    template: str, messages: Sequence[dict[str, Any]], bos_token: str | None, eos_token: str | None
) -> str:
    """The prompt, with the beginning of the assistant's answer (``add_generation_prompt``).

    Args:
        template: Jinja source.
        messages: plain data only, no objects: what a template can reach it can call.
        bos_token: given to the template where there is one.
        eos_token: likewise.

    Raises:
        PromptError: the template is no Jinja, fails, calls ``raise_exception``, or reaches for Python's internals.
    """
    from jinja2 import TemplateError

    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **{name: token for name, token in tokens.items() if token is not None},
        )
    except (
        TemplateError,
        SyntaxError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        MemoryError,
    ) as error:
        cause = " ".join(str(error).split())
        raise PromptError(
            f"chat template: {type(error).__name__}: {cause:.300}; change the conversation to what the template takes, "
            "or export the bundle with a built-in conversation format"
        ) from error


def check_template(template: str) -> None:
    """Refuse what is no Jinja, without rendering it.

    Raises:
        PromptError: it cannot be compiled; the message gives the reason, and the line where Jinja knows it.
    """
    from jinja2 import TemplateSyntaxError

    try:
        _compile(template)
    except TemplateSyntaxError as error:
        raise PromptError(f"line {error.lineno}: {' '.join(str(error.message).split()):.300}") from error
    except (SyntaxError, ValueError, RuntimeError, MemoryError) as error:  # of the Python that Jinja makes of it
        raise PromptError(f"{type(error).__name__}: {' '.join(str(error).split()):.300}") from error


@lru_cache(maxsize=8)
def template_forms(template: str, bos_token: str | None, eos_token: str | None) -> frozenset[ContentForm]:
    """Which forms of content come out of a template as text; none where a bare question does not come out at all.

    transformers hands over what it is given: a text is lost in a template for parts, without a word, and a template for
    texts shows the list of parts as Python writes it.
    """
    contents = {ContentForm.TEXT: _PROBE, ContentForm.PARTS: [{"type": "text", "text": _PROBE}]}
    forms = set()
    for form, content in contents.items():
        try:
            prompt = render_template(template, [{"role": "user", "content": content}], bos_token, eos_token)
        except PromptError:
            continue
        as_written = any(f"{quote}{_PROBE}{quote}" in prompt for quote in "'\"")
        if _PROBE in prompt and not as_written:
            forms.add(form)
    return frozenset(forms)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    # jinja2 is imported here because importing the runtime must stay cheap.
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
            # Jinja's own gives an undefined value, which prints as nothing.
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not safe")

    class Generation(Extension):
        """``{% generation %}``: marks the assistant's text for training; here it only stands for what it holds."""

        tags = {"generation"}  # noqa: RUF012 - the type that Jinja declares

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PlainNamespace(Namespace):
        """A namespace without underscored names, which Jinja looks up unguarded."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                _check_name(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} is not safe")

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    def plain_dict(*args: Any, **kwargs: Any) -> dict:  # the class itself would show its attributes
        return dict(*args, **kwargs)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        _DATE: strftime_now,
        "dict": plain_dict,
        "namespace": PlainNamespace,
    }
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; the arguments are those that transformers gives to templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
