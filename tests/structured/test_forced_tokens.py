"""Text that a grammar forces: computed as drafts without changing a result, or written outright."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import LLM, InvalidRequestError, SamplingParams, StructuredOutputsParams

PROMPT = {"prompt_token_ids": [1, 40, 41, 42, 43]}
PERSON = {
    "type": "object",
    "properties": {
        "full name": {"type": "string", "maxLength": 8},
        "is employed": {"type": "boolean"},
        "kind": {"const": "a person of this world"},
    },
    "required": ["full name", "is employed", "kind"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    {"json": PERSON, "disable_any_whitespace": True},
    {"json": PERSON},
    {"regex": "The answer is (yes|no), and that is final\\."},
    {"choice": ["Berlin, the capital", "Berlin, the city", "Bern"]},
    {"regex": "[a-c]{3} and then [0-9]{1,12}"},
    {"regex": "wholly forced, from its first to its last letter"},
]


def run(llm, many, prompts=None):
    outputs = llm.generate(prompts or [PROMPT] * len(many), many, use_tqdm=False)
    return [
        (c.text, c.token_ids, c.finish_reason, c.stop_reason, logprobs(c))
        for output in outputs
        for c in output.outputs
    ]


def logprobs(completion):
    if completion.logprobs is None:
        return None
    return [
        {id_: pytest.approx(each.logprob, abs=1e-4) for id_, each in entries.items()}
        for entries in completion.logprobs
    ]


def metric(llm, name):
    return llm.get_metrics()[name]


@pytest.fixture(scope="module")
def engines(tiny_llama):
    """The same engine with drafts and without; small, so that sequences are preempted."""
    options = {
        "dtype": "float32",
        "block_size": 4,
        "num_gpu_blocks_override": 40,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 6,
    }
    with (
        LLM(tiny_llama, **options) as drafting,
        LLM(tiny_llama, structured_outputs_forced_tokens=False, **options) as plain,
    ):
        yield drafting, plain


@st.composite
def requests(draw):
    """Parameters in which the tokens before decide about the next one, in every way there is."""
    options = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "seed": draw(st.integers(0, 3)),
        "max_tokens": draw(st.integers(1, 70)),
        "structured_outputs": StructuredOutputsParams(**draw(st.sampled_from(CONSTRAINTS))),
    }
    extra = draw(st.sampled_from(["", "n", "penalty", "logprobs", "stop", "processor", "min"]))
    if extra == "n" and options["temperature"]:
        options["n"] = 3
    elif extra == "penalty":
        options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4}
    elif extra == "logprobs":
        options["logprobs"] = 2
    elif extra == "stop":
        options["stop"] = ["e", "n"]
    elif extra == "processor":
        options["logits_processors"] = [lambda ids, logits: logits * (1 + len(ids) % 3)]
    elif extra == "min":
        options |= {"min_tokens": 1, "bad_words": ["a"]}
    return SamplingParams(**options)


@settings(max_examples=40, deadline=None)
@given(many=st.lists(requests(), min_size=1, max_size=8))
def test_drafts_change_no_result(engines, many):
    """Whatever is asked, in small memory and beside others: texts, tokens and logprobs."""
    drafting, plain = engines
    results = []
    for llm in engines:
        try:
            results.append(run(llm, many))
        except Exception as error:  # such as bad_words that leave nothing
            results.append(str(error).split("failed:")[1])
    assert results[0] == results[1]
    drafting.llm_engine.check_integrity()
    assert metric(plain, "num_forced_tokens") == 0


def test_drafts_are_proposed_and_kept_and_thrown_away(engines):
    """The runs before had all of it, so that they can have found something."""
    drafting, _ = engines
    run(drafting, [SamplingParams(structured_outputs={"json": PERSON}, max_tokens=70, seed=1)] * 8)
    proposed = metric(drafting, "num_forced_tokens")
    assert proposed > metric(drafting, "num_accepted_forced_tokens") > 0


def test_a_very_long_forced_text_has_few_drafts_in_a_step(engines):
    """The mask of each takes as long as the text is, and other requests wait for it."""
    drafting, _ = engines
    for length, most in ((1_000, 32), (30_000, 2)):
        steps, drafts = metric(drafting, "num_steps"), metric(drafting, "num_forced_tokens")
        wanted = StructuredOutputsParams(choice=["z" * length])
        run(drafting, [SamplingParams(temperature=1.0, max_tokens=40, structured_outputs=wanted)])
        steps = metric(drafting, "num_steps") - steps
        drafts = metric(drafting, "num_forced_tokens") - drafts
        assert 0 < drafts <= most * steps


@pytest.mark.parametrize("backend", ["llguidance", "outlines_core", "xgrammar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_writes_as_its_tokenizer_does_needs_fewer_steps(demo, backend, temperature):
    """And says the same; a backend proposes only what it knows to be forced."""
    pytest.importorskip(backend)
    drafting, plain = demo
    wanted = StructuredOutputsParams(
        json=json.dumps(
            {
                "type": "object",
                "properties": {"name": {"enum": ["Paris", "Rome"]}, "country": {"type": "boolean"}},
                "required": ["name", "country"],
                "additionalProperties": False,
            }
        ),
        disable_any_whitespace=True,
        backend=backend,
    )
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=40, structured_outputs=wanted)
        for i in range(4)
    ]
    before = metric(drafting, "num_steps"), metric(plain, "num_steps")
    texts = ["As JSON: "] * len(params)
    results = [llm.generate(texts, params, use_tqdm=False) for llm in (drafting, plain)]
    first, second = ([o.outputs[0].token_ids for o in outputs] for outputs in results)
    assert first == second
    steps = metric(drafting, "num_steps") - before[0], metric(plain, "num_steps") - before[1]
    assert steps[0] < steps[1]
    if backend == "llguidance":
        assert steps[0] <= 0.7 * steps[1]


@pytest.fixture(scope="module")
def demo():
    with (
        LLM("quire/demo") as drafting,
        LLM("quire/demo", structured_outputs_forced_tokens=False) as plain,
    ):
        yield drafting, plain


# -- canonical tokens ------------------------------------------------------------------------------


def canonical(wanted, **options):
    options.setdefault("max_tokens", 70)
    options.setdefault("temperature", 1.0)
    return SamplingParams(
        structured_outputs=StructuredOutputsParams(**wanted, canonical_tokens=True), **options
    )


def test_canonical_text_is_in_the_tokenizers_own_tokens(engines):
    """What the schema leaves no choice about is written as the tokenizer writes it."""
    llm, _ = engines
    tokenizer = llm.get_tokenizer()
    before = metric(llm, "num_canonical_tokens")
    results = run(llm, [canonical(CONSTRAINTS[0], seed=i) for i in range(6)])
    opening = tokenizer.encode_fragment('{"full name":"')
    whole = 0
    for text, token_ids, finish_reason, _, _ in results:
        assert token_ids[: len(opening) - 1] == opening[:-1]
        if finish_reason == "stop":
            assert json.loads(text)["kind"] == PERSON["properties"]["kind"]["const"]
            whole += 1
    assert whole >= 4
    assert metric(llm, "num_canonical_tokens") > before
    llm.llm_engine.check_integrity()


def test_canonical_text_that_is_forced_throughout_takes_no_step(engines):
    llm, _ = engines
    before = metric(llm, "num_computed_tokens")
    [(text, token_ids, finish_reason, _, _)] = run(llm, [canonical(CONSTRAINTS[5])])
    assert text == CONSTRAINTS[5]["regex"]
    assert finish_reason == "stop"
    assert token_ids == llm.get_tokenizer().encode_fragment(text)
    assert metric(llm, "num_computed_tokens") == before


def test_canonical_text_ends_where_the_request_says(engines):
    """By length, by a stop string, and each of n samples for itself."""
    llm, _ = engines
    forced = CONSTRAINTS[5]
    [(text, token_ids, finish_reason, _, _)] = run(llm, [canonical(forced, max_tokens=5)])
    assert (len(token_ids), finish_reason) == (5, "length")
    assert forced["regex"].startswith(text)
    [(text, _, finish_reason, stop, _)] = run(llm, [canonical(forced, stop=["from"])])
    assert (text, finish_reason, stop) == ("wholly forced, ", "stop", "from")
    results = run(llm, [canonical(CONSTRAINTS[0], n=3, seed=2)])
    assert len({text for text, *_ in results}) > 1


def test_canonical_text_goes_on_after_its_tokens_were_preempted(engines):
    """Many at once in a small memory say what each says alone."""
    llm, _ = engines
    many = [canonical(CONSTRAINTS[0], seed=i) for i in range(12)]
    before = metric(llm, "num_preemptions")
    prompts = [{"prompt_token_ids": [1, 40 + i, 41, 42]} for i in range(12)]
    together = run(llm, many, prompts)
    assert metric(llm, "num_preemptions") > before
    alone = [run(llm, [one], [prompt])[0] for one, prompt in zip(many, prompts, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logprobs", {"logprobs": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("use_beam_search", {"use_beam_search": True, "n": 2}),
        ("best_of", {"n": 2, "best_of": 3}),
    ],
)
def test_canonical_tokens_refuse_what_needs_the_models_word(name, options):
    with pytest.raises(InvalidRequestError, match=f"{name} must be .* with canonical_tokens"):
        SamplingParams(structured_outputs={"regex": "a", "canonical_tokens": True}, **options)
    with pytest.raises(InvalidRequestError, match="canonical_tokens must be True or False"):
        StructuredOutputsParams(regex="a", canonical_tokens=1)


# -- tokenizers that do not give back what they read -----------------------------------------------


@pytest.fixture(scope="module", params=["NFC", "Lowercase", None])
def normalizing(request, tiny_llama, tmp_path_factory):
    """An engine whose tokenizer normalizes, or reads special tokens out of a text."""
    folder = tmp_path_factory.mktemp("normalizing") / "model"
    shutil.copytree(tiny_llama, folder)
    if request.param is not None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": request.param}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with LLM(folder, dtype="float32", block_size=4) as llm:
        yield llm


@pytest.mark.parametrize("backend", ["llguidance", "outlines_core", "xgrammar"])
@pytest.mark.parametrize("canonical_tokens", [False, True])
def test_forced_text_comes_as_it_is_whatever_its_tokenizer_makes_of_it(
    normalizing, backend, canonical_tokens
):
    """Letters with marks of their own, capitals, and the names of special tokens."""
    pytest.importorskip(backend)
    for text in ("E\u0301tude, de\u0301ja\u0300 VU", "before <|end|> and after <|bos|>"):
        wanted = StructuredOutputsParams(
            choice=[text], backend=backend, canonical_tokens=canonical_tokens
        )
        params = SamplingParams(temperature=1.0, max_tokens=80, structured_outputs=wanted)
        [(got, _, finish_reason, _, _)] = run(normalizing, [params])
        assert (got, finish_reason) == (text, "stop")
