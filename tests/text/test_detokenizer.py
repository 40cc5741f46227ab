"""Streaming text: exact, never half a character, never taken back."""

from __future__ import annotations

import codecs
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sampling_params import SamplingParams
from quire.tokenizer.detokenizer import Detokenizer
from quire.tokenizer.pieces import byte_level_bytes

BYTE_LEVEL = ["gpt2", "llama3", "qwen2"]
PIECES = ["llama2", "unigram", "wordpiece", "words", "spm_llama", "spm_unigram", "spm_plain"]
WINDOW = ["unigram_cleaned", "suffixed"]
EVERY = BYTE_LEVEL + PIECES + WINDOW

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["The capital", " of France.", " don't ,", "東京へ行", "👨‍👩‍👧", "\n\n", "  "]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="session")
def tokenizers(loaded, loaded_spm):
    return {**loaded, **loaded_spm}


def stream(tokenizer, ids, prompt=(), **params):
    """Return the text shown after each token, and at the end; check that nothing is taken back."""
    params = SamplingParams(**params)
    detokenizer = Detokenizer(tokenizer, params, list(prompt))
    taker = Detokenizer(tokenizer, params, list(prompt))
    shown, taken = [], ""
    for id_ in ids:
        detokenizer.append([id_])
        taker.append([id_])
        shown.append(detokenizer.text(finished=False))
        taken += taker.take(finished=False)
        assert taken == shown[-1]
    final = detokenizer.text(finished=True)
    assert taken + taker.take(finished=True) == final
    assert taker.take(finished=True) == ""
    for earlier, later in pairwise([*shown, final]):
        assert later.startswith(earlier)
    return shown, final


def draw_ids(data, tokenizer, max_size=24):
    ids = st.integers(0, len(tokenizer) - 1)
    return data.draw(st.lists(ids, max_size=max_size))


@pytest.mark.parametrize("kind", EVERY)
class TestExactness:
    @given(data=st.data())
    def test_any_ids_end_as_the_tokenizer_decodes_them(self, kind, data, tokenizers):
        """Without a prompt, whatever the ids are: random ones are mostly invalid UTF-8."""
        tokenizer = tokenizers[kind]
        ids = draw_ids(data, tokenizer)
        for skip in (True, False):
            _, final = stream(tokenizer, ids, skip_special_tokens=skip)
            assert final == tokenizer.decode(ids, skip)

    @given(text=TEXTS, data=st.data())
    def test_a_text_cut_anywhere_goes_on_where_the_prompt_ends(self, kind, text, data, tokenizers):
        """Prompt and completion, decoded together, are the prompt's text and the completion's.

        Cut between characters, that is; a sentencepiece completion keeps its leading space.
        """
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode(text)
        cut = data.draw(st.integers(0, len(ids)))
        before = tokenizer.decode(ids[:cut], True)
        whole = tokenizer.decode(ids, True)
        if before.endswith("\ufffd") or not whole.startswith(before):
            return  # within a character, or where a clean-up joins the two
        _, final = stream(tokenizer, ids[cut:], ids[:cut])
        assert before + final == whole

    @given(text=TEXTS)
    def test_the_text_of_valid_ids_shows_no_replacement_character(self, kind, text, tokenizers):
        if "\ufffd" in text:
            return
        tokenizer = tokenizers[kind]
        shown, final = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        assert not any("\ufffd" in part for part in [*shown, final])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
class TestByteLevel:
    @given(data=st.data())
    def test_what_is_shown_is_every_complete_character_at_once(self, kind, data, tokenizers):
        """The oracle is Python's incremental UTF-8 decoder over the tokens' bytes."""
        tokenizer = tokenizers[kind]
        ids = draw_ids(data, tokenizer)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        expected, so_far = [], ""
        for token in tokenizer.convert_ids_to_tokens(ids):
            so_far += decoder.decode(byte_level_bytes(token))
            expected.append(so_far)
        shown, _ = stream(tokenizer, ids, skip_special_tokens=False)
        assert shown == expected

    @given(data=st.data())
    def test_a_prompt_that_ends_within_a_character_is_gone_on_with(self, kind, data, tokenizers):
        """The text is the characters of the whole that end behind the prompt."""
        tokenizer = tokenizers[kind]
        prompt, ids = draw_ids(data, tokenizer, 6), draw_ids(data, tokenizer, 6)
        _, final = stream(tokenizer, ids, prompt, skip_special_tokens=False)
        bytes_of = lambda row: b"".join(  # noqa: E731
            map(byte_level_bytes, tokenizer.convert_ids_to_tokens(row))
        )
        border = len(bytes_of(prompt))
        characters, position, data_left = [], 0, bytes_of(prompt + ids)
        while data_left:
            text = data_left.decode("utf-8", "replace")[0]
            size = _first_size(data_left)
            position += size
            data_left = data_left[size:]
            if position > border:
                characters.append(text)
        assert final == "".join(characters)


def _first_size(data: bytes) -> int:
    """Length of the first character, or of the first invalid stretch that U+FFFD replaces."""
    try:
        return len(data.decode()[0].encode())
    except UnicodeDecodeError as error:
        if error.start:
            return len(data[: error.start].decode()[0].encode())
        return error.end


