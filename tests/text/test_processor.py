"""Requests: what is refused, what is filled in, and that nothing of the caller's is changed."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.processor import ModelLimits, Processor
from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams

LIMITS = ModelLimits(
    vocab_size=700,
    max_model_len=64,
    max_cache_tokens=4096,
    eos_token_ids=(0,),
    default_params={},
)


def make(tokenizer, *, seed=0, **limits):
    return Processor(tokenizer, replace(LIMITS, **limits), seed=seed)


@pytest.fixture
def processor(loaded):
    return make(loaded["llama3"])


def process(processor, prompt, **params):
    return processor.process(prompt, SamplingParams(**params), request_id="r")


class TestPrompts:
    def test_every_form_of_a_prompt_gives_the_same_tokens(self, processor):
        ids = processor.tokenizer.encode("The capital")
        for prompt in (
            "The capital",
            {"prompt": "The capital"},
            ids,
            tuple(ids),
            {"prompt_token_ids": ids},
            np.array(ids),
            {"prompt": "The capital", "prompt_token_ids": ids, "cache_salt": "s"},
        ):
            request = process(processor, prompt)
            assert request.prompt_token_ids == ids
            assert all(type(id_) is int for id_ in request.prompt_token_ids)
        assert request.prompt == "The capital"
        assert request.cache_salt == "s"
        assert process(processor, ids).prompt is None

    def test_the_caller_s_list_is_not_shared(self, processor):
        ids = [1, 2, 3]
        request = process(processor, ids)
        request.prompt_token_ids.append(4)
        assert ids == [1, 2, 3]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "prompt is empty"),
            ([], "prompt is empty"),
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt_token_ids": []}, "prompt is empty"),
            ({}, "needs 'prompt'"),
            ({"prompt": None}, "needs 'prompt'"),
            ({"cache_salt": "x"}, "needs 'prompt'"),
            ({"promt": "x"}, "unknown key 'promt': did you mean 'prompt'"),
            ({"prompt": "x", "multi_modal_data": {}}, "unknown key 'multi_modal_data'"),
            ({"prompt": 3}, "'prompt' must be a str, got int"),
            ({"prompt": "x", "cache_salt": ""}, "'cache_salt'"),
            (None, "prompt is None"),
            (3, "got int"),
            (b"bytes", "got bytes"),
            ({"prompt_token_ids": "12"}, "got str"),
            ([1, 2.0], "integers, got 2.0 at position 1"),
            ([True], "integers, got True at position 0"),
            (["a"], "integers, got 'a'"),
            ([[1]], "integers"),
            ([5, 700], "token id 700 at position 1 .* 700 tokens"),
            ([5, 6, -1], "token id -1 at position 2"),
            (np.array([1.5]), "integers"),
            ("lone \ud800", "surrogate"),
        ],
    )
    def test_what_cannot_be_a_prompt_is_refused(self, prompt, message, processor):
        with pytest.raises(InvalidRequestError, match=message):
            process(processor, prompt)

    def test_text_needs_a_tokenizer_and_token_ids_do_not(self):
        processor = make(None)
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            process(processor, "x")
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            processor.render_chat([{"role": "user", "content": "x"}])
        assert process(processor, [1, 2]).prompt_token_ids == [1, 2]

    def test_a_text_with_tokens_that_the_model_lacks_is_refused(self, loaded):
        processor = make(loaded["llama3"], vocab_size=100)
        with pytest.raises(InvalidRequestError, match=r"at position .* has 100 tokens"):
            process(processor, "The capital")

    def test_a_bos_that_is_written_out_is_not_doubled(self, processor):
        """Neither is one of two that are written out taken away, nor one that is wanted added."""
        bos = processor.tokenizer.bos_token_id
        written = processor.tokenizer.bos_token
        ids = processor.tokenizer.encode("The", add_special_tokens=False)
        assert process(processor, "The").prompt_token_ids == [bos, *ids]
        assert process(processor, written + "The").prompt_token_ids == [bos, *ids]
        request = processor.process("The", None, request_id="r", add_special_tokens=False)
        assert request.prompt_token_ids == ids

    @pytest.mark.parametrize("kind", ["llama3", "llama2", "spm_llama", "opt_files"])
    def test_a_chat_written_out_as_text_is_the_same_prompt(self, kind, loaded, loaded_spm):
        """Whatever kind of tokenizer puts a BOS before a text: a template's own is not doubled."""
        tokenizer = {**loaded, **loaded_spm}[kind]
        processor = make(tokenizer, vocab_size=len(tokenizer))
        template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        messages = [{"role": "user", "content": "The capital"}]
        chat = processor.render_chat(messages, chat_template=template)
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert text == tokenizer.bos_token + "The capital"
        assert process(processor, text).prompt_token_ids == chat
        assert chat.count(tokenizer.bos_token_id) == 1
        assert process(processor, "The capital").prompt_token_ids[0] == tokenizer.bos_token_id

    @pytest.mark.parametrize("extra", [5, {5: 1}, {"tokenize": False}, {"messages": []}])
    def test_variables_of_a_chat_template_are_checked(self, processor, extra):
        """What is no dict of names, or takes an argument's place, is an error that says so."""
        messages = [{"role": "user", "content": "Hi"}]
        with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
            processor.render_chat(messages, chat_template_kwargs=extra)

    def test_a_chat_has_the_bos_of_its_template_alone(self, processor):
        ids = processor.render_chat([{"role": "user", "content": "Hi"}])
        bos = processor.tokenizer.bos_token_id
        assert ids[0] == bos
        assert ids.count(bos) == 1
        assert process(processor, ids).prompt_token_ids == ids

    def test_a_chat_passes_its_options_on(self, processor):
        def text(**options):
            messages = [{"role": "user", "content": "Hi"}]
            return processor.tokenizer.decode(processor.render_chat(messages, **options))

        assert text().endswith("assistant\n")
        assert not text(add_generation_prompt=False).endswith("assistant\n")
        template = "{{ tools | length }}{{ extra }}"
        options = {"chat_template": template, "tools": [{}], "chat_template_kwargs": {"extra": 7}}
        assert text(**options) == "17"
        with pytest.raises(InvalidRequestError, match="empty prompt"):
            text(chat_template="{# nothing #}")


