"""What goes between the copies of an engine comes out as it went in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import SamplingParams
from quire.engine.cache_map import KVBlock, KVCacheMap
from quire.engine.request import Request
from quire.errors import AdapterError, InvalidRequestError, RankError, RequestFailedError
from quire.executor.messages import pack, unpack
from quire.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from quire.pooling_params import PoolingParams
from quire.replicas.wire import (
    StaysHereError,
    cache_map_from_message,
    cache_map_to_message,
    error_from_message,
    error_to_message,
    output_from_message,
    output_to_message,
    request_from_message,
    request_to_message,
)
from quire.sampling_params import RequestOutputKind, StructuredOutputsParams

# Also lone surrogates, which a prompt may have.
texts = st.text(st.characters(), max_size=8)
whole_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ids = st.integers(0, 300)
floats = st.floats(-100, 100)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts | floats,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
schemas = st.dictionaries(whole_texts, st.integers() | whole_texts, max_size=3)
constraints = st.one_of(
    st.builds(
        StructuredOutputsParams,
        json=schemas,
        disable_any_whitespace=st.booleans(),
        drop_unsupported=st.booleans(),
        backend=st.sampled_from([None, "xgrammar"]),
    ),
    st.builds(StructuredOutputsParams, json=schemas, whitespace_pattern=st.just("[ \t]*")),
    st.builds(StructuredOutputsParams, regex=st.sampled_from(["a+", "\\d{3}"])),
    st.builds(
        StructuredOutputsParams,
        choice=st.lists(whole_texts, min_size=1),
        canonical_tokens=st.booleans(),
    ),
    st.builds(StructuredOutputsParams, json_object=st.just(True)),
    st.builds(StructuredOutputsParams, grammar=st.just('start: "a" | "b"')),
    st.builds(
        StructuredOutputsParams,
        structural_tag=st.just(
            {"structures": [{"begin": "<a", "schema": {}, "end": ">"}], "triggers": ["<"]}
        ),
    ),
)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    temperature=st.floats(0.1, 2),
    top_p=st.floats(0.1, 1),
    top_k=st.integers(-1, 50),
    repetition_penalty=st.floats(0.5, 2),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(texts.filter(bool), max_size=2),
    stop_token_ids=st.lists(ids, max_size=2),
    bad_words=st.lists(texts.filter(bool), max_size=2),
    max_tokens=st.none() | st.integers(1, 99),
    logit_bias=st.none() | st.dictionaries(ids, floats | st.just(-float("inf")), max_size=3),
    allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=3),
    extra_args=st.none() | st.dictionaries(texts, json_values, max_size=3),
    output_kind=st.sampled_from(RequestOutputKind),
    structured_outputs=st.none() | constraints,
)
beams = st.builds(
    SamplingParams,
    n=st.integers(2, 4),
    use_beam_search=st.just(True),
    early_stopping=st.sampled_from([True, False, "never"]),
    length_penalty=st.floats(-2, 2),
)
requests = st.builds(
    Request,
    request_id=texts,
    prompt=st.none(),
    prompt_token_ids=st.lists(ids, min_size=1, max_size=5),
    params=params | beams,
    seed=st.integers(-(2**63), 2**64 - 1),
    priority=st.integers(-5, 5),
    cache_salt=st.none() | texts,
    bad_words_ids=st.lists(st.lists(ids, max_size=2), max_size=2),
    pooling=st.none() | st.builds(PoolingParams, pooling=st.sampled_from([None, "mean", "cls"])),
)


@given(requests)
def test_requests_come_out_as_they_went_in(request_):
    found = request_from_message(unpack(pack(request_to_message(request_, None))))
    assert dataclasses.replace(found.params, structured_outputs=None) == dataclasses.replace(
        request_.params, structured_outputs=None
    )
    ours, theirs = found.params.structured_outputs, request_.params.structured_outputs
    if theirs is None:
        assert ours is None
    else:
        assert ours.spec == theirs.spec
        assert (ours.backend, ours.canonical_tokens) == (theirs.backend, theirs.canonical_tokens)
    for field in dataclasses.fields(Request):
        if field.name != "params":
            assert getattr(found, field.name) == getattr(request_, field.name)


logprobs = st.dictionaries(
    ids,
    st.builds(
        Logprob,
        logprob=floats | st.just(-float("inf")),
        rank=st.none() | ids,
        decoded_token=st.none() | texts,
    ),
    max_size=3,
)
outputs = st.builds(
    RequestOutput,
    request_id=texts,
    prompt=st.none() | texts,
    prompt_token_ids=st.lists(ids, max_size=5),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3),
    outputs=st.lists(
        st.builds(
            CompletionOutput,
            index=ids,
            text=texts,
            token_ids=st.lists(ids, max_size=4),
            cumulative_logprob=st.none() | floats,
            logprobs=st.none() | st.lists(logprobs, max_size=3),
            finish_reason=st.sampled_from([None, "stop", "length", "abort"]),
            stop_reason=st.none() | ids | texts,
            lora_request=st.just("its adapter"),
        ),
        max_size=3,
    ),
    finished=st.booleans(),
    metrics=st.none() | st.builds(RequestMetrics, arrival_time=floats, num_preemptions=ids),
    lora_request=st.just("its adapter"),
    num_cached_tokens=ids,
    embedding=st.none() | st.lists(floats, max_size=4),
)


@given(outputs)
def test_outputs_come_out_as_they_went_in(output):
    request = Request(
        output.request_id,
        output.prompt,
        output.prompt_token_ids,
        SamplingParams(),
        0,
        lora_request="its adapter",
    )
    found = output_from_message(unpack(pack(output_to_message(output))), request)
    assert found == output
    assert found.prompt_token_ids is not request.prompt_token_ids


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RequestFailedError("7", "why"), None),
        (InvalidRequestError("why"), InvalidRequestError),
        (AdapterError("why"), AdapterError),
        (RankError(1, "why"), RuntimeError),
        (KeyError("why"), RuntimeError),
    ],
)
def test_errors_keep_their_type_where_there_is_one(error, cause):
    found = error_from_message(unpack(pack(error_to_message(error))), "7")
    assert isinstance(found, RequestFailedError)
    assert found.request_id == "7"
    assert "why" in str(found)
    assert (type(found.__cause__) if found.__cause__ else None) is cause


def test_a_failure_keeps_its_cause():
    """By which a server tells whose fault it is."""
    failure = RequestFailedError("7", "why")
    failure.__cause__ = InvalidRequestError("because")
    found = error_from_message(unpack(pack(error_to_message(failure))), "7")
    assert str(found) == str(failure)
    assert type(found.__cause__) is InvalidRequestError
    assert str(found.__cause__) == "because"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logits_processors=[lambda ids, logits: logits]),
        SamplingParams(extra_args={"x": object()}),
        SamplingParams(extra_args={"x": 2**70}),
        SamplingParams(extra_args={"x": (1, 2)}),
        SamplingParams(extra_args={"x": [{"y": {1, 2}}]}),
    ],
)
def test_what_cannot_be_said_stays(params):
    with pytest.raises(StaysHereError):
        request_to_message(Request("1", None, [1], params, 0), None)


def test_an_adapter_goes_by_its_folder_and_its_content():
    class Adapter:
        digest = "abc"

    request_ = Request("1", None, [1], SamplingParams(), 0, lora_request="name", adapter=Adapter())
    with pytest.raises(StaysHereError):
        request_to_message(request_, None)
    message = request_to_message(request_, Path("/some/folder"))
    assert message["adapter"] == {"name": "name", "digest": "abc", "folder": "/some/folder"}
    assert request_from_message(message).lora_request == "name"


def test_maps_of_the_kv_cache():
    found = KVCacheMap(16, [KVBlock(), KVBlock(("1", "2"), True), KVBlock((), True)], "fp8")
    assert cache_map_from_message(unpack(pack(cache_map_to_message(found)))) == found
