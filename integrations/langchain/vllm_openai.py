"""VLLMOpenAI: LangChain's string-in, string-out model on a server with OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import GenerationChunk, LLMResult

from quire.errors import InvalidRequestError, QuireError
from quire.integrations.langchain.remote_model import RemoteModel
from quire.integrations.langchain.remote_results import (
    Answer,
    RemoteChunks,
    RemoteResult,
    has_choices,
    to_answers,
    to_remote_result,
    to_streamed_answer,
)
from quire.integrations.langchain.server_info import ServerInfo
from quire.integrations.langchain.text_model import TextModel


class VLLMOpenAI(RemoteModel, TextModel):
    """A text completion model on ``quire serve``, or on any server with OpenAI's completions API.

    A drop-in for the class of this name in ``langchain_community.llms``, on the official client,
    the package openai from 1.60 on. Neither torch nor the engine is imported. A prompt goes to
    the model as it is written.

    Parameters
    ----------
    model_name (model) : str
        A model that the server has.
    openai_api_key (api_key) : str, optional
        Else QUIRE_API_KEY, VLLM_API_KEY or OPENAI_API_KEY of the environment, in this order,
        else ``"EMPTY"``, which a server without keys takes.
    openai_api_base (base_url) : str, optional
        The server's URL, with ``/v1``. Else OPENAI_API_BASE or OPENAI_BASE_URL of the
        environment, else ``http://localhost:8000/v1``.
    openai_organization (organization), openai_proxy : str, optional
        Else OPENAI_ORG_ID and OPENAI_PROXY of the environment.
    request_timeout (timeout) : float, (float, float) or httpx.Timeout, optional
        Seconds for an answer; a pair is of connecting and of reading. None waits for ever.
    max_retries : int, default 2
        How often the client asks again after a failure that may pass.
    default_headers, default_query : dict, optional
        Sent with every request.
    http_client, http_async_client : optional
        Clients of httpx to send requests with. The latter belongs to one event loop; without it
        every loop has one of its own.
    client, async_client : optional
        Clients of openai, or their ``completions``, in place of those made here.
    temperature : float, default 0.7
    max_tokens : int or None, default 256
        Tokens to generate at most. -1 is whatever room the model has left after the prompt,
        which the server's ``/tokenize`` is asked for; None leaves it to the server.
    top_p, frequency_penalty, presence_penalty, n, logprobs, seed, logit_bias
        As in :class:`quire.SamplingParams`.
    best_of : int, default 1
        As there, and 1 is as good as unset.
    stop : str or list of str, optional
        Joined by the ``stop`` of a call.
    top_k, min_p, repetition_penalty, stop_token_ids, bad_words, include_stop_str_in_output, \
