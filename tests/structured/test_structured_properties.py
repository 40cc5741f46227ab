"""Whatever the constraint and whatever the model: finished texts match, others can be completed.

A model has random weights, so that it would say anything, another is the demo's; both are sampled
at temperature 1.5. Hypothesis draws the regexes and schemas, these also by hypothesis-jsonschema.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.structured.backends import load_constraint_backend
from quire.structured.closed_schema import why_open
from quire.structured.regex import UntranslatableError, to_xgrammar
from quire.structured.vocabulary import Vocabulary

BACKENDS = ("llguidance", "outlines_core", "xgrammar")
MAX_TOKENS = 100
PLAIN = SamplingParams(temperature=1.5, seed=9, max_tokens=20, ignore_eos=True)

LITERALS = st.text(st.sampled_from('abcXYZ019 _-,"{}é€😀\n'), min_size=1, max_size=4).map(re.escape)
CLASSES = st.sampled_from(
    [r"\d", r"\w", r"\W", r"[a-f]", r"[^a-z]", ".", r"\s", r"[\w.-]", r"[é-ž]", "[&[]", r"\D"]
)


def _repeated(inner):
    counts = st.sampled_from(["?", "{2}", "{,2}", "{1,3}", "{0,1}"])
    return st.builds("(?:{}){}".format, inner, counts)


REGEXES = st.recursive(
    LITERALS | CLASSES,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?P<name{2}>{0}){1}".format, inner, inner, st.integers(0, 10**9)),
        _repeated(inner),
    ),
    max_leaves=6,
).filter(lambda pattern: _compiles(pattern))


def _compiles(pattern: str) -> bool:
    try:
        compiled = re.compile(pattern)
    except re.error:  # a name of a group that is drawn twice
        return False
    return compiled.pattern != ""


def _is_known_to_xgrammar(pattern: str) -> bool:
    try:
        to_xgrammar(pattern)
    except UntranslatableError:
        return False
    return True


NAMES = st.text(st.sampled_from('abcé"\\ 1'), min_size=1, max_size=4)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "integer"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.integers(-(2**53), 2**53) | NAMES, min_size=1)
    ),
    st.builds(lambda value: {"const": value}, st.integers(0, 99) | NAMES | st.booleans()),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
    st.just({"type": "string", "format": "date"}),
)


def _objects(inner, names, fewest):
    def make(properties, optional, extra):
        names = sorted(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names[: max(len(names) - optional, 0)],
            "additionalProperties": extra,
        }

    return st.builds(
        make,
        st.dictionaries(names, inner, min_size=fewest, max_size=3),
        st.integers(0, 2),
        st.just(False),
    )


def _schemas(scalars, names=NAMES, fewest=0):
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            _objects(inner, names, fewest),
            st.builds(
                lambda items, least, span: {
                    "type": "array",
                    "items": items,
                    "minItems": least,
                    "maxItems": least + span,
                },
                inner,
                st.integers(0, 2),
                st.integers(0, 2),
            ),
            st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        ),
        max_leaves=5,
    )


NO_OTHERS = {"additionalProperties": False}


def _row(name, *items):
    items = [{"const": name}, *items]
    return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}


def _number(low, high):
    return {"type": "integer", "minimum": low, "maximum": high}


def schema_of_rows(backend, depth):
    """Return a JSON schema of lists that stand for the schemas that a library takes.

    hypothesis-jsonschema draws from it. It draws no objects with this hypothesis, whose internals
    it relies on, and no references.
    """
    text = {"type": "string", "maxLength": 5}
    value = {"anyOf": [_number(-999, 999), {"type": "boolean"}, {"type": "null"}, text]}
    values = {"type": "array", "items": value, "minItems": 1, "maxItems": 4, "uniqueItems": True}
    kinds = [
        _row("type", {"enum": ["boolean", "null", "integer"]}),
        _row("enum", values),
        _row("const", value),
    ]
    if backend != "xgrammar":
        kinds.append(_row("string", _number(0, 6)))
    if backend == "llguidance":
        kinds.append(_row("integer", _number(-99, 0), _number(0, 999)))
    if depth:
        inner = schema_of_rows(backend, depth - 1)
        name = {"type": "string", "pattern": "^[a-z]{1,6}$"}
        member = {"type": "array", "items": [name, inner], "minItems": 2, "maxItems": 2}
        kinds += [
            _row("object", {"type": "array", "items": member, "minItems": 1, "maxItems": 3}),
            _row("array", inner, _number(0, 1), _number(1, 2)),
            _row("anyOf", {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}),
        ]
    return {"anyOf": kinds}


def schema_of(row):
    """Return the schema that a list stands for."""
    kind, first, *others = row
    if kind == "object":
        properties = {name: schema_of(item) for name, item in first}
        return {"type": kind, "properties": properties, "required": [*properties], **NO_OTHERS}
    if kind == "array":
        least, most = others
        return {"type": kind, "items": schema_of(first), "minItems": least, "maxItems": most}
    if kind == "anyOf":
        return {kind: [schema_of(item) for item in first]}
    if kind == "integer":
        return {"type": kind, "minimum": first, "maximum": others[0]}
    return {"type": kind, "maxLength": first} if kind == "string" else {kind: first}


def regex_constraints(backend):
    patterns = REGEXES
    if backend == "xgrammar":  # it refuses the others
        patterns = REGEXES.filter(_is_known_to_xgrammar)
    return patterns.map(lambda pattern: {"regex": pattern})


def json_constraints(backend):
    if backend == "llguidance":
        return _schemas(SCALARS).map(lambda schema: {"json": schema})
    closed = SCALARS.filter(lambda schema: why_open(schema) is None)  # it refuses the others
    if backend == "xgrammar":
        closed = closed.filter(lambda schema: "maxLength" not in schema)
    schemas = _schemas(closed, names=st.text("abcé 1", min_size=1, max_size=4), fewest=1)
    return schemas.map(lambda schema: {"json": schema})


def drawn_json_constraints(backend):
    from_schema = pytest.importorskip("hypothesis_jsonschema").from_schema
    return from_schema(schema_of_rows(backend, 2)).map(lambda row: {"json": schema_of(row)})


KINDS = {
    "regex": regex_constraints,
    "schema": json_constraints,
    "schema by hypothesis-jsonschema": drawn_json_constraints,
}

OPTIONS = st.sampled_from(
    [
        *[{}, {"n": 2}, {"n": 3, "repetition_penalty": 1.3}, {"n": 4, "top_k": 50}],
        *[{"min_tokens": 4}, {"presence_penalty": 1.0, "frequency_penalty": -0.5}, {"logprobs": 1}],
        *[{"stop": ["~", "7"], "n": 2}, {"top_p": 0.9, "n": 3}],
    ]
)


def requests(backend, kind):
    """Return lists of constraints, each with what else its requests ask for."""
    spaces = [{"disable_any_whitespace": True}]
    if backend != "xgrammar":
        spaces.append({"whitespace_pattern": "[ \n]?"})

    def constraint(wanted, space):
        space = space if "json" in wanted else {}
        return StructuredOutputsParams(**wanted, **space, backend=backend)

    one = st.builds(constraint, KINDS[kind](backend), st.sampled_from(spaces))
    return st.lists(st.tuples(one, OPTIONS).filter(_can_be_long), min_size=4, max_size=8)


def _can_be_long(wanted) -> bool:
    """Whether a text of some tokens is asked for only where it need not be empty."""
    constraint, options = wanted
    may_be_empty = constraint.regex is not None and re.fullmatch(constraint.regex, "")
    return "min_tokens" not in options or not may_be_empty


@dataclass
class Model:
    """A model, and what it says without constraints."""

    llm: LLM
    prompt: dict
    vocabulary: Vocabulary = field(init=False)
    backends: dict = field(default_factory=dict)

    def __post_init__(self):
        limits = self.llm.engine_loop.engine.limits
        self.vocabulary = Vocabulary(self.llm.get_tokenizer(), limits.vocab_size)
        [alone] = self.llm.generate([self.prompt], PLAIN, use_tqdm=False)
        self.plain = alone.outputs[0].token_ids

    def generate(self, wanted, seed):
        many = [
            SamplingParams(
                structured_outputs=constraint,
                **{"temperature": 1.5, "seed": seed + i, "max_tokens": MAX_TOKENS, **options},
            )
            for i, (constraint, options) in enumerate(wanted)
        ]
        prompts = [self.prompt] * (len(many) + 1)
        *outputs, other = self.llm.generate(prompts, [*many, PLAIN], use_tqdm=False)
        assert other.outputs[0].token_ids == self.plain
        return [output.outputs for output in outputs]

    def complete(self, constraint, token_ids) -> str:
        """Walk from an unfinished text through its grammar to some end; return the whole text."""
        vocabulary = self.vocabulary
        if constraint.backend not in self.backends:
            loaded = load_constraint_backend(constraint.backend, vocabulary, 30.0)
            self.backends[constraint.backend] = loaded
        matcher = self.backends[constraint.backend].compile(constraint.spec).start()
        matcher.accept(token_ids)
        rng = random.Random(0)
        row = np.zeros(vocabulary.num_words, dtype=np.int32)
        closing = [i for i, t in enumerate(vocabulary.tokens) if t in (b'"', b"}", b"]", b",")]
        token_ids = list(token_ids)
        for _ in range(2000):
            if matcher.is_accepting():
                return b"".join(vocabulary.tokens[i] for i in token_ids).decode()
            matcher.fill_mask(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[: vocabulary.end_id])
            assert len(allowed), "a dead end"
            preferred = [i for i in closing if bits[i]]
            choice = int(rng.choice(preferred or allowed.tolist()))
            matcher.accept([choice])
            token_ids.append(choice)
        raise AssertionError("no end in sight")


@pytest.fixture(scope="module")
def models(llm):
    demo = []

    def get(name):
        if name == "random weights":
            return random_weights
        if not demo:
            demo.append(LLM("quire/demo", max_model_len=192))
            demo.append(Model(demo[0], {"prompt": "Say something. "}))
        return demo[1]

    random_weights = Model(llm, {"prompt_token_ids": [1, 40, 41, 42]})
    yield get
    if demo:
        demo[0].close()


def matches(constraint, text) -> bool:
    if constraint.regex is not None:
        return re.fullmatch(constraint.regex, text) is not None
    import jsonschema

    return jsonschema.Draft202012Validator(constraint.json).is_valid(json.loads(text))


def check(model, backend, kind, num_examples) -> Counter:
    """Generate, and hold every text against its constraint; return how many there were."""
    pytest.importorskip(backend)
    pytest.importorskip("jsonschema")
    tally: Counter = Counter()

    @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(wanted=requests(backend, kind), seed=st.integers(0, 2**32))
    def run(wanted, seed):
        for (constraint, _), completions in zip(wanted, model.generate(wanted, seed), strict=True):
            for completion in completions:
                was_stopped = completion.stop_reason is not None
                if completion.finish_reason == "stop" and not was_stopped:
                    tally["finished"] += 1
                    assert matches(constraint, completion.text), (constraint, completion.text)
                    continue
                assert was_stopped or completion.finish_reason == "length"
                tally["stopped" if was_stopped else "cut"] += 1
                text = model.complete(constraint, completion.token_ids)
                assert matches(constraint, text), (constraint, text)

    run()
    assert tally["finished"] >= 0.8 * (tally["finished"] + tally["cut"]), tally
    return tally


# Those that take longer to compile are tried less.
FEW = {"llguidance": 20, "outlines_core": 4, "xgrammar": 8}
MANY = {"llguidance": 60, "outlines_core": 40, "xgrammar": 60}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_match_what_they_have_to(models, backend, kind):
    check(models("random weights"), backend, kind, FEW[backend])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_demo_model_match_what_they_have_to(models, kind):
    check(models("demo"), "llguidance", kind, 5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_texts_match_what_they_have_to(models, backend, capsys):
    """On both models; the counts go into the README."""
    total: Counter = Counter()
    for name in ("random weights", "demo"):
        for kind in KINDS:
            tally = check(models(name), backend, kind, MANY[backend])
            total += tally
            with capsys.disabled():
                print(f"\n{backend}, {name}, {kind}: {dict(tally)}", end="")
    while sum(total.values()) < 2000:  # how many there are in a list is drawn, too
        total += check(models("random weights"), backend, "regex", MANY[backend])
    with capsys.disabled():
        print(f"\n{backend}: {sum(total.values())} generations, {dict(total)}")
