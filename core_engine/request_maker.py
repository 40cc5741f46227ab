"""RequestMaker: from what callers ask an LLM for to requests, each checked on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from quire.errors import AdapterError, InvalidRequestError, NotSupportedError
from quire.pooling_params import PoolingParams
from quire.prompts import Message, Prompt, one_per_prompt
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.utils.checks import refuse, shown

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.interface import AnyEngine
    from quire.engine.request import Request
    from quire.models.adapter import PreparedAdapter
    from quire.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """What a caller named, and the adapter that it is, or why there is none.

    Requests take it in place of what was named.
    """

    named: Any
    adapter: PreparedAdapter | None
    error: InvalidRequestError | None = None


class RequestMaker:
    """Makes the requests of one LLM; any thread may call it.

    Parameters
    ----------
    config : EngineConfig
    engine : AnyEngine
        Of which only what never changes is kept.
    """

    def __init__(self, config: EngineConfig, engine: AnyEngine) -> None:
        self.processor = engine.processor
        self.adapters = engine.adapters
        self._config = config
        self._request_ids = count()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises
        ------
        NotSupportedError
            There is none.
        """
        tokenizer = self.processor.tokenizer
        if tokenizer is None:
            raise NotSupportedError("there is no tokenizer: skip_tokenizer_init=True was given")
        return tokenizer

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> Request:
        """Check and tokenize one prompt."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(f"priority must be an integer, not {shown(priority)}")
        if priority != 0 and self._config.scheduler.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority={shown(priority)} needs an engine made with scheduling_policy='priority'"
            )
        if params is not None and not isinstance(params, SamplingParams):
            raise refuse("sampling_params", params, "a SamplingParams")
        wanted = self._adapter(lora_request)
        return self.processor.process(
            prompt,
            params,
            request_id=str(next(self._request_ids)),
            priority=priority,
            lora_request=wanted.named,
            adapter=wanted.adapter,
        )

    def embedding(
        self, prompt: Prompt, pooling: PoolingParams | None, lora_request: Any = None
    ) -> Request:
        """Check and tokenize one prompt whose vector is wanted."""
        if pooling is not None and not isinstance(pooling, PoolingParams):
            raise refuse("pooling_params", pooling, "a PoolingParams")
        wanted = self._adapter(lora_request)
        return self.processor.process(
            prompt,
            None,
            request_id=str(next(self._request_ids)),
            lora_request=wanted.named,
            adapter=wanted.adapter,
            pooling=pooling or PoolingParams(),
        )

    def batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        lora_request: Any,
        priority: int | Sequence[int] | None,
        return_errors: bool,
    ) -> list[Request | BaseException]:
        """Make the requests of a batch, whose outputs are wanted at its end.

        A prompt that cannot be served raises, or with `return_errors` has its error in its place.
        """
        every_params = one_per_prompt("sampling_params", params, len(prompts))
        every_priority = one_per_prompt(
            "priority", 0 if priority is None else priority, len(prompts)
        )
        adapters = self.find_adapters(lora_request, len(prompts))
        final: dict[int, SamplingParams] = {}  # by identity: most often all prompts share one
        requests: list[Request | BaseException] = []
        for i, prompt in enumerate(prompts):
            own = every_params[i]
            try:
                if id(own) not in final:
                    final[id(own)] = self.with_kind(own, RequestOutputKind.FINAL_ONLY)
                request = self.request(
                    prompt,
                    final[id(own)],
                    lora_request=adapters[i],
                    priority=every_priority[i],
                )
            except InvalidRequestError as error:
                if not return_errors:
                    raise at_index("prompt", i, len(prompts), error) from error
                requests.append(error)
            else:
                requests.append(request)
        return requests

    def embeddings(
        self,
        prompts: Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        lora_request: Any,
    ) -> list[Request | BaseException]:
        """Make the requests of a batch of prompts whose vectors are wanted."""
        every_pooling = one_per_prompt("pooling_params", pooling_params, len(prompts))
        adapters = self.find_adapters(lora_request, len(prompts))
        requests: list[Request | BaseException] = []
        for i, prompt in enumerate(prompts):
            try:
                requests.append(self.embedding(prompt, every_pooling[i], adapters[i]))
            except InvalidRequestError as error:
                raise at_index("prompt", i, len(prompts), error) from error
        return requests

    def find_adapters(self, lora_request: Any, num_prompts: int) -> list[FoundAdapter]:
        """Look for each of the adapters of a batch once.

        One that cannot be had is an error of the requests that want it.
        """
        every = one_per_prompt("lora_request", lora_request, num_prompts)
        found: dict[int, FoundAdapter] = {}
        for each in every:
            if id(each) not in found:
                try:
                    found[id(each)] = self._adapter(each)
                except InvalidRequestError as error:
                    found[id(each)] = FoundAdapter(each, None, error)
        return [found[id(each)] for each in every]

    def _adapter(self, lora_request: Any) -> FoundAdapter:
        if not isinstance(lora_request, FoundAdapter):
            return FoundAdapter(lora_request, self.adapters.resolve(lora_request))
        error = lora_request.error
        if error is not None:  # a new one: each is the exception of one prompt
            raise type(error)(str(error)) from error
        return lora_request

    def chat_prompt(
        self, conversation: list[Message], *, chat_template: str | None = None, **options: Any
    ) -> Prompt:
        """Write a conversation out by the chat template."""
        template = chat_template or self._config.model.chat_template
        token_ids = self.processor.render_chat(conversation, chat_template=template, **options)
        return {"prompt": self.tokenizer.decode(token_ids), "prompt_token_ids": token_ids}

    def with_kind(self, params: SamplingParams | None, kind: RequestOutputKind) -> SamplingParams:
        """Return the parameters, or the default ones, with another ``output_kind``."""
        if params is None:
            params = self.processor.default_sampling_params()
        elif not isinstance(params, SamplingParams):
            raise refuse("sampling_params", params, "a SamplingParams")
        return params if params.output_kind is kind else replace(params, output_kind=kind)

    def for_stream(self, params: SamplingParams | None) -> SamplingParams:
        """Return the parameters of a stream: of deltas, unless completions are compared first."""
        whole = self.with_kind(params, RequestOutputKind.FINAL_ONLY)
        if whole.use_beam_search or whole.num_sequences != whole.n:
            return whole
        return self.with_kind(whole, RequestOutputKind.DELTA)


def at_index(what: str, i: int, total: int, error: InvalidRequestError) -> InvalidRequestError:
    """Return an error that says which of several things it is about."""
    kind = AdapterError if isinstance(error, AdapterError) else InvalidRequestError
    return kind(f"{what} {i} of {total}: {error}" if total > 1 else str(error))
