"""Triton's choice of tokens, against plain torch and numpy: on a GPU, or in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton.backend import TritonBackend

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
SIZES = [1, 5, 300, 4096, 5000, *([40_001, 262_144] if ON_GPU else [])]
# A row takes the interpreter a tenth of a second.
few = settings(max_examples=200 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" or ON_GPU else 8)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter

TRITON, REFERENCE = TritonBackend(), ReferenceBackend()


def logits_of(num_rows: int, size: int, seed: int, *, rough: bool, masked: bool) -> torch.Tensor:
    """Random logits: with many equal ones where rough, and impossible ones where masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, size, generator=generator) * (1 + seed % 4)
    if rough:
        logits = (logits * 2).round() / 2 * torch.tensor(-1.0 if seed % 2 else 1.0)
    if masked:
        hidden = torch.rand(num_rows, size, generator=generator) < 0.9
        hidden[:, seed % size] = False
        logits[hidden] = -torch.inf
    return logits


rows = st.builds(
    logits_of,
    st.integers(1, 3),
    st.sampled_from(SIZES),
    st.integers(0, 2**20),
    rough=st.booleans(),
    masked=st.booleans(),
)


@few
@given(logits=rows, dtype=st.sampled_from(DTYPES), spoilt=st.booleans())
def test_the_likeliest_is_the_first_of_the_highest(logits, dtype, spoilt):
    """In every type; no number where any of a row's is none, and other rows their own."""
    logits = logits.to(dtype)
    if spoilt:
        logits[0, -1] = torch.nan
    ids, highest = TRITON.argmax(logits.to(DEVICE))
    expected_ids, expected = REFERENCE.argmax(logits.float())
    assert ids.dtype is torch.int64
    assert highest.dtype is torch.float32
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(highest.cpu().nan_to_num(9e9), expected.nan_to_num(9e9))


def test_zeros_of_either_sign_are_equal():
    """The first of them is taken, and drawn of one alone at no temperature."""
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]], device=DEVICE)
    assert TRITON.argmax(logits)[0].tolist() == [1, 1]
    one = torch.ones(2, dtype=torch.float64, device=DEVICE)
    drawn = TRITON.sample_tokens(logits, 0 * one, one.long(), one, 0 * one, 0.9 * one)
    assert drawn.tolist() == [1, 1]
    assert TRITON.top_logits(logits, 3)[1].tolist() == [[1, 2, 0]] * 2


@few
@given(logits=rows, k=st.sampled_from([0, 1, 3, 20, 64, 70]), seed=st.integers(0, 99))
def test_the_highest_logits_and_their_logprobs(logits, k, seed):
    """In order, equal ones by their ids; ranks count what is higher."""
    k = min(k, logits.shape[1])
    there = logits.to(DEVICE)
    if k:
        values, ids = TRITON.top_logits(there, k)
        order = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values.cpu(), order.values[:, :k])
        assert torch.equal(ids.cpu(), order.indices[:, :k])
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, logits.shape[1], (len(logits),), generator=generator)
    found = [each.cpu() for each in TRITON.gather_logprobs(there, targets.to(DEVICE), k)]
    expected = REFERENCE.gather_logprobs(logits, targets, k)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=2e-5, rtol=1e-6)
    assert torch.equal(found[2], expected[2])
    whole = TRITON.log_softmax(there).cpu()
    assert torch.allclose(whole, REFERENCE.log_softmax(logits), atol=2e-5, rtol=1e-6)


