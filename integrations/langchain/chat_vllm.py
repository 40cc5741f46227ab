"""ChatVLLM: LangChain's chat model on an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config
from pydantic import PrivateAttr

from quire.integrations.langchain.adapter_chat import AdapterChat
from quire.integrations.langchain.batch import batch_configs
from quire.integrations.langchain.chat_format import new_format
from quire.integrations.langchain.chat_profile import chat_profile
from quire.integrations.langchain.chat_request import (
    OPTION_NAMES,
    ChatOptions,
    ChatRequest,
    chat_prompt,
    chat_request,
)
from quire.integrations.langchain.chat_results import (
    ChatChunkBuilder,
    combined_output,
    to_chat_result,
    whole_chunk,
)
from quire.integrations.langchain.engine_model import EngineModel
from quire.integrations.langchain.gathering import MOST_THREADS, Gathering
from quire.integrations.langchain.messages import openai_messages
from quire.integrations.langchain.response_format import json_schema
from quire.integrations.langchain.tool_binding import ToolLike, openai_tools
from quire.integrations.langchain.tool_calling import ToolCallingModel
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from uuid import UUID

    from langchain_core.callbacks import Callbacks
    from typing_extensions import Self

    from quire.chat import ChatFormat

T = TypeVar("T")

_RENDERING = (
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
"""Fields that say how a conversation is written out."""

_FORMAT = ("tool_parser", "reasoning_parser")
"""Fields that say how an answer is read."""


class ChatVLLM(EngineModel, AdapterChat, ToolCallingModel):
    """A chat model on quire's engine.

    A conversation is written out by the model's own chat template, tools included; tool calls and
    reasoning are read from the answer. The engine is made with the object, or shared with every
    other object that asks for the same checkpoint and engine arguments, ``VLLM`` among them.
    The conversations of ``batch`` run as one batch, and calls from several threads or tasks join
    the batch that is running.

    Parameters
    ----------
    model, tensor_parallel_size, trust_remote_code, dtype, download_dir, vllm_kwargs, client
        Which engine, as for :class:`~quire.integrations.langchain.vllm.VLLM`.
    n, best_of, presence_penalty, frequency_penalty, repetition_penalty, temperature, top_p, \
top_k, min_p, seed, stop, stop_token_ids, bad_words, include_stop_str_in_output, ignore_eos, \
min_tokens, logprobs, prompt_logprobs, detokenize, skip_special_tokens, \
spaces_between_special_tokens, logit_bias, allowed_token_ids, truncate_prompt_tokens, \
logits_processors, extra_args, structured_outputs, use_beam_search, length_penalty, \
early_stopping, max_new_tokens, lora_request
        Sampling parameters, as for ``VLLM``. Each may be given to a call, too.
    chat_template : str, optional
        A Jinja template instead of the model's own, or the name of one of several.
    chat_template_kwargs : dict, optional
        Further variables for the template, such as ``{"enable_thinking": False}``.
    add_generation_prompt : bool, optional
        End the prompt where the answer begins. Left out, it is so unless
        ``continue_final_message`` is set.
    continue_final_message : bool, default False
        Leave the last message of a conversation open, for the model to go on with it.
    tool_parser, reasoning_parser : str, optional
        How tool calls and reasoning are read: a name of :mod:`quire.chat`, or ``"none"``. Left
        out, it is found out from the chat template.
    streaming : bool, default False
        Stream inside ``invoke``, too, for callbacks that follow the tokens.
    cache, callbacks, tags, metadata, verbose, name, custom_get_token_ids, rate_limiter, \
