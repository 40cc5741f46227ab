"""vLLM's LLMEngine: requests in by name, and their news step by step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import quire
from quire.errors import InvalidRequestError
from quire.integrations.vllm.engine_args import EngineArgs, as_quire
from quire.integrations.vllm.exceptions import GenerationError, VLLMValidationError, translated
from quire.integrations.vllm.metrics import Metric, as_metrics
from quire.integrations.vllm.model_config import ModelConfig
from quire.integrations.vllm.prompts import one_prompt, params_for_quire, pooling_for_quire
from quire.integrations.vllm.tokenizers import get_tokenizer
from quire.outputs import EmbeddingRequestOutput, RequestOutput
from quire.pooling_params import PoolingParams as QuirePoolingParams

if TYPE_CHECKING:
    from quire.waiting import Event

_POLL_SECONDS = 0.5


class LLMEngine:
    """An engine that its caller steps.

    The engine's own thread computes; :meth:`step` waits for its next news.

    Parameters
    ----------
    llm : quire.LLM
    """

    def __init__(self, llm: quire.LLM) -> None:
        self._llm = llm
        self._events: SimpleQueue[tuple[str, Event]] = SimpleQueue()
        self._in_flight: dict[str, str] = {}  # the caller's name to the engine's number

    @classmethod
    def of(cls, llm: quire.LLM) -> LLMEngine:
        """Return one over an LLM's engine; the requests of both run in one batch."""
        return cls(llm)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, *_: Any, **__: Any) -> LLMEngine:
        """Return one of its own, of these arguments."""
        arguments = engine_args.arguments()
        return cls(quire.LLM(arguments.pop("model"), **as_quire(arguments)))

    # -- requests --------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Any = None,
        priority: int = 0,
    ) -> str:
        """Queue a request.

        Parameters
        ----------
        request_id : str
            That no other request in flight has.
        prompt : str, dict or list of int
        params : SamplingParams or PoolingParams
        lora_request, priority
            As in ``LLM.generate``.
        arrival_time, tokenization_kwargs, trace_headers
            Without effect.

        Returns
        -------
        str
            The id.

        Raises
        ------
        TypeError
            The id is no string.
        VLLMValidationError
            The prompt, a parameter or the id is wrong.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a str, got {type(request_id).__name__}")
        if request_id in self._in_flight:
            raise VLLMValidationError(
                f"request_id={request_id!r} is in flight already: ids must be unique"
            )
        llm = self._llm
        with translated():
            told = one_prompt(prompt)
            if isinstance(params, QuirePoolingParams):
                request = llm._make_embedding(told, pooling_for_quire(params), lora_request)
            elif params is None:
                raise InvalidRequestError("params is missing: give SamplingParams or PoolingParams")
            else:
                request = llm._make_request(
                    told, params_for_quire(params), lora_request=lora_request, priority=priority
                )
            self._in_flight[request_id] = request.request_id

            def sink(event: Event) -> None:
                self._events.put((request_id, event))

            llm._lifetime.start().submit([(request, sink)])
        return request_id

    def abort_request(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests; their last outputs come with the next step. Unknown ids are passed over."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        numbers = [self._in_flight[name] for name in names if name in self._in_flight]
        if numbers:
            self._llm._lifetime.start().abort(numbers)

    def step(self) -> list[Any]:
        """Wait for news of requests, and return all that there is.

        Returns
        -------
        list of RequestOutput or EmbeddingRequestOutput
            Empty where no request is in flight.

        Raises
        ------
        GenerationError
            A request failed; the others go on.
        """
        outputs: dict[str, Any] = {}
        while self._in_flight:
            try:
                name, event = self._events.get(block=not outputs, timeout=_POLL_SECONDS)
            except Empty:
                if outputs:
                    break
                continue
            if isinstance(event, RequestOutput):
                event.request_id = name
                if event.finished:
                    del self._in_flight[name]
                if event.embedding is not None:
                    outputs[name] = EmbeddingRequestOutput.of(event)
                elif (known := outputs.get(name)) is not None and self._is_part(known, event):
                    known.add(event)
                else:
                    outputs[name] = event
            else:
                del self._in_flight[name]
                raise GenerationError(f"request {name!r}: {event}") from event
        return list(outputs.values())

    @staticmethod
    def _is_part(known: RequestOutput, later: RequestOutput) -> bool:
        """Whether an output goes on where another ended, and does not repeat it."""
        if not known.outputs or not later.outputs:
            return False
        before, after = known.outputs[0].token_ids, later.outputs[0].token_ids
        return after[: len(before)] != before

    def get_num_unfinished_requests(self) -> int:
        """Return how many requests are in flight."""
        return len(self._in_flight)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request is in flight."""
        return bool(self._in_flight)

    # -- adapters --------------------------------------------------------------------------------

    def add_lora(self, lora_request: Any) -> bool:
        """Read an adapter, so that requests find it read."""
        with translated():
            self._llm.load_lora(lora_request.lora_path, lora_request.lora_name)
        return True

    def remove_lora(self, lora_id: int | str) -> bool:
        """Forget an adapter, by its name."""
        with translated():
            self._llm.unload_lora(str(lora_id))
        return True

    def list_loras(self) -> set[str]:
        """Return the names of the adapters that were read."""
        return {each.lora_name for each in self._llm.list_loras()}

    # -- the rest --------------------------------------------------------------------------------

    @cached_property
    def model_config(self) -> ModelConfig:
        """What is known of the model."""
        return ModelConfig.of(self._llm)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers makes it."""
        model = self._llm.config.model
        return get_tokenizer(model.tokenizer or model.model, tokenizer_mode=model.tokenizer_mode)

    def get_tokenizer(self) -> Any:
        """Return `tokenizer`."""
        return self.tokenizer

    def get_model_config(self) -> ModelConfig:
        """Return `model_config`."""
        return self.model_config

    @property
    def vllm_config(self) -> LLMEngine:
        """Itself: what a configuration is asked for, ``model_config``, it has."""
        return self

    def get_metrics(self) -> list[Metric]:
        """Return the engine's counters and gauges."""
        return as_metrics(self._llm.get_metrics())

    def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Forget all cached prefixes."""
        return self._llm.reset_prefix_cache()

    def do_log_stats(self) -> None:
        """Do nothing: ``get_metrics`` has the counters."""

    def shutdown(self) -> None:
        """Close the engine."""
        self._llm.close()

    @property
    def model_executor(self) -> Any:
        """The engine; deleting it closes it, as scripts do that want the memory back."""
        return self

    @model_executor.deleter
    def model_executor(self) -> None:
        self._llm.close()

    @property
    def driver_worker(self) -> Any:
        """The same."""
        return self

    @driver_worker.deleter
    def driver_worker(self) -> None:
        self._llm.close()
