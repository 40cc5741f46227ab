"""What LangChain's text completion models of this package have in common: how they are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import LLMResult, RunInfo
from langchain_core.runnables import RunnableConfig
from pydantic import PrivateAttr

from quire.errors import InvalidRequestError
from quire.integrations.langchain.batch import batch_configs, batch_parts
from quire.integrations.langchain.cache import without_failures
from quire.integrations.langchain.results import failure_in, split_result

if TYPE_CHECKING:
    from uuid import UUID

    from langchain_core.callbacks import Callbacks
    from typing_extensions import Self


class TextModel(BaseLLM):
    """A text completion model whose calls may change its fields, and whose prompts fail alone.

    Another base has the fields. It says which of them a call may change (``_call_values``), joins
    stop strings (``_merged_stop``) and makes a copy for one call (``_call_copy``). One that has
    adapters keeps a call's as it is while the call lasts (``_with_found_adapter``).
    """

    _keep_failures: bool = PrivateAttr(default=False)

    if TYPE_CHECKING:

        def _call_values(self, kwargs: dict[str, Any]) -> dict[str, Any]: ...

        def _merged_stop(self, stop: Any) -> list[str] | None: ...

        def _call_copy(self) -> Self: ...

    # -- the arguments of a call -----------------------------------------------------------------

    def _with_found_adapter(self) -> Self:
        return self

    async def _awith_found_adapter(self) -> Self:
        return self

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
        copied.__pydantic_fields_set__.update(values)
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
        """Complete prompts together; see LangChain's ``BaseLLM.generate``.

        Parameters
        ----------
        prompts : list of str
        stop : list of str, optional
            Stop strings besides the constructor's.
        callbacks, tags, metadata, run_name, run_id
            As LangChain has them.
        **kwargs
            Arguments of the constructor, for this call: those of one request.

        Returns
        -------
        LLMResult
            ``n`` generations per prompt, each with ``finish_reason`` and what else is known of
            it in its ``generation_info``; ``token_usage`` and ``model_name`` in ``llm_output``.
        """
        _check_prompts(prompts)
        model, stop = self._for_call(stop, kwargs)
        model = model._with_found_adapter()  # the cache is to know it as the engine does
        return super(TextModel, model).generate(
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
        model = await model._awith_found_adapter()
        return await super(TextModel, model).agenerate(
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
        return super(TextModel, model).stream(input, config, stop=stop)

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
        if getattr(model, "lora_request", None) is None:
            return super(TextModel, model).astream(input, config, stop=stop)
        return model._astream_with_adapter(input, config, stop)

    async def _astream_with_adapter(
        self, input: LanguageModelInput, config: RunnableConfig | None, stop: list[str] | None
    ) -> AsyncIterator[str]:
        model = await self._awith_found_adapter()  # which may have to be read
        async with aclosing(super(TextModel, model).astream(input, config, stop=stop)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    # -- batches with failures -------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete prompts together, or in batches of ``max_concurrency``.

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

    # -- the end of a run -------------------------------------------------------------------------

    def _split(self, result: LLMResult) -> list[LLMResult]:
        """Return one result per prompt, each with the tokens that this prompt used."""
        return split_result(result)

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
        for manager, own in zip(run_managers, self._split(result), strict=False):
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
        for manager, own in zip(run_managers, self._split(result), strict=False):
            failure = failure_in(own.generations[0])
            if failure is None:
                ends.append(manager.on_llm_end(own))
            else:
                ends.append(manager.on_llm_error(failure, response=LLMResult(generations=[])))
        await asyncio.gather(*ends)
        result.run = _run_info(run_managers)
        return result


def _check_prompts(prompts: Any) -> None:
    # A list of lists of ids, or of messages, would else be taken for something by somebody.
    if isinstance(prompts, list):
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InvalidRequestError(f"prompts[{i}] must be a string, not {prompt!r}")


def _run_info(managers: Sequence[Any]) -> list[RunInfo] | None:
    return [RunInfo(run_id=manager.run_id) for manager in managers] or None
