"""vLLM's SamplingParams: quire's, with the fields that only vLLM knows."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from quire.errors import InvalidRequestError
from quire.integrations.vllm.exceptions import VLLMValidationError
from quire.sampling_params import SamplingParams as QuireSamplingParams
from quire.sampling_params import remember_given
from quire.structured_outputs import StructuredOutputsParams as QuireStructuredOutputsParams
from quire.utils.keywords import refuse_unknown_keywords

_TAKEN = "is taken for vLLM's sake"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "watermarking": (None, False),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None, 0),
    "logprob_token_ids": (None,),
    "flat_logprobs": (False,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (None,),
}
"""Fields that quire does not offer, each with the values that ask for nothing."""


class _StructuredOutputs:
    @staticmethod
    def of(value: Any) -> QuireStructuredOutputsParams | None:
        """Return what any of vLLM's forms of it says, if it says anything."""
        if isinstance(value, GuidedDecodingParams):
            return value.to_structured()
        if isinstance(value, dict):
            return StructuredOutputsParams(**value)
        found: QuireStructuredOutputsParams | None = value
        return found


@refuse_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams(QuireStructuredOutputsParams):
    """What the text has to match, see :class:`quire.StructuredOutputsParams`.

    Parameters
    ----------
    disable_additional_properties : bool
        Objects of ``json`` have the properties that the schema lists, where it does not say
        otherwise itself.
    """

    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        if self.disable_additional_properties and self.json is not None:
            object.__setattr__(self, "json", _closed(self.json))
        try:
            super().__post_init__()
        except InvalidRequestError as error:
            raise VLLMValidationError(str(error)) from error


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties beside those that it lists.

    What cannot be read is returned as it is, for its reader to say what is wrong.
    """
    if isinstance(schema, str):
        try:
            return json.dumps(_closed(json.loads(schema)))
        except (ValueError, RecursionError):
            return schema
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return _closed(schema.model_json_schema())
    if isinstance(schema, list):
        return [each if isinstance(each, str) else _closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        name: each if isinstance(each, str) else _closed(each) for name, each in schema.items()
    }
    if "properties" in found or "patternProperties" in found:
        found.setdefault("additionalProperties", False)
    return found


@refuse_unknown_keywords
@dataclass
class GuidedDecodingParams:
    """What ``structured_outputs`` was called before vLLM 0.12.

    Parameters
    ----------
    json, regex, choice, grammar, json_object, structural_tag
        Of which one says what the text has to match.
    whitespace_pattern, disable_any_whitespace, disable_additional_properties
        As in ``StructuredOutputsParams``.
    backend, backend_was_auto, disable_fallback
        Without effect: every library enforces the same.
    """

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    backend: str | None = None
    backend_was_auto: bool = False
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def to_structured(self) -> StructuredOutputsParams | None:
        """Return the same in today's words; None where nothing is asked for."""
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = {name: value for name in kinds if (value := getattr(self, name)) is not None}
        if not given or given == {"json_object": False}:
            return None
        options = {
            name: value
            for name in (
                "whitespace_pattern",
                "disable_any_whitespace",
                "disable_additional_properties",
            )
            if (value := getattr(self, name))
        }
        return StructuredOutputsParams(**given, **options)


@remember_given
@refuse_unknown_keywords
@dataclass(kw_only=True, repr=False)
class SamplingParams(QuireSamplingParams):
    """How the tokens of a completion are chosen, see :class:`quire.SamplingParams`.

    Every field that vLLM has, or had, is a keyword here. What vLLM alone knows:

    Parameters
    ----------
    guided_decoding : GuidedDecodingParams or dict, optional
        The former name of ``structured_outputs``, which it becomes.
    stream_interval : int, optional
        Without effect: tokens are told of as they come.
    skip_clone : bool
        Without effect.
    skip_reading_prefix_cache : bool, optional
        Without effect on what is generated; the cache is read.
    watermarking, prompt_logprob_token_ids, prompt_logprob_start, logprob_token_ids, flat_logprobs,
    thinking_token_budget, repetition_detection, routed_experts_prompt_start, trace_decode_token_ids
        Not offered beyond the values that ask for nothing.

    Raises
    ------
    VLLMValidationError
        A value out of its range, not offered, or two that contradict each other. It is a
        ValueError as well.
    TypeError
        An unknown keyword.
    """

    guided_decoding: Any = None
    stream_interval: int | None = None
    skip_clone: bool = False
    skip_reading_prefix_cache: bool | None = None
    watermarking: bool | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None

    __struct_fields__: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, nothing in _NEUTRAL.items():
            value = getattr(self, name)
            if not any(
                value is each or (type(value) is type(each) and value == each) for each in nothing
            ):
                raise VLLMValidationError(
                    f"{name} {_TAKEN} and not offered by quire; leave it out",
                    parameter=name,
                    value=value,
                )
        try:
            if self.guided_decoding is not None:
                guided = self.guided_decoding
                if isinstance(guided, dict):
                    guided = GuidedDecodingParams(**guided)
                wanted = _StructuredOutputs.of(guided)
                if self.structured_outputs is not None and wanted is not None:
                    raise VLLMValidationError(
                        "guided_decoding is the former name of structured_outputs: give one of them"
                    )
                if wanted is not None:
                    self.structured_outputs = wanted
                self.guided_decoding = None
            self.structured_outputs = _StructuredOutputs.of(self.structured_outputs)
            # Of parallel samples at temperature 0 vLLM returns equal ones.
            super().__post_init__()
        except InvalidRequestError as error:
            if isinstance(error, VLLMValidationError):
                raise
            raise VLLMValidationError(str(error)) from error

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """Return an object of the keywords that are not None."""
        return cls(**{name: value for name, value in kwargs.items() if value is not None})

    def to_quire(self) -> QuireSamplingParams:
        """Return what the engine is told."""
        names = [each.name for each in fields(QuireSamplingParams)]
        return QuireSamplingParams(**{name: getattr(self, name) for name in names})


# Every one a keyword, and its value one that the keyword takes: copies are made by them.
SamplingParams.__struct_fields__ = tuple(each.name for each in fields(SamplingParams))
SamplingParams.__annotations__ = {each.name: each.type for each in fields(SamplingParams)}

__all__ = ["GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams"]