disable_streaming, output_version, profile
        As every LangChain chat model has them, as far as the installed version does. ``profile``
        is filled in from the model.

    Raises
    ------
    TypeError
        For an argument that does not exist, here and in every call; the message has the nearest.
    InvalidRequestError
        For a sampling parameter out of its range; in a call, for a conversation that cannot be
        written out.
    ConfigError, ModelNotFoundError, ModelLoadError, OutOfMemoryError
        As from :class:`quire.LLM`.

    Examples
    --------
    >>> from quire.integrations.langchain import ChatVLLM
    >>> chat = ChatVLLM(model="quire/demo", temperature=0)
    >>> message = chat.invoke("What is the capital of France?")
    >>> message.usage_metadata["output_tokens"] > 0
    True
    """

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    streaming: bool = False

    _gathering: Gathering | None = PrivateAttr(default=None)
    _known_format: Any = PrivateAttr(default=None)

    CALL_ARGUMENTS: ClassVar[frozenset[str]] = frozenset(
        (*EngineModel.CALL_ARGUMENTS, *_RENDERING, *_FORMAT)
    )
    """Fields that a call may override, and ``bind``."""

    @property
    def _llm_type(self) -> str:
        return "quire-chat"

    def _attach(self, given: Mapping[str, Any]) -> None:
        super()._attach(given)
        chat_format = self._chat_format()  # a parser that does not exist is told at once
        # A field since langchain-core 1.1.
        if "profile" in type(self).model_fields and getattr(self, "profile", None) is None:
            limits = self._open_lease().async_llm.limits
            self.__dict__["profile"] = chat_profile(self.model, limits, chat_format)

    def _chat_format(self) -> ChatFormat:
        """Return how answers are read, from the template that is in use."""
        key = (self.chat_template, self.tool_parser, self.reasoning_parser)
        if self._known_format is None or self._known_format[0] != key:
            self._known_format = (key, new_format(self._open_lease().llm, *key))
        chat_format: ChatFormat = self._known_format[1]
        return chat_format

    # -- the arguments of a call -----------------------------------------------------------------

    def _for_call(self, kwargs: Mapping[str, Any]) -> tuple[Self, ChatOptions]:
        """Return a model whose fields are those of one call, and what else the call asks for."""
        kwargs = {
            k: v for k, v in kwargs.items() if k not in ("stream", "structured_output_format")
        }
        options = ChatOptions(**{name: kwargs.pop(name, None) for name in OPTION_NAMES})
        if not kwargs:
            return self, options
        values = self._call_values(kwargs)
        copied = self._call_copy()
        copied.__dict__.update(values)
        return copied, options

    def _check_call(self, kwargs: Mapping[str, Any]) -> None:
        ignored = ("ls_structured_output_format", "stop")
        self._for_call({k: v for k, v in kwargs.items() if k not in ignored})

    def _request(
        self,
        messages: Sequence[BaseMessage],
        stop: Any,
        options: ChatOptions,
        kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> ChatRequest:
        return chat_request(
            self._open_lease().llm,
            openai_messages(messages),
            self._sampling_params(stop, kind),
            options,
            self._chat_format(),
            self._rendering(),
        )

    def _rendering(self) -> dict[str, Any]:
        rendering = {name: getattr(self, name) for name in _RENDERING}
        if self.add_generation_prompt is None:
            rendering["add_generation_prompt"] = not self.continue_final_message
        return rendering

    @property
    def _comes_whole(self) -> bool:
        """Whether the answer to show is known only when all completions have ended."""
        return self.use_beam_search or self.best_of not in (None, self.n)

    def _should_stream(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        if self.streaming:  # which langchain-core before 1.0 does not look at
            kwargs.setdefault("stream", True)
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs)

    # -- what LangChain calls --------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        model, options = self._for_call(kwargs)
        request = model._request(messages, stop, options)
        return to_chat_result(model._answer(request), request.new_reader, self.model)

    def _answer(self, request: ChatRequest) -> RequestOutput:
        llm = self._open_lease().llm
        if self._gathering is not None:
            return self._gathering.run(
                llm._make_request(request.prompt, request.params, lora_request=self.lora_request)
            )
        [output] = llm.generate(
            [request.prompt], request.params, use_tqdm=False, lora_request=self.lora_request
        )
        return output

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        model, options = self._for_call(kwargs)
        request = model._request(messages, stop, options)
        output = await model._aanswer(request)
        return to_chat_result(output, request.new_reader, self.model)

    async def _aanswer(self, request: ChatRequest) -> RequestOutput:
        engine = self._open_lease().async_llm
        running = engine.generate(request.prompt, request.params, lora_request=self.lora_request)
        # With FINAL_ONLY there is one output, or an exception.
        async with aclosing(running) as outputs:
            return await anext(outputs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        model, options = self._for_call(kwargs)
        if model._comes_whole:
            request = model._request(messages, stop, options)
            result = to_chat_result(model._answer(request), request.new_reader, self.model)
            chunk = whole_chunk(result)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            return
        request = model._request(messages, stop, options, RequestOutputKind.DELTA)
        builder = ChatChunkBuilder(request.new_reader(), self.model)
        llm = model._open_lease().llm
        running = llm.stream(request.prompt, request.params, lora_request=model.lora_request)
        with closing(running) as outputs:
            for output in outputs:
                new = builder.add(output)
                if new is None:
                    continue
                if run_manager:
                    run_manager.on_llm_new_token(new.text, chunk=new)
                yield new

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        model, options = self._for_call(kwargs)
        if model._comes_whole:
            request = model._request(messages, stop, options)
            result = to_chat_result(await model._aanswer(request), request.new_reader, self.model)
            chunk = whole_chunk(result)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            return
        request = model._request(messages, stop, options, RequestOutputKind.DELTA)
        builder = ChatChunkBuilder(request.new_reader(), self.model)
        engine = model._open_lease().async_llm
        running = engine.generate(request.prompt, request.params, lora_request=model.lora_request)
        async with aclosing(running) as outputs:
            async for output in outputs:
                new = builder.add(output)
                if new is None:
                    continue
                if run_manager:
                    await run_manager.on_llm_new_token(new.text, chunk=new)
                yield new

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return combined_output(llm_outputs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        model, options = self._for_call(kwargs)
        params = model._sampling_params(stop)
        if isinstance(options.response_format, type):  # others may have its name
            options = replace(options, response_format=json_schema(options.response_format))
        identity = {
            **model._identifying_params,
            "stop": params.stop,
            "options": options,
            "rendering": {**model._rendering(), **{name: getattr(model, name) for name in _FORMAT}},
        }
        if params.structured_outputs is not None:
            identity["structured_outputs"] = params.structured_outputs.spec
        return f"{type(self).__name__} {sorted(identity.items())}"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self._merged_stop(stop), **kwargs)
        params["ls_provider"] = "quire"
        if isinstance(kwargs.get("model"), str):
            params["ls_model_name"] = kwargs["model"]
        temperature = kwargs.get("temperature", self.temperature)
        if isinstance(temperature, (int, float)):
            params["ls_temperature"] = float(temperature)
        most = kwargs.get("max_tokens", kwargs.get("max_new_tokens", self.max_new_tokens))
        if isinstance(most, int):
            params["ls_max_tokens"] = most
        return params

    # -- batches ---------------------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer conversations as one batch of the engine, ``max_concurrency`` at a time.

        With ``return_exceptions``, a conversation that fails has its exception in the list, and
        the others their messages. Without, all end when one fails.
        """
        if not inputs:
            return []
        configs = batch_configs(config, len(inputs))
        width = configs[0]["max_concurrency"] or MOST_THREADS
        calls = [
            partial(type(self).invoke, input=given, config=own, **kwargs)
            for given, own in zip(inputs, configs, strict=True)
        ]
        return self._together(calls, width, return_exceptions=return_exceptions)

    def _together(
        self, calls: Sequence[Callable[[Any], T]], width: int, *, return_exceptions: bool = False
    ) -> list[T]:
        """Return what calls with a model return, whose requests run as one batch of the engine."""
        width = min(len(calls), width)
        llm = self._open_lease().llm
        gathering = Gathering(llm, len(calls), width, fail_fast=not return_exceptions)
        _ = self._serialized  # kept by the copy: traces name the object, which is the same
        model = self._call_copy()
        model._gathering = gathering

        def result(call: Callable[[Any], T]) -> Any:
            try:
                return gathering.call(lambda: call(model))
            except Exception as error:
                if return_exceptions:
                    return error
                raise

        with get_executor_for_config({"max_concurrency": width}) as executor:
            try:
                return list(executor.map(result, calls))
            except Exception as error:
                # The first in the list may have ended because another one failed.
                raise (gathering.failure or error) from None
            finally:  # also where Ctrl-C ended the wait; what has ended is not affected
                gathering.abandon()

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Yield each conversation's index and message as it ends; see :meth:`batch`."""
        configs = batch_configs(config, len(inputs))  # type: ignore[arg-type]
        for own in configs:
            own["max_concurrency"] = own["max_concurrency"] or min(len(inputs), MOST_THREADS)
        yield from super().batch_as_completed(inputs, configs, **kwargs)

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        run_name: str | None = None,
        run_id: UUID | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer conversations as one batch, with ``n`` completions each; see LangChain's.

        Parameters
        ----------
        messages : list of list of BaseMessage
        stop : list of str, optional
            Stop strings besides the constructor's.
        callbacks, tags, metadata, run_name, run_id
            As LangChain has them.
        **kwargs
            Sampling parameters, ``tools`` and the like, for this call.

        Returns
        -------
        LLMResult
            ``n`` generations per conversation; ``token_usage`` and ``model_name`` in its
            ``llm_output``.
        """
        if len(messages) == 1:
            return super().generate(
                messages,
                stop,
                callbacks,
                tags=tags,
                metadata=metadata,
                run_name=run_name,
                run_id=run_id,
                **kwargs,
            )
        calls: list[Callable[[Any], LLMResult]] = [
            partial(
                type(self).generate,
                messages=[conversation],
                stop=stop,
                callbacks=callbacks,
                tags=tags,
                metadata=metadata,
                run_name=run_name,
                run_id=run_id if i == 0 else None,
                **kwargs,
            )
            for i, conversation in enumerate(messages)
        ]
        results = self._together(calls, MOST_THREADS) if calls else []
        return LLMResult(
            generations=[generations for result in results for generations in result.generations],
            llm_output=combined_output([result.llm_output for result in results]),
            run=[run for result in results for run in result.run or []] or None,
        )

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__pydantic_private__"] |= {"_known_format": None, "_gathering": None}
        return state

    def __repr_args__(self) -> Any:
        return ((name, value) for name, value in super().__repr_args__() if name != "profile")

    # -- tokens ----------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of a text's tokens, with those that the tokenizer puts around a prompt."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._open_lease().llm.get_tokenizer().encode_prompt(text)

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[ToolLike] | None = None
    ) -> int:
        """Return how many tokens the model is given for a conversation, as the template writes it.

        Parameters
        ----------
        messages : list of BaseMessage
        tools : list, optional
            As for :meth:`bind_tools`.
        """
        prompt = chat_prompt(
            self._open_lease().llm,
            openai_messages(messages),
            openai_tools(tools) if tools else None,
            self._chat_format(),
            self._rendering(),
        )
        return len(prompt["prompt_token_ids"])
