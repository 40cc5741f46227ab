"""VLLM: LangChain's string-in, string-out model on an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import GenerationChunk, LLMResult, RunInfo
from langchain_core.runnables import RunnableConfig
from pydantic import PrivateAttr

from quire.errors import InvalidRequestError
from quire.integrations.langchain.batch import batch_configs, batch_parts
from quire.integrations.langchain.cache import without_failures
from quire.integrations.langchain.engine_model import EngineModel
from quire.integrations.langchain.results import (
    ChunkBuilder,
    failure_in,
    split_result,
    to_generations,
    to_result,
)
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from uuid import UUID

    from langchain_core.callbacks import Callbacks
    from typing_extensions import Self

    from quire.async_llm import AsyncLLM


class VLLM(EngineModel, BaseLLM):
    """A text completion model on quire's engine.

    A prompt goes to the model as it is written, also to an instruct model, for which it should
    hold the model's own chat markup. Messages are written out by LangChain as ``Human: ...``. A
    model's chat template is applied by :meth:`quire.LLM.chat`, and by ``ChatVLLM``, the chat model
    of a later version.

    The engine is made with the object, or shared with every other object that asks for the same
    checkpoint and engine arguments. Prompts of ``batch`` run as one batch, and calls from several
    threads or tasks join the batch that is running. What the sampling parameters are never
    matters to the engine: they may differ by object, by ``bind`` and by call.

    Parameters
    ----------
    model : str or path
        A folder in the layout of Hugging Face, a name or URL on its hub, or ``"quire/demo"``.
    tensor_parallel_size, trust_remote_code, dtype, download_dir
        Engine arguments, as :class:`quire.LLM` has them.
    vllm_kwargs : dict, optional
        Any other engine argument, such as ``{"revision": "main", "max_model_len": 4096}``.
    client : quire.LLM, optional
        An engine to run on. Engine arguments beside it must agree with it. One that another
        model object made is exchanged where ``model`` and the arguments ask for another.
    n, best_of, presence_penalty, frequency_penalty, repetition_penalty, temperature, top_p, \
