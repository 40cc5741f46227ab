"""Required calls out of a running engine, whose model has random weights."""

from __future__ import annotations

import json

import pytest

from quire import LLM, SamplingParams
from quire.chat import ChatFormat, template_messages

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama, dtype="float32") as llm:
        yield llm


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral"])
def test_a_named_call_comes_out_of_any_model(llm, parser):
    """Whatever the tokens, each sample is one call whose arguments match the schema."""
    chat_format = ChatFormat.for_model(llm.get_tokenizer(), parser)
    options = {"tools": TOOLS, "tool_choice": NAMED}
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=150)
    params = chat_format.constrain(params, **options)
    messages = template_messages([{"role": "user", "content": "the weather ?"}])
    [output] = llm.chat(messages, params, use_tqdm=False)
    for sample in output.outputs:
        assert sample.finish_reason == "stop"
        reader = chat_format.reader(**options)
        reader.feed(sample.text)
        reader.finish()
        message = reader.message
        assert message.content is None
        [call] = message.tool_calls
        arguments = json.loads(call.arguments)
        assert arguments["city"] in ("Rome", "Oslo")
        assert arguments.keys() <= {"city", "days"}
