"""Models for Outlines on an engine in this process, sync and async."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quire.async_llm import AsyncLLM
from quire.config import EngineConfig
from quire.integrations.adapters import adapter_in
from quire.integrations.engines import EngineLease, acquire, borrow
from quire.integrations.outlines.inputs import as_prompt, is_batch
from quire.integrations.outlines.output_types import structured_outputs_for
from quire.integrations.outlines.results import Pieces, to_texts
from quire.integrations.outlines.sampling import Call, read_call
from quire.integrations.outlines.upstream import AsyncServerModel, ModelTypeAdapter, VLLMOffline
from quire.llm import LLM
from quire.lora_request import LoRARequest
from quire.outputs import RequestOutput
from quire.prompts import Prompt
from quire.sampling_params import RequestOutputKind
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import flag, shown

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from quire.arguments import EngineArguments
    from quire.tokenizer.tokenizer import Tokenizer
    from quire.waiting import OutputStream


def vllm(
    model: str | os.PathLike[str], *, chat: bool = False, **kwargs: Unpack[EngineArguments]
) -> VLLM:
    """Return a model for Outlines, by name.

    The engine is made now, or shared with every other object that asked for the same checkpoint
    and engine arguments. It is freed when the last of them is closed or dropped.

    Parameters
    ----------
    model : str or path
        A folder in the layout of Hugging Face, a name or URL on its hub, or ``"quire/demo"``.
    chat : bool, default False
        As in :class:`VLLM`.
    **kwargs
        Engine arguments, as :class:`quire.LLM` takes them; ``enable_lora=True`` for
        :meth:`VLLM.load_lora`.

    Raises
    ------
    TypeError
        For an argument that does not exist; the message names the nearest that does.
    ConfigError, ModelNotFoundError, ModelLoadError, OutOfMemoryError
        As from :class:`quire.LLM`.
    """
    flag("chat", chat)
    return VLLM._on(acquire(EngineConfig.create(model, **kwargs)), chat)


def from_quire(llm: LLM | AsyncLLM, *, chat: bool = False) -> VLLM | AsyncVLLM:
    """Return a model for Outlines on an engine that there is: sync for an LLM, else async.

    Parameters
    ----------
    llm : quire.LLM or quire.AsyncLLM
    chat : bool, default False
        As in :class:`VLLM`.
    """
    return AsyncVLLM(llm, chat=chat) if isinstance(llm, AsyncLLM) else VLLM(llm, chat=chat)


class VLLM(VLLMOffline):
    """A model for Outlines on an engine in this process.

    Outlines takes it wherever it takes one of its own: ``outlines.Generator(model, type)``,
    ``model(prompt, type)``, ``model.batch``, ``model.stream``, ``outlines.Application``.

    Parameters
    ----------
    llm : quire.LLM
        It is left running when the model is closed.
    chat : bool, default False
        Take a text for what a user says in a conversation, which the model's chat template writes
        out; without it a text goes to the model as it is. May be said by call, too.

    Attributes
    ----------
    llm : quire.LLM
    tokenizer : quire.tokenizer.tokenizer.Tokenizer
    """

    def __init__(self, llm: LLM, *, chat: bool = False) -> None:
        if not isinstance(llm, LLM):
            hint = "; from_quire takes an AsyncLLM" if isinstance(llm, AsyncLLM) else ""
            raise TypeError(f"llm must be a quire.LLM, not {shown(llm)}{hint}")
        llm.engine_loop  # noqa: B018  # a closed one is told now
        self._set_up(borrow(llm), flag("chat", chat))

    @classmethod
    def _on(cls, lease: EngineLease, chat: bool) -> Self:
        self = cls.__new__(cls)
        self._set_up(lease, chat)
        return self

    def _set_up(self, lease: EngineLease, chat: bool) -> None:
        self._lease = lease
        self._chat = chat
        self._adapter: LoRARequest | None = None

    @property
    def llm(self) -> LLM:
        """The engine.

        Raises
        ------
        EngineClosedError
            After :meth:`close`.
        """
        return self._lease.llm

    @property
    def model(self) -> LLM:
        """The engine, by Outlines' name for it."""
        return self.llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.llm.get_tokenizer()

    @property
    def type_adapter(self) -> ModelTypeAdapter:  # type: ignore[override]
        """Inputs and output types as the engine takes them."""
        return _TypeAdapter(self)  # not kept: dropping the model frees its engine at once

    # -- what users call -------------------------------------------------------------------------

    def __call__(
        self,
        model_input: Any,
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> Any:
        """Generate; see :meth:`generate`, of which ``backend`` is an argument as others are."""
        return self.generate(model_input, output_type, **_named(backend), **inference_kwargs)

    def batch(
        self,
        model_input: list[Any],
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> list[Any]:
        """Generate for several inputs at once; see :meth:`generate_batch`."""
        return self.generate_batch(model_input, output_type, **_named(backend), **inference_kwargs)

    def stream(
        self,
        model_input: Any,
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> Iterator[str]:
        """Generate, and yield the text as it comes; see :meth:`generate_stream`."""
        return self.generate_stream(model_input, output_type, **_named(backend), **inference_kwargs)

    # -- what Outlines calls ---------------------------------------------------------------------

    def generate(self, model_input: Any, output_type: Any = None, **inference_kwargs: Any) -> Any:
        """Generate a text.

        Parameters
        ----------
        model_input : str, Chat or list
            A text or a conversation. A list of these is a batch.
        output_type : object, optional
            What the text has to match: any output type of Outlines, or a
            :class:`quire.StructuredOutputsParams`.
        **inference_kwargs
            ``sampling_params`` and the fields of SamplingParams, where ``max_new_tokens`` is
            ``max_tokens`` and ``stop_at`` is ``stop``. What ``sampling_params`` sets explicitly
            stands. Besides: ``allow_incomplete``, ``backend``, ``chat`` and the arguments of
            :meth:`quire.LLM.chat`, ``use_tqdm`` (default False), ``lora_request``, ``priority``.

        Returns
        -------
        str or list of str
            A list where ``n`` is more than 1.

        Raises
        ------
        TypeError
            For an input, an output type or an argument that there is not.
        InvalidRequestError
            For values that cannot be served.
        RequestFailedError
            The constraint cannot be enforced, or the request failed as it ran.
        StructureIncompleteError
            The text was cut off before it matched, and ``allow_incomplete`` is not set.
        """
        if is_batch(model_input):
            return self.generate_batch(model_input, output_type, **inference_kwargs)
        [text] = self.generate_batch([model_input], output_type, **inference_kwargs)
        return text

    def generate_batch(
        self, model_input: list[Any], output_type: Any = None, **inference_kwargs: Any
    ) -> list[Any]:
        """Generate for several inputs, as one batch of the engine.

        Parameters
        ----------
        model_input : list of str or Chat
        output_type, **inference_kwargs
            As in :meth:`generate`, for all of them.

        Returns
        -------
        list of str, or list of list of str
            In the order of the inputs; of lists where ``n`` is more than 1.
        """
        llm = self.llm
        call = _read_call(self, llm, output_type, inference_kwargs)
        prompts = _prompts(llm, model_input, call)
        if not prompts:
            return []
        outputs = llm.generate(prompts, call.params, use_tqdm=call.use_tqdm, **call.engine_options)
        return _all_texts(outputs, call)

    def generate_stream(
        self, model_input: Any, output_type: Any = None, **inference_kwargs: Any
    ) -> Iterator[str]:
        """Generate a text and yield it as it comes.

        The request starts at once. Closing or dropping the iterator before its end aborts it. A
        text that is cut off before it matches is followed by StructureIncompleteError.

        Parameters
        ----------
        model_input, output_type, **inference_kwargs
            As in :meth:`generate`; ``n`` must be 1.
        """
        llm = self.llm
        call = _read_call(self, llm, output_type, inference_kwargs)
        pieces = Pieces(call)
        prompt = _prompt(llm, model_input, call)
        return _read(llm.stream(prompt, call.params, **call.engine_options), pieces)

    # -- adapters --------------------------------------------------------------------------------

    def load_lora(self, adapter_path: str | os.PathLike[str] | LoRARequest | None) -> None:
        """Have this model's next generations run with an adapter; those of others are as they were.

        Generators that were made before follow it, too. A call that has a ``lora_request`` of its
        own, None included, runs with that.

        Parameters
        ----------
        adapter_path : str, path, LoRARequest or None
            A folder in peft's format, or a name on the hub. What lies there when a call begins is
            what the call runs with. None is the model without an adapter.

        Raises
        ------
        InvalidRequestError
            The engine was made without ``enable_lora=True``; or (AdapterError) there is no such
            adapter, or it does not fit the model. The model keeps the adapter that it had.
        """
        self._adapter = adapter_in(self.llm, adapter_path)

    @property
    def lora_request(self) -> LoRARequest | None:
        """The adapter that generations run with, or None."""
        return self._adapter

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the engine; one that :func:`vllm` made is freed by its last user's closing."""
        self._lease.close()

    def __enter__(self) -> Self:
        """Return self, which is closed at the end of the block."""
        self.llm  # noqa: B018
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        inner = "closed" if self._lease.closed else repr(self._lease.llm)
        return f"{type(self).__name__}({inner})"


class AsyncVLLM(AsyncServerModel):
    """The async twin of :class:`VLLM`: ``await model(prompt, type)``, ``async for`` its stream.

    Parameters
    ----------
    llm : quire.AsyncLLM
    chat : bool, default False
        As in :class:`VLLM`.

    Attributes
    ----------
    llm : quire.AsyncLLM
    """

    def __init__(self, llm: AsyncLLM, *, chat: bool = False) -> None:
        if not isinstance(llm, AsyncLLM):
            hint = "; make one by AsyncLLM.from_llm" if isinstance(llm, LLM) else ""
            raise TypeError(f"llm must be a quire.AsyncLLM, not {shown(llm)}{hint}")
        llm._open_llm()  # a closed one is told now
        self.llm = llm
        self._chat = flag("chat", chat)
        self._adapter: LoRARequest | None = None

    @property
    def type_adapter(self) -> ModelTypeAdapter:  # type: ignore[override]
        """Inputs and output types as the engine takes them."""
        return _TypeAdapter(self)

    async def __call__(
        self,
        model_input: Any,
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> Any:
        """Generate; see :meth:`generate`."""
        return await self.generate(model_input, output_type, **_named(backend), **inference_kwargs)

    async def batch(
        self,
        model_input: list[Any],
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> list[Any]:
        """Generate for several inputs at once; see :meth:`generate_batch`."""
        return await self.generate_batch(
            model_input, output_type, **_named(backend), **inference_kwargs
        )

    async def stream(
        self,
        model_input: Any,
        output_type: Any = None,
        backend: str | None = None,
        **inference_kwargs: Any,
    ) -> AsyncIterator[str]:
        """Generate, and yield the text as it comes; see :meth:`generate_stream`."""
        stream = self.generate_stream(
            model_input, output_type, **_named(backend), **inference_kwargs
        )
        async with aclosing(stream) as texts:  # type: ignore[type-var]
            async for text in texts:
                yield text

    async def generate(
        self, model_input: Any, output_type: Any = None, **inference_kwargs: Any
    ) -> Any:
        """Generate a text, or those of a list; see :meth:`VLLM.generate`."""
        if is_batch(model_input):
            return await self.generate_batch(model_input, output_type, **inference_kwargs)
        [text] = await self.generate_batch([model_input], output_type, **inference_kwargs)
        return text

    async def generate_batch(
        self, model_input: list[Any], output_type: Any = None, **inference_kwargs: Any
    ) -> list[Any]:
        """Generate for several inputs, together with all else that runs.

        If one fails, or the task is cancelled, the others are aborted. ``use_tqdm`` shows nothing.
        """
        llm = self.llm._open_llm()
        call = _read_call(self, llm, output_type, inference_kwargs)
        call = replace(call, params=replace(call.params, output_kind=RequestOutputKind.FINAL_ONLY))
        prompts = _prompts(llm, model_input, call)
        wanted = call.engine_options.pop("lora_request", None)
        adapters: list[Any] = [None] * len(prompts)
        if wanted is not None:  # read once for all, and not on the event loop
            maker = llm._open_maker()
            adapters = [*await asyncio.to_thread(maker.find_adapters, wanted, len(prompts))]
        tasks = [
            asyncio.ensure_future(_final(self.llm, prompt, call, adapter))
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return _all_texts(outputs, call)

    async def generate_stream(  # type: ignore[override]
        self, model_input: Any, output_type: Any = None, **inference_kwargs: Any
    ) -> AsyncIterator[str]:
        """Generate a text and yield it as it comes; see :meth:`VLLM.generate_stream`.

        The request starts with the first text that is asked for.
        """
        llm = self.llm._open_llm()
        call = _read_call(self, llm, output_type, inference_kwargs)
        pieces = Pieces(call)
        prompt = _prompt(llm, model_input, call)
        params = llm._for_stream(call.params)
        last = None
        async with aclosing(self.llm.generate(prompt, params, **call.engine_options)) as outputs:
            async for last in outputs:
                if text := pieces.add(last):
                    yield text
        pieces.check(last)

    async def load_lora(self, adapter_path: str | os.PathLike[str] | LoRARequest | None) -> None:
        """Have this model's next generations run with an adapter; see :meth:`VLLM.load_lora`."""
        llm = self.llm._open_llm()
        self._adapter = await asyncio.to_thread(adapter_in, llm, adapter_path)

    @property
    def lora_request(self) -> LoRARequest | None:
        """The adapter that generations run with, or None."""
        return self._adapter

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.llm!r})"


class _TypeAdapter(ModelTypeAdapter):
    """What Outlines asks every model for: inputs and output types, as its engine takes them."""

    def __init__(self, model: VLLM | AsyncVLLM) -> None:
        self._model = model

    def format_input(self, model_input: Any) -> Prompt:
        model = self._model
        llm = model.llm if isinstance(model, VLLM) else model.llm._open_llm()
        return as_prompt(llm, model_input, chat=model._chat)

    def format_output_type(self, output_type: Any = None) -> StructuredOutputsParams | None:
        return structured_outputs_for(output_type)


def _named(backend: str | None) -> dict[str, str]:
    return {} if backend is None else {"backend": backend}


def _read_call(
    model: VLLM | AsyncVLLM, llm: LLM, output_type: Any, arguments: Mapping[str, Any]
) -> Call:
    adapter = model.lora_request
    own = {} if adapter is None else {"lora_request": adapter}
    return read_call(
        f"a call of {type(model).__name__}",
        llm.get_default_sampling_params(),
        output_type,
        {**own, **arguments},
        chat=model._chat,
        backend=llm.config.structured.structured_outputs_backend,
    )


def _prompt(llm: LLM, model_input: Any, call: Call) -> Prompt:
    return as_prompt(llm, model_input, chat=call.chat, chat_options=call.chat_options)


def _prompts(llm: LLM, model_input: Any, call: Call) -> list[Prompt]:
    if not isinstance(model_input, (list, tuple)):
        raise TypeError(f"a batch must be a list of inputs, not {shown(model_input)}")
    return [_prompt(llm, item, call) for item in model_input]


def _all_texts(outputs: list[RequestOutput], call: Call) -> list[str | list[str]]:
    texts = []
    for i, output in enumerate(outputs):
        where = f"input {i} of {len(outputs)}: " if len(outputs) > 1 else ""
        texts.append(to_texts(output, call, where))
    return texts


def _read(stream: OutputStream, pieces: Pieces) -> Iterator[str]:
    last = None
    with closing(stream):
        for last in stream:
            if text := pieces.add(last):
                yield text
    pieces.check(last)


async def _final(llm: AsyncLLM, prompt: Prompt, call: Call, adapter: Any) -> RequestOutput:
    # With FINAL_ONLY there is one output, or an exception.
    running = llm.generate(prompt, call.params, lora_request=adapter, **call.engine_options)
    async with aclosing(running) as outputs:
        return await anext(outputs)
