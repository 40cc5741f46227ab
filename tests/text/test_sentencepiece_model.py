"""A lone ``tokenizer.model``, read without sentencepiece, against sentencepiece itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import TokenizerError
from quire.tokenizer import load_tokenizer

KINDS = ["spm_llama", "spm_unigram", "spm_plain", "spm_char"]

# Control symbols are left out: sentencepiece spells them as text, a prompt means the token.
# U+2581 is left out: sentencepiece cannot tell it from a space either.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "The capital of France",
                " is  Paris",
                "  ",
                "東京へ",
                "😀",
                "ﬁ①Å",
                "2024",
                "\t\n",
                "’",
            ]
        ),
        st.text(st.characters(exclude_characters="▁<>", exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=5,
).map("".join)


@pytest.fixture(scope="session")
def reference(spm_folders: dict[str, Path]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentencepiece
    return {
        name: sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        for name, folder in spm_folders.items()
    }


@pytest.mark.parametrize("kind", KINDS)
class TestAgainstSentencepiece:
    @given(text=TEXTS)
    def test_a_text_has_the_same_ids(self, kind, text, loaded_spm, reference):
        assert loaded_spm[kind].encode(text, add_special_tokens=False) == reference[kind].encode(
            text
        )

    @given(text=TEXTS)
    def test_its_ids_have_the_same_text(self, kind, text, loaded_spm, reference):
        ids = reference[kind].encode(text)
        if reference[kind].unk_id() in ids:
            ids = [id_ for id_ in ids if id_ != reference[kind].unk_id()]
        assert loaded_spm[kind].decode(ids) == reference[kind].decode(ids)

    def test_the_vocabulary_is_the_same(self, kind, loaded_spm, reference):
        size = reference[kind].get_piece_size()
        assert len(loaded_spm[kind]) == size
        assert loaded_spm[kind].convert_ids_to_tokens(list(range(size))) == [
            reference[kind].id_to_piece(id_) for id_ in range(size)
        ]

    def test_special_tokens_are_the_model_s(self, kind, loaded_spm, reference):
        ours, theirs = loaded_spm[kind], reference[kind]
        assert ours.bos_token_id == theirs.bos_id()
        assert ours.eos_token_id == theirs.eos_id()
        assert ours.unk_token_id == theirs.unk_id()
        assert ours.encode("x")[0] == theirs.bos_id()


def test_the_leading_space_behind_a_special_token_follows_the_legacy_flag(
    spm_folders, tmp_path, reference
):
    """``legacy`` false puts the space of a text's start nowhere else; sentencepiece everywhere."""
    model = (spm_folders["spm_llama"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    piece = reference["spm_llama"].piece_to_id
    for legacy, expected in ((True, "▁the"), (False, "the")):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"legacy": {str(legacy).lower()}}}')
        ids = load_tokenizer(tmp_path).encode("the</s>the", add_special_tokens=False)
        assert ids[0] == piece("▁the")
        assert ids[1] == reference["spm_llama"].eos_id()
        assert load_tokenizer(tmp_path).convert_ids_to_tokens(ids[2:])[0] in (expected, expected[0])


def test_flags_say_what_goes_around_a_text(spm_folders, tmp_path):
    """add_bos_token is on by default, add_eos_token off."""
    model = (spm_folders["spm_llama"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    for flags, expected in (
        ("{}", (True, False)),
        ('{"add_bos_token": false}', (False, False)),
        ('{"add_eos_token": true}', (True, True)),
    ):
        (tmp_path / "tokenizer_config.json").write_text(flags)
        ids = load_tokenizer(tmp_path).encode("the")
        assert (ids[0] == 1, ids[-1] == 2) == expected


def test_neither_sentencepiece_nor_transformers_is_imported(spm_folders):
    code = (
        "import sys; from quire.tokenizer import load_tokenizer;"
        f"print(load_tokenizer({str(spm_folders['spm_llama'])!r}).encode('the')[0]);"
        "heavy = {'sentencepiece', 'google.protobuf', 'transformers', 'torch'};"
        "assert not heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@given(data=st.data())
def test_a_damaged_model_is_refused_or_read(data, spm_folders, tmp_path):
    """Any truncation or overwriting loads, or is a TokenizerError; nothing else comes out."""
    model = bytearray((spm_folders["spm_unigram"] / "tokenizer.model").read_bytes())
    end = data.draw(st.one_of(st.just(len(model)), st.integers(0, len(model))))
    damaged = model[:end]
    # What follows the pieces, the trainer's and the normalizer's settings, is the last part.
    anywhere = st.one_of(st.integers(0, end), st.integers(max(0, end - 400), end))
    for position in data.draw(st.lists(anywhere, max_size=3)):
        if position < end:
            damaged[position] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(damaged)
    try:
        tokenizer = load_tokenizer(tmp_path)
    except TokenizerError:
        return
    tokenizer.decode(tokenizer.encode("The capital"))


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"this is no protocol buffer")
    with pytest.raises(TokenizerError, match=re.escape(str(path))):
        load_tokenizer(tmp_path)


def test_a_model_with_a_lone_tokenizer_model_is_served(spm_folders, reference, tmp_path):
    """From text to text: a prompt as sentencepiece has it, a stream without half characters."""
    from checkpoints import build_config, build_model

    from quire import LLM, SamplingParams

    config = build_config("llama")
    config.vocab_size = reference["spm_llama"].GetPieceSize()
    build_model(config).save_pretrained(tmp_path)
    shutil.copy(spm_folders["spm_llama"] / "tokenizer.model", tmp_path)
    script = reference["spm_llama"].EncodeAsIds("Paris 東京 is 😀 STOP")

    def say(token_ids, logits):
        return logits.index_fill(0, torch.tensor(script[len(token_ids)]), 1e6)

    params = {"temperature": 0, "logits_processors": [say], "max_tokens": len(script)}
    with LLM(tmp_path, dtype="float32", max_model_len=128) as llm:
        text = "The capital of 東京"
        [output] = llm.generate(text, SamplingParams(**params), use_tqdm=False)
        bos = reference["spm_llama"].bos_id()
        assert output.prompt_token_ids == [bos, *reference["spm_llama"].EncodeAsIds(text)]
        assert list(output.outputs[0].token_ids) == script
        assert output.outputs[0].text == " Paris 東京 is 😀 STOP"
        stream = llm.stream(text, SamplingParams(**params, stop=["😀 ST"]))
        shown = "".join(delta.outputs[0].text for delta in stream)
        assert shown == " Paris 東京 is "
