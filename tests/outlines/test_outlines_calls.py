"""A model of quire's, wherever Outlines takes one; what calls ask for and what they return."""

from __future__ import annotations

import json
import pickle
import re
import time
import weakref
from typing import Literal

import pytest

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

import outlines
from outlines.inputs import Chat
from outlines.types import CFG, JsonSchema, Regex

from quire import (
    LLM,
    AsyncLLM,
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
    SamplingParams,
    StructuredOutputsParams,
    StructureIncompleteError,
)
from quire.integrations import engines
from quire.integrations.outlines import from_quire, models

PROMPT = "the quick brown fox"
ABC = Regex("[abc]{3}")
LONG = Regex("[abc]{40,60}")


# -- everywhere in Outlines ----------------------------------------------------------------------


def test_generators_and_the_model_itself_say_the_same(model):
    """All doors of Outlines lead to one request with the same parameters."""
    generator = outlines.Generator(model, ABC)
    expected = model(PROMPT, ABC, seed=7)
    assert re.fullmatch("[abc]{3}", expected)
    assert generator(PROMPT, seed=7) == expected
    assert model.generate(PROMPT, ABC, seed=7) == expected
    assert generator.batch([PROMPT] * 2, seed=7) == [expected] * 2
    assert model.batch([PROMPT] * 2, ABC, seed=7) == [expected] * 2
    assert "".join(generator.stream(PROMPT, seed=7)) == expected
    assert "".join(model.stream(PROMPT, ABC, seed=7)) == expected


def test_templates_and_applications_run(model):
    template = outlines.Template.from_string("the quick {{ animal }}")
    application = outlines.Application(template, Literal["fox", "dog"])
    assert application(model, {"animal": "fox"}, seed=1) in ("fox", "dog")
    assert application(model, {"animal": "cat"}, seed=1, max_tokens=9) in ("fox", "dog")
    assert model(template(animal="fox"), ABC, seed=1) == model("the quick fox", ABC, seed=1)


def test_outlines_takes_it_for_one_of_its_own(model, llm):
    """As upstream's dispatch is by class; a processor is refused by Outlines, as for its own."""
    assert isinstance(model, outlines.models.BlackBoxModel.__args__)
    assert isinstance(
        from_quire(AsyncLLM.from_llm(llm)), outlines.models.AsyncBlackBoxModel.__args__
    )
    assert model.model is model.llm is llm
    assert model.tokenizer is llm.get_tokenizer()
    assert model.type_adapter.format_output_type(ABC) == StructuredOutputsParams(regex="[abc]{3}")
    assert model.type_adapter.format_input("a") == "a"
    with pytest.raises(NotImplementedError, match="logits processors"):
        outlines.Generator(model, processor=lambda ids, logits: logits)


# -- what comes back -----------------------------------------------------------------------------


def test_one_text_is_a_string_and_more_are_lists(model):
    one = model(PROMPT, ABC)
    assert isinstance(one, str)
    several = model(PROMPT, ABC, n=2)
    assert [type(text) for text in several] == [str, str]
    assert [type(text) for text in model.batch([PROMPT, "a"], ABC)] == [str, str]
    nested = model.batch([PROMPT, "a"], ABC, n=2)
    assert [[type(text) for text in texts] for texts in nested] == [[str, str]] * 2
    assert model.batch([], ABC) == []
    assert model([PROMPT, "a"], ABC, seed=3) == model.batch([PROMPT, "a"], ABC, seed=3)


def test_a_batch_is_one_batch_of_the_engine(model, llm):
    before = llm.get_metrics()["num_steps"]
    model.batch([PROMPT] * 16, ABC)
    assert llm.get_metrics()["num_steps"] - before < 16


def test_best_of_several_comes_as_one_text(model):
    text = model(PROMPT, ABC, best_of=3, seed=1)
    assert re.fullmatch("[abc]{3}", text)
    assert list(model.stream(PROMPT, ABC, best_of=3, seed=1)) == [text]
    beams = model(PROMPT, Regex("[abc]{2}\n?"), use_beam_search=True, n=2)
    assert len(beams) == 2


# -- unfinished ----------------------------------------------------------------------------------


def test_a_structure_that_was_cut_off_is_no_answer(model):
    """The error has the text; a batch names the input, and the others' texts are in no result."""
    with pytest.raises(StructureIncompleteError, match=r"max_tokens=4.*allow_incomplete") as caught:
        model(PROMPT, LONG, max_tokens=4)
    assert re.fullmatch("[abc]{1,39}", caught.value.text)
    assert caught.value.output.outputs[0].finish_reason == "length"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.text) == (str(caught.value), caught.value.text)
    with pytest.raises(StructureIncompleteError, match="input 1 of 2: "):
        model.batch([PROMPT, [5] * 240], Regex("[abc]{99}"))
    assert model(PROMPT, LONG, max_tokens=4, seed=1, allow_incomplete=True) in (
        model(PROMPT, LONG, max_tokens=60, seed=1)
    )


