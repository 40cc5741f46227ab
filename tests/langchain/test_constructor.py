"""What VLLM is made with: as the community class takes it, and nothing it does not know."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models.llms import BaseLLM

from quire.errors import ConfigError, EngineClosedError, InvalidRequestError, NotSupportedError
from quire.integrations.langchain import VLLM
from quire.integrations.langchain.engine_model import EngineModel
from quire.sampling_params import SamplingParams


def community_class() -> Any:
    """Return the class that users come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vllm = pytest.importorskip("langchain_community.llms.vllm")
    return vllm.VLLM


def run_python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fields_and_defaults_are_those_of_the_community_class(fake: Any) -> None:
    """Code that reads or sets a field of the old class finds it, with the same default."""
    ours = VLLM(model="m")
    theirs = community_class().model_fields
    assert set(theirs) <= set(VLLM.model_fields)
    for name in set(theirs) - {"model", "client", "verbose", "metadata"}:
        assert getattr(ours, name) == theirs[name].get_default(call_default_factory=True), name


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tensor_parallel_size": st.sampled_from([1, None]),
            "trust_remote_code": st.sampled_from([True, False, None]),
            "n": st.integers(1, 3),
            "best_of": st.sampled_from([None, 3, 4]),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "temperature": st.floats(0.1, 2),
            "top_p": st.floats(0.1, 1),
            "top_k": st.sampled_from([-1, 0, 1, 50]),
            "stop": st.sampled_from([None, [], ["a"], ["a", "b"]]),
            "ignore_eos": st.booleans(),
            "max_new_tokens": st.integers(1, 4096),
            "logprobs": st.sampled_from([None, 0, 5]),
            "dtype": st.sampled_from(["auto", "half", "float16", "bfloat16", "float", "float32"]),
            "download_dir": st.sampled_from([None, "models"]),
            "vllm_kwargs": st.sampled_from([{}, {"max_model_len": 64, "enforce_eager": True}]),
            "callbacks": st.sampled_from([None, []]),
            "tags": st.sampled_from([None, ["a"]]),
        },
    )
)
def test_takes_every_call_of_the_community_constructor(fake: Any, kwargs: dict[str, Any]) -> None:
    """Whatever the old class was made with, this one is, and its fields have those values."""
    theirs = community_class().model_construct(model="m", **kwargs)
    ours = VLLM(model="m", **kwargs)
    assert {name: getattr(ours, name) for name in kwargs} == {
        name: getattr(theirs, name) for name in kwargs
    }
    assert isinstance(ours, BaseLLM)
    assert ours._llm_type == "vllm"


def test_has_every_sampling_parameter(fake: Any) -> None:
    """All of SamplingParams but what the adapter decides itself can be set, and reaches it."""
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    own = set(fields) - {"max_tokens", "output_kind"} | {"max_new_tokens"}
    assert own <= set(VLLM.model_fields)
    assert own | {"lora_request"} == VLLM.CALL_ARGUMENTS
    params = VLLM(model="m")._sampling_params(None)
    different = {"max_tokens": 512, "top_k": -1}
    for name, field in fields.items():
        if name not in {"output_kind", "stop", "stop_token_ids", "bad_words"}:
            assert getattr(params, name) == different.get(name, field.default), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temprature": 0.0}, "did you mean 'temperature'"),
        ({"frequence_penalty": 1.0}, "did you mean 'frequency_penalty'"),
        ({"max_model_len": 128}, r"vllm_kwargs=\{'max_model_len': 128\}"),
        ({"output_kind": 1}, "unexpected argument 'output_kind'"),
        ({"vllm_kwargs": {"max_modl_len": 128}}, "did you mean 'max_model_len'"),
        ({"vllm_kwargs": {"dtype": "half"}}, "vllm_kwargs has 'dtype'"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "two names of one argument"),
    ],
)
def test_refuses_unknown_and_doubled_arguments(
    fake: Any, kwargs: dict[str, Any], message: str
) -> None:
    """No argument is dropped in silence, and no engine is made for a call that is wrong."""
    with pytest.raises(TypeError, match=message):
        VLLM(model="m", **kwargs)
    assert fake.num_made() == 0


def test_an_argument_in_the_wrong_place_tells_no_secret(fake: Any) -> None:
    """The message says where the hub token belongs, and not what it is."""
    with pytest.raises(TypeError, match=r"vllm_kwargs=\{'hf_token': '\*\*\*'\}") as caught:
        VLLM(model="m", hf_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"stop": [""]},
        {"max_new_tokens": 0},
        {"use_beam_search": True},
        {"best_of": 1, "n": 2},
    ],
)
def test_refuses_bad_values_before_a_model_is_loaded(fake: Any, kwargs: dict[str, Any]) -> None:
    """A wrong sampling parameter is told at once, by the field's name."""
    with pytest.raises(InvalidRequestError, match=r"n|temperature|top_p|stop|max_tokens|best_of"):
        VLLM(model="m", **kwargs)
    assert fake.num_made() == 0