@few
@given(size=st.sampled_from([40, 5000]), num_words=st.integers(1, 160), seed=st.integers(0, 99))
def test_masks_and_penalties_change_what_they_name(size, num_words, seed):
    """Rows in any order; tokens past the mask's last word are not allowed."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator)
    places = torch.tensor([3, 1])
    mask = torch.randint(-(2**31), 2**31, (2, num_words), generator=generator).int()
    count = min(size, 30)
    tokens = torch.randperm(size, generator=generator)[:count]
    numbers = [torch.rand(count, generator=generator) + 0.5 for _ in range(3)]
    counts = torch.randint(0, 3, (count,), generator=generator).float()
    columns = [torch.arange(count) % 4, tokens, counts, *numbers]
    expected, found = logits.clone(), logits.clone().to(DEVICE)
    REFERENCE.apply_penalties(expected, *columns)
    TRITON.apply_penalties(found, *(column.to(DEVICE) for column in columns))
    assert torch.allclose(found.cpu(), expected, atol=1e-6)
    found = expected.to(DEVICE)
    REFERENCE.apply_bitmask(expected, places, mask)
    TRITON.apply_bitmask(found, places.to(DEVICE), mask.to(DEVICE))
    assert torch.equal(found.cpu(), expected)


def drawn(logits: torch.Tensor, uniform: npt.NDArray[Any], **limits: Any) -> list[int]:
    """Draw one token per number from one row."""
    count = len(uniform)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    columns = [
        torch.full((count,), value, dtype=torch.int64 if name == "top_k" else torch.float64)
        for name, value in values.items()
    ]
    columns.append(torch.from_numpy(uniform))
    batch = logits.expand(count, -1).contiguous().to(DEVICE)
    return TRITON.sample_tokens(batch, *(column.to(DEVICE) for column in columns)).tolist()


def naive(
    logits: npt.NDArray[Any], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], float]:
    """Return ids in the order of the draw, their probabilities, and how near a border is."""
    exact = logits.astype(np.float64)
    ids = np.lexsort((np.arange(len(exact)), -exact))
    weights = np.exp((exact[ids] - exact.max()) / max(temperature, 1e-30))
    miss = np.inf
    if top_k > 0:
        weights[top_k:] = 0
    if min_p > 0:
        miss = min(miss, float(np.abs(weights[1:] / min_p - 1).min(initial=np.inf)))
        weights[weights < min_p] = 0
    if top_p < 1:
        before = np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum()
        miss = min(miss, float(np.abs(before - top_p)[weights > 0].min()))
        weights[before >= top_p] = 0
    if not (0 < top_k < len(exact) or top_p < 1 or min_p > 0):
        order = np.argsort(ids)
        ids, weights = ids[order], weights[order]
    return ids, weights / weights.sum(), miss


LIMITS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.7, 0.01, 1e-9, 1e-40, 5.0, 1e300]),
        "top_k": st.sampled_from([0, -1, 1, 2, 50, 200, 1500, 10_000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 1e-8, 0.05, 1.0]),
    }
)
FLAT = logits_of(1, 5000, 0, rough=False, masked=False)
ROUGH = logits_of(1, 5000, 3, rough=True, masked=False)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@few
@given(logits=rows, limits=LIMITS, seed=st.integers(0, 99))
@example(FLAT, PLAIN, 0)
@example(FLAT, PLAIN | {"top_p": 0.9}, 0)
@example(ROUGH, PLAIN | {"top_k": 1500, "top_p": 0.9}, 0)
@example(ROUGH, PLAIN | {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, 0)
@example(logits_of(1, 5000, 1, rough=False, masked=True), PLAIN | {"top_k": 50}, 0)
def test_draws_invert_the_cumulative_distribution(logits, limits, seed):
    """The token drawn for a number is where the running sum passes it, to 1e-5."""
    row = logits[0]
    ids, probabilities, miss = naive(row.numpy(), **limits)
    assume(miss > 1e-5)
    uniform = np.append(np.random.default_rng(seed).random(1), 1.0 - 2.0**-53)
    ends = probabilities.cumsum()
    for token_id, number in zip(drawn(row, uniform, **limits), uniform, strict=True):
        place = int(np.flatnonzero(ids == token_id)[0])
        low = ends[place - 1] if place else 0.0
        assert probabilities[place] > 0
        assert low - 1e-5 <= number <= ends[place] + 1e-5


@pytest.mark.parametrize("limits", [{"top_p": 0.8}, {"top_p": 0.8, "top_k": 900}, {"min_p": 0.2}])
def test_what_is_found_by_bisection_is_what_is_found_among_candidates(limits, monkeypatch):
    """However many tokens are gathered, or whether they are enough."""
    from quire.kernels.triton import draw

    logits = logits_of(1, 6000, 4, rough=True, masked=False)[0]
    logits[:1000] -= 20
    uniform = np.array([0.0, 0.97])
    found = set()
    for number, room in ((1, 1024), (90, 1024), (90, 64)):
        monkeypatch.setattr(draw, "FEW", number)
        monkeypatch.setattr(draw, "ROOM", room)
        found.add(tuple(drawn(logits, uniform, **limits)))
    assert len(found) == 1


def test_a_row_is_drawn_alike_alone_and_in_a_batch():
    """Whatever stands beside it, and however it is drawn."""
    logits = logits_of(6, 5000, 2, rough=True, masked=False).to(DEVICE)
    columns = [
        torch.tensor([1.0, 0.5, 1e-40, 1.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE),
        torch.tensor([0, 40, 0, 1000, 3, 0], device=DEVICE),
        torch.tensor([1.0, 0.9, 1.0, 0.99, 1.0, 0.7], dtype=torch.float64, device=DEVICE),
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE),
        torch.tensor([0.2, 0.9, 0.5, 0.35, 0.1, 0.66], dtype=torch.float64, device=DEVICE),
    ]
    together = TRITON.sample_tokens(logits, *columns)
    for row in range(6):
        one = slice(row, row + 1)
        assert TRITON.sample_tokens(logits[one], *(each[one] for each in columns)) == together[row]
    wide = torch.zeros(6, 5100, device=DEVICE)
    wide[:, :5000] = logits
    assert torch.equal(TRITON.sample_tokens(wide[:, :5000], *columns), together)


@pytest.mark.parametrize("limits", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_frequencies_follow_the_distribution(limits):
    """Evenly spread numbers find each token as often as its probability says."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(5)) * 1.5
    count = 20_000 if ON_GPU else 20
    uniform = (np.arange(count) + 0.5) / count
    observed = np.bincount(drawn(logits, uniform, **limits), minlength=20)
    ids, probabilities, _ = naive(logits.numpy(), **(PLAIN | limits))
    assert (np.abs(observed[ids] - probabilities * count) <= 1.001).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_draw_from_what_cannot_be_drawn_from_ends(value):
    """With some token of the vocabulary; other rows are right."""
    logits = torch.zeros(2, 70, device=DEVICE)
    logits[1, -1] = 50.0
    logits[0] = value
    one = torch.ones(2, dtype=torch.float64, device=DEVICE)
    top_k = torch.tensor([5, 5], device=DEVICE)
    found = TRITON.sample_tokens(logits, one, top_k, one, 0 * one, 0 * one).tolist()
    assert 0 <= found[0] < 70
    assert found[1] == 69