def test_a_stream_that_was_cut_off_ends_with_the_error(model):
    pieces = []
    with pytest.raises(StructureIncompleteError) as caught:
        pieces.extend(model.stream(PROMPT, LONG, max_tokens=4))
    assert pieces
    assert caught.value.text == "".join(pieces)
    assert "".join(model.stream(PROMPT, LONG, max_tokens=4, allow_incomplete=True))


def test_a_constraint_in_the_sampling_params_is_a_structure_too(model):
    params = SamplingParams(structured_outputs={"regex": "[abc]{30,}"}, max_tokens=4)
    with pytest.raises(StructureIncompleteError):
        model(PROMPT, sampling_params=params)


def test_plain_text_may_be_cut_anywhere(model):
    assert isinstance(model(PROMPT, max_tokens=3), str)
    assert isinstance(model(PROMPT, None, max_tokens=3), str)


def test_a_stop_string_ends_a_structure_where_the_caller_wants(model):
    text = model(PROMPT, Regex("[abc]{99}"), stop_at="a", seed=2)
    assert re.fullmatch("[bc]*", text)
    kept = model(PROMPT, Regex("[abc]{99}"), stop=["a"], include_stop_str_in_output=True, seed=2)
    assert kept == text + "a"


# -- streams -------------------------------------------------------------------------------------


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def running(llm):
    return llm.get_metrics()["num_unfinished_requests"]


@pytest.mark.parametrize("leave", ["close", "drop", "never read"])
def test_leaving_a_stream_early_aborts_its_request(model, llm, leave):
    stream = model.stream(PROMPT, Regex("[abc]{180,}"))
    if leave != "never read":
        next(stream)
    if leave == "close":
        stream.close()
    del stream
    wait_until(lambda: running(llm) == 0)


def test_a_stream_is_checked_before_it_is_read(model):
    with pytest.raises(TypeError, match="unexpected argument 'tempature'"):
        model.stream(PROMPT, ABC, tempature=1)
    with pytest.raises(InvalidRequestError, match="n must be 1 in a stream"):
        model.stream(PROMPT, ABC, n=2)


# -- inputs --------------------------------------------------------------------------------------


def test_a_text_is_a_prompt_unless_it_is_said_to_be_a_chat(model, llm):
    """By constructor or by call; a Chat always goes by the template."""
    conversation = [{"role": "user", "content": PROMPT}]
    plain, chat = (
        f(x, SamplingParams(seed=5), use_tqdm=False)[0].outputs[0].text
        for f, x in ((llm.generate, PROMPT), (llm.chat, conversation))
    )
    assert plain != chat
    talker = models.VLLM(llm, chat=True)
    assert model(PROMPT, seed=5) == talker(PROMPT, seed=5, chat=False) == plain
    assert model(PROMPT, seed=5, chat=True) == talker(PROMPT, seed=5) == chat
    assert model(Chat(conversation), seed=5) == chat
    assert "".join(model.stream(Chat(conversation), seed=5)) == chat
    assert model.batch([PROMPT, Chat(conversation)], seed=5) == [plain, chat]


def test_a_chat_takes_the_arguments_of_llm_chat(model, llm):
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    [output] = llm.chat(conversation, SamplingParams(seed=5), use_tqdm=False, **options)
    assert model(Chat(conversation), seed=5, **options) == output.outputs[0].text
    with pytest.raises(TypeError, match="continue_final_message needs a chat"):
        model(PROMPT, continue_final_message=True)


def test_messages_of_several_texts_are_one_text(model):
    parts = [{"role": "user", "content": ["one", {"type": "text", "text": "two"}]}]
    whole = [{"role": "user", "content": "one\ntwo"}]
    assert model(Chat(parts), seed=5) == model(Chat(whole), seed=5)


def test_prompts_of_the_engine_are_inputs_too(model, llm):
    ids = llm.get_tokenizer().encode_prompt(PROMPT)
    expected = model(PROMPT, ABC, seed=5)
    assert model(ids, ABC, seed=5) == expected
    assert model({"prompt_token_ids": ids}, ABC, seed=5) == expected
    assert model.batch([ids, PROMPT], ABC, seed=5) == [expected] * 2


@pytest.fixture
def picture():
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed").new("RGB", (1, 1))
    image.format = "PNG"
    return outlines.Image(image)


