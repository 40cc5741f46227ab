"""SamplingParams: every field is checked, shown, copied and compared."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError, NotSupportedError
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.utils.suggest import nearest

NAMES = [item.name for item in fields(SamplingParams)]

REFUSED: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, -1, 1.0, True, "2", None)],
    *[("best_of", value) for value in (0, -1, 2.0, True)],
    *[("presence_penalty", value) for value in (-2.01, 2.01, math.nan, math.inf, "1", None, True)],
    *[("frequency_penalty", value) for value in (-2.5, 3, math.nan, None, False)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, math.inf, math.nan, None, True)],
    *[("temperature", value) for value in (-1, -1e-9, math.nan, math.inf, None, "0", False)],
    *[("top_p", value) for value in (0, 0.0, -0.1, 1.0001, 2, math.nan, None, True)],
    *[("top_k", value) for value in (-2, 1.0, 0.5, None, "5", True)],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan, None, True)],
    *[("seed", value) for value in (1.0, "7", True, 2**64, -(2**63) - 1)],
    *[("stop", value) for value in ("", ["a", ""], 3, [3], b"a", {"a": 1})],
    *[("stop_token_ids", value) for value in ([-1], [1.5], ["a"], 0, 7, "12", [True])],
    *[("bad_words", value) for value in ("", [""], [1], 5)],
    *[("include_stop_str_in_output", value) for value in (1, 0, None, "yes")],
    *[("ignore_eos", value) for value in (1, None)],
    *[("max_tokens", value) for value in (0, -1, 1.5, True, "16")],
    *[("min_tokens", value) for value in (-1, 17, 1.0, None, True)],
    *[("logprobs", value) for value in (-2, 1.0, True, "5")],
    *[("prompt_logprobs", value) for value in (-2, 0.5, False)],
    *[("detokenize", value) for value in (1, None)],
    *[("skip_special_tokens", value) for value in (0, None)],
    *[("spaces_between_special_tokens", value) for value in (0, None)],
    *[("logit_bias", value) for value in ({-1: 1.0}, {1: math.nan}, {1: math.inf}, [1], {"a": 1})],
    *[("allowed_token_ids", value) for value in ([], [-1], ["1"], 3)],
    *[("truncate_prompt_tokens", value) for value in (0, -2, 1.0, True)],
    *[("logits_processors", value) for value in (len, [3], "f")],
    *[("extra_args", value) for value in ([3], "f", {3: 4})],
    *[("structured_outputs", value) for value in ("json", 5, [])],
    *[("output_kind", value) for value in (3, "delta", None)],
    *[("use_beam_search", value) for value in (1, None)],
    *[("length_penalty", value) for value in (math.nan, math.inf, 11, None, True)],
    *[("early_stopping", value) for value in ("always", None, 1, 0)],
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_bad_value_is_refused_by_name_and_value(name: str, value: Any) -> None:
    """The message names the field, the value and what would be right."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "must be" in message
    shown = {"stop": "", "logit_bias": ""}.get(name, repr(value))
    inner = repr(value[0]) if isinstance(value, list) and value else shown
    assert shown in message or inner in message


def test_every_field_has_a_refused_value() -> None:
    """A field without a check would not be in the table above."""
    assert {name for name, _ in REFUSED} == set(NAMES)


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("n", np.int64(3), 3),
    ("best_of", 4, 4),
    ("presence_penalty", -2, -2.0),
    ("repetition_penalty", 1e-3, 1e-3),
    ("temperature", np.float32(0.5), 0.5),
    ("temperature", 1e-9, 1e-9),
    ("top_p", 1, 1.0),
    ("top_k", -1, -1),
    ("min_p", 1, 1.0),
    ("seed", 2**64 - 1, 2**64 - 1),
    ("seed", -1, None),
    ("seed", 0, 0),
    ("stop", "END", ["END"]),
    ("stop", ("a", "b"), ["a", "b"]),
    ("stop", None, []),
    ("stop_token_ids", {5}, [5]),
    ("stop_token_ids", np.array([1, 2]), [1, 2]),
    ("bad_words", "no", ["no"]),
    ("max_tokens", None, None),
    ("min_tokens", 16, 16),
    ("logprobs", -1, -1),
    ("logprobs", 0, 0),
    ("logit_bias", {"3": 1, 4: -math.inf}, {3: 1.0, 4: -math.inf}),
    ("truncate_prompt_tokens", -1, -1),
    ("output_kind", 1, RequestOutputKind.DELTA),
    ("logits_processors", (max,), [max]),
    ("extra_args", {"banned": [3]}, {"banned": [3]}),
]


