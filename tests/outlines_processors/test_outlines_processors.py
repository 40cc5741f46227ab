"""Outlines' processors in a running batch: each sequence is followed by a state of its own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError, NotSupportedError, RequestFailedError

pytest.importorskip("outlines", reason="the library `outlines` is not installed")
# Outlines sets an option of torch's compiler, whose import warns of what torch itself uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

BACKENDS = ["llguidance", "outlines_core", "xgrammar"]
REGEX = r"[a-c]{2,9}[0-9]{1,5}"
OPTIONS = {"dtype": "float32", "block_size": 4, "max_model_len": 80}


@pytest.fixture(scope="module")
def llm(tiny_llama: Any) -> Any:
    with LLM(tiny_llama, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def processors(llm: LLM) -> Any:
    """Outlines' own, by backend, for REGEX."""
    from outlines.types import Regex

    from quire.integrations.outlines.processors import outlines_processor

    made: dict[str, Any] = {}

    def get(backend: str) -> Any:
        pytest.importorskip(backend, reason=f"{backend} is not installed")
        if backend not in made:
            made[backend] = outlines_processor(llm, Regex(REGEX), backend)
        return made[backend]

    return get


def make_params(processor: Any, seed: int, **fields: Any) -> SamplingParams:
    defaults = {"temperature": 1.5, "seed": seed, "max_tokens": 40}
    return SamplingParams(logits_processors=[processor], **{**defaults, **fields})


def texts(llm: LLM, params: Any, prompts: int = 1) -> list[tuple[str, str | None]]:
    outputs = llm.generate([[5 + i, 6, 7] for i in range(prompts)], params, use_tqdm=False)
    return [(c.text, c.finish_reason) for output in outputs for c in output.outputs]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_text_matches_whatever_shares_the_batch(
    llm: LLM, tiny_llama: Any, processors: Any, backend: str
) -> None:
    """n samples, several requests of one processor, unconstrained neighbours: as if alone."""
    processor = processors(backend)
    params = [make_params(processor, seed, n=2) for seed in range(5)]
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=20, ignore_eos=True)
    together = texts(llm, [*params, free], prompts=6)
    for text, reason in together[:-1]:
        assert reason == "stop"
        assert re.fullmatch(REGEX, text)
    assert len({text for text, _ in together}) > 5
    with LLM(tiny_llama, max_num_seqs=1, **OPTIONS) as alone:
        assert texts(alone, [*params, free], prompts=6) == together


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_that_was_interrupted_goes_on_where_it_was(
    llm: LLM, tiny_llama: Any, processors: Any, backend: str
) -> None:
    """Preemption builds a new state from the tokens that there are."""
    params = [make_params(processors(backend), seed, n=3) for seed in range(8)]
    expected = texts(llm, params, prompts=8)
    with LLM(tiny_llama, num_gpu_blocks_override=21, **OPTIONS) as scarce:
        assert texts(scarce, params, prompts=8) == expected
        assert scarce.get_metrics()["num_preemptions"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_beams_have_states_of_their_own(llm: LLM, processors: Any, backend: str) -> None:
    """Each beam that branches off is followed from its first token."""
    params = SamplingParams(
        use_beam_search=True, n=3, max_tokens=30, logits_processors=[processors(backend)]
    )
    found = texts(llm, params)
    assert len({text for text, _ in found}) == 3
    assert all(re.fullmatch(REGEX, text) for text, reason in found if reason == "stop")
    assert any(reason == "stop" for _, reason in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_allows_what_the_engine_s_own_constraint_allows(
    llm: LLM, processors: Any, backend: str
) -> None:
    """Tokens that the one gives the other takes, and both end in the same places."""
    both = [
        make_params(processors(backend), seed, structured_outputs={"regex": REGEX})
        for seed in range(6)
    ]
    alone = [make_params(processors(backend), seed) for seed in range(6)]
    assert texts(llm, both, 6) == texts(llm, alone, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_are_made_to_processors_by_outlines(llm: LLM, backend: str) -> None:
    """By the types that Outlines has, and for a model that has more tokens than its tokenizer."""
    from outlines.types import JsonSchema

    from quire.integrations.outlines.processors import outlines_processor

    pytest.importorskip(backend, reason=f"{backend} is not installed")
    processor = outlines_processor(llm, JsonSchema({"enum": ["abc", 23, None]}), backend)
    found = texts(llm, [make_params(processor, seed) for seed in range(6)], 6)
    assert {reason for _, reason in found} == {"stop"}
    assert {json.loads(text) for text, _ in found} <= {"abc", 23, None}


def test_numpy_s_processors_are_given_arrays(llm: LLM, processors: Any) -> None:
    """As those for llama.cpp are."""
    from outlines.backends.llguidance import LLGuidanceLogitsProcessor

    from quire.integrations.outlines.processors import OutlinesProcessor

    own = processors("llguidance")._processor
    other = LLGuidanceLogitsProcessor(own.grammar, own.llg_tokenizer, "numpy")
    params = [make_params(OutlinesProcessor(other), seed) for seed in range(3)]
    expected = [make_params(processors("llguidance"), seed) for seed in range(3)]
    assert texts(llm, params, 3) == texts(llm, expected, 3)


def recorder(calls: list[Any]) -> Any:
    from outlines.processors import OutlinesLogitsProcessor

    class Recording(OutlinesLogitsProcessor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__("torch")
            self.history: list[list[int]] = []

        def reset(self) -> None:
            self.history.clear()

        def process_logits(self, input_ids: Any, logits: Any) -> Any:
            assert input_ids.shape[0] == logits.shape[0] == 1
            self.history.append(input_ids[0].tolist())
            calls.append(list(self.history))
            return logits

    return Recording()


@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 9), max_size=3)), max_size=12),
)
def test_a_processor_always_sees_each_token_once_and_in_order(
    start: list[int], edits: list[tuple[int, list[int]]]
) -> None:
    """Whatever of a sequence is taken back or asked again, its calls are those from the start."""
    from quire.integrations.outlines.processors import OutlinesProcessor

    calls: list[Any] = []
    original = recorder(calls)
    own = OutlinesProcessor(original).for_sequence()
    tokens = list(start)
    for back, more in [(0, [1]), *edits]:
        own([40, 41], list(tokens), torch.zeros(10))
        assert calls[-1] == [[40, 41, *tokens[:i]] for i in range(len(tokens) + 1)]
        tokens = [*tokens[: len(tokens) - min(back, len(tokens))], *more]
    assert not original.history


