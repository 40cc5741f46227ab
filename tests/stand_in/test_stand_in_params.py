"""SamplingParams of the stand-in: every field of vLLM a keyword, copies equal, errors of both."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import quire
from quire.integrations.vllm.exceptions import VLLMError, VLLMValidationError
from quire.integrations.vllm.pooling_params import PoolingParams
from quire.integrations.vllm.sampling_params import (
    GuidedDecodingParams,
    SamplingParams,
    StructuredOutputsParams,
)

# What vLLM 0.33 lists, private fields left out, and what earlier releases had.
FIELDS = [
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "watermarking",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "logprob_token_ids",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "structured_outputs",
    "logit_bias",
    "allowed_token_ids",
    "extra_args",
    "bad_words",
    "skip_reading_prefix_cache",
    "thinking_token_budget",
    "repetition_detection",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "guided_decoding",
    "logits_processors",
    "truncate_prompt_tokens",
]


def test_every_field_of_vllm_is_a_keyword_and_listed() -> None:
    params = SamplingParams()
    assert set(FIELDS) <= set(SamplingParams.__struct_fields__)
    assert set(FIELDS) <= set(SamplingParams.__annotations__)
    for name in SamplingParams.__struct_fields__:
        assert SamplingParams(**{name: getattr(params, name)}) == params


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 4),
        "temperature": st.floats(0.1, 2),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(-1, 50),
        "stop": st.sampled_from([None, "x", ["a", "b"]]),
        "max_tokens": st.sampled_from([None, 7, 20]),
        "seed": st.sampled_from([None, -1, 5]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "guided_decoding": st.sampled_from(
            [None, GuidedDecodingParams(regex="a+"), {"choice": ["x", "y"]}]
        ),
        "skip_clone": st.booleans(),
        "stream_interval": st.sampled_from([None, 3]),
        "best_of": st.none(),
    },
)


@given(CHANGES)
def test_copies_by_listed_fields_are_equal(changes: dict[str, Any]) -> None:
    params = SamplingParams(**changes)
    listed = {name: getattr(params, name) for name in params.__struct_fields__}
    assert SamplingParams(**listed) == params
    assert copy.deepcopy(params) == params
    assert params.clone() == params
    assert pickle.loads(pickle.dumps(params)) == params
    told = params.to_quire()
    assert type(told) is quire.SamplingParams
    assert (told.n, told.stop, told.seed) == (params.n, params.stop, params.seed)
    assert told.structured_outputs == params.structured_outputs


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert (params.n, params.logprobs, params.ignore_eos) == (1, None, False)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n must"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"flat_logprobs": True}, "flat_logprobs"),
        ({"guided_decoding": {"choice": []}}, "choice"),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "b"}},
            "former name",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs|exactly"),
    ],
)
def test_bad_values_are_errors_of_vllm_and_of_quire(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(VLLMValidationError, match=match) as caught:
        SamplingParams(**kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, VLLMError)
    assert isinstance(caught.value, quire.InvalidRequestError)


def test_unknown_keywords_are_type_errors() -> None:
    for kind in (SamplingParams, PoolingParams, StructuredOutputsParams, GuidedDecodingParams):
        with pytest.raises(TypeError, match="temperatur"):
            kind(temperatur=1)


def test_former_names_say_the_same() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    new = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
    for old in (GuidedDecodingParams(json=schema, backend="xgrammar"), {"json": schema}):
        found = SamplingParams(guided_decoding=old)
        assert found.structured_outputs == new.structured_outputs
        assert found.guided_decoding is None
    assert SamplingParams(guided_decoding=GuidedDecodingParams()).structured_outputs is None
    assert not PoolingParams(softmax=False).activates
    assert PoolingParams().activates


def test_additional_properties_can_be_ruled_out() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"properties": {"type": "null"}}}},
    }
    for kind in (StructuredOutputsParams, GuidedDecodingParams):
        for form in (schema, json.dumps(schema)):
            wanted = kind(json=form, disable_additional_properties=True)
            found: Any = SamplingParams(structured_outputs=wanted).structured_outputs
            closed = json.loads(found.json) if isinstance(found.json, str) else found.json
            assert closed["additionalProperties"] is False
            assert closed["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in schema
    with pytest.raises(VLLMValidationError, match="json"):
        StructuredOutputsParams(json="{", disable_additional_properties=True)
