"""The demo model's tokenizer: byte-level BPE with a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from quire.demo.samples import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START

VOCAB_SIZE = 3072
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
"""Words with their space, digits one by one (sums need them so), marks, white space."""

CHAT_TEMPLATE = (
    "{%- if tools %}{{ raise_exception('the demo model was not trained to call tools') }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the demo model knows the roles system, user and assistant, not '"
    " + message['role']) }}"
    "{%- endif %}"
    "{{ '" + TURN_START + "' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] != 'text' %}"
    "{{ raise_exception('the demo model reads text, not ' + part['type']) }}"
    "{%- endif %}{{ part['text'] }}{%- endfor %}{%- endif %}"
    "{{ '" + TURN_END + "\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '" + TURN_START + "assistant\n' }}{%- endif %}"
)
"""ChatML, for plain string contents and for lists of text parts."""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from texts; the same texts give the same tokenizer.

    Parameters
    ----------
    texts : Iterable[str]
        Text without special tokens.

    Returns
    -------
    Tokenizer
        Special tokens first, then all 256 bytes, then merges: it can write any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
