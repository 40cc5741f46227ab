"""The names under which a model of a server takes its arguments, and where they belong."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Mapping
from typing import Any

from quire.errors import ConfigError
from quire.utils.checks import refuse
from quire.utils.suggest import unexpected_argument

OPENAI_FIELDS = (
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "n",
    "max_tokens",
    "best_of",
    "logit_bias",
    "logprobs",
    "seed",
)
"""Fields that the client's ``completions.create`` takes under the same name, but ``stop``."""

EXTRA_FIELDS = frozenset(
    {
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop_token_ids",
        "bad_words",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "prompt_logprobs",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "allowed_token_ids",
        "truncate_prompt_tokens",
        "structured_outputs",
        "use_beam_search",
        "length_penalty",
        "early_stopping",
    }
)
"""Fields that OpenAI's API has no name for, and that go into a request's ``extra_body``."""

REQUEST_ARGUMENTS = frozenset(
    {"echo", "suffix", "user", "stream_options", "extra_headers", "extra_query", "timeout"}
)
"""What ``completions.create`` takes besides, for ``model_kwargs`` and for calls."""

_COMMUNITY_FIELDS = frozenset(
    {
        *OPENAI_FIELDS,
        "model_name",
        "openai_api_key",
        "openai_api_base",
        "openai_organization",
        "openai_proxy",
        "batch_size",
        "request_timeout",
        "max_retries",
        "streaming",
    }
) - {"logprobs", "seed"}
"""Fields that LangChain's class warns of where they stand in ``model_kwargs``."""


def by_field_name(
    owner: str, given: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments under the names of their fields.

    Raises
    ------
    TypeError
        For one that is given under both its names, with two values.
    """
    names = {field.alias: name for name, field in fields.items() if field.alias}
    values: dict[str, Any] = {}
    for name, value in given.items():
        own = names.get(name, name)
        if own in values and values[own] != value:
            other = next(alias for alias, field in names.items() if field == own)
            raise TypeError(f"{owner}: {own} and {other} are two names of one argument")
        values[own] = value
    return values


def settled_arguments(
    owner: str, given: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a constructor's arguments under their fields, with what is no field where it belongs.

    As in LangChain's class, ``model_kwargs`` may hold fields, which are moved out of it, and an
    argument of ``completions.create`` that is no field is moved into it, with a warning.

    Raises
    ------
    TypeError
        For a name that is neither; the message has the nearest.
    ConfigError
        For an argument that is given twice.
    """
    values = by_field_name(owner, given, fields)
    held = values.pop("model_kwargs", None) or {}
    kept: dict[str, Any] = {}
    for name, value in by_field_name("model_kwargs", held, fields).items():
        if name in values:
            raise ConfigError(f"{name} is given as an argument and in model_kwargs")
        if name in _COMMUNITY_FIELDS:
            warnings.warn(
                f"{name} is an argument of {owner}, and was given in model_kwargs", stacklevel=3
            )
        if name in fields:
            values[name] = value
        elif name in REQUEST_ARGUMENTS:
            kept[name] = value
        else:
            raise unexpected_argument("model_kwargs", name, {*fields, *REQUEST_ARGUMENTS})
    valid = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for name in [name for name in values if name not in fields]:
        if name not in REQUEST_ARGUMENTS:
            raise unexpected_argument(owner, name, valid | REQUEST_ARGUMENTS)
        if name in kept:
            raise ConfigError(f"{name} is given as an argument and in model_kwargs")
        warnings.warn(
            f"{name} is no argument of {owner} and was moved into model_kwargs", stacklevel=3
        )
        kept[name] = values.pop(name)
    if kept:
        values["model_kwargs"] = kept
    return values


def check_key(key: str, source: str) -> None:
    """Refuse a key that cannot be sent, without showing it; ``source`` is where it came from.

    Raises
    ------
    ConfigError
    """
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "openai_api_key has a character that no header may have, such as a line's end or an "
            f"accented letter ({source})"
        )


def check_timeout(given: Any) -> None:
    """Refuse seconds that are none.

    Raises
    ------
    InvalidRequestError
    """
    for seconds in given if isinstance(given, (tuple, list)) else (given,):
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if isinstance(seconds, (str, bytes, bool)) or (
            is_number and not 0 < seconds < threading.TIMEOUT_MAX
        ):
            raise refuse("request_timeout", given, "a positive number of seconds, or two")


def shown_headers(values: Mapping[str, Any]) -> dict[str, str]:
    """Return headers or a query such that equal ones look equal, and no secret is seen."""
    return {
        name: "sha256:" + hashlib.sha256(str(value).encode()).hexdigest()[:16]
        for name, value in values.items()
    }


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers or a query without those whose names say that they hold credentials."""
    words = ("auth", "key", "token", "secret", "cookie", "password")
    return {k: v for k, v in values.items() if not any(word in k.lower() for word in words)}
