"""What a server's refusals mean, in words, and as errors of both quire and the openai client."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai

from quire.errors import InvalidRequestError, ModelNotFoundError, QuireError
from quire.integrations.langchain.connection import shown_url

_MOST_MODELS = 20
"""Models that a message lists at most."""

_TOO_LONG = ("context length", "context_length", "max_model_len", "maximum context", "too long")
"""Words by which servers say that a prompt has more tokens than the model takes."""


class Asked(NamedTuple):
    """What an error is about."""

    url: str
    """The server's, with ``/v1``."""
    model: str
    key_source: str
    """Where the API key came from, as a message says it."""
    timeout: Any


def wants_models(error: Exception) -> bool:
    """Return whether the words for an error depend on what models the server has."""
    return isinstance(error, openai.NotFoundError)


def explained(
    error: Exception, asked: Asked, models: list[str] | Exception | None = None
) -> Exception:
    """Return the error to raise for one that a request to a server raised.

    Parameters
    ----------
    error : Exception
        From the openai client, or from what it stands on.
    asked : Asked
    models : list of str or Exception, optional
        What the server has, or why it does not say; looked at where :func:`wants_models`.

    Returns
    -------
    Exception
        For an error of openai one of the same class and content, which is an error of quire
        too, and says what to do. Any other is returned as it is.
    """
    url = shown_url(asked.url)
    if isinstance(error, QuireError):
        return error
    if isinstance(error, openai.APITimeoutError):
        return _again(
            error,
            QuireError,
            f"{url} gave no answer within the request_timeout ({asked.timeout!r}): raise it, or "
            "ask for less at once (batch_size, max_tokens)",
        )
    if isinstance(error, openai.APIConnectionError):
        return _again(error, QuireError, _unreachable(error, asked))
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return _again(
            error,
            QuireError,
            f"{url} refuses the API key ({asked.key_source}): {_said(error)}",
        )
    if isinstance(error, openai.NotFoundError):
        return _not_found(error, asked, models)
    if isinstance(error, openai.APIStatusError):
        if error.status_code in (400, 413, 422):
            return _again(error, InvalidRequestError, _refused(error, url))
        return _again(
            error, QuireError, f"{url} answered with status {error.status_code}: {_said(error)}"
        )
    if isinstance(error, openai.APIError):  # in the middle of a stream
        return _again(error, QuireError, f"{url} ended its answer with an error: {_said(error)}")
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        # Older clients let these through while a stream is read.
        text = f"the connection to {url} broke in the middle of an answer: {_reason(error)}"
        broken: Exception = _both(openai.APIConnectionError, QuireError)._of(text)
        return broken
    if isinstance(error, json.JSONDecodeError):  # the client lets it through
        return QuireError(
            f"what {url} answered is no JSON ({error}); is openai_api_base the URL of an "
            "OpenAI-compatible API?"
        )
    return error


def no_completion(answer: object, url: str) -> QuireError:
    """Return the error for an answer that is none of the completions API."""
    text = repr(answer)
    return QuireError(
        f"what {shown_url(url)}/completions answered is no completion; is this the URL of an "
        f"OpenAI-compatible API, such as http://localhost:8000/v1? It answered {text[:200]}"
    )


def _unreachable(error: openai.APIConnectionError, asked: Asked) -> str:
    url = urlsplit(asked.url)
    try:
        port = f" --port {url.port}" if url.port not in (None, 8000) else ""
    except ValueError:  # it is out of range
        port = ""
    return (
        f"no server answers at {shown_url(asked.url)} ({_root_reason(error)}): start "
        f"one there by `quire serve {asked.model}{port}`, or name another by openai_api_base"
    )


def _not_found(
    error: openai.NotFoundError, asked: Asked, models: list[str] | Exception | None
) -> Exception:
    url = shown_url(asked.url)
    if not isinstance(models, list):
        return _again(
            error,
            QuireError,
            f"{url} has no completions API ({_said(error)}); is openai_api_base right? That of "
            "`quire serve` ends in /v1",
        )
    if asked.model in models:
        return _again(error, QuireError, f"{url} answered with status 404: {_said(error)}")
    names = ", ".join(map(repr, models[:_MOST_MODELS])) or "none"
    more = f" and {len(models) - _MOST_MODELS} more" if len(models) > _MOST_MODELS else ""
    return _again(
        error, ModelNotFoundError, f"{url} has no model {asked.model!r}; it has {names}{more}"
    )


def _refused(error: openai.APIStatusError, url: str) -> str:
    said = _said(error)
    hint = ""
    text = f"{error.code} {said}".lower()
    if any(words in text for words in _TOO_LONG) and "shorten" not in text:
        hint = "; shorten the prompt, lower max_tokens, or set truncate_prompt_tokens"
    return f"{url} refuses the request: {said}{hint}"


def _said(error: openai.APIError) -> str:
    """Return a server's own words, without the shell that the client puts around them."""
    body = error.body
    for _ in range(2):  # {"error": {"message": ...}}, of which the client takes off a layer
        if isinstance(body, dict):
            body = body.get("message") or body.get("error") or body.get("detail") or body
    text = body if isinstance(body, str) else error.message
    return (" ".join(text.split()) or "no reason given").removesuffix(".")[:2000]


def _root_reason(error: BaseException) -> str:
    """Return what the layers below the client began with, such as a refused connection."""
    for _ in range(10):
        below = error.__cause__ or error.__context__
        if isinstance(below, OSError) or (below is not None and str(below)):
            error = below
        group = getattr(error, "exceptions", None)
        if group:
            error = group[0]
    return _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and (error.errno or 0) > 0:  # asyncio has words of its own
        return os.strerror(error.errno or 0)
    return str(error).rstrip(".") or type(error).__name__


class _Explained(Exception):
    """The part that all classes made here have."""

    _ours: type[QuireError]

    @classmethod
    def _of(cls, text: str, state: dict[str, Any] | None = None) -> Any:
        # Each client has its own arguments; what they leave behind is taken over as it is.
        error = cls.__new__(cls, text)
        error.__dict__.update({"body": None, "code": None, **(state or {}), "message": text})
        error.args = (text,)
        return error

    def __reduce__(self) -> tuple[type[QuireError], tuple[str]]:
        # A class made here is not found by its name, and a response does not travel.
        return self._ours, (str(self),)


_CLASSES: dict[tuple[type[Exception], type[QuireError]], type[_Explained]] = {}


def _both(theirs: type[Exception], ours: type[QuireError]) -> type[_Explained]:
    found = _CLASSES.get((theirs, ours))
    if found is None:
        body = {"_ours": ours, "__module__": __name__}
        found = _CLASSES[theirs, ours] = type(theirs.__name__, (_Explained, theirs, ours), body)
    return found


def _again(error: openai.APIError, ours: type[QuireError], text: str) -> Exception:
    raised: Exception = _both(type(error), ours)._of(text, vars(error))
    return raised
