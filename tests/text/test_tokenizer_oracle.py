"""quire's tokenizers against transformers' AutoTokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.tokenizer import load_tokenizer

KINDS = [
    "gpt2",
    "gpt2_files",
    "opt_files",
    "llama3",
    "qwen2",
    "qwen2_files",
    "llama2",
    "unigram",
    "unigram_cleaned",
    "wordpiece",
    "words",
    "suffixed",
]

SNIPPETS = st.sampled_from(
    [
        "The capital of France",
        " is  Paris , isn't it ?",
        "\n\n",
        "東京へ",
        "e\u0301",
        "😀",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|im_start|>",
        "<tool_call>",
        "<|begin_of_text|>",
        "   ",
        "\t",
        "▁",
        "don 't",
    ]
)
TEXTS = st.lists(st.one_of(SNIPPETS, st.text(max_size=8)), max_size=6).map("".join)


@pytest.fixture(scope="session")
def oracles(folders: dict[str, Path]):
    transformers = pytest.importorskip("transformers")
    # It warns of clean-ups that it does not do; so does quire not do them.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return {
        name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()
    }


@pytest.fixture(scope="session")
def llama_class(folders, tmp_path_factory):
    """The same tokenizer.json under ``LlamaTokenizer``: quire's reading and transformers'."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama_class")
    source = folders["llama2"] / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@given(text=st.text(st.characters(exclude_characters=" <>▁", exclude_categories=["Cs"])))
def test_tokenizer_json_is_taken_at_its_word(text, llama_class):
    """Also under ``LlamaTokenizer``, for which transformers 5 rebuilds normalizer and decoder.

    The two agree on text that starts with no space and holds no special token. Elsewhere the
    file, like sentencepiece, puts a space before the text, and transformers 5 does not.
    """
    ours, theirs = llama_class
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
class TestAgainstTransformers:
    @given(text=TEXTS)
    def test_a_text_has_the_same_ids_with_and_without_special_tokens(
        self, kind, text, loaded, oracles
    ):
        for add in (True, False):
            expected = oracles[kind].encode(text, add_special_tokens=add)
            assert loaded[kind].encode(text, add_special_tokens=add) == expected

    @given(data=st.data())
    def test_any_ids_have_the_same_text(self, kind, data, loaded, oracles):
        """Whatever is skipped or cleaned up, and for ids that no text has."""
        ids = data.draw(st.lists(st.integers(0, len(loaded[kind]) + 3), max_size=20))
        for skip in (True, False):
            assert loaded[kind].decode(ids, skip_special_tokens=skip) == oracles[kind].decode(
                ids, skip_special_tokens=skip
            )
            for clean in (True, False):
                assert loaded[kind].decode(ids, skip, clean) == oracles[kind].decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean
                )

    def test_the_vocabulary_and_its_special_tokens_are_the_same(self, kind, loaded, oracles):
        ours, theirs = loaded[kind], oracles[kind]
        assert ours.get_vocab() == theirs.get_vocab()
        assert ours.vocab_size == theirs.vocab_size
        assert len(ours) == len(theirs)
        for name in ("bos", "eos", "pad", "unk"):
            assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
            assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
        assert ours.all_special_tokens == theirs.all_special_tokens
        assert ours.all_special_ids == theirs.all_special_ids
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert ours.get_added_vocab() == theirs.get_added_vocab()

    def test_ids_and_tokens_convert_the_same(self, kind, loaded, oracles):
        ours, theirs = loaded[kind], oracles[kind]
        ids = list(range(0, len(ours), 7))
        tokens = ours.convert_ids_to_tokens(ids)
        assert tokens == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_ids_to_tokens(3) == theirs.convert_ids_to_tokens(3)
        assert ours.convert_tokens_to_ids(tokens) == ids
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
        assert ours.convert_ids_to_tokens(ids, True) == theirs.convert_ids_to_tokens(
            ids, skip_special_tokens=True
        )
        text = "The capital of France"
        assert ours.tokenize(text) == theirs.tokenize(text)
        expected = theirs([text, "x"])
        assert ours([text, "x"]) == {
            name: expected[name] for name in ("input_ids", "attention_mask")
        }

    def test_it_converts_to_a_transformers_tokenizer_that_works_the_same(self, kind, loaded):
        ours = loaded[kind]
        theirs = ours.to_transformers()
        text = "The capital </s> of <|im_start|> 東京 😀 ."
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, True)
        assert theirs.all_special_ids == ours.all_special_ids
        assert theirs.chat_template == ours.chat_template
