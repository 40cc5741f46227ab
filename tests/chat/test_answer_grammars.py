"""What a grammar lets a model write is read as what was asked for, whatever the model."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import InvalidRequestError, SamplingParams, StructuredOutputsParams
from quire.chat import ChatFormat
from quire.chat.schemas import closed
from quire.structured.llguidance_backend import Backend

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
    },
    "required": ["city"],
    "$defs": {"day": {"enum": ["Mo", "Tu"]}},
}
NOTHING = {"type": "object", "properties": {}}
SCHEMAS = {"weather": WEATHER, "now": NOTHING, "any/where-2": {"type": "object"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
MARKERS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<|python_tag|>"),
]
PIECES = [
    *('"}', '": ', '{"name": "', "\n</tool_call>", "; ", '"', "}", "]", '", "', "weather", "Mo"),
    *("Rome", "{", "[", " ", "\n", "[{", "hello", "<", '"arguments": ', '"parameters": '),
]
TOKENS = [bytes([i]) for i in range(256)] + [piece.encode() for piece in PIECES + MARKERS]
NUM_TOKENS = len(TOKENS)
FAMILIES = [
    ("hermes", "<tool_call>"),
    ("llama3_json", ""),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS][ARGS]"),
    ("mistral", "[TOOL_CALLS][CALL_ID][ARGS]"),
]


def tools_of(*strict):
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": schema, "strict": name in strict},
        }
        for name, schema in SCHEMAS.items()
    ]


class Model:
    """A tokenizer, with its markers special or not, and texts at random within a grammar."""

    def __init__(self, *, special: bool) -> None:
        first = NUM_TOKENS - len(MARKERS)
        self.special = {first + i: text for i, text in enumerate(MARKERS)} if special else {}
        tokens = [b"" if i in self.special else token for i, token in enumerate(TOKENS)]
        vocabulary = SimpleNamespace(
            tokens=[*tokens, b""],
            special_tokens=self.special,
            end_id=NUM_TOKENS,
            tokenize=lambda text: list(text.encode()),
        )
        self.backend = Backend(vocabulary, 10.0)
        self.compiled = {}
        self.chat_template = None

    def special_texts(self):
        return self.special

    def format(self, parser, template, reasoning="none"):
        source = SimpleNamespace(chat_template=template, special_texts=self.special_texts)
        return ChatFormat.for_model(source, parser, reasoning)

    def write(self, params, seed):
        """Return a text, and whether it came to its end."""
        draw = random.Random(seed)
        spec = params.structured_outputs.spec
        if spec not in self.compiled:
            self.compiled[spec] = self.backend.compile(spec)
        matcher = self.compiled[spec].start()
        row = np.zeros((NUM_TOKENS + 32) // 32, dtype=np.int32)
        out = b""
        for _ in range(250):
            if matcher.is_finished() or (matcher.is_accepting() and draw.random() < 0.3):
                return out.decode(errors="replace"), True
            matcher.fill_mask(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")[:NUM_TOKENS]
            allowed = np.flatnonzero(bits).tolist()
            if not allowed:
                return out.decode(errors="replace"), True
            pieces = [i for i in allowed if i >= 256]
            ascii_ = [i for i in allowed if 32 <= i < 127]
            pool = pieces if pieces and draw.random() < 0.6 else ascii_ or allowed
            token = draw.choice(pool)
            matcher.accept([token])
            if token in self.special and params.skip_special_tokens:
                continue
            out += TOKENS[token]
        return out.decode(errors="replace"), False


MODELS = {special: Model(special=special) for special in (False, True)}
REASONING = st.sampled_from(["none", "think", "deepseek_r1"])
PROMPTS = st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n"])


def read(chat_format, text, **options):
    reader = chat_format.reader(**options)
    reader.feed(text)
    reader.finish()
    return reader.message


def check_arguments(call, schemas=SCHEMAS):
    jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize(("parser", "template"), [*FAMILIES, ("none", "")])
@given(
    special=st.booleans(),
    reasoning=REASONING,
    seed=st.integers(0, 10**9),
    choice=st.sampled_from(["required", NAMED]),
    parallel=st.booleans(),
    prompt=PROMPTS,
)
def test_a_required_call_parses_and_its_arguments_match(
    parser, template, reasoning, special, seed, choice, parallel, prompt
):
    model = MODELS[special]
    chat_format = model.format(parser, template, reasoning)
    options = {"tools": tools_of(), "tool_choice": choice, "parallel_tool_calls": parallel}
    params = chat_format.constrain(SamplingParams(), prompt=prompt, **options)
    text, whole = model.write(params, seed)
    if not whole:
        return
    message = read(chat_format, text, prompt=prompt, **options)
    assert message.content is None
    assert message.tool_calls
    for call in message.tool_calls:
        check_arguments(call)
        if choice is NAMED:
            assert call.name == "weather"
    if choice is NAMED or not parallel:
        assert len(message.tool_calls) == 1
    if prompt == "<think>\n\n</think>\n\n" or reasoning == "none":
        assert message.reasoning is None


@pytest.mark.parametrize(("parser", "template"), FAMILIES)
@given(
    special=st.booleans(),
    reasoning=REASONING,
    seed=st.integers(0, 10**9),
    parallel=st.booleans(),
    strict=st.booleans(),
    prompt=PROMPTS,
)
def test_a_call_of_a_strict_function_matches_and_others_are_calls(
    parser, template, reasoning, special, seed, parallel, strict, prompt
):
    model = MODELS[special]
    chat_format = model.format(parser, template, reasoning)
    tools = tools_of("weather") if strict else tools_of()
    options = {"tools": tools, "parallel_tool_calls": parallel}
    params = chat_format.constrain(SamplingParams(), prompt=prompt, **options)
    assert (params.structured_outputs is None) == (parallel and not strict)
    if params.structured_outputs is None:
        return
    text, whole = model.write(params, seed)
    message = read(chat_format, text, prompt=prompt, **options)
    for call in message.tool_calls if whole else ():
        check_arguments(call, {**SCHEMAS, "now": {}, **({} if strict else {"weather": {}})})
    if not parallel:
        assert len(message.tool_calls) <= 1


OWN = {
    "json": {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]},
    "json_object": True,
    "regex": r"(?i)ab/\d{2}\.",
    "choice": ["yes", 'no "never"'],
    "grammar": 'start: "x" DIGITS\nDIGITS: /[0-9]{2}/',
}


def fits(kind, text):
    if kind == "json":
        return json.loads(text)["n"] in (1, 22)
    if kind == "json_object":
        return isinstance(json.loads(text), dict)
    if kind == "regex":
        return re.fullmatch(OWN[kind], text)
    return text in OWN[kind] if kind == "choice" else re.fullmatch("x[0-9]{2}", text)


@pytest.mark.parametrize("kind", list(OWN))
@given(
    special=st.booleans(),
    reasoning=REASONING,
    seed=st.integers(0, 10**9),
    family=st.sampled_from(FAMILIES),
    prompt=PROMPTS,
)
def test_an_answer_beside_tools_is_a_call_or_what_was_asked_for(
    kind, reasoning, special, seed, family, prompt
):
    model = MODELS[special]
    chat_format = model.format(*family, reasoning)
    own = StructuredOutputsParams(**{kind: OWN[kind]})
    tools = None if family[0] == "llama3_json" else tools_of()
    params = SamplingParams(structured_outputs=own)
    params = chat_format.constrain(params, tools, prompt=prompt)
    text, whole = model.write(params, seed)
    if not whole:
        return
    message = read(chat_format, text, tools=tools, prompt=prompt)
    assert bool(message.content) != bool(message.tool_calls)
    assert not message.content or fits(kind, message.content)
    assert all(isinstance(json.loads(call.arguments), dict) for call in message.tool_calls)


def test_what_asks_for_a_call_and_for_an_answer_is_refused():
    chat_format = ChatFormat.for_model("", "hermes")
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    for choice in ("required", NAMED):
        with pytest.raises(InvalidRequestError, match=r"structured_outputs.*tool_choice"):
            chat_format.constrain(params, tools_of(), choice)
    assert chat_format.constrain(params, tools_of(), "none") is params
    with pytest.raises(InvalidRequestError, match="llama3_json"):
        ChatFormat.for_model("", "llama3_json").constrain(params, tools_of())


def test_parameters_are_left_as_they_were():
    params = SamplingParams(max_tokens=7, stop=["x"])
    for parser in ("hermes", "llama3_json", "mistral"):
        chat_format = MODELS[True].format(parser, "")
        constrained = chat_format.constrain(params, tools_of(), "required")
        assert (constrained.max_tokens, constrained.stop) == (7, ["x"])
        assert constrained.skip_special_tokens == (parser == "llama3_json")
    assert params == SamplingParams(max_tokens=7, stop=["x"])


def test_integers_that_the_library_would_round_are_refused():
    schema = {"type": "object", "properties": {"n": {"const": 2**60}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(InvalidRequestError, match=r"2\*\*53"):
        ChatFormat.for_model("", "hermes").constrain(SamplingParams(), tools, "required")


def test_members_are_closed_only_where_that_empties_nothing():
    """A combination of schemas is left open: each would forbid what the others ask for."""
    inner = {"type": "object", "properties": {"b": {}}}
    shut = {**inner, "additionalProperties": False}
    assert closed(inner) == shut
    assert closed({"$defs": {"x": inner}, "items": inner}) == {"$defs": {"x": shut}, "items": shut}
    assert closed({"anyOf": [inner, {"type": "null"}]}) == {"anyOf": [shut, {"type": "null"}]}
    for open_ in (
        {"type": "object"},
        {**inner, "additionalProperties": {"type": "integer"}},
        {**inner, "patternProperties": {"^x": {}}},
        {"allOf": [inner, {"properties": {"c": {}}}]},
        {"properties": {"a": {"$ref": "#/$defs/x", "properties": {}}}, "$defs": {"x": inner}},
    ):
        assert closed(open_) == open_


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"json": OWN["json"], "backend": "xgrammar"}, "backend must be 'llguidance'"),
        ({"json": OWN["json"], "drop_unsupported": True}, "drop_unsupported must be False"),
        ({"json": {"const": 2**60}}, "2**53"),
        ({"regex": "(?x)a\\\nb"}, "regex must be on one line"),
        ({"regex": "(?x)a # b"}, "spaces or comments in a verbose regex"),
        ({"grammar": 'root ::= "a"'}, "Lark's notation"),
    ],
)
def test_what_cannot_be_had_behind_thoughts_is_refused_and_not_passed_over(own, message):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**own))
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        ChatFormat.for_model("", "none", "think").constrain(params)
    assert ChatFormat().constrain(params) is params


@pytest.mark.parametrize("kind", ["json", "json_object"])
def test_whitespace_of_a_response_format_holds_behind_thoughts(kind):
    chat_format = ChatFormat.for_model("", "none", "think")
    for options in ({"disable_any_whitespace": True}, {"whitespace_pattern": "\\t"}):
        own = StructuredOutputsParams(**{kind: OWN[kind]}, **options)
        params = chat_format.constrain(SamplingParams(structured_outputs=own))
        matcher = MODELS[False].backend.compile(params.structured_outputs.spec).start()
        matcher.accept(list(b"<think>hm</think>\n{"))
        with pytest.raises(InvalidRequestError):
            matcher.accept(list(b' "n"'))


def test_a_structural_tag_is_left_to_whoever_wrote_it():
    tag = {"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<a>"]}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=tag))
    assert ChatFormat.for_model("", "hermes", "think").constrain(params, tools_of()) is params


@given(seed=st.integers(0, 10**9))
def test_a_schema_of_anything_is_json_behind_thoughts(seed):
    own = StructuredOutputsParams(json="true")
    chat_format = ChatFormat.for_model("", "none", "think")
    params = chat_format.constrain(SamplingParams(structured_outputs=own))
    text, whole = MODELS[False].write(params, seed)
    if whole:
        json.loads(read(chat_format, text).content)
