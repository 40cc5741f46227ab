"""Stop strings: found across token borders, never shown, the earliest wins."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sampling_params import SamplingParams
from quire.tokenizer.detokenizer import Detokenizer

KINDS = ["gpt2", "llama2", "unigram_cleaned", "spm_llama"]
ALPHABET = st.text("ab é東😀", min_size=1, max_size=4)


@pytest.fixture(scope="session")
def tokenizers(loaded, loaded_spm):
    return {**loaded, **loaded_spm}


def earliest(text, stops):
    """Return (start, stop string) of the occurrence that ends first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


def run(tokenizer, ids, prompt=(), **params):
    """Return the stop string found, the tokens it took, all texts shown, and the final text."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), list(prompt))
    found, shown = None, []
    for id_ in ids:
        found = detokenizer.append([id_])
        shown.append(detokenizer.text(finished=found is not None))
        if found is not None:
            break
    final = detokenizer.text(finished=True)
    for earlier, later in pairwise([*shown, final]):
        assert later.startswith(earlier), "text was taken back"
    return found, detokenizer.num_tokens_used, shown, final


class TestEarliestOccurrence:
    @pytest.mark.parametrize("kind", KINDS)
    @given(
        text=st.text("ab é東😀", max_size=12),
        stops=st.lists(ALPHABET, min_size=1, max_size=4),
        include=st.booleans(),
    )
    def test_a_stop_string_is_found_wherever_token_borders_lie(
        self, kind, text, stops, include, tokenizers
    ):
        """The oracle searches the whole text; overlapping and nested stop strings included."""
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids, True)
        expected = earliest(whole, stops)
        found, _, _, final = run(tokenizer, ids, stop=stops, include_stop_str_in_output=include)
        if expected is None:
            assert found is None
            assert final == whole
        else:
            start, stop = expected
            assert found == stop
            assert final == whole[: start + (len(stop) if include else 0)]

    @given(data=st.data(), stops=st.lists(ALPHABET, min_size=1, max_size=3))
    def test_random_bytes_hide_no_stop_string(self, data, stops, tokenizers):
        tokenizer = tokenizers["gpt2"]
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
        ids += tokenizer.encode("ab é東", add_special_tokens=False)
        whole = tokenizer.decode(ids, True)
        found, _, _, final = run(tokenizer, ids, stop=stops)
        expected = earliest(whole, stops)
        assert found == (expected and expected[1])
        assert final == (whole if expected is None else whole[: expected[0]])

    def test_it_stops_at_the_very_token_that_completes_it(self, tokenizers):
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode("The capital of France is Paris")
        whole = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        found, used, _, final = run(tokenizer, ids, stop=["al of Fr"])
        assert found == "al of Fr"
        assert final == "The capit"
        assert "al of Fr" in whole[used - 1]
        assert "al of Fr" not in whole[used - 2]

    def test_a_stop_string_in_byte_tokens_is_found_with_its_last_byte(self, tokenizers):
        """Though its characters are not shown before the run of bytes ends."""
        tokenizer = tokenizers["spm_llama"]
        the = tokenizer.convert_tokens_to_ids("▁the")
        emoji = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
        found, used, _, final = run(tokenizer, [the, *emoji, the], stop=["😀"])
        assert (found, used, final) == ("😀", 5, "the")


class TestHoldingBack:
    @given(text=st.text("ab é東😀", max_size=12), stops=st.lists(ALPHABET, min_size=1, max_size=3))
    def test_just_what_may_become_a_stop_string_is_held_back(self, text, stops, tokenizers):
        """Everything is shown but the longest end that some stop string begins with."""
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode(text)
        found, _, shown, _ = run(tokenizer, ids, stop=stops)
        for count, part in enumerate(shown[:-1] if found else shown, start=1):
            whole = tokenizer.decode(ids[:count]).rstrip("\ufffd")
            held = [
                stop[:n] for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])
            ]
            assert part == whole[: len(whole) - max(map(len, held))]

    def test_the_beginning_of_a_stop_string_is_shown_at_the_end(self, tokenizers):
        tokenizer = tokenizers["gpt2"]
        _, _, shown, final = run(tokenizer, tokenizer.encode("It is ST"), stop=["STOP"])
        assert shown[-1] == "It is "
        assert final == "It is ST"

    def test_an_included_stop_string_is_not_held_back(self, tokenizers):
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode("It is ST")
        _, _, shown, _ = run(tokenizer, ids, stop=["STOP"], include_stop_str_in_output=True)
        assert shown[-1] == "It is ST"


class TestMinTokens:
    @given(
        text=st.text("ab ", max_size=16),
        stops=st.lists(ALPHABET, min_size=1),
        least=st.integers(0, 8),
    )
    def test_an_occurrence_counts_if_it_ends_behind_the_first_min_tokens(
        self, text, stops, least, tokenizers
    ):
        tokenizer = tokenizers["gpt2"]
        ids = tokenizer.encode(text)
        floor = len(tokenizer.decode(ids[:least]))
        expected = None
        for end in range(floor + 1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                expected = (end - len(stop), stop)
                break
        found, used, _, final = run(tokenizer, ids, stop=stops, min_tokens=least)
        assert found == (expected and expected[1])
        assert final == (text if expected is None else text[: expected[0]])
        assert found is None or used > least


def test_nothing_is_read_behind_the_stop(tokenizers):
    """Of several tokens at once, those behind the stop are left; later ones change nothing."""
    tokenizer = tokenizers["gpt2"]
    ids = tokenizer.encode("The capital of France")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="capital"), [])
    assert detokenizer.append(ids) == "capital"
    assert detokenizer.num_tokens_used < len(ids)
    assert detokenizer.append(ids) is None
    assert detokenizer.text(finished=False) == detokenizer.text(finished=True) == "The "
    assert detokenizer.take(finished=True) == "The "


def test_the_prompt_is_no_place_for_a_stop_string(tokenizers):
    """A stop string that the prompt begins or holds does not end the completion."""
    tokenizer = tokenizers["gpt2"]
    prompt = tokenizer.encode("STOP ST")
    found, *_ = run(tokenizer, tokenizer.encode("OP x"), prompt, stop=["STOP"])
    assert found is None