def test_there_may_be_no_rows():
    """Nothing is launched for none."""
    logits = torch.empty(0, 9, device=DEVICE)
    none = torch.empty(0, dtype=torch.float64, device=DEVICE)
    assert [len(each) for each in TRITON.argmax(logits)] == [0, 0]
    assert TRITON.log_softmax(logits).shape == (0, 9)
    assert TRITON.sample_tokens(logits, none, none.long(), none, none, none).shape == (0,)
    assert TRITON.gather_logprobs(logits, none.long(), 2)[1].shape == (0, 3)
    assert TRITON.top_logits(logits, 2)[1].shape == (0, 2)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
def test_nothing_waits_for_the_device():
    """Torch itself says so of whatever would."""
    logits = torch.randn(8, 40_000, device=DEVICE)
    one = torch.ones(8, dtype=torch.float64, device=DEVICE)
    limits = [one, one.long() * 40, one * 0.9, one * 0.01, one * 0.5]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = TRITON.sample_tokens(logits, *limits)
        TRITON.argmax(logits)
        TRITON.gather_logprobs(logits, ids, 20)
        TRITON.gather_logprobs(logits, ids, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


_COMPILE = """
import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.triton import draw, edits, logit_rows as rows, logprobs

INT64 = "bests tops top_ids targets ids ranks rows token_ids candidates masses top_ks out".split()
INT32 = "spans thresholds counters higher bitmask".split()
FLOAT64 = "temperatures top_ps min_ps uniforms".split()
NUMBERS = "vocab_size stride num_chunks num_spans num_words words_stride k num_entries".split()
TYPES = dict.fromkeys(INT64, "*i64") | dict.fromkeys(INT32, "*i32")
TYPES |= dict.fromkeys(FLOAT64, "*fp64") | dict.fromkeys(NUMBERS, "i32")
for vocab_size in (300, 262_144):
    chunks = triton.next_power_of_2(triton.cdiv(vocab_size, rows.CHUNK))
    sizes = {"SPAN": draw.SPAN, "ROOM": draw.ROOM, "FEW": draw.FEW, "MOST": draw.MOST,
             "SMALL": 128, "CHUNK": rows.CHUNK, "CHUNKS": chunks, "BLOCK": 256,
             "SPANS": chunks * rows.CHUNK // draw.SPAN,
             "WITH_RANKS": True, "WITH_SUMS": True, "WITH_SPANS": True}
    if chunks == 1:
        sizes["num_chunks"] = 1  # so it is compiled where it is 1
    kernels = [rows.survey, rows.finish_argmax, logprobs.subtract_normalizer,
               logprobs.top_of_chunks, logprobs.finish_logprobs, edits.penalize,
               edits.mask_logits, draw.choose_threshold, draw.gather, draw.draw]
    for kernel in kernels:
        names = list(inspect.signature(kernel.fn).parameters)
        constants = {name: sizes[name] for name in names if name in sizes}
        types = {name: TYPES.get(name, "*fp32") for name in names}
        if kernel is logprobs.subtract_normalizer:
            types["out"] = "*fp32"
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        target, options = GPUTarget("cuda", 90, 32), {"num_warps": 8}
        built = triton.compile(source, target=target, options=options)
        assert built.metadata.shared <= 48 * 1024
        print(kernel.fn.__name__, vocab_size)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For vocabularies of one chunk and of many."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20
