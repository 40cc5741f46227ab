"""vLLM's exceptions, each of which is an error of quire's as well where quire has such an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quire.errors import AdapterError, InvalidRequestError, QuireError, RequestFailedError


class VLLMError(Exception):
    """Base of all."""


class VLLMClientError(VLLMError):
    """The request is to blame."""


class VLLMServerError(VLLMError):
    """The engine is to blame."""


class VLLMValidationError(VLLMClientError, InvalidRequestError):
    """A prompt or a parameter that cannot be served.

    Parameters
    ----------
    message : str
    parameter : str, optional
        Which one.
    value : object, optional
        What it was.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value

    def __str__(self) -> str:
        said = {"parameter": self.parameter, "value": self.value}
        extras = ", ".join(f"{name}={each}" for name, each in said.items() if each is not None)
        return f"{self.args[0]} ({extras})" if extras else str(self.args[0])


class VLLMUnprocessableEntityError(VLLMClientError):
    """Well-formed, and yet nothing can be done with it; never raised here."""


class VLLMNotFoundError(VLLMClientError):
    """There is no such thing."""


class LoRAAdapterNotFoundError(VLLMNotFoundError, AdapterError):
    """An adapter that cannot be found, read, or applied."""


class GenerationError(VLLMServerError, QuireError, RuntimeError):
    """A request that failed while it ran."""


@contextmanager
def translated() -> Iterator[None]:
    """Let errors of requests leave as those that callers of vLLM catch."""
    try:
        yield
    except VLLMError:
        raise
    except AdapterError as error:
        raise LoRAAdapterNotFoundError(str(error)) from error
    except InvalidRequestError as error:
        raise VLLMValidationError(str(error)) from error
    except RequestFailedError as error:
        raise GenerationError(str(error)) from error