top_k, min_p, seed, stop, stop_token_ids, bad_words, include_stop_str_in_output, ignore_eos, \
min_tokens, logprobs, prompt_logprobs, detokenize, skip_special_tokens, \
spaces_between_special_tokens, logit_bias, allowed_token_ids, truncate_prompt_tokens, \
logits_processors, extra_args, structured_outputs, use_beam_search, length_penalty, early_stopping
        As in :class:`quire.SamplingParams`. ``stop`` is joined by the ``stop`` of a call. With
        ``use_beam_search``, a temperature of 1.0, the default, counts as unset.
    max_new_tokens : int or None, default 512
        Tokens to generate at most; ``max_tokens`` is the same.
    lora_request : object, optional
        The adapter to run with.
    cache, callbacks, tags, metadata, verbose, name, custom_get_token_ids
        As every LangChain model has them.

    Raises
    ------
    TypeError
        For an argument that does not exist, here and in every call; the message has the nearest.
    InvalidRequestError
        For a sampling parameter out of its range.
    ConfigError, ModelNotFoundError, ModelLoadError, OutOfMemoryError
        As from :class:`quire.LLM`.

    Examples
    --------
    >>> from langchain_core.output_parsers import StrOutputParser
    >>> from langchain_core.prompts import PromptTemplate
    >>> from quire.integrations.langchain import VLLM
    >>> llm = VLLM(model="quire/demo", temperature=0, max_new_tokens=16)
    >>> prompt = PromptTemplate.from_template("What is the capital of {country} ?")
    >>> (prompt | llm | StrOutputParser()).invoke({"country": "France"})  # doctest: +SKIP
    ' Paris'
    """

    _keep_failures: bool = PrivateAttr(default=False)

    @property
    def _llm_type(self) -> str:
        return "vllm"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "quire"
        if self.max_new_tokens is not None:
            params["ls_max_tokens"] = self.max_new_tokens
        return params

    # -- the arguments of a call -----------------------------------------------------------------

    def _for_call(self, stop: Any, kwargs: dict[str, Any]) -> tuple[Self, list[str] | None]:
        """Return a model whose fields are those of one call, and the call's stop strings.

        LangChain looks at a model's own parameters for its cache and its traces, and not at what
        a call adds to them: so the call is made on a copy that has them all.
        """
        stop = self._merged_stop(stop)
        if not kwargs:
            return self, stop
        values = self._call_values(kwargs)
        _ = self._serialized  # kept by the copy: traces name the object, which is the same
        copied = self._call_copy()
        copied.__dict__.update(values)
        return copied, stop

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: UUID | list[UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Complete prompts as one batch; see LangChain's ``BaseLLM.generate``.

        Parameters
        ----------
        prompts : list of str
        stop : list of str, optional
            Stop strings besides the constructor's.
        callbacks, tags, metadata, run_name, run_id
            As LangChain has them.
        **kwargs
            Sampling parameters and ``lora_request``, for this call.

        Returns
        -------
        LLMResult
            ``n`` generations per prompt, each with ``finish_reason``, ``stop_reason``,
            ``token_usage`` and, where asked for, ``logprobs`` in its ``generation_info``;
            ``token_usage`` and ``model_name`` in ``llm_output``.
        """
        _check_prompts(prompts)
        model, stop = self._for_call(stop, kwargs)
        return super(VLLM, model).generate(
            prompts,
            stop=stop,
            callbacks=callbacks,
            tags=tags,
            metadata=metadata,
            run_name=run_name,
            run_id=run_id,
        )

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: UUID | list[UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Complete prompts together with all others that run; see :meth:`generate`."""
        _check_prompts(prompts)
        model, stop = self._for_call(stop, kwargs)
        return await super(VLLM, model).agenerate(
            prompts,
            stop=stop,
            callbacks=callbacks,
            tags=tags,
            metadata=metadata,
            run_name=run_name,
            run_id=run_id,
        )

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Yield a completion as it comes.

        With ``n`` completions it is the first of them, which ``invoke`` returns. Completions that
        must be compared first (``best_of``, ``use_beam_search``) come in one piece.
        """
        model, stop = self._for_call(stop, kwargs)
        return super(VLLM, model).stream(input, config, stop=stop)

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        """Yield a completion as it comes; see :meth:`stream`."""
        model, stop = self._for_call(stop, kwargs)
        return super(VLLM, model).astream(input, config, stop=stop)

    # -- batches with failures -------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete prompts as one batch, or in batches of ``max_concurrency``.

        With ``return_exceptions``, a prompt that fails has its exception in the list, and the
        others their completions.
        """
        if not return_exceptions:
            return super().batch(inputs, batch_configs(config, len(inputs)), **kwargs)
        outputs: list[Any] = []
        for part in batch_parts(self, inputs, config):
            try:
                results = self._keeping_failures().generate_prompt(**part.arguments, **kwargs)
            except Exception as error:
                outputs += part.all_failed(error)
            else:
                outputs += part.merged(results)
        return outputs

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete prompts together with all others that run; see :meth:`batch`."""
        if not return_exceptions:
            return await super().abatch(inputs, batch_configs(config, len(inputs)), **kwargs)
        outputs: list[Any] = []
        for part in batch_parts(self, inputs, config):
            try:
                model = self._keeping_failures()
                results = await model.agenerate_prompt(**part.arguments, **kwargs)
            except Exception as error:
                outputs += part.all_failed(error)
            else:
                outputs += part.merged(results)
        return outputs

    def _keeping_failures(self) -> Self:
        """Return a copy whose results have failures in them, and whose cache has none."""
        copied = self._call_copy()
        copied._keep_failures = True
        copied.__dict__["cache"] = without_failures(self.cache)
        return copied

    # -- what LangChain calls --------------------------------------------------------------------

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        model, stop = self._for_call(stop, kwargs)
        params = model._sampling_params(stop)
        return to_result(model._complete(prompts, params), model.model)

    def _complete(
        self, prompts: list[str], params: SamplingParams
    ) -> Sequence[RequestOutput | BaseException]:
        llm = self._open_lease().llm
        if not prompts:
            return []
        if self._keep_failures:
            return llm._run(
                prompts, params, return_errors=True, use_tqdm=False, lora_request=self.lora_request
            )
        return llm.generate(prompts, params, use_tqdm=False, lora_request=self.lora_request)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        model, stop = self._for_call(stop, kwargs)
        params = model._sampling_params(stop)
        engine = model._open_lease().async_llm
        tasks = [
            asyncio.ensure_future(_final(engine, prompt, params, model.lora_request))
            for prompt in prompts
        ]
        try:
            outputs = await asyncio.gather(*tasks, return_exceptions=model._keep_failures)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return to_result(outputs, model.model)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        model, stop = self._for_call(stop, kwargs)
        llm = model._open_lease().llm
        if model._comes_whole:
            [output] = model._complete([prompt], model._sampling_params(stop))
            whole = _whole(output)
            if run_manager:
                run_manager.on_llm_new_token(whole.text, chunk=whole)
            yield whole
            return
        params = model._sampling_params(stop, RequestOutputKind.DELTA)
        builder = ChunkBuilder()
        with closing(llm.stream(prompt, params, lora_request=model.lora_request)) as outputs:
            for output in outputs:
                chunk = builder.add(output)
                if chunk is None:
                    continue
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        model, stop = self._for_call(stop, kwargs)
        engine = model._open_lease().async_llm
        if model._comes_whole:
            params = model._sampling_params(stop)
            whole = _whole(await _final(engine, prompt, params, model.lora_request))
            if run_manager:
                await run_manager.on_llm_new_token(whole.text, chunk=whole)
            yield whole
            return
        params = model._sampling_params(stop, RequestOutputKind.DELTA)
        builder = ChunkBuilder()
        running = engine.generate(prompt, params, lora_request=model.lora_request)
        async with aclosing(running) as outputs:
            async for output in outputs:
                chunk = builder.add(output)
                if chunk is None:
                    continue
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    @property
    def _comes_whole(self) -> bool:
        """Whether the completion to show is known only when all of them have ended."""
        return self.use_beam_search or self.best_of not in (None, self.n)

    def _generate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[CallbackManagerForLLMRun],
        new_arg_supported: bool = True,
        **kwargs: Any,
    ) -> LLMResult:
        # LangChain's own ends all runs alike; here each has its own outcome and its own usage.
        try:
            first = run_managers[0] if run_managers else None
            result = self._generate(prompts, stop=stop, run_manager=first, **kwargs)
        except BaseException as error:
            for manager in run_managers:
                manager.on_llm_error(error, response=LLMResult(generations=[]))
            raise
        for manager, own in zip(run_managers, split_result(result), strict=False):
            failure = failure_in(own.generations[0])
            if failure is None:
                manager.on_llm_end(own)
            else:
                manager.on_llm_error(failure, response=LLMResult(generations=[]))
        result.run = _run_info(run_managers)
        return result

    async def _agenerate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[AsyncCallbackManagerForLLMRun],
        new_arg_supported: bool = True,
        **kwargs: Any,
    ) -> LLMResult:
        try:
            first = run_managers[0] if run_managers else None
            result = await self._agenerate(prompts, stop=stop, run_manager=first, **kwargs)
        except BaseException as error:
            nothing = LLMResult(generations=[])
            await asyncio.gather(*(m.on_llm_error(error, response=nothing) for m in run_managers))
            raise
        ends = []
        for manager, own in zip(run_managers, split_result(result), strict=False):
            failure = failure_in(own.generations[0])
            if failure is None:
                ends.append(manager.on_llm_end(own))
            else:
                ends.append(manager.on_llm_error(failure, response=LLMResult(generations=[])))
        await asyncio.gather(*ends)
        result.run = _run_info(run_managers)
        return result

    # -- tokens ----------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids that the model would be given for this text as a prompt."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._open_lease().llm.get_tokenizer().encode_prompt(text)

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens the model would be given for this text as a prompt."""
        return len(self.get_token_ids(text))


async def _final(
    engine: AsyncLLM, prompt: str, params: SamplingParams, lora_request: Any
) -> RequestOutput:
    # With FINAL_ONLY there is one output, or an exception.
    async with aclosing(engine.generate(prompt, params, lora_request=lora_request)) as outputs:
        return await anext(outputs)


def _check_prompts(prompts: Any) -> None:
    # A list of lists of ids, or of messages, would else be taken for something by somebody.
    if isinstance(prompts, list):
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InvalidRequestError(f"prompts[{i}] must be a string, not {prompt!r}")


def _whole(output: RequestOutput | BaseException) -> GenerationChunk:
    generation = to_generations(output)[0]
    return GenerationChunk(text=generation.text, generation_info=generation.generation_info)


def _run_info(managers: Sequence[Any]) -> list[RunInfo] | None:
    return [RunInfo(run_id=manager.run_id) for manager in managers] or None
