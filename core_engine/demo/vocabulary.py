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

_CONTENT = (
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- elif message['content'] %}{%- for part in message['content'] %}"
    "{%- if part['type'] != 'text' %}"
    "{{ raise_exception('the demo model reads text, not ' + part['type']) }}"
    "{%- endif %}{{ part['text'] }}{%- endfor %}{%- endif %}"
)
"""A message's text: a string, text parts, or nothing."""

_PARAMETER = (
    "{%- if 'properties' in value or 'items' in value %}{{ value | tojson }}"
    "{%- else %}"
    "{%- set kinds = namespace(names=[]) %}"
    "{%- if value['enum'] %}{%- set kinds.names = value['enum'] %}"
    "{%- elif value['type'] is string %}{%- set kinds.names = [value['type']] %}"
    "{%- elif value['type'] %}{%- set kinds.names = value['type'] %}"
    "{%- else %}{%- for other in value['anyOf'] or [] %}"
    "{%- if other['type'] != 'null' %}"
    "{%- set kinds.names = kinds.names + [other['type'] or 'any'] %}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{%- set brief = kinds.names | join('|') or 'any' %}"
    "{%- if key not in (schema['required'] or []) %}{%- set brief = brief + '?' %}{%- endif %}"
    "{%- if value['description'] %}{%- set brief = brief + ': ' + value['description'] %}"
    "{%- endif %}"
    "{{ brief | tojson }}{%- endif %}"
)
"""One parameter in a few words: its type or choices, ? if optional, and what it means."""

_TOOL = (
    "{%- set function = tool['function'] or tool %}"
    "{%- set schema = function['parameters'] or {} %}"
    "{{ '{\"name\": ' + (function['name'] | tojson) }}"
    "{%- if function['description'] %}"
    "{{ ', \"description\": ' + (function['description'] | tojson) }}{%- endif %}"
    "{{ ', \"parameters\": {' }}"
    "{%- for key, value in (schema['properties'] or {}).items() %}"
    "{{ (key | tojson) + ': ' }}" + _PARAMETER + "{%- if not loop.last %}{{ ', ' }}{%- endif %}"
    "{%- endfor %}{{ '}}\n' }}"
)
"""One line per tool. The schema is told in brief, for a model of few tokens."""

_CALL = (
    "{%- set function = call['function'] or call %}"
    "{{ '<tool_call>\n{\"name\": ' + (function['name'] | tojson) + ', \"arguments\": ' }}"
    "{%- if function['arguments'] is string %}{{ function['arguments'] or '{}' }}"
    "{%- else %}{{ (function['arguments'] or {}) | tojson }}{%- endif %}"
    "{{ '}\n</tool_call>' }}"
)

CHAT_TEMPLATE = (
    "{%- set first = messages[0] if messages else {} %}"
    "{%- set opened = tools and first['role'] in ['system', 'developer'] %}"
    "{%- if tools %}{{ '" + TURN_START + "system\n' }}"
    "{%- if opened %}{%- set message = first %}"
    + _CONTENT
    + "{%- if first['content'] %}{{ '\n\n' }}{%- endif %}{%- endif %}"
    "{{ '<tools>\n' }}{%- for tool in tools %}" + _TOOL + "{%- endfor %}"
    "{{ '</tools>" + TURN_END + "\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (opened and loop.first) %}"
    "{%- if message['role'] not in ['system', 'developer', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('the demo model knows the roles system, developer, user, assistant and "
    "tool, not ' + message['role']) }}"
    "{%- endif %}"
    "{%- if message['role'] == 'tool' %}"
    "{%- if loop.first or loop.previtem['role'] != 'tool' %}"
    "{{ '" + TURN_START + "user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' }}" + _CONTENT + "{{ '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '" + TURN_END + "\n' }}"
    "{%- endif %}"
    "{%- else %}"
    "{{ '" + TURN_START + "' }}"
    "{{ 'system' if message['role'] == 'developer' else message['role'] }}{{ '\n' }}"
    + _CONTENT
    + "{%- for call in message['tool_calls'] or [] %}"
    "{%- if message['content'] or not loop.first %}{{ '\n' }}{%- endif %}" + _CALL + "{%- endfor %}"
    "{{ '" + TURN_END + "\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '" + TURN_START + "assistant\n' }}{%- endif %}"
)
"""ChatML with tools, their calls and responses marked as Hermes and Qwen2.5 mark them.

Contents are strings, lists of text parts or nothing; arguments are objects or their JSON text.
"""


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
