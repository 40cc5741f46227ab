"""Small tokenizers of every kind that quire reads, built on the spot."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quire.tokenizer import load_tokenizer

CORPUS = [
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "What is 12 + 7? It's 19; don't you'll they've I'm we're can't.",
    "Ein Mädchen aß Brötchen über den Dächern von Köln. Größe: 5 € !",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今日は天気がいいですね。東京へ行きましょう。",
    "def f(x):\n    return x * 2  # twice\n\n\nprint(f(3))\t\n",
    "naïve café — “quoted” … 👍🏽 😀 👨‍👩‍👧",
    "The the the of of of and and a a in in to to is is.",
] * 4

MODEL_TYPES = {
    "gpt2": "gpt2",
    "gpt2_files": "gpt2",
    "opt_files": "opt",
    "qwen2": "qwen2",
    "qwen2_files": "qwen2",
}

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def train_byte_level(vocab_size: int = 700, special: list[str] = SPECIAL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_sentencepiece(**settings: object) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return model.getvalue()


LLAMA_SETTINGS = {
    "model_type": "bpe",
    "vocab_size": 600,
    "byte_fallback": True,
    "character_coverage": 0.98,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
UNIGRAM_SETTINGS = {
    "model_type": "unigram",
    "vocab_size": 400,
    "byte_fallback": True,
    "character_coverage": 0.98,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    found: dict[str, Path] = {}

    def make(name: str, config: dict[str, object] | None) -> Path:
        folder = root / name
        folder.mkdir()
        if config is not None:
            write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "config.json", {"model_type": MODEL_TYPES.get(name, "llama")})
        found[name] = folder
        return folder

    gpt2 = train_byte_level()
    folder = make("gpt2", {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024})
    gpt2.save(str(folder / "tokenizer.json"))

    folder = make("gpt2_files", {"tokenizer_class": "GPT2Tokenizer"})
    gpt2.model.save(str(folder))
    # As facebook/opt-125m has it: BOS by a flag, tokens in special_tokens_map.json.
    folder = make("opt_files", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True})
    opt = train_byte_level(special=["<s>", "<pad>", "</s>", "<unk>"])
    opt.model.save(str(folder))
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    write_json(folder / "special_tokens_map.json", names)

    llama3 = train_byte_level(special=["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"])
    llama3.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama3.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair=None,
        special_tokens=[("<|begin_of_text|>", llama3.token_to_id("<|begin_of_text|>"))],
    )
    folder = make(
        "llama3",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True,
            "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|im_end|>", "<|eot_id|>"),
        },
    )
    llama3.save(str(folder / "tokenizer.json"))

    qwen = train_byte_level()
    qwen.normalizer = normalizers.NFC()
    qwen.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    qwen.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(id_): {
                "content": token.content,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
                "special": token.special,
            }
            for id_, token in qwen.get_added_tokens_decoder().items()
        },
    }
    folder = make("qwen2", config)
    qwen.save(str(folder / "tokenizer.json"))
    folder = make("qwen2_files", config)
    qwen.model.save(str(folder))

    llama2 = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama2.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    llama2.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    llama2.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    llama2.train_from_iterator(
        [line.replace("東", "").replace("😀", "") for line in CORPUS], trainer
    )
    state = json.loads(llama2.to_str())
    state["pre_tokenizer"] = None
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {**vocab, **{b: len(vocab) + i for i, b in enumerate(bytes_)}}
    llama2 = Tokenizer.from_str(json.dumps(state))
    llama2.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", llama2.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = make("llama2", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    llama2.save(str(folder / "tokenizer.json"))

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    for name, cleans_up in (("unigram", False), ("unigram_cleaned", True)):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        folder = make(name, {**settings, "clean_up_tokenization_spaces": cleans_up})
        unigram.save(str(folder / "tokenizer.json"))

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    folder = make("wordpiece", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    wordpiece.save(str(folder / "tokenizer.json"))

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        CORPUS,
        trainers.WordLevelTrainer(
            vocab_size=100, special_tokens=["<unk>", "</s>"], show_progress=False
        ),
    )
    folder = make("words", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    words.save(str(folder / "tokenizer.json"))

    suffixed = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = pre_tokenizers.Whitespace()
    suffixed.decoder = decoders.BPEDecoder()
    suffixed.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "</s>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    folder = make("suffixed", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    suffixed.save(str(folder / "tokenizer.json"))
    return found


SENTENCEPIECE = {
    "spm_llama": LLAMA_SETTINGS,
    "spm_unigram": UNIGRAM_SETTINGS,
    "spm_plain": {**UNIGRAM_SETTINGS, "byte_fallback": False, "add_dummy_prefix": False},
    "spm_char": {"model_type": "char", "vocab_size": 300, "character_coverage": 0.98},
}


@pytest.fixture(scope="session")
def spm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of ``tokenizer.model``, with nothing else in it."""
    root = tmp_path_factory.mktemp("sentencepiece")
    found = {}
    for name, settings in SENTENCEPIECE.items():
        found[name] = root / name
        found[name].mkdir()
        (found[name] / "tokenizer.model").write_bytes(train_sentencepiece(**settings))
    return found


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]):
    """Each of the folders' tokenizers, loaded once."""
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def loaded_spm(spm_folders: dict[str, Path]):
    """Each of the sentencepiece folders' tokenizers, loaded once."""
    return {name: load_tokenizer(folder) for name, folder in spm_folders.items()}
