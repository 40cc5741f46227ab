"""What becomes of calls that models get wrong."""

from __future__ import annotations

import json

import pytest

from quire.chat import ChatFormat

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ONE = [("f", '{"a": 1}')]


def read(text, parser="hermes", reasoning="none", prompt="", **options):
    reader = ChatFormat.for_model("", parser, reasoning).reader(TOOLS, prompt=prompt, **options)
    reader.feed(text)
    reader.finish()
    message = reader.message
    return message.content, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>',
        '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>\n',
        '<tool_call>\n{"id": 7, "name": "f", "arguments": "{\\"a\\": 1}", "x": []}\n</tool_call>',
        '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_c',
    ],
)
def test_what_can_only_mean_one_call_is_that_call(text):
    assert read(text) == (None, ONE)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\nf(a=1)\n</tool_call>",
        '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "[1]"}\n</tool_call>',
        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
    ],
)
def test_what_is_no_call_is_content_with_its_tags(text):
    assert read(text) == (text, [])
    assert read(text + CALL) == (text, ONE)


def test_a_call_without_arguments_has_empty_ones():
    for text in (
        '{"name": "f"}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": ""}',
    ):
        assert read(f"<tool_call>{text}</tool_call>") == (None, [("f", "{}")])


def test_arguments_that_turn_out_to_be_no_json_are_kept_up_to_the_end_of_the_call():
    text = '<tool_call>\n{"name": "f", "arguments": {"a": \'x\'}}\n</tool_call>\nDone.'
    assert read(text) == ("Done.", [("f", "{\"a\": 'x'}}")])
    text = '<tool_call>\n{"name": "f", "arguments": {"a": ?<tool_call>' + CALL[len("<tool_call>") :]
    assert read(text) == (None, [("f", '{"a": ?'), *ONE])


def test_line_breaks_within_strings_are_escaped():
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}</tool_call>'
    _, [(_, arguments)] = read(text)
    assert json.loads(arguments) == {"a": "x\ny\t"}


def test_text_beside_calls_keeps_its_line_breaks_but_those_next_to_calls_alone():
    assert read(f"\n\n{CALL}\n{CALL}\n") == (None, ONE * 2)
    assert read(f"I look.\n{CALL}\n") == ("I look.", ONE)
    assert read(f"I look.\n{CALL}\nDone.\n") == ("I look.\n\nDone.", ONE)
    assert read(f"{CALL}\n\nDone.") == ("Done.", ONE)


def test_an_unknown_function_is_called_all_the_same():
    assert read(CALL.replace('"f"', '"g"')) == (None, [("g", '{"a": 1}')])


def test_without_parallel_calls_a_second_one_is_content():
    assert read(CALL + CALL, parallel_tool_calls=False) == (CALL, ONE)


def test_an_answer_in_json_is_no_call_of_a_llama():
    for text in ('{"name": "Bob"}', '{"parameters": {}}', "{}", '{"name": "Bob", "age": 3} Yes.'):
        assert read(text, "llama3_json") == (text, [])
    call = '{"type": "function", "name": "f", "parameters": {"a": 1}}'
    assert read(f"<|python_tag|>{call}", "llama3_json") == (None, ONE)
    assert read(f"{call};{call}", "llama3_json") == (None, ONE * 2)
    assert read(f"Look: {call}", "llama3_json") == (f"Look: {call}", [])


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]',
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}',
        '[TOOL_CALLS]f[ARGS]{"a": 1}',
        '[TOOL_CALLS] f [ARGS] {"a": 1}',
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}',
        '[TOOL_CALLS]f{"a": 1}',
        '[{"name": "f", "arguments": {"a": 1}}]',
    ],
)
def test_all_ways_of_mistral_models_to_call_are_read(text):
    assert read(text, "mistral") == (None, ONE)
    if text.startswith("[TOOL_CALLS]") and text.endswith(("]", "1}")):
        second = text if text.startswith("[TOOL_CALLS]f") else ""
        assert read(f"Hm. {text}{second}", "mistral") == ("Hm.", ONE * (2 if second else 1))


def test_thoughts_are_apart_from_the_answer_and_calls_in_them_are_thoughts():
    def message(text, prompt="", reasoning="think"):
        reader = ChatFormat.for_model("", "hermes", reasoning).reader(TOOLS, prompt=prompt)
        reader.feed(text)
        reader.finish()
        found = reader.message
        return found.reasoning, found.content, len(found.tool_calls)

    thought = f"I call {CALL}"
    text = f"{thought}\n</think>\n\nYes. <think>"
    assert message(f"<think>\n{text}") == (thought, "Yes. <think>", 0)
    for prompt in ("assistant\n<think>\n", "<think>"):
        assert message(text, prompt) == (thought, "Yes. <think>", 0)
    assert message(text, reasoning="deepseek_r1") == (thought, "Yes. <think>", 0)
    assert message(f"<think>{text}", reasoning="deepseek_r1") == (thought, "Yes. <think>", 0)
    assert message("a</think>b") == (None, "a</think>b", 0)
    assert message("a", "<think>\n\n</think>\n\n", "deepseek_r1") == (None, "a", 0)
    assert message("<think>so long") == ("so long", "", 0)
    assert message(f"<think>so</think>{CALL}") == ("so", None, 1)