def test_a_call_that_follows_the_last_is_one_call() -> None:
    """Nothing is made again while a sequence goes on."""
    from quire.integrations.outlines.processors import OutlinesProcessor

    calls: list[Any] = []
    own = OutlinesProcessor(recorder(calls)).for_sequence()
    for length in range(20):
        own([1], list(range(length)), torch.zeros(30))
    assert len(calls) == 20


@pytest.mark.parametrize(("known", "have"), [(7, 10), (10, 7), (8, 8)])
def test_logits_that_a_processor_does_not_know_are_out_of_reach(known: int, have: int) -> None:
    """It is given as many as it knows, and of the model's others none can be chosen."""
    from outlines.processors import OutlinesLogitsProcessor

    from quire.integrations.outlines.processors import OutlinesProcessor

    class Widths(OutlinesLogitsProcessor):  # type: ignore[misc, unused-ignore]
        def process_logits(self, input_ids: Any, logits: Any) -> Any:
            assert logits.shape == (1, known)
            return logits + 1

    own = OutlinesProcessor(Widths("torch"), vocab_size=known).for_sequence()
    result = own([1], [], torch.arange(float(have)))
    assert result.shape == (have,)
    assert result[:known].tolist() == [float(i + 1) for i in range(min(known, have))]
    assert (result[known:] == -torch.inf).all()


def test_what_is_no_processor_is_refused() -> None:
    """By name, before a request is made of it."""
    from outlines.processors import OutlinesLogitsProcessor

    from quire.integrations.outlines.processors import OutlinesProcessor

    with pytest.raises(InvalidRequestError, match=r"OutlinesLogitsProcessor, got <function"):
        OutlinesProcessor(recorder)
    strange = OutlinesLogitsProcessor("torch")
    strange.tensor_adapter = object()
    with pytest.raises(NotSupportedError, match=r"make it for 'torch' or 'numpy'"):
        OutlinesProcessor(strange)


def test_a_processor_that_raises_fails_its_request_alone(llm: LLM, processors: Any) -> None:
    """Neighbours with Outlines' processors are not disturbed."""
    from outlines.processors import OutlinesLogitsProcessor

    from quire.integrations.outlines.processors import OutlinesProcessor

    class Broken(OutlinesLogitsProcessor):  # type: ignore[misc, unused-ignore]
        def process_logits(self, input_ids: Any, logits: Any) -> Any:
            if input_ids.shape[1] > 4:
                raise ZeroDivisionError("no way on")
            return logits

    good = make_params(processors("llguidance"), 3)
    bad = SamplingParams(
        max_tokens=9, ignore_eos=True, logits_processors=[OutlinesProcessor(Broken("torch"))]
    )
    [expected] = texts(llm, good)
    outputs = llm._run([[5, 6, 7], [5, 6, 7]], [good, bad], use_tqdm=False, return_errors=True)
    assert (outputs[0].outputs[0].text, outputs[0].outputs[0].finish_reason) == expected
    assert isinstance(outputs[1], RequestFailedError)
    assert "no way on" in str(outputs[1])


def test_compilers_are_left_as_they_were(llm: LLM, processors: Any) -> None:
    """Functions that torch compiles for others are compiled again after a request."""
    texts(llm, make_params(processors("llguidance"), 1))
    assert torch._dynamo.eval_frame._stance.stance == "default"


async def test_an_async_engine_takes_them_too(llm: LLM, processors: Any) -> None:
    """Made for its tokenizer, they are as those made for the engine."""
    from outlines.types import Regex

    from quire import AsyncLLM
    from quire.integrations.outlines.processors import outlines_processor

    class Model:
        pass

    async_llm = AsyncLLM.from_llm(llm)
    made = outlines_processor(await async_llm.get_tokenizer(), Regex(REGEX), "outlines_core")
    expected = texts(llm, make_params(processors("outlines_core"), 5))
    async for output in async_llm.generate([5, 6, 7], make_params(made, 5)):
        found = [(output.outputs[0].text, output.outputs[0].finish_reason)]
    assert found == expected
    model: Any = Model()
    model.llm = llm
    again = outlines_processor(model, Regex(REGEX), "outlines_core")
    assert texts(llm, make_params(again, 5)) == expected
    with pytest.raises(InvalidRequestError, match="output_type"):
        outlines_processor(llm, None)


def test_an_engine_without_a_tokenizer_has_none_to_make_them_for(tiny_llama: Any) -> None:
    from quire.integrations.outlines.processors import outlines_processor

    with (
        LLM(tiny_llama, skip_tokenizer_init=True, **OPTIONS) as llm,
        pytest.raises(NotSupportedError, match="no tokenizer"),
    ):
        outlines_processor(llm, int)
