"""Chat templates: a conversation to the prompt text that a model was tuned on.

The templates are Jinja in the dialect that Hugging Face tokenizers store: blocks are trimmed,
``raise_exception``, ``strftime_now``, ``tojson``, ``{% break %}`` and ``{% generation %}`` are
known. They come with a checkpoint, from outside: they run in Jinja's immutable sandbox without
a loader (so without files), see plain JSON values only, and have a budget of loop iterations.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from quire.errors import InvalidRequestError
from quire.utils.checks import flag, refuse, shown

MAX_LOOP_ITERATIONS = 1_000_000
"""Loop iterations that one rendering may take: a thousand times what a long chat needs."""

MAX_REPEATED_SIZE = 1_000_000
"""Longest string or list that a template may make by ``*``, and bits of a power by ``**``."""

MAX_RENDERED_SIZE = 10_000_000
"""Longest text, in characters, that a template may write: tokenizing takes a hundredfold of
memory, and the tokenizers library ends the process where there is none."""

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

_iterations_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("iterations_left")


def _spend(count: int) -> None:
    budget = _iterations_left.get()
    budget[0] -= count
    if budget[0] < 0:
        raise jinja2.TemplateError(
            f"it took more than {MAX_LOOP_ITERATIONS} loop iterations, which no chat needs"
        )


def _counted(iterable: Any) -> Any:
    """Charge a loop to the budget of the rendering; sized values are charged at once."""
    try:
        size = len(iterable)
    except TypeError:
        return _counted_lazily(iterable)
    _spend(size)
    return iterable


def _counted_lazily(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        _spend(1)
        yield item


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what the assistant wrote; it renders as is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way of declaring the tags

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own: what is set inside stays inside, as in a call block.
        return nodes.Scope(body, lineno=lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with loops counted and repetition bounded."""

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if not isinstance(value, Sequence) or not isinstance(times, int):
                    continue
                if len(value) * times > MAX_REPEATED_SIZE:
                    raise jinja2.TemplateError(
                        f"it repeats a value of length {len(value)} {times} times"
                    )
        elif not isinstance(left, int) or not isinstance(right, int):
            pass
        elif left.bit_length() * right > MAX_REPEATED_SIZE:
            raise jinja2.TemplateError(f"it computes {left} to the power of {right}")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model has never seen escaped.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _Dict:
    """``dict(...)`` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` for templates; names that start with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"it sets {name!r} on a namespace")


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["_counted"] = _counted
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


_compile_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    with _compile_lock:
        try:
            return _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequestError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            # Jinja writes Python, whose compiler has bounds of its own on what is nested or long.
            raise InvalidRequestError(
                f"the chat template cannot be compiled, so it must be simpler: {_reason(error)}"
            ) from error


def check_template(source: str) -> None:
    """Compile a template, so that what is wrong in its text is known before a chat.

    Raises
    ------
    InvalidRequestError
    """
    _compiled(source)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or type(error).__name__


def plain_data(value: Any) -> Any:
    """Rebuild a value out of plain JSON types, all that a template may touch.

    Parameters
    ----------
    value : object
        Scalars, mappings, lists, tuples, dataclasses and pydantic models, nested at will.

    Returns
    -------
    object
        The same data. An object of another type becomes a text that names its type: templates
        ask whether an image is there and never read it.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: plain_data(getattr(value, item.name)) for item in dataclasses.fields(value)
        }
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump())
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return plain_data(value.item())  # a numpy scalar
    return f"<{type(value).__name__}>"


def _plain(name: str, value: Any) -> Any:
    """Return :func:`plain_data` of a value; an error calls it by this name."""
    try:
        return plain_data(value)
    except RecursionError as error:
        raise InvalidRequestError(
            f"{name} is nested too deeply for a template: it holds itself, or hundreds of values "
            "in each other"
        ) from error
    except Exception as error:  # of an object's own methods
        raise InvalidRequestError(f"{name} cannot be read: {_reason(error)}") from error


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    messages = getattr(messages, "messages", messages)
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidRequestError(
            "messages must be a list of dicts such as {'role': 'user', 'content': 'Hello'}, "
            f"got {type(messages).__name__}"
        )
    plain = []
    for position, message in enumerate(messages):
        data = _plain(f"messages[{position}]", message)
        if not isinstance(data, dict):
            raise InvalidRequestError(
                f"messages[{position}] must be a dict such as "
                f"{{'role': 'user', 'content': 'Hello'}}, got {shown(message)}"
            )
        # A key that holds None is a key left out: templates test for presence.
        data = {key: item for key, item in data.items() if item is not None}
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (bytes, bytearray)):
            raise InvalidRequestError(
                f"the content of messages[{position}] is bytes; it must be a str or a list of parts"
            )
        if "role" not in data:
            raise InvalidRequestError(
                f"messages[{position}] has no 'role'; it has {shown(list(data))}"
            )
        reasoning = next((data[key] for key in _REASONING_FIELDS if key in data), None)
        if reasoning is not None:
            data = {"thinking": reasoning, **data, "reasoning_content": reasoning}
        plain.append(data)
    if not plain:
        raise InvalidRequestError("messages is empty: a chat needs at least one message")
    return plain


def _tool_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise InvalidRequestError(f"tools must be a list, got {type(tools).__name__}")
    schemas = []
    for position, tool in enumerate(tools):
        name = f"tools[{position}]"
        if isinstance(tool, Mapping) or callable(getattr(tool, "model_dump", None)):
            schemas.append(_plain(name, tool))
        elif inspect.isfunction(tool) or inspect.ismethod(tool):
            from transformers.utils.chat_template_utils import get_json_schema

            try:
                schemas.append(get_json_schema(tool))
            except Exception as error:  # of several kinds, all for the function's author
                raise InvalidRequestError(
                    f"{name} must have type hints and a docstring that describe its arguments: "
                    f"{error}"
                ) from error
        else:
            expected = "a JSON schema (a dict) or a function with type hints and a docstring"
            raise refuse(name, tool, expected)
    return schemas


