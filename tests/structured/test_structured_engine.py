"""Constrained requests in a running engine: beside others, and with all else that can be asked."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time

import pytest
import torch

from quire import (
    LLM,
    InvalidRequestError,
    RequestFailedError,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

PROMPT = {"prompt_token_ids": [1, 40, 41, 42]}
EOS = 2
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def params(constraint, **options):
    options.setdefault("max_tokens", 120)
    options.setdefault("temperature", 1.5)
    if isinstance(constraint, str):
        constraint = {"regex": constraint}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint), **options)


def run(llm, *many):
    return llm.generate([PROMPT] * len(many), list(many), use_tqdm=False)


def one(llm, constraint, **options):
    [output] = run(llm, params(constraint, **options))
    return output.outputs[0]


def collect(llm, many, seconds=30.0):
    """Run requests together; return of each its last output, or what ended it."""
    loop = llm.engine_loop
    done = threading.Event()
    results: dict[int, object] = {}
    items = []

    def sink_for(i):
        def sink(news):
            if isinstance(news, BaseException) or news.finished:
                results[i] = news
                if len(results) == len(many):
                    done.set()

        return sink

    for i, each in enumerate(many):
        request = loop.engine.processor.process(PROMPT, each, request_id=f"{id(many)}-{i}")
        items.append((request, sink_for(i)))
    loop.submit(items)
    assert done.wait(seconds)
    return [results[i] for i in range(len(many))]


PLAIN = SamplingParams(temperature=1.5, seed=5, max_tokens=30, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def plain(llm):
    """What an unconstrained request says when it is alone."""
    return run(llm, PLAIN)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": DATE}, DATE),
        ({"regex": rf"^{DATE}$"}, DATE),
        ({"choice": ["Berlin", "Bern", "Be", 'quo"te\n', "\u007f\\", "Zürich"]}, None),
        ({"grammar": 'start: "a" b+\nb: "b" | "c" b\n'}, "ab(b|c)*"),
        ({"grammar": 'root ::= "a" b b?\nb ::= [b-d] | "x"\n'}, "a[b-dx]{1,2}"),
        ({"regex": r"[^\w\s]{1,3}\W\w"}, r"[^\w\s]{1,3}\W\w"),
        ({"regex": r"[&[\]^-]{3}x{,2}"}, r"[&[\]^-]{3}x{,2}"),
    ],
)
def test_texts_match(llm, plain, constraint, pattern):
    """In one batch with an unconstrained request, whose tokens do not change."""
    many = [params(constraint, seed=i) for i in range(6)]
    *outputs, other = run(llm, *many, PLAIN)
    for output in outputs:
        text = output.outputs[0].text
        if output.outputs[0].finish_reason == "stop":
            if pattern is None:
                assert text in constraint["choice"]
            else:
                assert re.fullmatch(pattern, text)
    assert sum(o.outputs[0].finish_reason == "stop" for o in outputs) >= 4
    assert other.outputs[0].token_ids == plain


def test_json_is_valid_and_whitespace_is_as_asked(llm):
    jsonschema = pytest.importorskip("jsonschema")
    kinds = [{"disable_any_whitespace": True}, {"whitespace_pattern": " ?"}]
    for options in kinds:
        outputs = run(llm, *(params({"json": PERSON, **options}, seed=i) for i in range(8)))
        done = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
        assert len(done) >= 6
        for text in done:
            value = json.loads(text)
            jsonschema.validate(value, PERSON)
            if "disable_any_whitespace" in options:
                assert text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or (
                    "\\" in text
                )


def test_any_json_object(llm):
    constraint = {"json_object": True, "disable_any_whitespace": True}
    outputs = run(llm, *(params(constraint, seed=i, temperature=1.0) for i in range(8)))
    done = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in done)


def test_a_tag_constrains_what_it_begins_and_nothing_else(llm):
    """Free text, then what a trigger starts is as its schema says, then free text."""
    tag = {
        "structures": [{"begin": "q=", "schema": {"enum": [1, 2]}, "end": ";"}],
        "triggers": ["q"],
    }
    outputs = run(llm, *(params({"structural_tag": tag}, seed=i, max_tokens=80) for i in range(20)))
    found = 0
    for output in outputs:
        for match in re.finditer("q(.{3})", output.outputs[0].text, re.DOTALL):
            found += 1
            assert match[1] in ("=1;", "=2;")
    assert found


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("only_first", [False, True])
def test_a_constraint_may_start_after_a_marker(llm, tokenizer, needed, only_first):
    """Free thought, then what the schema says; the flags say whether it must come, and be last."""
    tag = {
        "structures": [{"begin": "q", "schema": {"enum": ["yes", "no"]}, "end": ""}],
        "triggers": ["q"],
        "at_least_one": needed,
        "stop_after_first": only_first,
    }
    likelier = {tokenizer.encode_fragment("q")[0]: 3.0, EOS: 2.0}
    many = [
        params({"structural_tag": tag}, seed=i, max_tokens=120, logit_bias=likelier)
        for i in range(24)
    ]
    texts = [o.outputs[0].text for o in run(llm, *many) if o.outputs[0].finish_reason == "stop"]
    assert len(texts) >= 4
    answer = '(q("yes"|"no"))'
    times = f"{answer}{'' if needed else '?'}" if only_first else f"({answer}[^q]*)*"
    if needed and not only_first:
        times = f"{answer}[^q]*{times}"
    assert all(re.fullmatch(f"[^q]*{times}", text) for text in texts), texts
    assert any('q"' in text for text in texts)
    assert needed is all('q"' in text for text in texts)
    if only_first:
        assert all(text.endswith(('"yes"', '"no"')) for text in texts if 'q"' in text)


def test_a_special_token_without_a_role_or_angle_brackets_is_a_marker(tiny_llama, tmp_path):
    """Such as tokenizers have for the calls of tools: the token itself, and not its letters."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    [call, *others] = ["[CALLS]", "<call it>", "<|call|>"]
    first = max(tokenizer["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": first + i, "content": name, "special": True, **flags}
        for i, name in enumerate([call, *others])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with LLM(folder, dtype="float32") as engine:
        for i, name in enumerate([call, *others]):
            tag = {
                "structures": [{"begin": f"{name}f", "schema": {"enum": [1, 2]}, "end": ";"}],
                "triggers": [name],
                "at_least_one": True,
                "stop_after_first": True,
            }
            likelier = {first + i: 9.0}
            completion = one(engine, {"structural_tag": tag}, seed=1, logit_bias=likelier)
            assert completion.finish_reason == "stop"
            assert first + i in completion.token_ids
            assert re.search("f[12];$", completion.text)


def test_texts_end_where_nothing_may_follow_and_may_end_only_where_the_grammar_accepts(llm):
    """Also with ignore_eos, before min_tokens, and where max_tokens is just reached."""
    for options in ({}, {"ignore_eos": True}, {"min_tokens": 20}, {"max_tokens": 3}):
        completion = one(llm, "[a]{3}", **options)
        assert (completion.text, completion.finish_reason) == ("aaa", "stop")
        assert completion.stop_reason is None
    cut = one(llm, "[ab]{9}", max_tokens=4)
    assert cut.finish_reason == "length"
    assert re.fullmatch("[ab]{4,8}", cut.text)
    assert EOS not in cut.token_ids


def test_min_tokens_keeps_an_optional_end_away(llm):
    for seed in range(8):
        completion = one(llm, "a*", min_tokens=5, max_tokens=12, seed=seed, temperature=0.01)
        assert re.fullmatch("a*", completion.text)
        assert len(completion.token_ids) >= 5


def test_eos_is_likeliest_and_yet_waits(llm):
    """A bias for the end of the text does not end it early, and ends it as soon as it may."""
    completion = one(llm, "[0-9]{2}[a-z]*", logit_bias={EOS: 1000.0})
    assert re.fullmatch("[0-9]{2}", completion.text)
    assert completion.finish_reason == "stop"


def everything_at_once(vocab_size=304):
    def raise_all(token_ids, logits):
        return torch.full_like(logits, 5.0)

    def infinite(token_ids, logits):
        logits[7] = torch.inf
        return logits

    return [
        {"temperature": 0},
        {"logit_bias": {7: 1000.0, 90: -5.0}},
        {"allowed_token_ids": list(range(5, 290))},
        {"bad_words": ["0"]},
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0},
        {"top_k": 1},
        {"top_p": 0.1, "min_p": 0.1},
        {"logits_processors": [raise_all]},
        {"logits_processors": [infinite]},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"min_tokens": 3},
        {"skip_special_tokens": False},
        {"n": 3},
        {"n": 2, "best_of": 4},
        {"stop_token_ids": [EOS, 260]},
        {"output_kind": RequestOutputKind.FINAL_ONLY},
    ]


