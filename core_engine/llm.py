"""LLM: offline batches and in-process streaming."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from quire.classifier import Classifier
from quire.config import EngineConfig, init_signature
from quire.errors import EngineClosedError, InvalidRequestError
from quire.html import card
from quire.lifetime import Lifetime, describe, make_loop
from quire.outputs import (
    BeamSearchOutput,
    RequestOutput,
)
from quire.pooling import Pooling
from quire.prompts import (
    Message,
    Prompt,
    as_conversations,
    as_prompts,
    as_single_prompt,
)
from quire.request_maker import FoundAdapter, RequestMaker, at_index
from quire.sampling_params import BeamSearchParams, SamplingParams
from quire.sleep import Sleep
from quire.utils.checks import refuse
from quire.utils.output_history import keep_out_of_history
from quire.waiting import OutputStream, wait_for_all

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from quire.arguments import EngineArguments
    from quire.engine.cache_map import KVCacheMap
    from quire.engine.interface import AnyEngine, Later
    from quire.engine.loop import EngineLoop
    from quire.engine.processor import Processor
    from quire.engine.request import Request
    from quire.lora_request import LoRARequest
    from quire.pooling_params import PoolingParams
    from quire.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")


class LLM(Pooling):
    """A model with its engine, for batches of prompts and for streams within a process.

    Any number of threads may call ``generate``, ``chat`` and ``stream`` at once; their requests
    run in one batch. The engine's thread starts with the first request, so that a process may be
    forked before. Closing the object frees weights and KV cache at once; so does deleting it, once
    nothing refers to it any more, as the traceback of an exception that was kept does.

    Parameters
    ----------
    model : str or path
        A folder in the layout of Hugging Face, a name or URL on its hub, or ``"quire/demo"``.
    **kwargs
        The engine arguments, of which the most used are here; :mod:`quire.config` has them all.

        tokenizer, tokenizer_mode, skip_tokenizer_init, trust_remote_code, dtype, revision,
        tokenizer_revision, download_dir, hf_token, hf_overrides, generation_config, chat_template
            Which model, where from, how read: :class:`quire.config.ModelConfig`.
        max_model_len
            Most tokens of one request.
        kv_cache_memory_bytes, num_gpu_blocks_override, block_size, kv_cache_dtype,
        enable_prefix_caching, gpu_memory_utilization, swap_space
            The KV cache: :class:`quire.config.CacheConfig`.
        enable_lora, max_loras, max_lora_rank, max_cpu_loras, lora_modules
            LoRA adapters: :class:`quire.config.LoRAConfig`.
        max_num_seqs, max_num_batched_tokens, enable_chunked_prefill, scheduling_policy,
        async_scheduling
            How much runs at once: :class:`quire.config.SchedulerConfig`.
        seed, device, batch_invariant, attention_backend, enforce_eager
            What unseeded requests draw from; where the model runs; whether the same bits for a
            request in any company are a condition; who computes attention; whether a GPU's steps
            are to go without graphs: :class:`quire.config.EngineConfig`.

    Raises
    ------
    TypeError
        For an argument that does not exist; the message names the nearest that does.
    ConfigError
        For an argument's value that is wrong, or (NotSupportedError) not offered.
    ModelNotFoundError, ModelLoadError, OutOfMemoryError
        When the model cannot be found, read or held.
    AdapterError
        When one of ``lora_modules`` cannot be.

    Examples
    --------
    >>> from quire import LLM, SamplingParams
    >>> with LLM("quire/demo") as llm:
    ...     outputs = llm.generate("The capital of France is", SamplingParams(temperature=0))
    >>> len(outputs)
    1
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Unpack[EngineArguments]) -> None:
        config = EngineConfig.create(model, **kwargs)
        loop = make_loop(config)
        self.config = config
        self._maker: RequestMaker | None = RequestMaker(config, loop.engine)
        self._lifetime = Lifetime(
            loop, f"LLM(model={config.model.model!r})", bound=config.parallel.num_ranks > 1
        )
        self._sleep = Sleep(config, self._lifetime)
        self._classifier = Classifier(config, loop.engine.limits.hidden_size)
        self._finalizer = weakref.finalize(self, self._lifetime.close)
        keep_out_of_history(self)

    # -- generation ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, and return when all of them are complete.

        Parameters
        ----------
        prompts : str, dict, list of int, or a list of these
            Text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}`` or the ids themselves.
        sampling_params : SamplingParams, or one per prompt, optional
            By default what :meth:`get_default_sampling_params` returns.
        use_tqdm : bool or callable
            Show a progress bar; a callable is used in place of ``tqdm.auto.tqdm``.
        lora_request : LoRARequest or str, or one per prompt, optional
            The adapter, or the name of one that is loaded; None for the model alone.
        priority : int, or one per prompt, optional
            Lower runs earlier; needs ``scheduling_policy="priority"``.

        Returns
        -------
        list of RequestOutput
            In the order of the prompts, whatever order they finished in.

        Raises
        ------
        InvalidRequestError
            A prompt or a parameter is wrong; the message has the prompt's index. Nothing has run.
        RequestFailedError
            A request failed while it ran. The others were completed before this is raised.
        EngineClosedError
            The LLM was closed before or meanwhile.
        """
        results = self._run(
            as_prompts(prompts),
            sampling_params,
            return_errors=False,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
        )
        outputs: list[RequestOutput] = []
        for result in results:
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:  # the exception has this frame, which would have the exception
                    del results, result
            outputs.append(result)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, written out by the model's chat template.

        Parameters
        ----------
        messages : list of dict, or list of such lists
            One conversation or several: ``[{"role": "user", "content": "..."}]``.
        sampling_params, use_tqdm, lora_request, priority
            As in :meth:`generate`.
        chat_template : str, optional
            A Jinja template instead of the model's own.
        add_generation_prompt : bool
            End the prompt where the assistant's answer begins.
        continue_final_message : bool
            Leave the last message open, for the model to go on with it. Needs
            ``add_generation_prompt=False``.
        tools : list of dict, optional
            Function descriptions for the template.
        chat_template_kwargs : dict, optional
            Further variables for the template.

        Returns
        -------
        list of RequestOutput
            One per conversation, in order.

        Raises
        ------
        InvalidRequestError
            Also when there is no chat template, or the template refuses the messages.
        """
        conversations = as_conversations(messages)
        prompts: list[Prompt] = []
        for i, conversation in enumerate(conversations):
            try:
                prompt = self._chat_prompt(
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                )
            except InvalidRequestError as error:
                raise at_index("conversation", i, len(conversations), error) from error
            prompts.append(prompt)
        return self.generate(
            prompts,
            sampling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> OutputStream:
        """Complete one prompt and yield what is new as it comes.

        The request is checked and starts at once. Closing or dropping the iterator before its
        end aborts it. Completions that must be compared first (``best_of``, ``use_beam_search``)
        come in one piece, at the end.

        Parameters
        ----------
        prompt : str, dict or list of int
            One prompt, as in :meth:`generate`.
        sampling_params : SamplingParams, optional
            Its ``output_kind`` has no effect: a stream is of deltas.
        lora_request, priority
            As in :meth:`generate`.

        Returns
        -------
        OutputStream
            An iterator of RequestOutput; the texts of an index, joined, are the whole text.

        Raises
        ------
        InvalidRequestError
            At once, for a wrong prompt or parameter.
        """
        request = self._make_request(
            as_single_prompt(prompt),
            self._for_stream(sampling_params),
            lora_request=lora_request,
            priority=priority,
        )
        return OutputStream(self._lifetime.start(), request, keep_alive=self)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        lora_request: Any = None,
    ) -> list[BeamSearchOutput]:
        """Find the most likely completions of each prompt by beam search.

        Parameters
        ----------
        prompts
            As in :meth:`generate`.
        params : BeamSearchParams
        use_tqdm, lora_request
            As in :meth:`generate`.

        Returns
        -------
        list of BeamSearchOutput
            Per prompt its ``beam_width`` hypotheses, best first.
        """
        if not isinstance(params, BeamSearchParams):
            raise refuse("params", params, "BeamSearchParams")
        # logprobs, so that the outputs have the hypotheses' cumulative one.
        search = replace(params.to_sampling_params(), logprobs=0)
        outputs = self.generate(prompts, search, use_tqdm=use_tqdm, lora_request=lora_request)
        return [BeamSearchOutput.of(output) for output in outputs]

    # -- adapters --------------------------------------------------------------------------------

    def load_lora(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        load_inplace: bool = False,
        base_model_name: str | None = None,
    ) -> LoRARequest:
        """Read a LoRA adapter, so that requests can ask for it by a name.

        The name stands for what was read until it is loaded again, whatever happens to the files.
        Requests that run with another adapter of that name go on with it.

        Parameters
        ----------
        path : str or path
            A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a name on
            the hub.
        name : str, optional
            By default the last part of the path.
        load_inplace : bool
            Read the files even where they seem unchanged.
        base_model_name : str, optional
            The model that it was made for; shown by a server.

        Returns
        -------
        LoRARequest
            For ``lora_request``. It has the path, too, and means what lies there when it is used;
            the name alone, as a str, means what was read here.

        Raises
        ------
        AdapterError
            There is no such adapter, it does not fit the model, or ``enable_lora`` is off.
        """
        return self._open_maker().adapters.load(
            path, name, load_inplace=load_inplace, base_model_name=base_model_name
        )

    def unload_lora(self, name: str) -> None:
        """Forget an adapter that was loaded; requests that run with it go on with it.

        Raises
        ------
        AdapterError
            There is none of that name.
        """
        self._open_maker().adapters.unload(name)

    def list_loras(self) -> list[LoRARequest]:
        """Return the adapters that were loaded, in that order."""
        return self._open_maker().adapters.list()

    def count_lora_requests(self) -> dict[str, tuple[int, int]]:
        """Return by adapters' names how many requests with them have begun, and how many wait."""
        return self._call(lambda engine: engine.count_adapters())

    # -- the model and the engine ----------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer.

        Raises
        ------
        NotSupportedError
            The LLM was made with ``skip_tokenizer_init=True``.
        """
        return self._open_maker().tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: those the checkpoint recommends."""
        return self._open_processor().default_sampling_params()

    def get_metrics(self) -> dict[str, float]:
        """Return the engine's counters and gauges by name.

        Of a model on several ranks there are ``num_exchanges``, ``exchanged_bytes``,
        ``exchange_seconds`` and ``exchange_wait_seconds``: what this process's rank handed the
        others, and how long that took it.
        """
        return self._call(lambda engine: engine.metrics())

    def kv_cache_map(self) -> KVCacheMap:
        """Return which block of the KV cache is free, cached, or used by which request."""
        return self._call(lambda engine: engine.kv_cache_map())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, and return True; running requests keep what they use."""
        return self._call(lambda engine: engine.reset_prefix_cache())

    @property
    def llm_engine(self) -> Any:
        """The engine, for inspection; only its own thread may step it.

        An :class:`~quire.engine.engine.Engine`, or what divides requests among several.
        """
        return self._lifetime.check().engine

    @property
    def engine_loop(self) -> EngineLoop:
        """The thread that steps the engine."""
        return self._lifetime.check()

    # -- life ------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Let memory go until :meth:`wake_up`; requests in flight are aborted, new ones refused.

        Cached prefixes are forgotten.

        Parameters
        ----------
        level : int
            1: the KV cache's. 2: all of it, the weights' too, which are loaded again afterwards,
            as are adapters; so it is at level 1 where several processes compute the model.
        """
        with self._sleep.lock:
            self._sleep.begin(level)
            if self._lifetime.is_suspended:
                self._maker = None

    def wake_up(self) -> None:
        """Take the memory again. Idempotent.

        Raises
        ------
        OutOfMemoryError, MemoryError
            There is not enough of it any more; the LLM goes on sleeping.
        """
        with self._sleep.lock:
            if self._sleep.end():
                self._maker = RequestMaker(self.config, self._lifetime.check().engine)

    @property
    def is_sleeping(self) -> bool:
        """Whether :meth:`sleep` was called, and :meth:`wake_up` was not yet."""
        return self._sleep.level > 0

    def close(self) -> None:
        """Stop the engine and free weights and KV cache; running requests fail. Idempotent."""
        self._finalizer()
        self._maker = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._lifetime.closed

    def __enter__(self) -> Self:
        self._lifetime.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"{type(self).__name__}(model={self.config.model.model!r}{state})"

    def _repr_html_(self) -> str:
        return card(type(self).__name__, describe(self.config, self._lifetime))

    # -- what the adapters share -----------------------------------------------------------------

    def _chat_prompt(
        self, conversation: list[Message], *, chat_template: str | None = None, **options: Any
    ) -> Prompt:
        """Write a conversation out by the chat template; the options are those of :meth:`chat`."""
        return self._open_maker().chat_prompt(conversation, chat_template=chat_template, **options)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_errors: bool = True,
        use_tqdm: bool | Callable[..., Any] = False,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput | BaseException]:
        """Run prompts as one batch; return in order the output, or the exception, of each.

        With ``return_errors=False`` a prompt that cannot be served raises before any has run.
        """
        requests = self._open_maker().batch(
            prompts,
            params,
            lora_request=lora_request,
            priority=priority,
            return_errors=return_errors,
        )
        return wait_for_all(self._lifetime.start, requests, use_tqdm)

    def _make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> Request:
        """Check and tokenize one prompt."""
        return self._open_maker().request(
            prompt, params, lora_request=lora_request, priority=priority
        )

    def _make_embedding(
        self, prompt: Prompt, pooling: PoolingParams | None, lora_request: Any = None
    ) -> Request:
        """Check and tokenize one prompt whose vector is wanted."""
        return self._open_maker().embedding(prompt, pooling, lora_request)

    def _find_adapters(self, lora_request: Any, num_prompts: int) -> list[FoundAdapter]:
        """Return what requests take for `lora_request`, whatever is loaded meanwhile."""
        return self._open_maker().find_adapters(lora_request, num_prompts)

    def _is_at_hand(self, lora_request: Any) -> bool:
        """Whether a request for that adapter is made without a look at its files."""
        return self._open_maker().adapters.is_at_hand(lora_request)

    def _for_stream(self, params: SamplingParams | None) -> SamplingParams:
        """Return the parameters of a stream."""
        return self._open_maker().for_stream(params)

    def _call(self, function: Callable[[AnyEngine], T | Later[T]]) -> T:
        return self._lifetime.start().call(function)

    def _open_processor(self) -> Processor:
        return self._open_maker().processor

    def _open_maker(self) -> RequestMaker:
        maker = self._maker
        self._lifetime.check()
        if maker is None:  # it has just woken
            with self._sleep.lock:
                maker = self._maker
                self._lifetime.check()
        if maker is None:  # closed in between
            raise EngineClosedError(f"{self!r} was closed; make a new one")
        return maker


# For help() and for editors that ask at run time; the annotations serve those that do not.
LLM.__init__.__signature__ = init_signature()  # type: ignore[attr-defined]
