"""What is wrong, too large or endless fails its request alone, in time, whichever library has it.

Beside each run a constrained request of the same library and one without a constraint, whose
tokens are those that they have alone.
"""

from __future__ import annotations

import threading
import time

import pytest

from quire import (
    LLM,
    InvalidRequestError,
    RequestFailedError,
    SamplingParams,
    StructuredOutputsParams,
)

PROMPT = {"prompt_token_ids": [1, 40, 41, 42]}
BACKENDS = ("llguidance", "outlines_core", "xgrammar")
DEADLINE = 4.0
SLACK = 10.0  # of a busy machine
PLAIN = SamplingParams(temperature=1.5, seed=5, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama):
    options = {"dtype": "float32", "block_size": 4, "structured_outputs_deadline": DEADLINE}
    with LLM(tiny_llama, **options) as llm:
        yield llm


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param)
    return request.param


def params(constraint, **options):
    wanted = StructuredOutputsParams(**constraint)
    return SamplingParams(structured_outputs=wanted, temperature=1.5, max_tokens=40, **options)


class Running:
    """Requests that run together."""

    def __init__(self, llm, *many):
        self.results: dict[int, object] = {}
        self.done = threading.Event()
        self.count = len(many)
        process = llm.engine_loop.engine.processor.process
        llm.engine_loop.submit(
            [
                (process(PROMPT, each, request_id=f"{id(self)}-{i}"), self._sink(i))
                for i, each in enumerate(many)
            ]
        )

    def _sink(self, i):
        def sink(news):
            if isinstance(news, BaseException) or news.finished:
                self.results[i] = news
                if len(self.results) == self.count:
                    self.done.set()

        return sink

    def wait(self, seconds):
        assert self.done.wait(seconds), "not within the deadline"
        return [self.results[i] for i in range(self.count)]


def tokens(results):
    return [each.outputs[0].token_ids for each in results]


@pytest.fixture(scope="module")
def others(llm, backend):
    """Requests that are in order, and the tokens that they have alone."""
    good = params({"regex": "[0-9]{4}-[0-9]{2}", "backend": backend}, seed=4)
    return [good, PLAIN], tokens(Running(llm, good, PLAIN).wait(30))


def nested(depth):
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED_AT_ONCE = {
    "empty choice": {"choice": []},
    "two constraints": {"regex": "a", "choice": ["a"]},
    "no constraint": {},
    "no JSON": {"json": "{"},
    "schema of 5 MB": {"json": {"const": "x" * 5_000_000}},
    "schema of 5 MB as text": {"json": '{"enum": [' + ",".join(["1"] * 2_500_000) + "]}"},
    "schema 10,000 levels deep": {"json": nested(10_000)},
    "schema 10,000 levels deep as text": {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "regex 10,000 levels deep": {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    "regex of 5 MB": {"regex": "a" * 5_000_000},
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_what_is_refused_at_once_never_reaches_the_engine(llm, backend, others, name):
    many, expected = others
    running = Running(llm, *many)
    started = time.monotonic()
    with pytest.raises(InvalidRequestError):
        StructuredOutputsParams(**REFUSED_AT_ONCE[name], backend=backend)
    assert time.monotonic() - started < 2.0
    assert tokens(running.wait(30)) == expected


WRONG = {
    "invalid regex": {"regex": "a(b"},
    "back-reference": {"regex": r"(a)\1"},
    "possessive quantifier": {"regex": "a{2}+b"},
    "invalid schema": {"json": {"type": "nonsense"}},
    "unsupported keyword": {"json": {"type": "array", "uniqueItems": True}},
    "schema of itself": {"json": {"$ref": "#"}},
    "schemas of each other": {
        "json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    "reference to nowhere": {"json": {"$ref": "#/$defs/missing"}},
    "undefined rule": {"grammar": "start: missing"},
    "undefined rule in GBNF": {"grammar": "root ::= missing"},
    "malformed GBNF": {"grammar": 'root ::= "a'},
    "grammar without end": {"grammar": "root ::= root root"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_fails_with_a_reason(llm, backend, others, name):
    many, expected = others
    [kind] = WRONG[name]
    bad = params({**WRONG[name], "backend": backend})
    error, *results = Running(llm, bad, *many).wait(DEADLINE + SLACK)
    assert isinstance(error, RequestFailedError)
    assert f"{kind} cannot be enforced by {backend}: " in str(error) or (
        "structured_outputs" in str(error)
    )
    assert tokens(results) == expected


LARGE = {
    "recursive schema": {
        "json": {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                    "required": ["next"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        }
    },
    "schema of nearly 1 MB": {
        "json": {
            "type": "object",
            "properties": {f"key{i}": {"enum": [f"value{i}"]} for i in range(20_000)},
        }
    },
    "schema of 1,000 properties": {
        "json": {
            "type": "object",
            "properties": {f"key{i}": {"enum": [f"value{i}"]} for i in range(1000)},
        }
    },
    "schema nearly 100 levels deep": {"json": nested(98)},
    "array of very many": {"json": {"type": "array", "items": {"type": "null"}, "minItems": 10**8}},
    "references that double": {
        "json": {
            "$defs": {
                **{
                    f"a{i}": {
                        "anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]
                    }
                    for i in range(40)
                },
                "a40": {"type": "null"},
            },
            "$ref": "#/$defs/a0",
        }
    },
    "regex of very many": {"regex": r"(((\w{1,500}-?){1,500}){1,500}){1,500}"},
    "regex exponential in its automaton": {"regex": "(a|b)*a(a|b){40}"},
    "regex of nearly 1 MB": {"regex": "|".join(f"{i:07d}" for i in range(120_000))},
    "choice of nearly 1 MB": {"choice": [f"{i:07d}" for i in range(80_000)]},
    "GBNF of very many": {"grammar": 'root ::= (("x"{1,9999}){1,9999}){1,9999}'},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "schema of nearly 1 MB" else name
        for name in LARGE
    ],
)
def test_what_is_large_is_enforced_or_fails_in_time(llm, backend, others, name):
    """Meanwhile the others finish as they do alone, and afterwards there is room for more."""
    many, expected = others
    started = time.monotonic()
    large = params({**LARGE[name], "backend": backend}, seed=1)
    result, *results = Running(llm, large, *many).wait(DEADLINE + SLACK)
    assert time.monotonic() - started < DEADLINE + SLACK
    if isinstance(result, RequestFailedError):
        assert "cannot be enforced" in str(result) or "structured_outputs" in str(result)
    else:
        assert result.outputs[0].finish_reason in ("stop", "length")
    assert tokens(results) == expected
    compiler = llm.engine_loop.engine._constraints._compiler
    while compiler._num_strays:
        assert time.monotonic() - started < 60, "a thread is at it for ever"
        time.sleep(0.05)