@pytest.mark.parametrize("options", everything_at_once(), ids=lambda o: "-".join(o))
def test_no_other_parameter_lets_a_wrong_token_through(llm, plain, options):
    many = [params(DATE, seed=i, **options) for i in range(3)]
    *outputs, other = run(llm, *many, PLAIN)
    for output in outputs:
        assert len(output.outputs) == options.get("n", 1)
        for completion in output.outputs:
            assert completion.finish_reason == "stop"
            assert re.fullmatch(DATE, completion.text)
            if "bad_words" in options:
                assert "0" not in completion.text.partition("-")[0]
            if "logprobs" in options:
                assert len(completion.logprobs) == len(completion.token_ids)
    assert other.outputs[0].token_ids == plain


def test_a_stop_string_ends_a_text_half_way(llm):
    completion = one(llm, DATE, stop="-")
    assert re.fullmatch("[0-9]{4}", completion.text)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "-")


def test_what_else_forbids_every_token_fails_the_request_alone(llm, plain):
    """Rather than a token that the grammar does not allow, there is none."""
    good, bad = params(DATE, seed=1), params("[a]{3}", allowed_token_ids=[7])
    constrained, error, unconstrained = collect(llm, [good, bad, PLAIN])
    assert isinstance(error, RequestFailedError)
    assert "no token is allowed: structured_outputs" in str(error)
    assert re.fullmatch(DATE, constrained.outputs[0].text)
    assert unconstrained.outputs[0].token_ids == plain