@pytest.mark.parametrize("name", ["n", "seed", "temperature", "max_new_tokens", "top_k"])
def test_true_is_no_number(fake: Any, name: str) -> None:
    """A switch set where a number belongs is a slip; it is not taken for 1."""
    with pytest.raises(ValueError, match=rf"{name}\n.*must be a number, not True"):
        VLLM(model="m", **{name: True})
    assert fake.num_made() == 0


def test_refuses_what_is_not_offered(fake: Any) -> None:
    """Features of later versions are refused, not passed over."""
    with pytest.raises(NotSupportedError, match="fully_sharded_loras"):
        VLLM(model="m", vllm_kwargs={"fully_sharded_loras": True})
    with pytest.raises(ConfigError, match="model is empty"):
        VLLM()


def test_max_tokens_is_max_new_tokens(fake: Any) -> None:
    """The name that SamplingParams has works beside the community's, None included."""
    assert VLLM(model="m", max_tokens=3).max_new_tokens == 3
    assert VLLM(model="m", max_tokens=3, max_new_tokens=3).max_new_tokens == 3
    llm = VLLM(model="m", max_tokens=None)
    llm.invoke("p")
    llm.invoke("p", max_tokens=7)
    llm.invoke("p", max_new_tokens=8)
    assert [call.params.max_tokens for call in fake.calls] == [None, 7, 8]


def test_a_path_is_a_model(fake: Any, checkpoint: Path) -> None:
    """``model`` may be a Path."""
    assert VLLM(model=checkpoint).model == str(checkpoint)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000, "a\0b"])
@pytest.mark.parametrize("argument", ["model", "tokenizer", "generation_config"])
def test_a_name_that_is_no_path_is_not_looked_for_as_one(
    fake: Any, argument: str, name: str
) -> None:
    """What the system cannot even look up is no folder: the engine says what it is then."""
    model, arguments = (name, {}) if argument == "model" else ("m", {argument: name})
    llm = VLLM(model=model, vllm_kwargs=arguments)
    assert llm.client.config.to_kwargs()[argument] == name


def test_a_model_without_its_engine_says_how_it_came_about(fake: Any) -> None:
    """Pydantic's ``model_construct`` leaves the constructor out, and so the engine."""
    llm = VLLM.model_construct(model="m")
    with pytest.raises(EngineClosedError, match=r"model_construct.* make it by VLLM\(\.\.\.\)"):
        llm.invoke("p")


def test_engine_fields_do_not_change(fake: Any) -> None:
    """A model object cannot come to name another model than it runs."""
    llm = VLLM(model="m")
    for name in ("model", "dtype", "vllm_kwargs", "client"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(llm, name, "other")
    llm.temperature = 0.5
    llm.invoke("p")
    assert fake.calls[-1].params.temperature == 0.5


def test_repr_shows_what_was_set_and_no_secret(fake: Any) -> None:
    """The text of a model is its constructor call, without the hub token."""
    llm = VLLM(model="m", temperature=0.0, vllm_kwargs={"hf_token": "hf_secret"})
    assert repr(llm) == "VLLM(model='m', vllm_kwargs={'hf_token': '***'}, temperature=0.0)"
    assert "secret" not in str(llm)
    assert repr(VLLM(model="m")) == "VLLM(model='m')"
    llm.close()
    assert "closed=True" in repr(llm)
    assert "'model': 'm'" in str(llm)


def test_names_that_are_not_there_say_what_there_is() -> None:
    """A name that is not here is an error that lists those that are."""
    with pytest.raises(ImportError, match="it has VLLM"):
        from quire.integrations.langchain import VLLMRemote  # noqa: F401
    import quire.integrations.langchain as module

    with pytest.raises(AttributeError, match="no 'anything'"):
        _ = module.anything
    assert "VLLM" in dir(module)


def test_the_docstring_says_that_prompts_go_as_written() -> None:
    """And where chat templates are applied; every field is described there."""
    text = " ".join((VLLM.__doc__ or "").split())
    assert "A prompt goes to the model as it is written, also to an instruct model" in text
    assert "ChatVLLM" in text
    assert not {name for name in EngineModel.model_fields if name not in text}


def test_import_brings_no_torch() -> None:
    """The adapter costs what LangChain costs until an engine is made."""
    run_python(
        """
        import sys
        import langchain_core.language_models.llms
        before = set(sys.modules)
        from quire.integrations.langchain import VLLM
        try:
            VLLM(model="m", temprature=1)
        except TypeError:
            pass
        try:
            VLLM(model="m", temperature=-1)
        except ValueError:
            pass
        new = set(sys.modules) - before
        assert not {"torch", "transformers", "tokenizers"} & new, new
        """
    )


def test_missing_langchain_says_what_to_install() -> None:
    """Without langchain-core the error names the extra that brings it."""
    out = run_python(
        """
        import sys
        sys.modules["langchain_core"] = None
        import quire.integrations.langchain
        try:
            from quire.integrations.langchain import VLLM
        except ImportError as error:
            print(error)
        """
    )
    assert "pip install 'quire[langchain]'" in out
