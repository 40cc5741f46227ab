"""What can go wrong, as types a user can catch.

Every message names the field, the value that was given and what would be right.
"""

from __future__ import annotations


class QuireError(Exception):
    """Base of every error that quire raises on purpose.

    Attributes
    ----------
    request_id : str or None
        The request of :class:`quire.AsyncLLM` that it is about, where it is about one.
    """

    request_id: str | None = None


class ConfigError(QuireError, ValueError):
    """An engine argument that cannot be honoured; raised before a model is loaded."""


class NotSupportedError(ConfigError):
    """A known argument or model feature that this version of quire does not offer."""


class InvalidRequestError(QuireError, ValueError):
    """A prompt or a sampling parameter that cannot be served; only that request fails."""


class AdapterError(InvalidRequestError):
    """A LoRA adapter that cannot be found, read, or applied to the model."""


class ModelNotFoundError(QuireError, OSError):
    """The model name leads to no folder and to nothing on a hub that can be reached."""


class ModelLoadError(QuireError):
    """A checkpoint that is damaged, incomplete or does not fit its configuration."""


class UnsupportedModelError(ModelLoadError, NotSupportedError):
    """An architecture, or a variant of one, that quire has no description for."""


class TokenizerError(ModelLoadError):
    """A tokenizer that is missing, unreadable or does not fit its model."""


class OutOfMemoryError(QuireError, MemoryError):
    """Weights or KV cache do not fit; the message says what to lower."""


class EngineClosedError(QuireError, RuntimeError):
    """The engine was closed; make a new one."""


class EngineBusyError(QuireError, RuntimeError):
    """As many requests wait as ``max_waiting_requests`` allows; nothing was lost, try again later.

    Attributes
    ----------
    retry_after : float
        Seconds after which it is worth trying.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


class DeviceLostError(QuireError, RuntimeError):
    """The device that a model runs on does not answer any more, and the engine with it."""


class RankError(DeviceLostError):
    """One of the processes that compute a model together is gone, or does not answer.

    Attributes
    ----------
    rank : int
        Which of them; -1: it is not known.
    why : str
        What became of it.
    """

    def __init__(self, rank: int, why: str) -> None:
        name = "one of them" if rank < 0 else f"rank {rank}"
        super().__init__(f"a rank of the model was lost: {name} {why}")
        self.rank = rank
        self.why = why

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.rank, self.why)


class ReplicaError(QuireError, RuntimeError):
    """One of the copies of an engine is gone, or does not answer; the others go on.

    Attributes
    ----------
    replica : int
        Which of them.
    why : str
        What became of it.
    """

    def __init__(self, replica: int, why: str) -> None:
        super().__init__(f"replica {replica} of the engine was lost: it {why}")
        self.replica = replica
        self.why = why

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.replica, self.why)


class RequestFailedError(QuireError, RuntimeError):
    """A request that was accepted and then failed while it ran.

    Attributes
    ----------
    request_id : str
        The request that failed. The cause, if any, is in ``__cause__``.
    """

    request_id: str

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(f"request {request_id!r} failed: {message}")
        self.request_id = request_id
        self._message = message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.request_id, self._message)


class StructureIncompleteError(QuireError, ValueError):
    """A text that ended before the structure it has to match did.

    Attributes
    ----------
    text : str
        What there is of it.
    output : object
        The RequestOutput with it.
    """

    def __init__(self, message: str, text: str, output: object) -> None:
        super().__init__(message)
        self.text = text
        self.output = output

    def __reduce__(self) -> tuple[type, tuple[str, str, object]]:
        return type(self), (str(self), self.text, self.output)
