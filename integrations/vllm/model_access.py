"""What ``collective_rpc`` and ``apply_model`` find where the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quire.errors import NotSupportedError
from quire.integrations.vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    import torch

    import quire
    from quire.models.decoder import Decoder


class Worker:
    """What holds the model, as functions that are called by `collective_rpc` see it.

    Parameters
    ----------
    runner
        The engine's.

    Attributes
    ----------
    rank, local_rank : int
        0.
    device : torch.device
    """

    rank = 0
    local_rank = 0

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.device: torch.device = runner.device

    @property
    def model_runner(self) -> Worker:
        """Itself."""
        return self

    @property
    def model(self) -> Decoder:
        """The model: ``weights`` has its parameters by name."""
        model: Decoder = self._runner.model
        return model

    def get_model(self) -> Decoder:
        """Return the model."""
        return self.model

    def check_health(self) -> None:
        """Return: it answers."""


def collective_rpc(
    llm: quire.LLM,
    method: str | Callable[..., Any],
    timeout: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
) -> list[Any]:
    """Call a function with the `Worker`, or one of its methods, between two steps of an engine.

    Parameters
    ----------
    llm : quire.LLM
    method : callable or str
    timeout : float or None
        Without effect: the call is in this process.
    args, kwargs
        What else it is given.

    Raises
    ------
    NotSupportedError
        Other processes have the model, or shares of it: nothing is sent to them but tensors.
    VLLMValidationError
        There is no such method.
    """
    parallel = llm.config.parallel
    if parallel.num_ranks > 1 or parallel.data_parallel_size > 1:
        raise NotSupportedError(
            "collective_rpc runs functions in this process, and the model is in several: use "
            "tensor_parallel_size=1, pipeline_parallel_size=1 and data_parallel_size=1"
        )

    def call(engine: Any) -> Any:
        worker = Worker(engine._runner)
        if isinstance(method, str):
            function = getattr(worker, method, None)
            if method.startswith("_") or not callable(function):
                names = [
                    n for n in dir(Worker) if not n.startswith("_") and callable(getattr(Worker, n))
                ]
                raise VLLMValidationError(
                    f"method={method!r} is none of the worker's: {', '.join(names)}; or give a "
                    "function, which is called with the worker"
                )
            return function(*args, **(kwargs or {}))
        return method(worker, *args, **(kwargs or {}))

    return [llm._call(call)]
