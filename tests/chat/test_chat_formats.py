"""Which parsers a model gets, by its template, by name, and from other packages."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from quire import ConfigError, SamplingParams
from quire.chat import ChatFormat, reasoning_parser_names, registry, tool_parser_names
from quire.chat.tool_parsers.hermes import HermesToolParser

HERMES = "{{ '<tool_call>\\n{\"name\": ' }}"
LLAMA = '{{- \'Respond in the format {"name": function name, "parameters": dictionary of\' }}'
MISTRAL = "{{- '[TOOL_CALLS] [' }}"
THINK = "{{ content.split('</think>')[-1] }}{{ '<think>\\n' }}"


@pytest.mark.parametrize(
    ("template", "tool_parser", "reasoning_parser"),
    [
        ("", None, None),
        ("{{ messages[0].content }}", None, None),
        (HERMES, "hermes", None),
        (HERMES + THINK, "hermes", "think"),
        (HERMES + "<function=", None, None),
        (HERMES + "<arg_key>", None, None),
        (LLAMA, "llama3_json", None),
        (MISTRAL, "mistral", None),
        (MISTRAL + "[THINK][/THINK]", "mistral", "mistral"),
        ("{{ content.split('</think>')[-1] }}", None, "deepseek_r1"),
        ({"default": THINK, "tool_use": HERMES}, "hermes", "think"),
        (SimpleNamespace(chat_template=MISTRAL), "mistral", None),
        (SimpleNamespace(chat_template=None), None, None),
        (None, None, None),
    ],
)
def test_parsers_are_guessed_from_the_chat_template(template, tool_parser, reasoning_parser):
    found = ChatFormat.for_model(template)
    assert (found.tool_parser, found.reasoning_parser) == (tool_parser, reasoning_parser)
    off = ChatFormat.for_model(template, "none", "none")
    assert off == ChatFormat()


def test_a_name_says_more_than_the_template():
    found = ChatFormat.for_model(HERMES + THINK, "mistral", "deepseek_r1")
    assert (found.tool_parser, found.reasoning_parser) == ("mistral", "deepseek_r1")
    assert ChatFormat.for_model(None, "qwen").tool_parser == "hermes"
    assert ChatFormat.for_model(None, None, "qwen3").reasoning_parser == "think"
    for name in tool_parser_names():
        ChatFormat.for_model(None, name)
    for name in reasoning_parser_names():
        ChatFormat.for_model(None, None, name)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        ChatFormat.for_model(None, "hermse")
    with pytest.raises(ConfigError, match=r"^reasoning_parser must be one of"):
        ChatFormat.for_model(None, None, "nonesuch")


class ShoutParser(HermesToolParser):
    name = "shout"

    def call_id(self):
        return "SHOUT"


def installed(monkeypatch, load):
    point = SimpleNamespace(name="shout", value="shouting:ShoutParser", load=load)
    monkeypatch.setattr(registry, "_installed", lambda group: {point.name: point})


def test_an_installed_package_offers_a_parser_by_its_entry_point(monkeypatch):
    installed(monkeypatch, lambda: ShoutParser)
    assert "shout" in tool_parser_names()
    reader = ChatFormat.for_model(None, "shout").reader(
        [{"type": "function", "function": {"name": "f"}}]
    )
    reader.feed('<tool_call>{"name": "f"}</tool_call>')
    assert reader.message.tool_calls[0].id == "SHOUT"


def test_a_package_that_fails_is_named(monkeypatch):
    def fail():
        raise RuntimeError("no such thing")

    installed(monkeypatch, fail)
    with pytest.raises(ConfigError, match=r"shouting:ShoutParser.*no such thing"):
        ChatFormat.for_model(None, "shout")
    installed(monkeypatch, lambda: 3)
    with pytest.raises(ConfigError, match=r"quire\.tool_parsers.*got 3"):
        ChatFormat.for_model(None, "shout")


def test_ids_are_new_each_time_and_as_the_family_has_them():
    tools = [{"type": "function", "function": {"name": "f"}}]
    forms = {"hermes": "call_[0-9a-f]{24}", "mistral": "[0-9a-zA-Z]{9}"}
    for parser, form in forms.items():
        ids = set()
        for _ in range(20):
            reader = ChatFormat.for_model(None, parser).reader(tools)
            reader.feed('[{"name": "f", "arguments": {}}]' if parser == "mistral" else "")
            reader.feed('<tool_call>{"name": "f"}</tool_call>')
            ids.add(reader.message.tool_calls[0].id)
        assert len(ids) == 20
        assert all(re.fullmatch(form, item) for item in ids)


def test_tags_stay_in_the_text_where_they_are_special_tokens():
    params = SamplingParams()
    special = SimpleNamespace(chat_template=MISTRAL, special_texts=lambda: {5: "[TOOL_CALLS]"})
    assert not ChatFormat.for_model(special).adjust(params).skip_special_tokens
    assert ChatFormat.for_model(special).adjust(params, has_tools=False) is params
    assert ChatFormat.for_model(MISTRAL).adjust(params) is params
    think = SimpleNamespace(chat_template=THINK, special_texts=lambda: {7: "</think>"})
    assert not ChatFormat.for_model(think).constrain(params).skip_special_tokens


def test_importing_it_brings_in_no_heavy_library():
    code = (
        "import sys, quire.chat; quire.chat.ChatFormat.for_model('<tool_call>');"
        "print([m for m in ('torch', 'transformers', 'llguidance', 'jinja2') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
