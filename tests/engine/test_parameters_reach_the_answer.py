"""Every sampling parameter, from `LLM.generate` to the text: none is lost on the way."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from quire import LLM, SamplingParams

PROMPT = [11, 42, 7, 99, 150, 31]
EOS = (2, 60)
TEXT = "a fox é東😀 says STOP to 😀"


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """A model with two end tokens and recommended parameters in its generation_config.json."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("two-ends") / "model")
    recommended = {"eos_token_id": list(EOS), "temperature": 0.25, "max_new_tokens": 3, "top_k": 7}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, dtype="float32") as llm:
        yield llm


def test_recommended_parameters_can_be_replaced(folder):
    """Those that are named; with generation_config="vllm" they stand alone."""
    fields = {"temperature": 0.5, "max_new_tokens": 4}
    for source, top_k in (("auto", 7), ("vllm", 0)):
        with LLM(
            folder, dtype="float32", generation_config=source, override_generation_config=fields
        ) as llm:
            params = llm.get_default_sampling_params()
            assert (params.temperature, params.max_tokens) == (0.5, 4)
            assert params.top_k in (top_k, -1 if top_k == 0 else top_k)
            [output] = llm.generate([PROMPT], use_tqdm=False)
            assert len(output.outputs[0].token_ids) <= 4


def one(llm, prompt=PROMPT, **options):
    options.setdefault("temperature", 0)
    [output] = llm.generate([prompt], SamplingParams(**options), use_tqdm=False)
    [completion] = output.outputs
    return completion


def ids(llm, **options):
    return list(one(llm, **options).token_ids)


def say(llm, text):
    """Options that make a model say a text, whatever it would say itself."""
    script = llm.get_tokenizer().encode(text, add_special_tokens=False)

    def force(token_ids, logits):
        wanted = logits[script[len(token_ids)]].item()
        logits.fill_(-math.inf)
        logits[script[len(token_ids)]] = wanted
        return logits

    return {"logits_processors": [force], "max_tokens": len(script), "ignore_eos": True}


def test_stop_strings_end_the_text_and_are_named(llm):
    """Over token borders; left out or kept; not before min_tokens."""
    script = say(llm, TEXT)
    whole = one(llm, **script)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (TEXT, "length", None)
    ended = one(llm, **script, stop=["never", "ys ST"])
    assert ended.text == TEXT[: TEXT.index("ys ST")]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", "ys ST")
    assert len(ended.token_ids) < len(whole.token_ids)
    kept = one(llm, **script, stop="ys ST", include_stop_str_in_output=True)
    assert kept.text == ended.text + "ys ST"
    late = one(llm, **script, stop="😀", min_tokens=len(ended.token_ids))
    assert late.text == TEXT[: TEXT.rindex("😀")]


@pytest.mark.parametrize("stop", [None, ["STOP to"], ["fox é東😁"]])
def test_a_stream_shows_neither_half_characters_nor_parts_of_stop_strings(llm, stop):
    """What has been shown is always a beginning of the text that generate gives."""
    script = say(llm, TEXT)
    final = one(llm, **script, stop=stop)
    shown = ""
    for output in llm.stream(PROMPT, SamplingParams(temperature=0, **script, stop=stop)):
        shown += output.outputs[0].text
        assert "\ufffd" not in shown
        assert final.text.startswith(shown)
    assert shown == final.text
    assert output.outputs[0].stop_reason == final.stop_reason


@pytest.mark.parametrize("eos", EOS)
def test_any_end_token_of_the_generation_config_ends_the_text(llm, eos):
    """And none does with ignore_eos; min_tokens forbids all of them for so long."""
    wish = {"logit_bias": {eos: 1000.0}, "max_tokens": 6}
    ended = one(llm, **wish)
    assert (list(ended.token_ids), ended.finish_reason, ended.stop_reason) == ([eos], "stop", None)
    assert ids(llm, **wish, ignore_eos=True) == [eos] * 6
    late = ids(llm, **wish, min_tokens=3)
    assert len(late) == 4
    assert not set(EOS) & set(late[:3])
    assert late[3] == eos


def test_stop_token_ids_end_the_text_and_are_named(llm):
    ended = one(llm, logit_bias={70: 1000.0}, stop_token_ids=[5, 70], max_tokens=9)
    assert (list(ended.token_ids), ended.finish_reason) == ([70], "stop")
    assert ended.stop_reason == 70


