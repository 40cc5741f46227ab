"""vLLM's AsyncLLM, over quire's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import quire
from quire.integrations.vllm.engine_args import EngineArgs, as_quire
from quire.integrations.vllm.exceptions import translated
from quire.integrations.vllm.llm_engine import LLMEngine
from quire.integrations.vllm.model_config import ModelConfig
from quire.integrations.vllm.outputs import EmbeddingRequestOutput
from quire.integrations.vllm.profiling import Profiler
from quire.integrations.vllm.prompts import one_prompt, params_for_quire, pooling_for_quire
from quire.outputs import RequestOutput


class AsyncLLM:
    """An engine whose requests are awaited.

    Parameters
    ----------
    llm : quire.AsyncLLM

    Attributes
    ----------
    quire : quire.AsyncLLM
        What does the work.
    """

    def __init__(self, llm: quire.AsyncLLM) -> None:
        self.quire = llm
        self._llm = inner = llm._open_llm()  # also while it sleeps
        self._profiler = Profiler(inner)
        self._engine = LLMEngine.of(inner)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, *_: Any, **__: Any) -> AsyncLLM:
        """Return an engine of these arguments."""
        arguments = engine_args.arguments()
        return cls(quire.AsyncLLM(arguments.pop("model"), **as_quire(arguments)))

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt and yield its outputs as they come.

        Parameters
        ----------
        prompt, sampling_params, request_id, lora_request, priority
            As of :meth:`quire.AsyncLLM.generate`.
        """
        with translated():
            outputs = self.quire.generate(
                one_prompt(prompt),
                params_for_quire(sampling_params),
                request_id,
                lora_request=lora_request,
                priority=priority,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    async def encode(
        self,
        prompt: Any,
        pooling_params: Any,
        request_id: str,
        lora_request: Any = None,
        **_: Any,
    ) -> AsyncGenerator[EmbeddingRequestOutput, None]:
        """Turn one prompt into a vector; it is the only thing that is yielded."""
        with translated():
            found = await self.quire.embed(
                one_prompt(prompt),
                pooling_for_quire(pooling_params),
                request_id,
                lora_request=lora_request,
            )
        yield EmbeddingRequestOutput(
            found.request_id, found.outputs, found.prompt_token_ids, found.num_cached_tokens
        )

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests; ids that are not in flight are passed over."""
        await self.quire.abort(request_id)

    # -- the engine ------------------------------------------------------------------------------

    async def get_tokenizer(self, *_: Any) -> Any:
        """Return the model's tokenizer, as transformers makes it."""
        return await asyncio.to_thread(self._engine.get_tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers makes it."""
        return self._engine.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        """What is known of the model."""
        return self._engine.model_config

    async def get_model_config(self) -> ModelConfig:
        """Return `model_config`."""
        return self._engine.model_config

    @property
    def vllm_config(self) -> LLMEngine:
        """What has ``model_config``."""
        return self._engine

    async def add_lora(self, lora_request: Any) -> bool:
        """Read an adapter, so that requests find it read."""
        with translated():
            await self.quire.load_lora(lora_request.lora_path, lora_request.lora_name)
        return True

    async def remove_lora(self, lora_id: int | str) -> bool:
        """Forget an adapter, by its name."""
        with translated():
            await self.quire.unload_lora(str(lora_id))
        return True

    async def list_loras(self) -> set[str]:
        """Return the names of the adapters that were read."""
        return {each.lora_name for each in await self.quire.list_loras()}

    async def check_health(self) -> None:
        """Raise what the engine broke down with, if it did."""
        await self.quire.check_health()

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Forget all cached prefixes."""
        return await self.quire.reset_prefix_cache()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Let the engine's memory go until :meth:`wake_up`."""
        await asyncio.to_thread(self._llm.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring it back."""
        await asyncio.to_thread(self._llm.wake_up)

    async def is_sleeping(self) -> bool:
        """Return whether it sleeps."""
        return self._llm.is_sleeping

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """Record what the engine's thread computes."""
        await asyncio.to_thread(self._profiler.start, profile_prefix)

    async def stop_profile(self) -> None:
        """Write down what was recorded."""
        await asyncio.to_thread(self._profiler.stop)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Return what the model is for, in vLLM's words."""
        return await asyncio.to_thread(self._engine.get_supported_tasks)

    async def reset_mm_cache(self) -> None:
        """Do nothing: models here read text."""

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method, or a function, where the model is; see `Worker`."""
        call = self._engine.collective_rpc
        return await asyncio.to_thread(call, method, timeout, args, kwargs)

    async def is_tracing_enabled(self) -> bool:
        """Return False."""
        return False

    async def do_log_stats(self) -> None:
        """Do nothing: ``get_metrics`` of quire has the counters."""

    async def wait_for_requests_to_drain(self, drain_timeout: int = 300) -> None:
        """Wait until no request is in flight, so long at most; take no new ones."""
        await self.quire.drain(drain_timeout)

    def get_num_unfinished_requests(self) -> int:
        """Return how many requests are in flight."""
        return self.quire.num_unfinished_requests

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return not self.quire.closed and self.quire.engine_error is None

    @property
    def is_stopped(self) -> bool:
        """Whether it takes none any more."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """Whether it broke down."""
        return self.quire.engine_error is not None

    @property
    def dead_error(self) -> BaseException | None:
        """What it broke down with."""
        return self.quire.engine_error

    def shutdown(self, timeout: float | None = None) -> None:
        """Close the engine."""
        self.quire.close()