@pytest.mark.parametrize("cut", [0, 1])
def test_half_a_surrogate_is_two_invalid_bytes(cut, tokenizers):
    """UTF-8 has no surrogates, though an incremental decoder waits for their third byte."""
    tokenizer = tokenizers["gpt2"]
    alphabet = {byte_level_bytes(token): id_ for token, id_ in tokenizer.get_vocab().items()}
    ids = [alphabet[bytes([byte])] for byte in b"\xed\xa1"]
    assert stream(tokenizer, ids[cut:], ids[:cut])[1] == "\ufffd" * (2 - cut)


class TestBytesOfSentencepiece:
    def test_a_character_in_bytes_appears_when_it_is_settled(self, tokenizers):
        tokenizer = tokenizers["spm_llama"]
        emoji = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
        the = tokenizer.convert_tokens_to_ids("▁the")
        shown, final = stream(tokenizer, [the, *emoji, the, *emoji])
        assert shown[:5] == ["the"] * 5 or shown[0] == "the"
        assert shown[5] == "the😀 the"
        assert final == "the😀 the😀"

    @given(text=st.text(st.characters(min_codepoint=0x1000, exclude_categories=["Cs"])))
    def test_a_long_run_of_bytes_streams_and_ends_right(self, text, tokenizers):
        """Held back are 64 bytes at most, however long no other token comes."""
        tokenizer = tokenizers["spm_llama"]
        text = text * 20
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
        shown, final = stream(tokenizer, ids)
        assert final == text
        for position, part in enumerate(shown):
            assert position + 1 - len(part.encode()) <= 67

    def test_a_long_run_that_turns_invalid_takes_nothing_back(self, tokenizers):
        tokenizer = tokenizers["spm_llama"]
        run = "字".encode() * 40 + b"\xff" + "字".encode()
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in run]
        _, final = stream(tokenizer, ids)
        assert final.startswith("字" * 40)
        assert "\ufffd" in final


class TestOptions:
    def test_special_tokens_show_when_they_are_not_skipped(self, tokenizers):
        tokenizer = tokenizers["qwen2"]
        ids = tokenizer.encode("The<|im_end|>capital")
        assert stream(tokenizer, ids)[1] == "Thecapital"
        assert stream(tokenizer, ids, skip_special_tokens=False)[1] == "The<|im_end|>capital"

    @pytest.mark.parametrize("kind", ["words", "wordpiece", "unigram", "gpt2"])
    @given(data=st.data())
    def test_spaces_between_special_tokens_are_left_out_on_demand(self, kind, data, tokenizers):
        """Decoding at once and streaming agree, and added tokens alone have no space between."""
        tokenizer = tokenizers[kind]
        ids = st.integers(0, 6)
        ids = data.draw(st.lists(ids, max_size=12))
        _, final = stream(
            tokenizer, ids, skip_special_tokens=False, spaces_between_special_tokens=False
        )
        decoded = tokenizer.decode(
            ids, skip_special_tokens=False, spaces_between_special_tokens=False
        )
        assert final == decoded
        added = set(tokenizer.get_added_vocab().values())
        if set(ids) <= added:
            assert " " not in final.lstrip(" ")

    def test_without_detokenize_or_tokenizer_there_is_no_text(self, tokenizers):
        for tokenizer, wanted in ((None, True), (tokenizers["gpt2"], False)):
            shown, final = stream(tokenizer, [40, 41], detokenize=wanted)
            assert [*shown, final] == ["", "", ""]

    def test_several_tokens_at_once_are_one_after_the_other(self, tokenizers):
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode("The capital of 東京 😀")
        detokenizer = Detokenizer(tokenizer, SamplingParams(), [])
        detokenizer.append(ids)
        assert detokenizer.text(finished=True) == "The capital of 東京 😀"
        assert detokenizer.num_tokens_used == len(ids)

    @pytest.mark.parametrize("kind", EVERY)
    def test_every_token_has_a_text_of_its_own(self, kind, tokenizers):
        """decode_token never fails; in a row, the texts of ASCII tokens are the text."""
        tokenizer = tokenizers[kind]
        for id_ in range(-1, len(tokenizer) + 2):
            assert isinstance(tokenizer.decode_token(id_), str)
        if kind in WINDOW:
            return
        ids = tokenizer.encode("The capital of France", add_special_tokens=False)
        text = "".join(map(tokenizer.decode_token, ids))
        assert text.lstrip(" ") == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", EVERY)
def test_a_token_costs_the_same_however_long_the_text_is(kind, tokenizers, monkeypatch):
    """Tokens decoded per token are bounded, and what is kept for stop strings is, too."""
    tokenizer = tokenizers[kind]
    decode = tokenizer._decode
    sizes = []
    monkeypatch.setattr(
        tokenizer, "_decode", lambda ids, skip: (sizes.append(len(ids)), decode(ids, skip))[1]
    )
    ids = tokenizer.encode("The capital of 東京 is 😀, isn't it?") * 60
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["never seen"]), [])
    for id_ in ids:
        detokenizer.append([id_])
        detokenizer.take(finished=False)
    assert max(sizes, default=0) <= 100
    assert len(detokenizer._tail) < len("never seen")
