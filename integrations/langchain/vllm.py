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
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import GenerationChunk, LLMResult

from quire.integrations.langchain.engine_model import EngineModel
from quire.integrations.langchain.results import ChunkBuilder, to_generations, to_result
from quire.integrations.langchain.text_model import TextModel
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM


class VLLM(EngineModel, TextModel):
    """A text completion model on quire's engine.

    A prompt goes to the model as it is written, also to an instruct model, for which it should
    hold the model's own chat markup. Messages are written out by LangChain as ``Human: ...``. A
    model's chat template is applied by :meth:`quire.LLM.chat`, and by ``ChatVLLM``.

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
    lora_request : LoRARequest or str, optional
        The adapter to run with; a name is one of an adapter that ``client.load_lora`` loaded. Needs
        ``vllm_kwargs={"enable_lora": True}``. See :meth:`with_lora`, too.
    cache, callbacks, tags, metadata, verbose, name, custom_get_token_ids
        As every LangChain model has them.

    Raises
    ------
    TypeError
        For an argument that does not exist, here and in every call; the message has the nearest.
    InvalidRequestError
        For a sampling parameter out of its range; (AdapterError) for an adapter that is not there
        or does not fit.
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

    @property
    def _llm_type(self) -> str:
        return "vllm"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "quire"
        if self.max_new_tokens is not None:
            params["ls_max_tokens"] = self.max_new_tokens
        return params

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
                prompts,
                params,
                return_errors=True,
                use_tqdm=False,
                lora_request=self.lora_request,
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


def _whole(output: RequestOutput | BaseException) -> GenerationChunk:
    generation = to_generations(output)[0]
    return GenerationChunk(text=generation.text, generation_info=generation.generation_info)
