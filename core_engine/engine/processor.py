"""From what a user asks for to a request that the engine can run: checked, complete, in tokens."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.engine.request import Request
from quire.errors import InvalidRequestError, QuireError
from quire.sampling.random import derive_seed
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.utils.suggest import nearest

if TYPE_CHECKING:
    from quire.models.adapter import PreparedAdapter
    from quire.pooling_params import PoolingParams
    from quire.tokenizer.tokenizer import Tokenizer

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")

MAX_SEQUENCES = 16384
"""Most completions, or beams, of one request: each takes memory and time before anything runs."""

_TEXT_LIKE = (str, bytes, bytearray, memoryview)
"""Sequences of integers, some of them, that are not meant as token ids."""

_GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of ``generation_config.json`` that are sampling parameters, and how those are named."""


@dataclass(frozen=True)
class ModelLimits:
    """What a request is measured against.

    Attributes
    ----------
    vocab_size : int
        Token ids run from 0 to ``vocab_size - 1``.
    max_model_len : int
        Prompt and output together have at most this many tokens.
    max_cache_tokens : int
        Tokens that the whole KV cache holds.
    eos_token_ids : tuple of int
        Tokens that end a text.
    hidden_size : int
        Numbers of an embedding.
    default_params : dict
        The model's ``generation_config.json``, or nothing of it where the user wants none.
    generates : bool
        Whether the model has a head for tokens; one for classes reads prompts only.
    """

    vocab_size: int
    max_model_len: int
    max_cache_tokens: int
    eos_token_ids: tuple[int, ...]
    default_params: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 0
    generates: bool = True