class TestLengths:
    @given(
        length=st.integers(1, 80),
        max_tokens=st.one_of(st.none(), st.integers(1, 100)),
        truncate=st.one_of(st.none(), st.just(-1), st.integers(1, 100)),
    )
    def test_prompt_and_output_fit_the_model(self, length, max_tokens, truncate):
        """Or the request is refused: the prompt leaves room, and max_tokens is what fits."""
        processor = make(None)
        ids = list(range(length))
        kept = ids if truncate is None else ids[-truncate:] if truncate > 0 else None
        try:
            request = process(
                processor, ids, max_tokens=max_tokens, truncate_prompt_tokens=truncate
            )
        except InvalidRequestError:
            assert kept is not None
            assert len(kept) >= 64
            return
        prompt = request.prompt_token_ids
        assert prompt == ids[-len(prompt) :]
        room = 64 - len(prompt)
        assert room >= 1
        assert request.params.max_tokens == min(max_tokens or room, room)
        if kept is not None:
            assert prompt == kept
        elif length > 64:
            assert room == min(max_tokens or 1, 63)

    def test_a_prompt_too_long_is_refused_with_the_numbers(self, processor):
        with pytest.raises(InvalidRequestError, match=r"64 tokens.*max_model_len is 64"):
            process(processor, [1] * 64)
        assert process(processor, [1] * 63, max_tokens=None).params.max_tokens == 1

    def test_a_prompt_longer_than_the_cache_is_refused_with_the_numbers(self):
        processor = make(None, max_cache_tokens=32)
        with pytest.raises(InvalidRequestError, match=r"33 tokens.*KV cache holds 32"):
            process(processor, [1] * 33)
        assert process(processor, [1] * 32, max_tokens=None).params.max_tokens == 1

    def test_min_tokens_never_exceeds_what_fits(self, processor):
        params = process(processor, [1] * 60, max_tokens=30, min_tokens=20).params
        assert (params.max_tokens, params.min_tokens) == (4, 4)
        params.clone()  # stays valid