@pytest.mark.parametrize(("name", "value", "kept"), ACCEPTED)
def test_a_good_value_is_kept_in_its_plain_type(name: str, value: Any, kept: Any) -> None:
    """Numpy's numbers, lone strings and other spellings become what the field documents."""
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"best_of": 2, "temperature": 0.0}, "best_of"),
        ({"use_beam_search": True}, "n"),
        ({"use_beam_search": True, "best_of": 1}, "best_of"),
        ({"use_beam_search": True, "n": 2, "temperature": 1.0}, "temperature"),
        ({"use_beam_search": True, "n": 2, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "n": 2, "top_p": 0.9}, "top_p"),
        ({"use_beam_search": True, "n": 2, "top_k": 5}, "top_k"),
        ({"use_beam_search": True, "n": 2, "min_p": 0.1}, "min_p"),
        ({"early_stopping": True}, "early_stopping"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"stop": "a", "detokenize": False}, "stop"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"best_of": 2, "output_kind": 1}, "best_of"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(values: dict[str, Any], named: str) -> None:
    """The message names the field to change."""
    with pytest.raises(InvalidRequestError, match=rf"^{named} must be"):
        SamplingParams(**values)


def test_fields_and_defaults_are_those_that_users_of_vllm_know() -> None:
    """What is left out of a call means what it means there."""
    nothing = ("best_of", "seed", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids")
    nothing += ("truncate_prompt_tokens", "logits_processors", "extra_args")
    nothing += ("structured_outputs",)
    expected: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "early_stopping": False,
        **dict.fromkeys(nothing),
    }
    assert {name: getattr(SamplingParams(), name) for name in NAMES} == expected


def test_an_unset_temperature_is_zero_in_a_beam_search_and_one_elsewhere() -> None:
    """Whichever way the object came about; a temperature that was written stays written."""
    assert SamplingParams().temperature == 1.0
    for way in (lambda p: p, copy.copy, copy.deepcopy, SamplingParams.clone, round_trip):
        plain = way(SamplingParams(n=2))
        assert replace(plain, use_beam_search=True).temperature == 0.0
        written = way(SamplingParams(n=2, temperature=1.0))
        with pytest.raises(InvalidRequestError, match="temperature"):
            replace(written, use_beam_search=True)
    beams = SamplingParams(use_beam_search=True, n=2, best_of=5, top_k=-1, early_stopping="never")
    assert (beams.temperature, beams.beam_width, beams.is_greedy) == (0.0, 5, False)


def round_trip(params: Any) -> Any:
    return pickle.loads(pickle.dumps(params))


def test_an_unknown_keyword_names_the_nearest_valid_one() -> None:
    """A typo that an old manual prints leads to the right name; positions are refused."""
    with pytest.raises(
        TypeError,
        match="unexpected argument 'frequence_penalty': did you mean 'frequency_penalty'\\?",
    ):
        SamplingParams(frequence_penalty=1.0)
    with pytest.raises(TypeError, match=r"unexpected argument 'zzz'$"):
        SamplingParams(zzz=1)
    with pytest.raises(TypeError, match="did you mean 'beam_width'"):
        BeamSearchParams(beam_with=3, max_tokens=3)
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(3)


