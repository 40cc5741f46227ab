"""Who says what the parameters of a request are, and in which order they are heard."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

from outlines.types import Regex

from quire import InvalidRequestError, SamplingParams, StructuredOutputsParams
from quire.integrations.outlines.sampling import read_call, request_params

DIGITS = StructuredOutputsParams(regex="[0-9]+")
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.sampled_from([None, 5, 16]),
        "temperature": st.sampled_from([0.5, 1.0]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "seed": st.sampled_from([None, 3]),
        "stop": st.sampled_from([["a"], ["b"]]),
        "min_tokens": st.sampled_from([0, 2]),
    },
)
DEFAULT = SamplingParams(temperature=0.7, top_k=5)


@given(VALUES, VALUES, st.booleans(), st.booleans())
def test_explicit_params_come_first_then_arguments_then_defaults(
    written, arguments, has_params, constrained
):
    """A default that was written out is explicit, too; nothing that was handed in changes."""
    params = SamplingParams(**written) if has_params else None
    before = repr(params), repr(DEFAULT), dict(arguments)
    structure = DIGITS if constrained else None
    made = request_params("f", DEFAULT, params, arguments, structured_outputs=structure)
    assert (repr(params), repr(DEFAULT), arguments) == before
    base = params if has_params else DEFAULT
    for field in dataclasses.fields(SamplingParams):
        name = field.name
        if has_params and name in written:
            expected = written[name]
        elif name in arguments:
            expected = arguments[name]
        elif name == "structured_outputs":
            expected = structure
        elif name == "max_tokens" and constrained:
            expected = None
        else:
            expected = getattr(base, name)
        assert getattr(made, name) == expected, name


@given(VALUES)
def test_explicit_fields_outlive_copies(written):
    """Copied, pickled or cloned, parameters know what was written; replaced, what differs."""
    params = SamplingParams(**written)
    assert params.explicit_fields == written.keys()
    copies = [params.clone(), copy.copy(params), copy.deepcopy(params)]
    for same in (*copies, pickle.loads(pickle.dumps(params))):
        assert same == params
        assert same.explicit_fields == written.keys()
    replaced = dataclasses.replace(params, top_k=3)
    assert "top_k" in replaced.explicit_fields <= {*written, "top_k"}
    params.min_p = 0.5
    assert params.explicit_fields == {*written, "min_p"}


def test_other_models_names_of_parameters_are_known():
    made = request_params("f", DEFAULT, None, {"max_new_tokens": 9, "stop_at": "x"})
    assert (made.max_tokens, made.stop) == (9, ["x"])
    with pytest.raises(TypeError, match="max_tokens is given twice"):
        request_params("f", DEFAULT, None, {"max_new_tokens": 9, "max_tokens": 9})


def test_a_structure_has_the_room_that_is_left_and_plain_text_the_default(model, llm):
    text = model("the", Regex("[ab]{100}"))
    assert len(text) == 100
    assert len(llm.get_tokenizer().encode(model("the", ignore_eos=True, temperature=0))) <= 17
    checkpoints = SamplingParams(max_tokens=7)  # what a model's generation_config may recommend
    assert request_params("f", checkpoints, None, {}, structured_outputs=DIGITS).max_tokens == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temprature": 1}, TypeError, r"^f\(\) got .* 'temprature': did you mean 'temperature'"),
        ({"sampling_parms": 1}, TypeError, "did you mean 'sampling_params'"),
        ({"output_kind": 1}, TypeError, "unexpected argument 'output_kind'"),
        ({"sampling_params": {"n": 1}}, InvalidRequestError, "must be a quire.SamplingParams"),
        ({"temperature": -1}, InvalidRequestError, "temperature must be"),
        ({"n": 2, "temperature": 0}, InvalidRequestError, "n must be 1 at temperature 0"),
        ({"chat": 1}, InvalidRequestError, "chat must be True or False"),
        ({"allow_incomplete": 1}, InvalidRequestError, "allow_incomplete must be"),
        ({"backend": "none"}, InvalidRequestError, "backend must be one of"),
        ({"backend": ""}, InvalidRequestError, "backend must be one of"),
        ({"detokenize": False}, InvalidRequestError, "detokenize must be True"),
        ({"structured_outputs": 0}, InvalidRequestError, "None beside an output type"),
        (
            {"sampling_params": SamplingParams(structured_outputs=DIGITS)},
            InvalidRequestError,
            "structured_outputs must be None beside an output type",
        ),
        ({"structured_outputs": DIGITS}, InvalidRequestError, "None beside an output type"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(arguments, error, message):
    with pytest.raises(error, match=message):
        read_call("f", DEFAULT, int, arguments)


def test_none_written_out_for_a_constraint_takes_none_away():
    """SamplingParams(structured_outputs=None) is what many write who have no other."""
    given = SamplingParams(structured_outputs=None)
    assert read_call("f", DEFAULT, int, {"sampling_params": given}).params.structured_outputs
    call = read_call("f", DEFAULT, None, {"sampling_params": given, "structured_outputs": DIGITS})
    assert call.params.structured_outputs == DIGITS