def test_seeds_repeat_and_samples_differ(llm):
    first, second = (run(llm, params(DATE, seed=3, n=4))[0] for _ in range(2))
    texts = [c.text for c in first.outputs]
    assert texts == [c.text for c in second.outputs]
    assert len(set(texts)) > 1


WAYS = {
    "alone": {"max_num_seqs": 1},
    "chunks": {"max_num_batched_tokens": 3},
    "scarce blocks": {"num_gpu_blocks_override": 24, "max_model_len": 80},
    "no cache": {
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
        "enable_prefix_caching": False,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_texts_do_not_depend_on_how_requests_are_run(llm, tiny_llama, way):
    """Preempted sequences stand where they stood in their grammar when they come back."""

    def texts(llm):
        many = [params(DATE, seed=i, n=1 + i % 3, max_tokens=40) for i in range(6)]
        many += [params({"json": PERSON}, seed=i, max_tokens=40) for i in range(4)]
        many += [PLAIN, params({"choice": ["yes", "no"]}, temperature=0)]
        return [[(c.text, c.finish_reason) for c in o.outputs] for o in run(llm, *many)]

    with LLM(tiny_llama, dtype="float32", block_size=4, **WAYS[way]) as other:
        assert texts(other) == texts(llm)
        if "num_gpu_blocks_override" in WAYS[way]:
            assert other.get_metrics()["num_preemptions"] > 0


def test_beams_each_stand_in_the_grammar_on_their_own(llm, plain):
    """Every hypothesis matches, and what a search without a grammar finds does not change."""
    free = SamplingParams(n=3, use_beam_search=True, max_tokens=6)
    [expected] = run(llm, free)
    beams = params("[ab]{2}(c|d[0-9])", n=4, use_beam_search=True, temperature=0, max_tokens=20)
    searched, unconstrained, other = run(llm, beams, free, PLAIN)
    assert len(searched.outputs) == 4
    for completion in searched.outputs:
        assert re.fullmatch("[ab]{2}(c|d[0-9])", completion.text)
        assert completion.finish_reason == "stop"
    assert len({c.text for c in searched.outputs}) > 1
    assert [c.token_ids for c in unconstrained.outputs] == [c.token_ids for c in expected.outputs]
    assert other.outputs[0].token_ids == plain
    endless = params("a", n=2, use_beam_search=True, temperature=0, ignore_eos=True)
    with pytest.raises(InvalidRequestError, match="use_beam_search must be False"):
        run(llm, endless)


BAD = {
    "invalid regex": {"regex": "a(b"},
    "back-reference": {"regex": r"(a)\1"},
    "look-around": {"regex": "(?=a)b"},
    "regex of catastrophic size": {"regex": r"(\w{1,500}-?){1,500}{1,500}{1,500}{1,500}"},
    "invalid schema": {"json": {"type": "nonsense"}},
    "unsupported keyword": {"json": {"type": "array", "uniqueItems": True}},
    "schema that matches nothing": {"json": "false"},
    "oneOf that would be anyOf": {
        "json": {
            "x-guidance": {"coerce_one_of": True},
            "oneOf": [{"minLength": 1}, {"maxLength": 9}],
        }
    },
    "keyword that would be dropped": {
        "json": {"x-guidance": {"lenient": True}, "type": "array", "contains": {}}
    },
    "integer that would be rounded": {"json": {"enum": [1, 9007199254740993]}},
    "GBNF of very many rules": {"grammar": 'root ::= "a"\n' * 5000},
    "reference to nowhere": {"json": {"$ref": "#/$defs/missing"}},
    "reference to the net": {"json": {"$ref": "https://example.com/schema.json"}},
    "undefined rule": {"grammar": "start: missing"},
    "undefined rule in GBNF": {"grammar": "root ::= missing"},
    "malformed grammar": {"grammar": 'start: "a'},
    "malformed GBNF": {"grammar": "root = a"},
    "grammar without end": {"grammar": 'start: "a" start'},
    "special token that is none": {"grammar": 'start: <|nonsense|> "a"'},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_fails_its_request_alone_with_a_reason(llm, plain, name):
    """Others in its batch, constrained or not, finish as if it had not been."""
    good = params(DATE, seed=4)
    expected = run(llm, good)[0].outputs[0].text
    loop_outputs = collect(llm, [params(BAD[name]), good, PLAIN])
    error, constrained, unconstrained = loop_outputs
    if name == "regex of catastrophic size" and not isinstance(error, RequestFailedError):
        # A text may end before the library has to look at more of it than it is ready to.
        assert re.fullmatch(r"(\w+-?)+", error.outputs[0].text)
    else:
        assert isinstance(error, RequestFailedError)
        [kind] = BAD[name]
        assert kind in str(error) or "structured_outputs" in str(error)
        assert "llguidance" in str(error)
    assert constrained.outputs[0].text == expected
    assert unconstrained.outputs[0].token_ids == plain


def test_recursive_schemas_are_enforced(llm):
    schema = {
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
    completion = one(llm, {"json": schema, "disable_any_whitespace": True}, seed=1)
    if completion.finish_reason == "stop":
        assert "next" in json.loads(completion.text)
    else:
        assert completion.text.startswith('{"next":')


def test_others_are_not_held_up_by_a_grammar_that_takes_its_time(llm, plain, monkeypatch):
    """A request without one finishes while one is being compiled; one past its deadline fails."""
    from quire.structured import llguidance_backend

    compile_ = llguidance_backend.Backend.compile

    def slow(self, spec):
        if spec.text == "slow":
            time.sleep(1.0)
        return compile_(self, spec)

    monkeypatch.setattr(llguidance_backend.Backend, "compile", slow)
    constraints = llm.engine_loop.engine._constraints
    monkeypatch.setattr(constraints._compiler, "deadline", 0.3)
    started = time.monotonic()
    late, good, other = collect(llm, [params("slow"), params("fast[0-9]"), PLAIN])
    assert time.monotonic() - started < 1.0
    assert "structured_outputs_deadline=0.3" in str(late)
    assert good.outputs[0].text.startswith("fast")
    assert other.outputs[0].token_ids == plain


def test_a_request_can_be_aborted_while_it_waits_for_its_grammar(llm, monkeypatch):
    from quire.structured import llguidance_backend

    compile_ = llguidance_backend.Backend.compile

    def slow(self, spec):
        time.sleep(0.3)
        return compile_(self, spec)

    monkeypatch.setattr(llguidance_backend.Backend, "compile", slow)
    loop = llm.engine_loop
    request = loop.engine.processor.process(PROMPT, params("later"), request_id="waiting")
    seen = []
    loop.submit([(request, seen.append)])
    loop.abort(["waiting"])
    loop.call(lambda engine: engine.check_integrity())
    assert seen[-1].outputs[0].finish_reason == "abort"
    assert not loop.call(lambda engine: engine.has_unfinished_requests)
    assert one(llm, "a").text == "a"


def test_an_engine_without_a_tokenizer_refuses_at_once(tiny_llama):
    with (
        LLM(tiny_llama, dtype="float32", skip_tokenizer_init=True) as llm,
        pytest.raises(InvalidRequestError, match="structured_outputs must be empty"),
    ):
        run(llm, params("a"))


def test_streamed_pieces_make_up_the_text(llm):
    """Deltas of a constrained request are those of any other."""
    constraint = params({"json": PERSON}, seed=2, output_kind=RequestOutputKind.DELTA)
    whole = one(llm, {"json": PERSON}, seed=2)
    loop = llm.engine_loop
    pieces = []
    request = loop.engine.processor.process(PROMPT, constraint, request_id="deltas")
    done = threading.Event()

    def sink(news):
        pieces.append(news.outputs[0].text)
        if news.finished:
            done.set()

    loop.submit([(request, sink)])
    assert done.wait(30)
    assert "".join(pieces) == whole.text


def test_the_demo_model_answers_in_the_form_that_is_asked_for():
    """With its own vocabulary and in its own precision; the threads end with the engine."""
    of_others = set(threading.enumerate())
    with LLM("quire/demo", max_model_len=128) as llm:
        many = [params(DATE, seed=i, temperature=1.5) for i in range(4)]
        many += [params({"json": PERSON, "disable_any_whitespace": True}, seed=i) for i in range(4)]
        many += [params({"choice": ["Paris", "Rome"]}, temperature=0)]
        prompts = ["What is the capital of France?"] * len(many)
        outputs = llm.generate(prompts, many, use_tqdm=False)
        for output in outputs[:4]:
            assert re.fullmatch(DATE, output.outputs[0].text)
        for output in outputs[4:8]:
            assert set(json.loads(output.outputs[0].text)) == {"name", "age"}
        assert outputs[8].outputs[0].text in ("Paris", "Rome")
        before = {thread.name for thread in threading.enumerate()}
        assert any(name.startswith("quire-masks") for name in before)
        engine = llm.llm_engine
    assert engine._constraints._filler is None
    assert not any("quire-compiler" in each.name for each in {*threading.enumerate()} - of_others)