class TestParams:
    def test_the_caller_s_parameters_are_never_changed(self, processor):
        params = SamplingParams(max_tokens=None, stop="x", bad_words=["bad"], logit_bias={1: 1.0})
        before = repr(params)
        request = processor.process([1, 2], params, request_id="r")
        request.params.stop.append("y")
        request.params.logit_bias[2] = 3.0
        assert repr(params) == before

    @pytest.mark.parametrize(
        "params",
        [
            {"logit_bias": {700: 1.0}},
            {"allowed_token_ids": [3, 700]},
            {"stop_token_ids": [700]},
        ],
    )
    def test_token_ids_out_of_the_vocabulary_are_refused(self, params, processor):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(params))}.*700"):
            process(processor, [1], **params)

    def test_what_looks_at_text_needs_a_tokenizer(self, loaded):
        for name in ("stop", "bad_words"):
            with pytest.raises(InvalidRequestError, match=f"{name} must be empty"):
                process(make(None), [1], **{name: ["x"]})
        params = SamplingParams(stop="x")
        params.detokenize = False
        with pytest.raises(InvalidRequestError, match="stop must be empty with detokenize=False"):
            make(loaded["gpt2"]).process([1], params, request_id="r")

    def test_other_types_are_refused(self, processor):
        with pytest.raises(InvalidRequestError, match="must be a SamplingParams, got dict"):
            processor.process([1], {"n": 1}, request_id="r")

    @pytest.mark.parametrize("kind", ["gpt2", "llama2", "llama3", "spm_llama"])
    def test_bad_words_are_spelled_with_and_without_a_space(self, kind, loaded, loaded_spm):
        tokenizer = {**loaded, **loaded_spm}[kind]
        request = process(make(tokenizer), [5], bad_words=["capital", " of"])
        start = tokenizer.encode("x", add_special_tokens=False)
        texts = [tokenizer.decode(start + ids) for ids in request.bad_words_ids]
        assert texts == ["xcapital", "x capital", "xof", "x of"]

    def test_priority_and_adapter_are_passed_on(self, processor):
        request = processor.process([1], None, request_id="a", priority=3, lora_request="adapter")
        assert (request.request_id, request.priority) == ("a", 3)
        assert request.lora_request == "adapter"


class TestDefaults:
    def test_they_are_those_of_the_generation_config(self, loaded):
        config = {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_new_tokens": 12,
            "do_sample": True,
            "eos_token_id": [1, 2],
            "top_h": 0.3,
        }
        processor = make(loaded["gpt2"], default_params=config)
        params = processor.default_sampling_params()
        expected = SamplingParams(
            temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=12
        )
        assert params == expected
        assert processor.process([1], None, request_id="r").params == expected
        # Given parameters are complete in themselves.
        assert process(processor, [1]).params.temperature == 1.0

    def test_without_one_they_are_the_field_s(self, processor):
        assert processor.default_sampling_params() == SamplingParams()
        nulls = make(None, default_params={"temperature": None, "top_k": None})
        assert nulls.default_sampling_params() == SamplingParams()

    def test_a_wrong_one_is_named(self):
        processor = make(None, default_params={"temperature": -1})
        with pytest.raises(InvalidRequestError, match=r"generation_config\.json: temperature"):
            processor.default_sampling_params()


class TestSeeds:
    def seeds(self, seed, count=8):
        processor = make(None, seed=seed)
        return [process(processor, [1]).seed for _ in range(count)]

    def test_equal_prompts_draw_differently_and_a_run_repeats(self):
        assert len(set(self.seeds(0))) == 8
        assert self.seeds(0) == self.seeds(0)
        assert not set(self.seeds(0)) & set(self.seeds(1))

    def test_a_seed_that_is_given_is_taken(self, processor):
        assert process(processor, [1], seed=7).seed == 7
        assert process(processor, [1], seed=0).seed == 0

    def test_a_refused_request_leaves_the_others_draws_alone(self):
        processor = make(None)
        with pytest.raises(InvalidRequestError):
            process(processor, [])
        assert process(processor, [1]).seed == self.seeds(0)[0]

    def test_threads_get_each_seed_once(self):
        processor = make(None)
        found = []

        def work():
            for _ in range(50):
                found.append(process(processor, [1]).seed)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == sorted(self.seeds(0, 200))
