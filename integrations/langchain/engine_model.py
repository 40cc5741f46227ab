"""What the language models of this package are made of: an engine and sampling parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from quire.config import argument_names
from quire.integrations.langchain.adapter_holder import AdapterHolder
from quire.integrations.langchain.engine_holder import no_flag
from quire.integrations.langchain.identity import callable_name
from quire.integrations.langchain.stops import merged_stop
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.utils.suggest import unexpected_argument

if TYPE_CHECKING:
    from typing_extensions import Self

    from quire.request_maker import FoundAdapter

_SAMPLING_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name not in ("max_tokens", "output_kind")
)
"""Fields that are handed to SamplingParams under their own names."""

_NUMBERS = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_new_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "length_penalty",
)
"""Fields in which True is no 1."""

_ALWAYS_SHOWN = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_p",
    "top_k",
    "use_beam_search",
    "stop",
    "ignore_eos",
    "logprobs",
)
"""Sampling parameters that stand among a model's parameters even at their defaults."""


class EngineModel(AdapterHolder):
    """Sampling parameters that the models share; a base beside LangChain's own.

    The fields are described in :class:`~quire.integrations.langchain.vllm.VLLM`.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_new_tokens: int | None = 512
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    logits_processors: list[Any] | None = None
    extra_args: dict[str, Any] | None = None
    structured_outputs: Any = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    CALL_ARGUMENTS: ClassVar[frozenset[str]] = frozenset(
        (*_SAMPLING_FIELDS, "max_new_tokens", "lora_request")
    )
    """Fields that a call may override, and ``bind``."""

    _OTHER_NAMES: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    # -- arguments -------------------------------------------------------------------------------

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        return no_flag(value)

    @classmethod
    def _by_field(cls, owner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return _one_max_tokens(owner, super()._by_field(owner, kwargs))

    def _check_fields(self) -> None:
        super()._check_fields()
        self._sampling_params(None)

    @classmethod
    def _call_values(cls, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by field name.

        Raises
        ------
        TypeError
            For a name that no call takes.
        """
        owner = f"a call of {cls.__name__}"
        values = cls._by_field(owner, kwargs)
        for name in values:
            if name in cls.CALL_ARGUMENTS:
                continue
            if name in cls.model_fields or name in argument_names():
                raise TypeError(
                    f"{owner} cannot change {name!r}: make another {cls.__name__}, which shares "
                    "the engine where it can"
                )
            raise unexpected_argument(owner, name, cls.CALL_ARGUMENTS | {"max_tokens"})
        return values

    def _with_found_adapter(self) -> Self:
        """Return a model for one call whose adapter stays what it is now."""
        return self._holding(self._found_own())

    async def _awith_found_adapter(self) -> Self:
        return self._holding(await self._afound_own())

    def _holding(self, adapter: FoundAdapter | None) -> Self:
        if adapter is self.lora_request:
            return self
        getattr(self, "_serialized", None)  # kept by the copy: traces name the object
        copied = self._call_copy()
        copied.__dict__["lora_request"] = adapter
        return copied

    def _merged_stop(self, stop: Any) -> list[str] | None:
        """Return the constructor's stop strings and a call's, each once."""
        return merged_stop(self.stop, stop)

    def _sampling_params(
        self, stop: Any, output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    ) -> SamplingParams:
        """Return the fields, with a call's stop strings, as the engine takes them.

        Raises
        ------
        InvalidRequestError
            For a value out of its range, or two that contradict each other.
        """
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        values["stop"] = self._merged_stop(stop)
        # The default here is 1.0 for compatibility; a beam search takes an unset one for 0.
        if self.use_beam_search and self.temperature == 1.0:
            del values["temperature"]
        return SamplingParams(**values, max_tokens=self.max_new_tokens, output_kind=output_kind)

    # -- identity --------------------------------------------------------------------------------

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes the answer: LangChain's cache tells models apart by it."""
        return {**self._engine_identity, **self._default_params}

    @property
    def _default_params(self) -> dict[str, Any]:
        """The sampling parameters of a call that gives none of its own."""
        shown: dict[str, Any] = {"max_tokens": self.max_new_tokens}
        for name in _SAMPLING_FIELDS:
            value = getattr(self, name)
            if name in _ALWAYS_SHOWN or value != _DEFAULTS[name]:
                shown[name] = value
        shown["stop"] = self._merged_stop(None)
        if self.logits_processors:
            shown["logits_processors"] = [callable_name(f) for f in self.logits_processors]
        if self.lora_request is not None:
            shown["lora_request"] = self._adapter_name
        return shown


_DEFAULTS = {name: EngineModel.model_fields[name].default for name in _SAMPLING_FIELDS}


def _one_max_tokens(owner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with ``max_tokens`` under its name here, ``max_new_tokens``."""
    values = dict(kwargs)
    if "max_tokens" in values:
        most = values.pop("max_tokens")
        if values.setdefault("max_new_tokens", most) != most:
            raise TypeError(
                f"{owner}: max_tokens={most!r} and max_new_tokens={values['max_new_tokens']!r} "
                "are two names of one argument"
            )
    return values
