"""How the arguments of a call, the sampler and SamplingParams combine."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import InvalidRequestError, SamplingParams, StructuredOutputsParams
from quire.integrations.outlines import samplers
from quire.integrations.outlines.generators import request_params
from quire.integrations.outlines.samplers import parameters_of

CONSTRAINT = StructuredOutputsParams(regex="[0-9]+")
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(1, 100),
        "stop_at": st.none() | st.sampled_from(["a", ["a", "b"]]),
        "seed": st.none() | st.integers(0, 100),
        "constraint": st.sampled_from([None, CONSTRAINT]),
    },
)
SAMPLERS = st.sampled_from(
    [
        None,
        samplers.greedy(),
        samplers.multinomial(temperature=0.7, top_k=3),
        samplers.multinomial(2, top_p=0.5),
        samplers.beam_search(3),
    ]
)
EXPLICIT = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(2, 5),
        "top_p": st.just(0.25),
        "top_k": st.just(7),
        "seed": st.integers(0, 9),
        "stop": st.just(["x"]),
        "max_tokens": st.none() | st.integers(1, 9),
        "temperature": st.just(1.25),
        "logprobs": st.just(2),
        "ignore_eos": st.just(True),
    },
)


def contents(params):
    return {item.name: repr(getattr(params, item.name)) for item in fields(params)}


@given(explicit=EXPLICIT, sampler=SAMPLERS, arguments=ARGUMENTS)
def test_what_sampling_params_set_wins_and_is_not_changed(explicit, sampler, arguments):
    """Every field that the user's object sets reaches the request, and the object stays as it is.

    Only contradictions are refused: a search that draws, and several completions that would all be
    the greedy one.
    """
    params = SamplingParams(**explicit)
    before = contents(params)
    kind = parameters_of(sampler).sampler
    draws = explicit.keys() & {"temperature", "top_p", "top_k"}
    if (kind == "beam_search" and draws) or (
        kind == "greedy" and "n" in explicit and "temperature" not in explicit
    ):
        with pytest.raises(InvalidRequestError, match=r"temperature|top_p|top_k"):
            request_params(params, parameters_of(sampler), **arguments)
    else:
        combined = request_params(params, parameters_of(sampler), **arguments)
        assert combined is not params
        for name, value in explicit.items():
            assert getattr(combined, name) == value
    assert contents(params) == before


@given(sampler=SAMPLERS, arguments=ARGUMENTS)
def test_arguments_reach_the_request(sampler, arguments):
    """What SamplingParams leaves open is as the arguments and the sampler say."""
    combined = request_params(SamplingParams(), parameters_of(sampler), **arguments)
    asked = {name: value for name, value in arguments.items() if value is not None}
    assert combined.seed == asked.get("seed")
    assert combined.stop == list(asked.get("stop_at", []))
    assert combined.structured_outputs == asked.get("constraint")
    default = None if "constraint" in asked else 16
    assert combined.max_tokens == asked.get("max_tokens", default)
    assert combined.n == parameters_of(sampler).num_samples


def test_a_temperature_of_one_that_somebody_wrote_is_kept():
    """SamplingParams(temperature=1.0) draws, whatever the sampler says; an unset one does not."""
    greedy = parameters_of(samplers.greedy())
    assert request_params(SamplingParams(temperature=1.0), greedy).temperature == 1.0
    assert request_params(replace(SamplingParams(), seed=1), greedy).temperature == 0.0


def test_a_search_in_sampling_params_is_a_search_with_any_sampler():
    """Beams that SamplingParams ask for are followed, and a sampler's temperature is left out."""
    search = SamplingParams(use_beam_search=True, n=2, best_of=4)
    sampler = parameters_of(samplers.multinomial(temperature=0.5, top_k=3))
    assert request_params(search, sampler) == search


def test_more_completions_than_beams_widen_the_search():
    """An explicit n of more than the sampler's beams is honoured by as many beams."""
    sampler = parameters_of(samplers.beam_search(3))
    assert request_params(SamplingParams(n=5), sampler).beam_width == 5
    assert request_params(SamplingParams(n=2), sampler).beam_width == 3


def test_a_second_constraint_is_refused():
    """A generator of a structure takes no SamplingParams with another one; plain text does."""
    params = SamplingParams(structured_outputs=CONSTRAINT)
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        request_params(params, parameters_of(None), constraint=CONSTRAINT)
    assert request_params(params, parameters_of(None)).structured_outputs == CONSTRAINT


def test_none_written_out_for_a_constraint_takes_none_away():
    """SamplingParams(structured_outputs=None) is what many write who have no other."""
    given = SamplingParams(structured_outputs=None)
    params = request_params(given, parameters_of(None), constraint=CONSTRAINT)
    assert params.structured_outputs == CONSTRAINT


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, 1, [SamplingParams()]])
def test_what_are_no_sampling_params_is_refused(wrong):
    """A dict, a number, a list: named as what they are."""
    with pytest.raises(InvalidRequestError, match="sampling_params must be a SamplingParams"):
        request_params(wrong, parameters_of(None))


def test_text_is_needed():
    """detokenize=False leaves nothing to return, and is refused."""
    with pytest.raises(InvalidRequestError, match="detokenize"):
        request_params(SamplingParams(detokenize=False), parameters_of(None))