def _mark_end(message: dict[str, Any], field: str, template: str) -> str:
    """Put the mark after the text to be continued, and return that text."""
    text = message.get(field)
    if text is None:
        raise InvalidRequestError(
            f"continue_final_message is set, but the final message has no {field!r} to continue"
        )
    fields = [field]
    if field in _REASONING_FIELDS:
        fields = [name for name in _REASONING_FIELDS if message.get(name) == text]
    if not any(name in template for name in fields):
        raise InvalidRequestError(
            f"continue_final_message asks for {field!r}, which the chat template never reads"
        )
    if isinstance(text, str):
        for name in fields:
            message[name] = text + _CONTINUE_MARK
        return text
    for part in reversed(text if isinstance(text, (list, tuple)) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            last: str = part["text"]
            part["text"] = last + _CONTINUE_MARK
            return last
    raise InvalidRequestError(
        "continue_final_message is set, but the final message holds no text to continue"
    )


def _cut_at_mark(rendered: str, text: str) -> str:
    position = rendered.rfind(_CONTINUE_MARK.strip())
    if position < 0 or text.strip() not in rendered:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template leaves the final message out or "
            "changes it, so there is nothing to continue"
        )
    if rendered.startswith(_CONTINUE_MARK, position):
        return rendered[:position]
    # The template trimmed the message's end: trim what stands before the mark likewise.
    return rendered[:position].rstrip()


def choose_template(
    own: str | Mapping[str, str] | None, asked: str | None, *, has_tools: bool
) -> str:
    """Return the source of the template to use.

    Parameters
    ----------
    own : str, mapping of str to str, or None
        The tokenizer's template, or its templates by name.
    asked : str, optional
        A template, or the name of one of the tokenizer's.
    has_tools : bool
        Whether tools are given; a template named ``"tool_use"`` is for that.

    Raises
    ------
    InvalidRequestError
        If there is none, or none of several is the default.
    """
    if asked is not None and not isinstance(asked, str):
        raise refuse("chat_template", asked, "a Jinja template or the name of one")
    if isinstance(own, Mapping):
        if asked is not None:
            return own.get(asked, asked)
        if has_tools and "tool_use" in own:
            return own["tool_use"]
        if "default" in own:
            return own["default"]
        raise InvalidRequestError(
            "this tokenizer has several chat templates and none is the default: pass "
            f"chat_template, one of {sorted(own)}"
        )
    if asked is not None:
        return asked
    if own is None:
        raise InvalidRequestError(
            "this model's tokenizer has no chat template: pass chat_template, or use generate() "
            "with a prompt written as the model expects it"
        )
    return own


def render(
    template: str,
    messages: Any,
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation.

    Parameters
    ----------
    template : str
        The Jinja source.
    messages : list of dict
        The conversation; each message has a ``role`` and mostly a ``content``.
    special_tokens : mapping of str to str
        ``bos_token`` and its like, by name, for the template to write.
    tools : list, optional
        JSON schemas, or functions that are turned into schemas.
    documents : list of dict, optional
        For templates that do retrieval.
    add_generation_prompt : bool, default True
        Whether to end with the header of the assistant's answer.
    continue_final_message : bool or str, default False
        Whether to leave the final message open for the model to go on with; a string names the
        message's field to continue, in place of ``"content"``.
    variables : mapping, optional
        Further variables of the template.

    Returns
    -------
    str

    Raises
    ------
    InvalidRequestError
        If the messages are malformed, or the template is, or it refuses them; the message holds
        the template's own.
    """
    flag("add_generation_prompt", add_generation_prompt)
    if not isinstance(continue_final_message, (bool, str)):
        expected = "True, False or the name of a message's field"
        raise refuse("continue_final_message", continue_final_message, expected)
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: the first goes "
            "on with the final message, the second starts a new one; set one of them to False"
        )
    plain = _plain_messages(messages)
    if documents is not None:
        if not isinstance(documents, (list, tuple)):
            raise refuse("documents", documents, "a list of dicts with 'title' and 'text'")
        for position, document in enumerate(documents):
            if not isinstance(document, Mapping):
                raise refuse(f"documents[{position}]", document, "a dict with 'title' and 'text'")
    compiled = _compiled(template)
    open_text = ""
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        open_text = _mark_end(plain[-1], field, template)
    values = {
        **special_tokens,
        **{
            name: _plain(f"the template's variable {name!r}", value)
            for name, value in (variables or {}).items()
        },
        "messages": plain,
        "tools": _tool_schemas(tools),
        "documents": _plain("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    token = _iterations_left.set([MAX_LOOP_ITERATIONS])
    try:
        rendered = compiled.render(values)
    except RecursionError as error:
        raise InvalidRequestError(
            "the chat template failed: it calls itself without end"
        ) from error
    except Exception as error:
        raise InvalidRequestError(f"the chat template failed: {_reason(error)}") from error
    finally:
        _iterations_left.reset(token)
    if len(rendered) > MAX_RENDERED_SIZE:
        raise InvalidRequestError(
            f"the chat template wrote {len(rendered)} characters, more than the "
            f"{MAX_RENDERED_SIZE} that are taken"
        )
    return _cut_at_mark(rendered, open_text) if continue_final_message else rendered
