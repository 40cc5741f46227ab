"""Finding a tokenizer: what is read, what is refused, and what is left to transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pytest
import tokenizers

from quire.errors import ConfigError, InvalidRequestError, TokenizerError
from quire.sampling_params import SamplingParams
from quire.tokenizer import load_tokenizer
from quire.tokenizer.detokenizer import Detokenizer
from quire.tokenizer.transformers_tokenizer import TransformersTokenizer


def copy(source, target, *names):
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())


class TestRefusals:
    def test_a_folder_without_a_tokenizer_says_what_was_looked_for(self, tmp_path):
        """And how to do without; transformers is not even asked."""
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(tmp_path)
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "skip_tokenizer_init"):
            assert name in str(caught.value)

    def test_a_tokenizer_of_the_checkpoint_s_own_code_is_not_run(self, tmp_path):
        config = {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenization.py").write_text("raise SystemExit('code was run')")
        with pytest.raises(TokenizerError, match="never runs"):
            load_tokenizer(tmp_path, trust_remote_code=True)

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(TokenizerError, match="no tokenizer folder"):
            load_tokenizer(tmp_path / "missing")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer.json", "{"),
            ("tokenizer.json", "{}"),
            ("tokenizer.json", ""),
            ("tokenizer_config.json", "{"),
            ("tokenizer_config.json", "[]"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
            ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
            ("special_tokens_map.json", "nothing"),
            ("added_tokens.json", "{"),
            ("chat_template.jinja", b"\xff\xfe"),
        ],
    )
    def test_a_damaged_file_is_named(self, name, content, tmp_path, folders):
        copy(folders["gpt2"], tmp_path, "tokenizer.json")
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TokenizerError, match=re.escape(str(tmp_path / name))):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[("additional_special_tokens", value) for value in (5, 1.5, True, "<a>")],
            *[("extra_special_tokens", value) for value in (5, True, ["\ud800"])],
            ("extra_special_tokens", {"own": "\ud800"}),
            ("additional_special_tokens", [{"content": "a\udfff"}]),
            *[(f"{kind}_token", "\ud800") for kind in ("bos", "eos", "pad", "unk", "own")],
            ("bos_token", {"content": "\ud800"}),
            ("added_tokens_decoder", {"0": {"content": "\ud800"}}),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", "slow"])
    def test_special_tokens_are_lists_of_whole_characters(
        self, name, value, mode, tmp_path, folders
    ):
        """A lone number lists no tokens, and half a surrogate pair has no UTF-8: both are named."""
        copy(folders["gpt2"], tmp_path, "tokenizer.json")
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({name: value}))
        with pytest.raises(TokenizerError, match=rf"^{name} of {re.escape(str(path))}"):
            load_tokenizer(tmp_path, mode=mode)

    @pytest.mark.parametrize("value", [None, [], {}, [5, ["a"], {"content": {}}], {"own": 5}])
    def test_an_entry_that_names_no_token_is_passed_over(self, value, tmp_path, folders):
        """As a name without a token is: checkpoints have both."""
        copy(folders["gpt2"], tmp_path, "tokenizer.json")
        config = {
            "bos_token": {"content": {}},
            "add_bos_token": True,
            "extra_special_tokens": value,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).bos_token is None

    @pytest.mark.parametrize("content", ['{"a": "x"}', '{"a": null}', '{"\\ud800": 5}'])
    def test_tokens_that_are_added_have_a_text_and_an_id(self, content, tmp_path, folders):
        copy(folders["gpt2"], tmp_path, "tokenizer.json")
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
            load_tokenizer(tmp_path)

    def test_merges_that_do_not_fit_the_vocabulary(self, tmp_path):
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        for merges in ("#version: 0.2\na b\n", "a\n"):
            (tmp_path / "merges.txt").write_text(merges)
            with pytest.raises(TokenizerError, match=r"merges\.txt"):
                load_tokenizer(tmp_path)

    def test_more_ids_than_the_model_has_embeddings(self, folders):
        """Both numbers are named; a model with padded embeddings takes any smaller tokenizer."""
        size = len(load_tokenizer(folders["gpt2"]))
        load_tokenizer(folders["gpt2"], model_config={"vocab_size": size})
        load_tokenizer(folders["gpt2"], model_config={"vocab_size": size + 100})
        with pytest.raises(TokenizerError, match=rf"up to {size - 1}.* vocab_size is {size - 1}"):
            load_tokenizer(folders["gpt2"], model_config={"vocab_size": size - 1})

    def test_a_padding_token_behind_the_embeddings_does_no_harm(self, tmp_path, folders):
        copy(folders["gpt2"], tmp_path, "tokenizer.json")
        (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
        size = len(load_tokenizer(folders["gpt2"]))
        tokenizer = load_tokenizer(tmp_path, model_config={"vocab_size": size})
        assert tokenizer.pad_token_id == size

    @pytest.mark.parametrize(("mode", "hint"), [("slwo", "'slow'"), ("mistral", ""), (3, "")])
    def test_an_unknown_mode_names_the_known_ones(self, mode, hint, folders):
        with pytest.raises(ConfigError, match=f"'auto', 'hf', 'fast', 'slow'.*{hint}"):
            load_tokenizer(folders["gpt2"], mode=mode)


class TestModes:
    @pytest.mark.parametrize("mode", ["auto", "hf", "fast", "slow"])
    def test_every_mode_gives_the_same_ids(self, mode, folders):
        tokenizer = load_tokenizer(folders["qwen2"], mode=mode)
        text = "The capital of 東京 <|im_end|>"
        assert tokenizer.encode(text) == load_tokenizer(folders["qwen2"]).encode(text)
        assert tokenizer.eos_token == "<|im_end|>"

    def test_reading_a_tokenizer_imports_neither_transformers_nor_torch(self, folders):
        """They cost more than a second; a chat template is rendered without them, too."""
        code = (
            "import sys; from quire.tokenizer import load_tokenizer;"
            f"t = load_tokenizer({str(folders['qwen2'])!r});"
            "t.apply_chat_template([{'role': 'user', 'content': 'x'}], tokenize=True);"
            "t.decode(t.encode('Hello'));"
            "assert not {'transformers', 'torch', 'sentencepiece'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestTransformersFallback:
    def test_a_python_tokenizer_of_transformers_streams_too(self, tmp_path):
        """ByT5 has no files at all: its tokens are bytes, and its decoder is Python."""
        pytest.importorskip("transformers")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        tokenizer = load_tokenizer(tmp_path)
        assert isinstance(tokenizer, TransformersTokenizer)
        text = "Köln 東京 😀"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["京"]), [])
        found = [detokenizer.append([id_]) for id_ in ids]
        assert "京" in found
        assert detokenizer.text(finished=True) == "Köln 東"
        assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
        assert tokenizer.to_transformers().encode(text, add_special_tokens=False) == ids
        assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1
        assert tokenizer.decode_token(10**9) == ""

    def test_a_vocabulary_for_transformers_is_read_by_transformers(self, tmp_path):
        pytest.importorskip("transformers")
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nparis\n##ian\n")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("parisian", add_special_tokens=False) == [5, 6]
        assert tokenizer.decode([5, 6]) == "parisian"

    def test_what_transformers_cannot_read_is_a_tokenizer_error(self, tmp_path):
        pytest.importorskip("transformers")
        (tmp_path / "tiktoken.model").write_text("nonsense")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(TokenizerError, match=re.escape(str(tmp_path))):
            load_tokenizer(tmp_path)


class TestUse:
    def test_threads_share_a_tokenizer(self, loaded):
        tokenizer = loaded["llama2"]
        texts = [f"The capital {n} of 東京 😀" for n in range(40)]
        expected = [tokenizer.encode(text) for text in texts]
        wrong = []

        def work():
            for text, ids in zip(texts, expected, strict=True):
                if tokenizer.encode(text) != ids or tokenizer.decode(ids[1:]) != text:
                    wrong.append(text)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize("text", [None, 3, b"x", ["x"]])
    def test_only_text_is_encoded(self, text, loaded):
        with pytest.raises(InvalidRequestError, match="text must be a str"):
            loaded["gpt2"].encode(text)

    def test_a_lone_surrogate_is_refused(self, loaded):
        with pytest.raises(InvalidRequestError, match=r"surrogate.*position 1"):
            loaded["gpt2"].encode("a\ud83d")

    @pytest.mark.parametrize("kind", ["gpt2", "llama2", "qwen2"])
    def test_a_fragment_has_the_ids_it_has_within_a_text(self, kind, loaded):
        tokenizer = loaded[kind]
        for fragment in ("capital", " capital", "東", "."):
            ids = tokenizer.encode_fragment(fragment)
            assert tokenizer.decode([*tokenizer.encode("x", False), *ids]) == f"x{fragment}"

    def test_added_tokens_of_old_checkpoints_are_read(self, tmp_path, folders):
        """added_tokens.json, which before 2023 stood beside the vocabulary."""
        copy(folders["gpt2_files"], tmp_path, "vocab.json", "merges.txt", "config.json")
        size = len(load_tokenizer(folders["gpt2_files"]))
        added = {"<extra>": size, "<pad>": size + 1}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"pad_token": {"content": "<pad>"}, "eos_token": "<|endoftext|>"})
        )
        transformers = pytest.importorskip("transformers")
        oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.get_added_vocab() == oracle.get_added_vocab()
        ids = tokenizer.encode("a<extra>b<pad>")
        assert ids == oracle.encode("a<extra>b<pad>")
        assert tokenizer.decode(ids, True) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings",
    ['{"added_tokens_decoder": {"5": {"content": 5}}}', "[" * 100_000],
    ids=["content", "nested"],
)
def test_a_damaged_configuration_is_an_error_of_the_tokenizer(tmp_path, settings):
    from checkpoints import write_tokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(TokenizerError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("length", ["Infinity", "NaN"])
def test_no_limit_of_length_is_none(tmp_path, length):
    from checkpoints import write_tokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
    load_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_spell_is_an_invalid_request(tmp_path):
    """A word-level vocabulary without an unknown token: the request is refused, by our error."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InvalidRequestError, match="cannot spell"):
        tokenizer.encode("b")
