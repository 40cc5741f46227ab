"""vLLM's LLMEngine: requests in by name, and their news step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import quire
from quire.errors import InvalidRequestError
from quire.integrations.vllm.engine_args import EngineArgs, as_quire
from quire.integrations.vllm.exceptions import GenerationError, VLLMValidationError, translated
from quire.integrations.vllm.metrics import Metric, as_metrics
from quire.integrations.vllm.model_access import collective_rpc
from quire.integrations.vllm.model_config import ModelConfig
from quire.integrations.vllm.prompts import (
    one_prompt,
    params_for_quire,
    pooling_for_quire,
    token_limit,
)
from quire.integrations.vllm.tokenizers import get_tokenizer
from quire.outputs import EmbeddingRequestOutput, RequestOutput
from quire.pooling_params import PoolingParams as QuirePoolingParams
from quire.sampling_params import RequestOutputKind

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
        # With the number: a name may be another request's by the time an event is read.
        self._events: SimpleQueue[tuple[str, str, Event]] = SimpleQueue()
        self._in_flight: dict[str, str] = {}  # the caller's name to the engine's number
        self._aborted: set[str] = set()
        self._in_parts: set[str] = set()  # whose outputs are deltas

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
        session_id: str | None = None,
        prompt_text: str | None = None,
        kv_hints: Any = None,
    ) -> str:
        """Queue a request.

        Parameters
        ----------
        request_id : str
            That no other request in flight has; of one that was aborted it can be used again.
        prompt : str, dict or list of int
        params : SamplingParams or PoolingParams
        lora_request, priority
            As in ``LLM.generate``.
        tokenization_kwargs : dict, optional
            ``truncate_prompt_tokens``.
        arrival_time, trace_headers, session_id, prompt_text, kv_hints
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
        if request_id in self._in_flight and request_id not in self._aborted:
            raise VLLMValidationError(
                f"request_id={request_id!r} is in flight already: ids must be unique"
            )
        llm = self._llm
        with translated():
            told = one_prompt(prompt)
            wanted = params_for_quire(pooling_for_quire(params))
            limit = token_limit(tokenization_kwargs)
            if limit is not None and isinstance(wanted, (QuirePoolingParams, quire.SamplingParams)):
                wanted = replace(wanted, truncate_prompt_tokens=limit)
            if isinstance(wanted, QuirePoolingParams):
                request = llm._make_embedding(told, wanted, lora_request)
            elif wanted is None:
                raise InvalidRequestError("params is missing: give SamplingParams or PoolingParams")
            else:
                request = llm._make_request(
                    told, wanted, lora_request=lora_request, priority=priority
                )
            number = request.request_id

            def sink(event: Event) -> None:
                self._events.put((request_id, number, event))

            loop = llm._lifetime.start()  # it may be closed, or asleep
            self._forget(request_id)
            self._in_flight[request_id] = number
            if getattr(params, "output_kind", None) is RequestOutputKind.DELTA:
                self._in_parts.add(request_id)
            loop.submit([(request, sink)])
        return request_id

    def _forget(self, name: str) -> None:
        self._in_flight.pop(name, None)
        self._aborted.discard(name)
        self._in_parts.discard(name)

    def abort_request(self, request_ids: str | Iterable[str], internal: bool = False) -> None:
        """End requests; their last outputs come with the next step. Unknown ids are passed over."""
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        names = [name for name in names if name in self._in_flight]
        self._aborted.update(names)
        numbers = [self._in_flight[name] for name in names]
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
                name, number, event = self._events.get(block=not outputs, timeout=_POLL_SECONDS)
            except Empty:
                if outputs:
                    break
                continue
            if self._in_flight.get(name) != number:
                continue  # one that was aborted, whose name is another's by now
            if isinstance(event, RequestOutput):
                event.request_id = name
                if event.embedding is not None:
                    outputs[name] = EmbeddingRequestOutput.of(event)
                elif (known := outputs.get(name)) is not None and name in self._in_parts:
                    known.add(event)
                else:
                    outputs[name] = event
                if event.finished:
                    self._forget(name)
            else:
                self._forget(name)
                raise GenerationError(f"request {name!r}: {event}") from event
        return list(outputs.values())

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

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Return what the model is for, in vLLM's words."""
        if self._llm.num_classes is not None:
            return ("classify",)
        return ("generate", "embed")

    def reset_mm_cache(self) -> None:
        """Do nothing: models here read text."""

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Let the engine's memory go until :meth:`wake_up`, see :meth:`quire.LLM.sleep`."""
        self._llm.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Bring it back; return whether the engine is awake."""
        self._llm.wake_up()
        return True

    def is_sleeping(self) -> bool:
        """Return whether it sleeps."""
        return self._llm.is_sleeping

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a function, or a method by its name, where the model is; see `Worker`."""
        return collective_rpc(self._llm, method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the model, between two steps."""
        return self.collective_rpc(lambda worker: func(worker.get_model()))

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