ignore_eos, min_tokens, prompt_logprobs, skip_special_tokens, spaces_between_special_tokens, \
allowed_token_ids, truncate_prompt_tokens, structured_outputs, use_beam_search, length_penalty, \
early_stopping
        As in :class:`quire.SamplingParams`, for servers that know them, which quire and vLLM do.
        None leaves them to the server. They go into the request's ``extra_body``.
    batch_size : int, default 20
        Prompts that one request has at most. Asynchronous calls send all requests at once.
    streaming : bool, default False
        Ask for a stream also where the whole text is returned, so that callbacks see tokens.
    stream_usage : bool, default True
        Ask for the tokens used in streams.
    model_kwargs : dict, optional
        More arguments of the client's ``completions.create``: ``echo``, ``suffix``, ``user``,
        ``stream_options``, ``extra_headers``, ``extra_query``. Given directly they are moved
        here, with a warning. Arguments from above are taken here, too.
    extra_body : dict, optional
        Sent with the request as it is, whatever it says. That of a call is merged into it.
    tiktoken_model_name : str, optional
        Count tokens by tiktoken's encoding for this model, in place of the server's
        ``/tokenize``.
    allowed_special, disallowed_special
        For tiktoken.
    cache, callbacks, tags, metadata, verbose, name, custom_get_token_ids
        As every LangChain model has them.

    Raises
    ------
    ImportError
        Without the package openai.
    TypeError
        For an argument that does not exist, here and in every call; the message has the nearest.
    InvalidRequestError, ConfigError
        For an argument that is wrong, before a server is asked.

    Notes
    -----
    Errors of requests are of the classes of openai, so that handlers for these go on working, and
    of quire: ``openai.BadRequestError`` is an :class:`~quire.errors.InvalidRequestError`, too.

    Examples
    --------
    >>> from quire.integrations.langchain import VLLMOpenAI
    >>> llm = VLLMOpenAI(
    ...     openai_api_key="EMPTY",
    ...     openai_api_base="http://localhost:8000/v1",
    ...     model_name="quire/demo",
    ...     model_kwargs={"stop": ["."]},
    ... )
    >>> llm.invoke("Rome is")  # doctest: +SKIP
    ' the capital of Italy'
    """

    @property
    def _llm_type(self) -> str:
        return "vllm-openai"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "quire"
        return params

    @property
    def _invocation_params(self) -> dict[str, Any]:
        """The arguments of a request to which a call adds none of its own."""
        return self._request(None)

    # -- whole completions -----------------------------------------------------------------------

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        model, stop = self._for_call(stop, kwargs)
        request = model._request(stop)
        answers: list[Answer | BaseException] = []
        for part in model._parts(prompts):
            answers += model._answers(part, request, run_manager)
        return to_remote_result(answers, model.model_name)

    def _answers(
        self, part: list[str], request: dict[str, Any], run_manager: Any = None
    ) -> list[Answer | BaseException]:
        """Return the answers to prompts that go together."""
        try:
            if self.streaming:
                return [self._streamed(part[0], request, run_manager)]
            with self._telling():
                response = self.client.create(prompt=part, **self._with_room(part, request))
            return [*self._read(response, part, request)]
        except Exception as error:
            if not self._keep_failures:
                raise
            if not isinstance(error, InvalidRequestError) or len(part) == 1:
                return [error] * len(part)
            return [one for prompt in part for one in self._answers([prompt], request)]

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        model, stop = self._for_call(stop, kwargs)
        request = model._request(stop)
        answers = await _together(
            model._aanswers(part, request, run_manager) for part in model._parts(prompts)
        )
        return to_remote_result(answers, model.model_name)

    async def _aanswers(
        self, part: list[str], request: dict[str, Any], run_manager: Any = None
    ) -> list[Answer | BaseException]:
        try:
            if self.streaming:
                return [await self._astreamed(part[0], request, run_manager)]
            room = await self._awith_room(part, request)
            async with self._atelling():
                response = await self.async_client.create(prompt=part, **room)
            return [*self._read(response, part, request)]
        except Exception as error:
            if not self._keep_failures:
                raise
            if not isinstance(error, InvalidRequestError) or len(part) == 1:
                return [error] * len(part)
            return await _together(self._aanswers([prompt], request) for prompt in part)

    def _parts(self, prompts: list[str]) -> Iterator[list[str]]:
        """Cut prompts into those of one request each."""
        # A stream shows one completion, and what room is left is each prompt's own.
        width = 1 if self.streaming or self.max_tokens == -1 else self.batch_size
        for start in range(0, len(prompts), width):
            yield prompts[start : start + width]

    def _with_room(self, part: list[str], request: dict[str, Any]) -> dict[str, Any]:
        """Return the request for these prompts, with a ``max_tokens`` of -1 resolved."""
        for prompt in part:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError(
                    f"the prompt has a character that is none, at {error.start}: {error.reason}"
                ) from None
        if request.get("max_tokens") != -1:
            return request
        return {**request, "max_tokens": self.max_tokens_for_prompt(part[0])}

    async def _awith_room(self, part: list[str], request: dict[str, Any]) -> dict[str, Any]:
        if request.get("max_tokens") != -1:
            return self._with_room(part, request)
        return await asyncio.to_thread(self._with_room, part, request)

    def _read(self, response: Any, part: list[str], request: dict[str, Any]) -> list[Answer]:
        plain = _plain(response)
        if plain is None or not has_choices(plain):
            from quire.integrations.langchain.server_errors import no_completion

            raise no_completion(response if plain is None else plain, self._url)
        try:
            return to_answers(plain, len(part), request["n"])
        except ValueError as error:
            raise QuireError(f"{self._server.url}: {error}") from None

    # -- streams ---------------------------------------------------------------------------------

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        model, stop = self._for_call(stop, kwargs)
        yield from model._chunks(prompt, model._request(stop), run_manager)

    def _chunks(
        self, prompt: str, request: dict[str, Any], run_manager: Any
    ) -> Iterator[GenerationChunk]:
        if self._comes_whole:
            [answer] = self._answers([prompt], request)
            chunks: Iterator[GenerationChunk] = iter([_whole(answer)])
        else:
            chunks = self._events(prompt, request)
        for chunk in chunks:
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, **self._token_arguments(chunk))
            yield chunk

    def _events(self, prompt: str, request: dict[str, Any]) -> Iterator[GenerationChunk]:
        builder = RemoteChunks()
        room = self._with_room([prompt], request)
        with self._telling():
            stream = self.client.create(prompt=prompt, **self._as_stream(room))
            try:
                for event in stream:
                    chunk = builder.add(self._event(event))
                    if chunk is not None:
                        yield chunk
            finally:
                close = getattr(stream, "close", None)
                if close is not None:  # what is not read to its end is ended on the server, too
                    close()
            yield self._last(builder)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        model, stop = self._for_call(stop, kwargs)
        running = model._achunks(prompt, model._request(stop), run_manager)
        async with aclosing(running) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _achunks(
        self, prompt: str, request: dict[str, Any], run_manager: Any
    ) -> AsyncGenerator[GenerationChunk, None]:
        if self._comes_whole:
            [answer] = await self._aanswers([prompt], request)
            running = _one(_whole(answer))
        else:
            running = self._aevents(prompt, request)
        async with aclosing(running) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, **self._token_arguments(chunk))
                yield chunk

    async def _aevents(
        self, prompt: str, request: dict[str, Any]
    ) -> AsyncGenerator[GenerationChunk, None]:
        builder = RemoteChunks()
        room = await self._awith_room([prompt], request)
        async with self._atelling():
            stream = await self.async_client.create(prompt=prompt, **self._as_stream(room))
            try:
                async for event in stream:
                    chunk = builder.add(self._event(event))
                    if chunk is not None:
                        yield chunk
            finally:
                close = getattr(stream, "close", None)
                if close is not None:
                    await close()
            yield self._last(builder)

    def _streamed(self, prompt: str, request: dict[str, Any], run_manager: Any) -> Answer:
        """Return an answer that was asked for as a stream, which callbacks follow."""
        whole: GenerationChunk | None = None
        for chunk in self._chunks(prompt, request, run_manager):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None  # a stream has a last chunk, or raises
        return to_streamed_answer(whole)

    async def _astreamed(self, prompt: str, request: dict[str, Any], run_manager: Any) -> Answer:
        whole: GenerationChunk | None = None
        async for chunk in self._achunks(prompt, request, run_manager):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return to_streamed_answer(whole)

    def _as_stream(self, request: dict[str, Any]) -> dict[str, Any]:
        options = dict(request.get("stream_options") or {})
        if self.stream_usage:
            options.setdefault("include_usage", True)
        return {**request, "stream": True, **({"stream_options": options} if options else {})}

    def _event(self, event: Any) -> dict[str, Any]:
        plain = _plain(event)
        if plain is None or not (plain.get("choices") is None or has_choices(plain)):
            from quire.integrations.langchain.server_errors import no_completion

            raise no_completion(event, self._url)
        return plain

    def _last(self, builder: RemoteChunks) -> GenerationChunk:
        chunk = builder.finish()
        if chunk is None:
            raise QuireError(f"{self._server.url} ended its stream before the completion's end")
        return chunk

    def _token_arguments(self, chunk: GenerationChunk) -> dict[str, Any]:
        logprobs = (chunk.generation_info or {}).get("logprobs")
        return {"chunk": chunk, "verbose": self.verbose, "logprobs": logprobs}

    @property
    def _comes_whole(self) -> bool:
        """Whether the completion to show is known only when all of them have ended."""
        return bool(self.use_beam_search) or self._best_of not in (None, self.n)

    # -- errors and ends -------------------------------------------------------------------------

    @property
    def _server(self) -> ServerInfo:
        return ServerInfo(self.client, self._url, self.model_name)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what a request raises into errors that say what to do."""
        try:
            yield
        except QuireError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    @asynccontextmanager
    async def _atelling(self) -> AsyncIterator[None]:
        try:
            yield
        except QuireError:
            raise
        except Exception as error:
            raise await asyncio.to_thread(self._explained, error) from error

    def _explained(self, error: Exception) -> Exception:
        from quire.integrations.langchain.server_errors import Asked, explained, wants_models

        asked = Asked(self._url, self.model_name, self._key_source, self.request_timeout)
        models = self._server.models() if wants_models(error) else None
        return explained(error, asked, models)

    def _split(self, result: LLMResult) -> list[LLMResult]:
        assert isinstance(result, RemoteResult)
        return result.split()

    # -- tokens ----------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids that the model would be given for this text as a prompt.

        The server's ``/tokenize`` is asked for them. Where it has none, or with
        ``tiktoken_model_name``, tiktoken is: its ids are those of OpenAI's models, which a
        warning says unless it was asked for.

        Raises
        ------
        NotSupportedError
            When the server has no ``/tokenize``, and tiktoken is not installed.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        special = {
            "allowed_special": self.allowed_special,
            "disallowed_special": self.disallowed_special,
        }
        with self._telling():
            return self._server.token_ids(text, self.tiktoken_model_name, special)

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens the model would be given for this text as a prompt."""
        return len(self.get_token_ids(text))

    @property
    def max_context_size(self) -> int:
        """Tokens that prompt and completion may have together, as the server says.

        Raises
        ------
        NotSupportedError
            When it does not say.
        """
        with self._telling():
            return self._server.max_context_size()

    def max_tokens_for_prompt(self, prompt: str) -> int:
        """Return how many tokens the model has room for after a prompt.

        Raises
        ------
        InvalidRequestError
            For none.
        """
        size = self.max_context_size
        used = self.get_num_tokens(prompt)
        if used >= size:
            raise InvalidRequestError(
                f"the prompt has {used} tokens, and {self.model_name!r} on {self._server.url} "
                f"takes {size} with the completion: shorten the prompt"
            )
        return size - used


async def _together(parts: Any) -> list[Any]:
    """Run coroutines at once and join the lists they return; the first failure ends the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return [one for answers in await asyncio.gather(*tasks) for one in answers]
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _one(chunk: GenerationChunk) -> AsyncGenerator[GenerationChunk, None]:
    yield chunk


def _plain(answer: Any) -> dict[str, Any] | None:
    """Return a response, or an event of a stream, as a dict; None for what is neither."""
    if isinstance(answer, dict):
        return answer
    if not hasattr(answer, "model_dump"):
        return None
    # What a server says beyond OpenAI's own values is no reason for a warning.
    plain: dict[str, Any] = answer.model_dump(warnings=False)
    return plain


def _whole(answer: Answer | BaseException) -> GenerationChunk:
    if isinstance(answer, BaseException):
        raise answer
    [generation] = to_remote_result([answer], "").generations[0][:1]
    info = {k: v for k, v in (generation.generation_info or {}).items() if v is not None}
    return GenerationChunk(text=generation.text, generation_info=info)
