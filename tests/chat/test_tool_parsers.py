"""What readers make of text that models write: calls, content, and no text lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.chat import ChatFormat, ChatReader

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}},
]
PARSERS = ["hermes", "llama3_json", "mistral"]


def reader_of(parser, **options):
    chat_format = ChatFormat.for_model("", tool_parser=parser, reasoning_parser="none")
    return chat_format.reader(TOOLS, **options)


def read(reader: ChatReader, pieces):
    """Return the message, whose calls are without their ids, which are random."""
    content, reasoning, calls = "", "", []
    deltas = [reader.feed(piece) for piece in pieces]
    deltas.append(reader.finish())
    for delta in deltas:
        content += delta.content
        reasoning += delta.reasoning
        for item in delta.tool_calls:
            if item.id is not None:
                assert item.index == len(calls)
                calls.append([item.name, ""])
            else:
                assert item.name is None
            calls[item.index][1] += item.arguments
    message = reader.message
    assert (message.content or "") == content
    assert (message.reasoning or "") == reasoning
    assert [[call.name, call.arguments] for call in message.tool_calls] == calls
    assert reader.has_tool_calls == bool(calls)
    return content, reasoning, [tuple(call) for call in calls]


SCRAPS = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>"],
    "llama3_json": ["<|python_tag|>", "; ", ";"],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS][", "]", "[ARGS]", "[CALL_ID]a1", "weather", "[{"],
}
COMMON = [
    '{"name": "weather", "arguments": {"city": "Rome"}}',
    '{"name": "time", "parameters": {}}',
    '{"arguments": {"n": [1, {"x": null}]}, "name": "time"}',
    '{"name": "weather", "arguments": {"city": \'Rome\'}}',
    '{"name": "weather", "arguments": "{\\"city\\": 1}"}',
    '{"name": "weather"}',
    '{"name": "weather", "arguments": {"city": "Ro',
    '{"name": ',
    '"arguments": {',
    '"name": "f"',
    "{}", "{", "}", '"', ":", ",", "\\", "\n", " ", "[", "1", "-", "1.5e3", "true", "tru",
    "Hello", "<", "</", "<think>", "</think>", "é", "\ud7ff", "\x01",
]  # fmt: skip


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("reasoning", ["none", "think", "deepseek_r1"])
@given(data=st.data())
def test_a_message_does_not_depend_on_how_its_text_was_cut(parser, reasoning, data):
    scraps = st.sampled_from(COMMON + 3 * SCRAPS[parser])
    text = "".join(data.draw(st.lists(scraps, max_size=12)))
    parallel = data.draw(st.booleans())
    prompt = data.draw(st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n"]))
    chat_format = ChatFormat.for_model("", parser, reasoning)

    def message(pieces):
        reader = chat_format.reader(TOOLS, parallel_tool_calls=parallel, prompt=prompt)
        return read(reader, pieces)

    whole = message([text])
    assert message(list(text)) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert message([text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]) == whole
    if not parallel:
        assert len(whole[2]) <= 1


@pytest.mark.parametrize("parser", PARSERS)
@given(text=st.text())
def test_text_without_calls_is_content_as_it_is(parser, text):
    assert read(reader_of(parser), list(text)) == (text, "", [])


@pytest.mark.parametrize("parser", PARSERS)
@given(data=st.data())
def test_what_is_no_call_comes_out_whole(parser, data):
    scraps = st.sampled_from(COMMON + 3 * SCRAPS[parser])
    text = "".join(data.draw(st.lists(scraps, max_size=12)))
    content, _, calls = read(reader_of(parser), list(text))
    if not calls:
        assert content == text
    assert read(reader_of(parser, tool_choice="none"), list(text)) == (text, "", [])
    no_tools = ChatFormat.for_model("", parser, "none").reader()
    assert read(no_tools, list(text)) == (text, "", [])


def written(parser, calls):
    """Write calls as a model of this family does."""
    key = "parameters" if parser == "llama3_json" else "arguments"
    objects = [json.dumps({"name": name, key: arguments}) for name, arguments in calls]
    if parser == "hermes":
        return "\n".join(f"<tool_call>\n{item}\n</tool_call>" for item in objects)
    if parser == "llama3_json":
        return "; ".join(objects)
    return f"[TOOL_CALLS] [{', '.join(objects)}]"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=2)


@pytest.mark.parametrize("parser", PARSERS)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["weather", "x"]), ARGUMENTS), min_size=1, max_size=3)
)
def test_calls_are_read_as_they_were_written(parser, calls):
    text = written(parser, calls)
    content, _, found = read(reader_of(parser), list(text))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("parser", PARSERS)
def test_arguments_are_told_while_they_are_written(parser):
    text = written(parser, [("weather", {"city": "Rome", "days": 3})])
    reader = reader_of(parser)
    half = text.index("days")
    delta = reader.feed(text[:half])
    assert delta.tool_calls[0].arguments.startswith('{"city": "Rome"')


@pytest.mark.parametrize("parser", PARSERS)
def test_a_cut_call_is_content_until_its_arguments_begin_and_a_call_from_then_on(parser):
    text = written(parser, [("weather", {"city": "Rome"})])
    begin, end = text.index('{"city'), text.index("}")
    for length in range(1, end + 2):
        content, _, calls = read(reader_of(parser), [text[:length]])
        if length <= begin:
            assert (content, calls) == (text[:length], [])
        else:
            assert (content, calls) == ("", [("weather", text[begin:length])])