class Processor:
    """Make requests. Holds no state of the engine; threads may share one.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        Without one, prompts are token ids, and nothing that is text can be asked for.
    limits : ModelLimits
    seed : int
        The engine's seed: requests without a seed of their own draw one from it and from
        their number, so that equal prompts differ and a run repeats.
    """

    def __init__(self, tokenizer: Tokenizer | None, limits: ModelLimits, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self._seed = seed
        self._num_requests = 0
        self._lock = threading.Lock()

    def process(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        params: SamplingParams | None,
        *,
        request_id: str,
        priority: int = 0,
        lora_request: Any = None,
        add_special_tokens: bool = True,
        pooling: PoolingParams | None = None,
        adapter: PreparedAdapter | None = None,
    ) -> Request:
        """Make a request.

        Parameters
        ----------
        prompt : str, sequence of int, or mapping
            A text; token ids; or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``, with
            ``"cache_salt"`` to keep its prefix blocks apart from other requests'.
        params : SamplingParams or None
            None for :meth:`default_sampling_params`. Never changed.
        request_id : str
        priority : int, default 0
            Lower runs earlier where the scheduling policy is ``"priority"``.
        lora_request : object, optional
            The adapter as the caller named it.
        add_special_tokens : bool, default True
            Whether a text gets what the tokenizer puts around one, such as a BOS token. A text
            that begins with the BOS token's own text does not get a second one.
        pooling : PoolingParams, optional
            For an embedding of the prompt; ``params`` are then left out.
        adapter : PreparedAdapter, optional
            The adapter itself.

        Returns
        -------
        Request

        Raises
        ------
        InvalidRequestError
            If the prompt or the parameters cannot be served; the message says why.
        """
        if pooling is not None:
            pooling.check(self.limits.hidden_size)
            params = SamplingParams(
                temperature=0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                truncate_prompt_tokens=pooling.truncate_prompt_tokens,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        elif not self.limits.generates:
            raise InvalidRequestError(
                "the model has a head for classes and none for tokens, so it generates no text: "
                "use LLM.classify, LLM.score or LLM.embed"
            )
        elif params is None:
            params = self.default_sampling_params()
        elif not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be a SamplingParams, got {type(params).__name__}"
            )
        else:
            params = params.clone()
        params.verify(self.limits.vocab_size)
        if params.num_sequences > MAX_SEQUENCES:
            name = "n" if params.best_of is None else "best_of"
            raise InvalidRequestError(
                f"{name} must be at most {MAX_SEQUENCES}, got {params.num_sequences}"
            )
        self._check_text_params(params)
        text, token_ids, cache_salt = self._read_prompt(prompt, add_special_tokens)
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-self._num_kept(params) :]
        self._check_length(len(token_ids))
        room = min(
            self.limits.max_model_len - len(token_ids),
            # The last token's keys and values are never needed.
            self.limits.max_cache_tokens - len(token_ids) + 1,
        )
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        params.top_k = min(params.top_k, self.limits.vocab_size)
        bad_words_ids = [ids for word in params.bad_words or () for ids in self._spellings(word)]
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            seed=self._next_seed(params.seed),
            priority=priority,
            lora_request=lora_request,
            cache_salt=cache_salt,
            bad_words_ids=bad_words_ids,
            pooling=pooling,
            adapter=adapter,
        )

    def _next_seed(self, seed: int | None) -> int:
        with self._lock:
            number = self._num_requests
            self._num_requests += 1
        return derive_seed(self._seed, number) if seed is None else seed

    def default_sampling_params(self) -> SamplingParams:
        """Return the parameters that the model's makers recommend.

        They are those of ``generation_config.json``: temperature, top_p, top_k, min_p,
        repetition_penalty, and max_new_tokens as ``max_tokens``.

        Raises
        ------
        InvalidRequestError
            If a value there is out of its range.
        """
        values = {
            name: self.limits.default_params[key]
            for key, name in _GENERATION_CONFIG_FIELDS.items()
            if self.limits.default_params.get(key) is not None
        }
        try:
            return SamplingParams(**values)
        except QuireError as error:
            raise InvalidRequestError(
                f"the model's generation_config.json: {error}; pass sampling_params, or "
                "generation_config='vllm' to leave it out"
            ) from error

    def render_chat(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Write a conversation as a prompt, in token ids.

        Special tokens are those that the template writes; no BOS is added to its own.

        Parameters
        ----------
        messages : list of dict
        chat_template : str, optional
            A template, or the name of one of the tokenizer's, to use instead of its default.
        add_generation_prompt : bool, default True
        continue_final_message : bool, default False
        tools : list, optional
        chat_template_kwargs : mapping, optional
            Further variables of the template.

        Raises
        ------
        InvalidRequestError
            If there is no tokenizer or template, or the template fails on the messages.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a chat needs the tokenizer's template, and this engine has no tokenizer "
                "(skip_tokenizer_init=True)"
            )
        arguments: dict[str, Any] = {
            "chat_template": chat_template,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tokenize": True,
        }
        token_ids = self.tokenizer.apply_chat_template(
            messages, **arguments, **_template_variables(chat_template_kwargs, arguments)
        )
        assert isinstance(token_ids, list)
        if not token_ids:
            raise InvalidRequestError("the chat template wrote an empty prompt for these messages")
        return token_ids

    # Prompts

    def _read_prompt(
        self, prompt: Any, add_special_tokens: bool
    ) -> tuple[str | None, list[int], str | None]:
        """Return a prompt's text (if it has one), its token ids and its cache salt."""
        salt = None
        text = ids = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            self._check_keys(prompt)
            text, ids, salt = (prompt.get(key) for key in _PROMPT_KEYS)
            if text is not None and not isinstance(text, str):
                raise InvalidRequestError(f"'prompt' must be a str, got {type(text).__name__}")
            if salt is not None and (not isinstance(salt, str) or not salt):
                raise InvalidRequestError(f"'cache_salt' must be a non-empty str, got {salt!r}")
        else:
            ids = prompt
        if ids is not None:
            return text, self._check_ids(ids), salt
        if text is None:
            raise InvalidRequestError("the prompt is None: give a text or token ids")
        return text, self._encode(text, add_special_tokens), salt

    def _check_keys(self, prompt: Mapping[str, Any]) -> None:
        for key in prompt:
            if key not in _PROMPT_KEYS:
                guess = nearest(str(key), _PROMPT_KEYS)
                hint = f": did you mean {guess!r}?" if guess is not None else ""
                raise InvalidRequestError(
                    f"a prompt has the keys {', '.join(_PROMPT_KEYS)}; unknown key {key!r}{hint}"
                )
        if prompt.get("prompt") is None and prompt.get("prompt_token_ids") is None:
            raise InvalidRequestError(
                "a prompt given as a dict needs 'prompt' (a text) or 'prompt_token_ids'; it has "
                f"{sorted(map(str, prompt)) or 'no keys'}"
            )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text:
            raise InvalidRequestError("the prompt is empty: it needs at least one character")
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "a prompt of text needs a tokenizer, and this engine has none "
                "(skip_tokenizer_init=True): give {'prompt_token_ids': [...]}"
            )
        token_ids = tokenizer.encode_prompt(text, add_special_tokens)
        if not token_ids:
            raise InvalidRequestError(f"the prompt {text!r} gives no tokens at all")
        # The tokenizer may know tokens that the model does not.
        return self._check_ids(token_ids)

    def _check_ids(self, ids: Any) -> list[int]:
        if hasattr(ids, "tolist") and not isinstance(ids, memoryview):
            ids = ids.tolist()
        if isinstance(ids, _TEXT_LIKE) or not isinstance(ids, Sequence):
            raise InvalidRequestError(
                "a prompt must be a str, a list of token ids, or a dict with 'prompt' or "
                f"'prompt_token_ids', got {type(ids).__name__}"
            )
        if not ids:
            raise InvalidRequestError("the prompt is empty: it needs at least one token")
        if set(map(type, ids)) == {int}:
            token_ids = list(ids)
        else:
            token_ids = [_token_id(id_, position) for position, id_ in enumerate(ids)]
        vocab_size = self.limits.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            for position, id_ in enumerate(token_ids):
                if not 0 <= id_ < vocab_size:
                    raise InvalidRequestError(
                        f"token id {id_} at position {position} of the prompt is out of range: "
                        f"the model's vocabulary has {vocab_size} tokens (0 to {vocab_size - 1})"
                    )
        return token_ids

    def _num_kept(self, params: SamplingParams) -> int:
        """Return how many of a prompt's last tokens ``truncate_prompt_tokens`` keeps."""
        count = params.truncate_prompt_tokens
        assert count is not None
        if count > 0:
            return count
        room = self.limits.max_model_len - (params.max_tokens or 1)
        return max(1, min(room, self.limits.max_cache_tokens))

    def _check_length(self, num_tokens: int) -> None:
        limits = self.limits
        if num_tokens >= limits.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, and max_model_len is {limits.max_model_len}, "
                "which must hold the prompt and at least one new token: shorten the prompt, or "
                "set truncate_prompt_tokens"
            )
        if num_tokens > limits.max_cache_tokens:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, and the whole KV cache holds "
                f"{limits.max_cache_tokens}: shorten the prompt, set truncate_prompt_tokens, or "
                "raise kv_cache_memory_bytes"
            )

    # Parameters

    def _check_text_params(self, params: SamplingParams) -> None:
        if params.stop and not params.detokenize:
            raise InvalidRequestError(
                f"stop must be empty with detokenize=False, which makes no text to look for "
                f"{params.stop!r} in"
            )
        if self.tokenizer is None:
            for name in ("stop", "bad_words", "structured_outputs"):
                if value := getattr(params, name):
                    raise InvalidRequestError(
                        f"{name} must be empty, got {value!r}: it needs a tokenizer, and this "
                        "engine has none (skip_tokenizer_init=True)"
                    )

    def _spellings(self, word: str) -> list[list[int]]:
        """Return the token ids of a word in the middle of a text, without and with a space."""
        assert self.tokenizer is not None
        bare = word.lstrip(" ") or word
        spellings = []
        for spelling in (bare, f" {bare}"):
            ids = self.tokenizer.encode_fragment(spelling)
            if not ids or max(ids) >= self.limits.vocab_size:
                raise InvalidRequestError(
                    f"bad_words holds {word!r}, which the model's vocabulary cannot spell"
                )
            if ids not in spellings:
                spellings.append(ids)
        return spellings


def _token_id(value: Any, position: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(
            f"token ids must be integers, got {value!r} at position {position} of the prompt"
        )
    return operator.index(value)


def _template_variables(given: Any, taken: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further variables of a chat template, if they are any."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InvalidRequestError(
            f"chat_template_kwargs must be a dict of names and values, got {given!r}"
        )
    for name in given:
        if name in taken or name == "messages":
            raise InvalidRequestError(
                f"chat_template_kwargs has {name!r}, which is an argument of its own or is set "
                "already; leave it out"
            )
    return dict(given)