def test_the_signature_lists_every_field_by_keyword() -> None:
    """Editors and inspect see the fields, not ``**kwargs``."""
    parameters = inspect.signature(SamplingParams).parameters
    assert list(parameters) == NAMES
    assert all(item.kind is item.KEYWORD_ONLY for item in parameters.values())


def test_every_field_is_documented() -> None:
    """A numpydoc entry with a type for each."""
    for cls in (SamplingParams, BeamSearchParams):
        for item in fields(cls):
            assert f"\n    {item.name} : " in (cls.__doc__ or ""), item.name


def test_repr_shows_what_differs_from_the_defaults() -> None:
    """And evaluates to an equal object."""
    assert repr(SamplingParams()) == "SamplingParams()"
    params = SamplingParams(n=2, temperature=0.5, stop="x", logit_bias={3: 1})
    assert repr(params) == ("SamplingParams(n=2, temperature=0.5, stop=['x'], logit_bias={3: 1.0})")
    beams = BeamSearchParams(4, 8, early_stopping=True)
    assert repr(beams) == "BeamSearchParams(beam_width=4, max_tokens=8, early_stopping=True)"


VALID = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 4),
        "temperature": st.floats(0.01, 3),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 50),
        "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
        "stop": st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 99), max_size=3),
        "max_tokens": st.none() | st.integers(20, 50),
        "min_tokens": st.integers(0, 16),
        "logit_bias": st.none() | st.dictionaries(st.integers(0, 99), st.floats(-100, 100)),
        "output_kind": st.sampled_from(RequestOutputKind),
    },
)


@given(values=VALID)
def test_copies_are_equal_and_independent(values: dict[str, Any]) -> None:
    """clone, copy, deepcopy and pickle; changing a copy's lists leaves the original alone."""
    params = SamplingParams(**values)
    before = repr(params)
    for way in (copy.copy, copy.deepcopy, SamplingParams.clone, replace, round_trip):
        other = way(params)
        assert other == params
        assert repr(other) == before
        other.stop.append("more")
        other.stop_token_ids.append(3)
        assert repr(params) == before
        assert other != params


def test_what_was_changed_by_hand_is_checked_when_cloned() -> None:
    """The engine works on a clone, so a bad value is found before it does harm."""
    params = SamplingParams()
    params.stop = "END"
    assert params.clone().stop == ["END"]
    params.top_p = 7
    with pytest.raises(InvalidRequestError, match="top_p"):
        params.clone()


def test_deep_copies_share_callables() -> None:
    """A processor may hold a model or a lock, which cannot be copied."""

    class Processor:
        def __call__(self, token_ids: list[int], logits: Any) -> Any:
            return logits

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    processor = Processor()
    params = SamplingParams(logits_processors=[processor])
    assert copy.deepcopy(params).logits_processors == [processor]


@pytest.mark.parametrize(
    "values",
    [
        {"stop_token_ids": [10]},
        {"allowed_token_ids": [3, 10]},
        {"logit_bias": {10: 1.0}},
        {"logprobs": 11},
        {"prompt_logprobs": 11},
    ],
)
def test_verify_refuses_what_the_vocabulary_lacks(values: dict[str, Any]) -> None:
    """Ids and counts are checked against the model before the engine sees them."""
    params = SamplingParams(**values)
    params.verify(12)
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        params.verify(10)


