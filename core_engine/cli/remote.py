"""RemoteSpeaker: a server that speaks OpenAI's protocol, through the official client."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quire.cli.speaker import Completion, Piece
from quire.errors import InvalidRequestError, QuireError

if TYPE_CHECKING:
    from typing_extensions import Self


class RemoteError(QuireError):
    """A server that is not there, that refuses us, or that fails."""


class RemoteSpeaker:
    """A model behind a URL.

    Parameters
    ----------
    url : str
        With ``/v1`` at its end, which is added to a host alone.
    model : str, optional
        Otherwise the first that the server names.
    fields : mapping
        Goes with every request, as it is.
    api_key : str, optional
        Of several with commas, the first.

    Raises
    ------
    RemoteError
        The official client is not installed, or there is no model's name to be had.
    """

    def __init__(
        self, url: str, model: str | None, fields: Mapping[str, Any], api_key: str | None = None
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise RemoteError(f"--url needs `pip install 'quire[openai]'` ({error})") from error
        try:
            parts = urlsplit(url)
            is_web = parts.scheme in ("http", "https") and bool(parts.netloc) and parts.port != 0
        except ValueError:  # brackets without an address, a port out of range
            is_web = False
        if not is_web:
            raise InvalidRequestError(f"--url {url!r}: such as http://localhost:8000/v1")
        self._url = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        # The variable may be the one that the server was started with, which has several.
        key = (api_key or "").split(",")[0].strip() or "EMPTY"
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequestError("--api-key has a character that no header may have")
        self._client = openai.OpenAI(base_url=self._url, api_key=key)
        self._fields = dict(fields)
        try:
            self._model = self._first_model() if model is None else model
        except BaseException:
            self._client.close()
            raise

    def _first_model(self) -> str:
        with self._errors():
            models = self._client.with_options(max_retries=0).models.list().data
        if not models:
            raise RemoteError(f"{self._url} names no model: give --model")
        return models[0].id

    @property
    def num_completions(self) -> int:
        """Completions of each prompt."""
        return int(self._fields.get("n", 1))

    def answer(self, messages: list[dict[str, str]]) -> Generator[Piece, None, None]:
        """Yield the pieces of the next message as they come."""
        conversation: Any = messages
        with (
            self._errors(),
            self._client.chat.completions.create(
                model=self._model, messages=conversation, stream=True, extra_body=self._fields
            ) as stream,
        ):
            ended = False
            for chunk in stream:
                for choice in chunk.choices:
                    ended |= choice.finish_reason is not None
                    if reasoning := getattr(choice.delta, "reasoning_content", None):
                        yield Piece(reasoning, is_reasoning=True)
                    if choice.delta.content:
                        yield Piece(choice.delta.content)
            self._check_end(ended)

    def stream(self, prompt: str) -> Generator[str, None, None]:
        """Yield the pieces of the only completion of a prompt."""
        with (
            self._errors(),
            self._client.completions.create(
                model=self._model, prompt=prompt, stream=True, extra_body=self._fields
            ) as stream,
        ):
            ended = False
            for chunk in stream:
                for choice in chunk.choices:
                    ended |= choice.finish_reason is not None
                    yield choice.text
            self._check_end(ended)

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Return all completions, in the order of the prompts."""
        with self._errors():
            done = self._client.completions.create(
                model=self._model, prompt=list(prompts), extra_body=self._fields
            )
            n = self.num_completions
            found = [
                Completion(
                    prompts[choice.index // n],
                    choice.index % n,
                    choice.text,
                    getattr(choice, "token_ids", None),
                    choice.finish_reason,
                )
                for choice in sorted(done.choices, key=lambda choice: choice.index)
            ]
        if len(found) != n * len(prompts):
            raise RemoteError(f"{self._url} gave {len(found)} completions, not {n * len(prompts)}")
        return found

    def _check_end(self, ended: bool) -> None:
        if not ended:  # what came would be taken for all of it
            raise RemoteError(f"{self._url} ended its stream before the answer's end")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Let the client's errors say what a user can do about them."""
        import openai

        try:
            yield
        except QuireError:
            raise
        except openai.APIConnectionError as error:
            reason = str(error.__cause__ or error)
            raise RemoteError(f"no server answers at {self._url}: {reason}") from error
        except openai.AuthenticationError as error:
            raise RemoteError(
                f"{self._url} refuses the key, which --api-key or QUIRE_API_KEY gives: "
                f"{_message(error)}"
            ) from error
        except openai.APIStatusError as error:
            kind = InvalidRequestError if error.status_code in (400, 422) else RemoteError
            raise kind(f"{self._url} answers {error.status_code}: {_message(error)}") from error
        except openai.APIError as error:
            raise RemoteError(f"{self._url}: {_message(error)}") from error
        except Exception as error:
            # The client lets what ends a stream half-way through as its HTTP library raises it.
            if type(error).__module__.startswith("http"):
                raise RemoteError(f"{self._url} broke off: {error}") from error
            if isinstance(error, (ValueError, TypeError, AttributeError, LookupError)):
                raise RemoteError(
                    f"{self._url} answers with what is no answer of OpenAI's API ({error}): is it "
                    "the URL of one, as http://localhost:8000/v1?"
                ) from error
            raise


def _message(error: Any) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message)
