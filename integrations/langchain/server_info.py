"""What a server tells of its models and their tokens."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from quire.errors import ModelNotFoundError, NotSupportedError, QuireError
from quire.integrations.langchain.connection import server_root, shown_url

_PATIENCE = 5.0
"""Seconds to wait for what is only there to make a message clearer."""


class ServerInfo:
    """Asks a server about itself.

    Parameters
    ----------
    completions : object
        A client's ``completions``, whose client is used.
    url : str
        The server's, with ``/v1``.
    model : str
        The model that it is about.
    """

    def __init__(self, completions: Any, url: str, model: str) -> None:
        self._client = getattr(completions, "_client", None)
        self._url = url
        self._model = model

    @property
    def url(self) -> str:
        """The server's URL, as a message shows it."""
        return shown_url(self._url)

    def models(self) -> list[str] | Exception:
        """Return the names of the server's models, or why it does not say."""
        try:
            client = self._asker().with_options(timeout=_PATIENCE, max_retries=0)
            return [model.id for model in client.models.list()]
        except Exception as error:
            return error

    def max_context_size(self) -> int:
        """Return how many tokens the model takes.

        Raises
        ------
        NotSupportedError
            When the server does not say.
        ModelNotFoundError
            When it has no such model.
        """
        import openai

        try:
            found = {model.id: model for model in self._asker().models.list()}
        except (openai.OpenAIError, QuireError):
            raise
        except Exception as error:  # the client's own, on an answer that is no list of models
            raise NotSupportedError(
                f"{self.url}/models does not answer with models ({error}): give a number as "
                "max_tokens, not -1"
            ) from error
        if self._model not in found:
            names = ", ".join(map(repr, found)) or "none"
            raise ModelNotFoundError(f"{self.url} has no model {self._model!r}; it has {names}")
        size = getattr(found[self._model], "max_model_len", None)
        if not isinstance(size, int):
            raise NotSupportedError(
                f"{self.url} does not say how many tokens {self._model!r} takes: give a number as "
                "max_tokens, not -1"
            )
        return size

    def token_ids(
        self, text: str, tiktoken_model: str | None, special: dict[str, Any]
    ) -> list[int]:
        """Return the ids of a text; see :meth:`VLLMOpenAI.get_token_ids`."""
        if tiktoken_model is not None:
            ids: list[int] = _encoding(tiktoken_model).encode(text, **special)
            return ids
        found = self._tokenize(text)
        if found is not None:
            return found
        try:
            encoding = _encoding("cl100k_base")
        except ImportError:
            raise NotSupportedError(
                f"{self.url} has no /tokenize to count tokens by: give custom_get_token_ids, or "
                "tiktoken_model_name with the package tiktoken"
            ) from None
        warnings.warn(
            f"{self.url} has no /tokenize: tokens are tiktoken's cl100k_base, which are not those "
            f"of {self._model!r}; give custom_get_token_ids or tiktoken_model_name",
            stacklevel=4,
        )
        ids = encoding.encode(text, **special)
        return ids

    def _tokenize(self, text: str) -> list[int] | None:
        """Return what the server's ``/tokenize`` says; None without one."""
        if self._client is None:
            return None
        import openai

        body = {"model": self._model, "prompt": text, "add_special_tokens": True}
        try:
            answer = self._client.post(
                f"{server_root(self._url)}/tokenize", cast_to=object, body=body
            )
        except openai.APIStatusError as error:
            models = self.models() if error.status_code == 404 else None
            if error.status_code == 405 or (isinstance(models, list) and self._model in models):
                return None
            raise
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        return ids if isinstance(ids, list) else None

    def _asker(self) -> Any:
        if self._client is None:
            raise NotSupportedError("the client that was given cannot be asked about its server")
        return self._client


@functools.cache
def _encoding(name: str) -> Any:
    import tiktoken

    if name in tiktoken.list_encoding_names():
        return _loaded(tiktoken.get_encoding, name)
    try:
        return _loaded(tiktoken.encoding_for_model, name)
    except KeyError:
        raise NotSupportedError(
            f"tiktoken knows no model {name!r}: tiktoken_model_name is one of OpenAI's, or an "
            f"encoding ({', '.join(tiktoken.list_encoding_names())})"
        ) from None


def _loaded(load: Callable[[str], Any], name: str) -> Any:
    try:
        return load(name)
    except OSError as error:  # it fetches what it has not kept, which takes a network
        raise NotSupportedError(
            f"tiktoken has no encoding for {name!r} here and cannot fetch it ({error}): give "
            "custom_get_token_ids"
        ) from error