def test_what_may_be_said_is_all_that_is_said(llm):
    """allowed_token_ids, logit_bias of -inf, and bad_words."""
    free = {"max_tokens": 12, "ignore_eos": True}
    assert set(ids(llm, **free, allowed_token_ids=[70, 71])) <= {70, 71}
    banned = set(ids(llm, **free))
    assert not banned & set(ids(llm, **free, logit_bias=dict.fromkeys(banned, -math.inf)))
    tokenizer = llm.get_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    wish = {"allowed_token_ids": letters, "logit_bias": {letters[0]: 1000.0}}
    assert one(llm, **free, **wish).text == "x" * 12
    assert "x" not in one(llm, **free, **wish, bad_words=["x"]).text
    assert "xx" not in one(llm, **free, **wish, bad_words=["xx"]).text


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ({}, [7, 7, 7, 7]),
        ({"presence_penalty": 1.5}, [7, 8, 7, 7]),
        ({"frequency_penalty": 0.75}, [7, 7, 8, 7]),
        ({"repetition_penalty": 3.0}, [8, 7, 7, 7]),  # 7 is in the prompt
    ],
)
def test_penalties_reach_the_choice(llm, penalty, expected):
    """Two candidates a unit apart, 7 ahead of 8, until a penalty turns them round."""

    def two(token_ids, logits):
        logits.fill_(-math.inf)
        logits[7], logits[8] = -1.0, -2.0
        return logits

    options = {"logits_processors": [two], "max_tokens": 4, "ignore_eos": True}
    assert ids(llm, **options, **penalty) == expected


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-9}], ids=str
)
def test_each_narrowing_of_the_draw_leads_to_the_best_token(llm, narrow):
    """At its narrowest, a seeded draw at a high temperature is the greedy choice."""
    free = {"max_tokens": 12, "ignore_eos": True}
    drawn = {"temperature": 2.0, "seed": 5}
    assert ids(llm, **free, **drawn) != ids(llm, **free)
    assert ids(llm, **free, **{**drawn, **narrow}) == ids(llm, **free)


def test_a_truncated_prompt_is_its_end(llm):
    params = SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=4, ignore_eos=True)
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert output.prompt_token_ids == PROMPT[-4:]
    assert list(output.outputs[0].token_ids) == ids(
        llm, prompt=PROMPT[-4:], max_tokens=5, ignore_eos=True
    )


def test_text_is_made_as_it_was_asked_for(llm):
    """Without detokenize there is none; special tokens show on demand."""
    free = {"max_tokens": 3, "ignore_eos": True}
    assert one(llm, **free, detokenize=False).text == ""
    special = {**free, "allowed_token_ids": [3]}
    assert one(llm, **special).text == ""
    assert one(llm, **special, skip_special_tokens=False).text == "<|user|>" * 3


def test_recommended_parameters_are_taken_where_they_are_wanted(folder, llm, tmp_path):
    """generation_config: "auto" is the model's own file, "vllm" none, a folder another's.

    The end tokens stay the model's, unless the other folder has some of its own.
    """
    expected = SamplingParams(temperature=0.25, max_tokens=3, top_k=7)
    assert llm.get_default_sampling_params() == expected
    assert len(llm.generate([PROMPT], use_tqdm=False)[0].outputs[0].token_ids) <= 3
    with LLM(folder, dtype="float32", generation_config="vllm") as plain:
        assert plain.get_default_sampling_params() == SamplingParams()
        assert ids(plain, logit_bias={EOS[1]: 1000.0}, max_tokens=6) == [EOS[1]]
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    with LLM(folder, dtype="float32", generation_config=str(tmp_path)) as other:
        assert other.get_default_sampling_params() == SamplingParams(top_p=0.5)
        assert ids(other, logit_bias={EOS[1]: 1000.0}, max_tokens=6) == [EOS[1]]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [61]}')
    with LLM(folder, dtype="float32", generation_config=str(tmp_path)) as other:
        assert ids(other, logit_bias={61: 1000.0}, max_tokens=6) == [61]


def test_a_reset_prefix_cache_is_empty(llm):
    """A prompt that was cached is computed again, and gives the same."""
    prompt = {"prompt_token_ids": list(range(100, 150))}
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def run():
        [output] = llm.generate([prompt], params, use_tqdm=False)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    _, answer = run()
    assert run() == (48, answer)
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True, seed=1))
    next(stream)
    assert llm.reset_prefix_cache() is True
    assert run() == (0, answer)
    assert len(list(stream)) >= 1  # what ran meanwhile kept its blocks
    llm.engine_loop.call(lambda engine: engine.check_integrity())