def test_beam_search_params_are_checked_and_converted() -> None:
    """BeamSearchParams is a short way to write the SamplingParams of a beam search."""
    params = BeamSearchParams(beam_width=3, max_tokens=5, length_penalty=0.5, ignore_eos=True)
    converted = params.to_sampling_params()
    assert converted == SamplingParams(
        n=3, use_beam_search=True, max_tokens=5, length_penalty=0.5, ignore_eos=True
    )
    assert converted.beam_width == 3
    assert round_trip(params) == copy.deepcopy(params) == params
    ended = BeamSearchParams(3, 5, stop="END", include_stop_str_in_output=True)
    assert ended.to_sampling_params().stop == ended.stop == ["END"]
    assert ended.to_sampling_params().include_stop_str_in_output
    assert repr(BeamSearchParams(3, 5)) == "BeamSearchParams(beam_width=3, max_tokens=5)"
    for values in (
        {"beam_width": 1},
        {"max_tokens": 0},
        {"temperature": 0.5},
        {"ignore_eos": 1},
        {"stop": 5},
    ):
        with pytest.raises(InvalidRequestError, match=next(iter(values))):
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 4} | values))
    with pytest.raises(TypeError, match="max_tokens"):
        BeamSearchParams(beam_width=2)


def test_num_sequences_is_best_of_else_n() -> None:
    """What is generated, as opposed to what is returned."""
    assert SamplingParams(n=2).num_sequences == 2
    assert SamplingParams(n=2, best_of=5).num_sequences == 5
    assert SamplingParams(n=2).beam_width == 1
    assert SamplingParams(temperature=0).is_greedy


def test_nearest_finds_typos_and_lets_strangers_be() -> None:
    """Case does not matter; a word with nothing in common gets no suggestion."""
    assert nearest("Temprature", NAMES) == "temperature"
    assert nearest("max_new_tokens", NAMES) == "max_tokens"
    assert nearest("qwerty", NAMES) is None
    assert nearest("x", []) is None


def test_the_module_is_light() -> None:
    """Making SamplingParams needs neither torch nor transformers."""
    code = (
        "import sys; from quire.sampling_params import SamplingParams; SamplingParams();"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value",
    [np.array([1, 2]), np.array(0.5), torch.tensor([1, 2]), torch.tensor(0.5), int, -(10**5000)],
    ids=["array", "scalar array", "tensor", "scalar tensor", "type", "huge"],
)
def test_whatever_object_is_given_a_refusal_names_the_field(name: str, value: Any) -> None:
    """Arrays, types and integers too long to print are taken or refused, never half-read."""
    try:
        SamplingParams(**{name: value})
    except (InvalidRequestError, NotSupportedError) as error:
        message = str(error)
    else:
        message = name  # taken
    assert name in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "value",
    [
        {"9" * 5000: 1},
        {10**5000: 1},
        {10**5000: "x"},
        {1: np.array([1.0, 2.0])},
        {1: torch.tensor([1.0, 2.0])},
        {1: Decimal("sNaN")},
        {1: Decimal("-Infinity")},
        {1: "-inf"},
        {1: True},
        {1: 10**5000},
    ],
    ids=range(10),
)
def test_a_bias_that_is_no_number_is_refused(value: Any) -> None:
    """Whatever comparing it with infinity would do."""
    with pytest.raises(InvalidRequestError, match=r"logit_bias.* must be"):
        SamplingParams(logit_bias=value)


@pytest.mark.parametrize(
    "values",
    [
        *[{name: 10**5000} for name in ("n", "best_of", "top_k", "max_tokens", "logprobs")],
        *[{name: [10**5000]} for name in ("stop_token_ids", "allowed_token_ids")],
        {"n": 10**5000, "best_of": 2},
        {"max_tokens": 2**63},
    ],
    ids=range(9),
)
def test_a_number_past_every_use_is_refused(values: dict[str, Any]) -> None:
    """No field holds an integer that Python cannot print: what is made can be shown."""
    name = next(iter(values))
    with pytest.raises(InvalidRequestError, match=rf"{name} must be .* 2\*\*63 - 1, got"):
        SamplingParams(**values)
    assert SamplingParams(max_tokens=2**63 - 1).max_tokens == 2**63 - 1


def test_a_flag_is_no_output_kind() -> None:
    """True is equal to DELTA's number, and means something else."""
    with pytest.raises(InvalidRequestError, match="output_kind"):
        SamplingParams(output_kind=True)