def test_pictures_and_sounds_are_refused_by_name(model, picture):
    for given in ([PROMPT, picture], picture, Chat([{"role": "user", "content": ["a", picture]}])):
        with pytest.raises(InvalidRequestError, match="Image is not supported"):
            model(given)
    with pytest.raises(InvalidRequestError, match="Audio is not supported"):
        model.batch([[PROMPT, outlines.Audio("a")]])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (5, TypeError, "must be a str, an outlines.inputs.Chat"),
        (None, TypeError, "must be a str"),
        ([{"role": "user", "content": "a"}], TypeError, "messages go into a Chat"),
        (Chat("hello"), TypeError, "messages of a Chat must be a list"),
        (Chat(["hello"]), TypeError, "must be a dict"),
        (Chat([]), InvalidRequestError, "at least one message"),
        (Chat([{"content": "a"}]), InvalidRequestError, "'role'"),
        (Chat([{"role": "user", "content": [5]}]), InvalidRequestError, "must be text"),
        ("", InvalidRequestError, "empty"),
        ([], TypeError, "must be a str"),
    ],
)
def test_what_is_no_input_is_refused(model, given, error, message):
    with pytest.raises(error, match=message):
        model(given, ABC)


def test_a_batch_is_a_list(model):
    with pytest.raises(TypeError, match="a batch must be a list"):
        model.batch(PROMPT, ABC)


# -- the engine's life ---------------------------------------------------------------------------


def test_models_by_one_name_share_an_engine(tiny_llama):
    """It is freed with the last of them, and a closed model says so."""
    options = {"dtype": "float32", "max_model_len": 64}
    one, two = models.vllm(tiny_llama, **options), models.vllm(str(tiny_llama), **options)
    other = models.vllm(tiny_llama, **options, seed=3)
    assert one.llm is two.llm is not other.llm
    reference = weakref.ref(one.llm)
    with one:
        assert re.fullmatch("[abc]{3}", one(PROMPT, ABC))
    assert not two.llm.closed
    for use in (lambda: one(PROMPT), lambda: one.stream(PROMPT), lambda: one.llm, one.__enter__):
        with pytest.raises(EngineClosedError, match="was closed"):
            use()
    assert "closed" in repr(one)
    del two
    assert reference() is None
    other.close()
    other.close()
    assert not any(reference() for reference in engines._ENGINES.values())


def test_an_engine_of_the_callers_is_left_running(tiny_llama):
    with LLM(tiny_llama, dtype="float32", max_model_len=64) as llm:
        model = from_quire(llm)
        assert type(model) is models.VLLM
        model.close()
        assert not llm.closed
        alive = from_quire(llm)
    with pytest.raises(EngineClosedError):
        alive(PROMPT)
    with pytest.raises(EngineClosedError):
        from_quire(llm)
    with pytest.raises(EngineClosedError):
        from_quire(AsyncLLM.from_llm(llm))


def test_what_is_no_engine_is_refused(llm):
    with pytest.raises(TypeError, match=r"must be a quire\.LLM, not 'quire/demo'"):
        from_quire("quire/demo")
    with pytest.raises(TypeError, match="from_quire takes an AsyncLLM"):
        models.VLLM(AsyncLLM.from_llm(llm))
    with pytest.raises(TypeError, match=r"AsyncLLM\.from_llm"):
        models.AsyncVLLM(llm)
    with pytest.raises(TypeError, match="max_model_len"):
        models.vllm("quire/demo", max_model_length=5)
    with pytest.raises(InvalidRequestError, match="chat must be True or False"):
        from_quire(llm, chat="yes")
    with pytest.raises(ConfigError):
        models.vllm("quire/demo", max_model_len=-5)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Regex("("),
        Regex("(?=a)b"),
        CFG("start: nothing"),
        CFG("no grammar at all"),
        JsonSchema({"type": "array", "uniqueItems": True, "minItems": 2}),
        JsonSchema({"$ref": "#/$defs/missing"}),
    ],
    ids=lambda bad: str(bad)[:30],
)
def test_a_bad_constraint_fails_alone(model, bad):
    """A stream that runs beside it ends as it does without."""
    expected = model(PROMPT, LONG, seed=4)
    stream = model.stream(PROMPT, LONG, seed=4)
    pieces = [next(stream)]
    with pytest.raises((RequestFailedError, InvalidRequestError)):
        model(PROMPT, bad)
    with pytest.raises((RequestFailedError, InvalidRequestError)):
        list(model.stream(PROMPT, bad))
    assert "".join([*pieces, *stream]) == expected


def test_a_recursive_schema_is_generated(model):
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
        "$ref": "#/$defs/node",
    }
    value = json.loads(model(PROMPT, JsonSchema(tree), temperature=0.5, seed=1))
    while value["next"] is not None:
        value = value["next"]
    assert value.keys() == {"next"}
