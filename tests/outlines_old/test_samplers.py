"""Samplers of the 0.x API say what the engine samples by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import InvalidRequestError, SamplingParams
from quire.integrations.outlines import samplers
from quire.integrations.outlines.generators import request_params
from quire.integrations.outlines.samplers import SamplingParameters, parameters_of


@given(
    samples=st.integers(1, 20),
    top_k=st.none() | st.integers(1, 1000),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    temperature=st.none() | st.floats(0.01, 10),
)
def test_multinomial_says_all_that_it_was_given(samples, top_k, top_p, temperature):
    """What a multinomial sampler is made with arrives in the request, and nothing else does."""
    sampler = samplers.multinomial(samples, top_k=top_k, top_p=top_p, temperature=temperature)
    params = request_params(None, parameters_of(sampler))
    assert params == SamplingParams(
        n=samples,
        top_k=0 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
        temperature=1.0 if temperature is None else temperature,
    )


def test_old_class_names_are_those_of_the_short_names():
    """Code that names the classes, or asks isinstance, meets the same samplers."""
    assert samplers.greedy is samplers.GreedySampler
    assert samplers.multinomial is samplers.MultinomialSampler
    assert samplers.beam_search is samplers.BeamSearchSampler
    assert [samplers.greedy().samples, samplers.multinomial(3).samples] == [1, 3]
    assert samplers.beam_search(4).samples == 4


def test_no_sampler_is_one_draw_at_temperature_one():
    """Without a sampler, one completion is drawn from the model's own distribution."""
    assert parameters_of(None) == SamplingParameters("multinomial")
    assert request_params(None, parameters_of(None)) == SamplingParams(temperature=1.0)


def test_one_beam_is_the_greedy_choice():
    """The default beam search, of one beam, runs and is greedy; of several, a search."""
    assert request_params(None, parameters_of(samplers.beam_search())) == SamplingParams(
        temperature=0.0
    )
    assert request_params(None, parameters_of(samplers.beam_search(3))) == SamplingParams(
        n=3, best_of=3, use_beam_search=True
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0),
        ("samples", True),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    """A sampler that cannot be is refused when it is made; temperature 0 is sent to greedy()."""
    with pytest.raises(InvalidRequestError, match=name) as caught:
        samplers.multinomial(**{name: value})
    if name == "temperature":
        assert "greedy()" in str(caught.value)


def test_beams_out_of_range_are_refused():
    """A search has at least one beam."""
    with pytest.raises(InvalidRequestError, match="beams"):
        samplers.beam_search(0)


@pytest.mark.parametrize("wrong", [samplers.greedy, "greedy", 1, object(), SamplingParams()])
def test_what_is_no_sampler_is_refused(wrong):
    """Also a sampler's class, whose parentheses were forgotten, and the engine's parameters."""
    with pytest.raises(InvalidRequestError, match=r"sampler must be .*greedy\(\)"):
        parameters_of(wrong)


def test_a_sampler_of_the_users_own_is_taken():
    """Whatever says its parameters is a sampler."""

    class Mine:
        sampling_params = SamplingParameters("multinomial", 2, temperature=0.5)

    params = request_params(None, parameters_of(Mine()))
    assert params == SamplingParams(n=2, temperature=0.5)
