"""Draws equal a naive float64 definition, and a row's draw does not depend on its neighbours."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from quire.kernels import Backend

Floats = npt.NDArray[np.float64]


def naive(
    logits: npt.NDArray[Any], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.int64], Floats, float]:
    """Return token ids in the order of the draw, their probabilities, and the nearest miss.

    The miss is how far the decision of which tokens are kept is from going the other way, as
    far as it hangs on a sum of probabilities.
    """
    exact = logits.astype(np.float64)
    ids = np.lexsort((np.arange(len(exact)), -exact))
    scaled = (exact[ids] - exact.max()) / temperature
    weights = np.exp(scaled)
    miss = math.inf
    if top_k > 0:
        weights[top_k:] = 0
    if min_p > 0:
        miss = min(miss, float(np.abs(weights[1:] / min_p - 1).min(initial=math.inf)))
        weights[weights < min_p * weights[0]] = 0
    if top_p < 1:
        before = np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum()
        miss = min(miss, float(np.abs(before - top_p)[weights > 0].min()))
        weights[before >= top_p] = 0
    limited = 0 < top_k < len(exact) or top_p < 1 or min_p > 0
    if not limited:
        order = np.argsort(ids)
        ids, weights = ids[order], weights[order]
    return ids, weights / weights.sum(), miss


def draw(kernels: Backend, logits: torch.Tensor, uniform: Floats, **limits: Any) -> list[int]:
    """Draw one token per number in ``uniform`` from one row of logits."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    count = len(uniform)
    return kernels.sample_tokens(
        logits.expand(count, -1).contiguous(),
        torch.full((count,), values["temperature"], dtype=torch.float64),
        torch.full((count,), values["top_k"], dtype=torch.int64),
        torch.full((count,), values["top_p"], dtype=torch.float64),
        torch.full((count,), values["min_p"], dtype=torch.float64),
        torch.from_numpy(uniform),
    ).tolist()


@st.composite
def rows(draw_from: Any, most: int = 400) -> torch.Tensor:
    """Draw a row of logits: flat or peaked, with or without equal and impossible ones."""
    size = draw_from(st.sampled_from([1, 2, 3, 17, 127, 128, 129, 300, most]))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 2**20)))
    logits = torch.randn(size, generator=generator) * draw_from(st.sampled_from([0.1, 1, 4, 30]))
    if draw_from(st.booleans()):
        logits = logits.bfloat16().float()
    if draw_from(st.booleans()):
        logits = logits.round()
    if draw_from(st.booleans()):
        hidden = torch.rand(size, generator=generator) < 0.5
        hidden[draw_from(st.integers(0, size - 1))] = False
        logits[hidden] = -torch.inf
    return logits


LIMITS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.7, 0.01, 1e-9, 5.0, 1e6]),
        "top_k": st.sampled_from([0, -1, 1, 2, 5, 50, 200, 10_000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 1e-8, 0.05, 0.5, 1.0]),
    }
)


def check_against_naive(
    kernels: Backend,
    logits: torch.Tensor,
    limits: dict[str, Any],
    uniform: Floats,
    tolerance: float = 1e-6,
) -> None:
    ids, probabilities, _ = naive(logits.numpy(), **limits)
    cumulative = probabilities.cumsum()
    for token_id, number in zip(draw(kernels, logits, uniform, **limits), uniform, strict=True):
        place = int(np.flatnonzero(ids == token_id)[0])
        low = cumulative[place - 1] if place else 0.0
        assert probabilities[place] > 0
        assert low - tolerance <= number <= cumulative[place] + tolerance


@given(logits=rows(), limits=LIMITS, seed=st.integers(0, 2**20))
def test_draws_invert_the_naive_cumulative_distribution(
    kernels: Backend, logits: torch.Tensor, limits: dict[str, Any], seed: int
) -> None:
    """The token drawn for u is where the naive distribution's running sum passes u."""
    assume(naive(logits.numpy(), **limits)[2] > 1e-6)
    edges = [0.0, 0.5, 1.0 - 2.0**-53]
    check_against_naive(
        kernels, logits, limits, np.append(np.random.default_rng(seed).random(6), edges)
    )


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("size", [8192, 40_001])
def test_draws_of_large_vocabularies(kernels: Backend, size: int, scale: float) -> None:
    """The shortcuts for large vocabularies change nothing, nor does a nucleus of thousands."""
    generator = torch.Generator().manual_seed(size)
    rough = (torch.randn(size, generator=generator) * scale).bfloat16().float()
    uniform = np.random.default_rng(0).random(3)
    for limits in (
        {"top_k": 40, "top_p": 0.95, "min_p": 0.0},
        {"top_k": 1500, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 30_000, "top_p": 0.8, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.02},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ):
        # Here single tokens weigh so little that rounding may add one to the kept ones.
        check_against_naive(kernels, rough, {"temperature": 0.9} | limits, uniform, tolerance=1e-4)


@pytest.mark.parametrize(
    ("limits", "warper", "arguments"),
    [
        ({"top_k": 7}, "TopKLogitsWarper", {"top_k": 7}),
        ({"top_p": 0.83}, "TopPLogitsWarper", {"top_p": 0.83}),
        ({"min_p": 0.04}, "MinPLogitsWarper", {"min_p": 0.04}),
    ],
)
def test_kept_tokens_equal_transformers(
    kernels: Backend, limits: dict[str, Any], warper: str, arguments: dict[str, Any]
) -> None:
    """Where no logits are equal, top_k, top_p and min_p keep what transformers' warpers keep."""
    import transformers

    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    warped = getattr(transformers, warper)(**arguments)(torch.empty(1, 0), logits[None].clone())[0]
    kept = set(warped.isfinite().nonzero()[:, 0].tolist())
    assert 1 < len(kept) < 60
    assert set(draw(kernels, logits, np.linspace(0, 1, 4000, endpoint=False), **limits)) == kept


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 2.0},
    ],
)
def test_frequencies_follow_the_distribution(kernels: Backend, limits: dict[str, Any]) -> None:
    """Chi-square over many draws, of seeds and positions as requests have them."""
    from quire.sampling.random import derive_seed, uniforms

    logits = torch.randn(40, generator=torch.Generator().manual_seed(5)) * 1.5
    count = 20_000
    seeds = np.array([derive_seed(9, index // 50) for index in range(count)], dtype=np.uint64)
    drawn = draw(kernels, logits, uniforms(seeds, np.arange(count) % 50), **limits)
    every = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    ids, probabilities, _ = naive(logits.numpy(), **every)
    observed = np.bincount(drawn, minlength=40)[ids]
    assert observed[probabilities == 0].sum() == 0
    likely = probabilities * count >= 5
    expected = probabilities[likely] * count
    statistic = ((observed[likely] - expected) ** 2 / expected).sum()
    freedom = int(likely.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile at four standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@given(
    seed=st.integers(0, 2**20),
    vocab_size=st.sampled_from([5, 200, 5000]),
    picks=st.lists(LIMITS, min_size=2, max_size=6),
)
def test_a_row_is_drawn_alike_alone_and_in_a_batch(
    kernels: Backend, seed: int, vocab_size: int, picks: list[dict[str, Any]]
) -> None:
    """Neighbours decide which shortcut is taken, but never the token, not even at a border."""
    generator = torch.Generator().manual_seed(seed)
    count = len(picks)
    logits = torch.randn(count, vocab_size, generator=generator) * 3
    if seed % 2:
        logits = logits.bfloat16().float()
    columns = [
        torch.tensor([pick[name] for pick in picks], dtype=dtype)
        for name, dtype in (
            ("temperature", torch.float64),
            ("top_k", torch.int64),
            ("top_p", torch.float64),
            ("min_p", torch.float64),
        )
    ]
    columns.append(torch.from_numpy(np.random.default_rng(seed).random(count)))
    together = kernels.sample_tokens(logits, *columns)
    for row in range(count):
        one = slice(row, row + 1)
        alone = kernels.sample_tokens(logits[one], *(column[one] for column in columns))
        assert alone[0] == together[row]


@given(seed=st.integers(0, 2**20), size=st.sampled_from([3, 128, 1000, 20_000]))
def test_sums_are_bitwise_alike_alone_and_in_a_batch(
    kernels: Backend, seed: int, size: int
) -> None:
    """Log-probabilities have no trace of how many rows were computed at once."""
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(seed)) * 4
    together = kernels.log_softmax(logits)
    for row in range(5):
        assert torch.equal(kernels.log_softmax(logits[row : row + 1])[0], together[row])


@given(logits=rows(), k=st.integers(1, 60))
def test_top_logits_are_in_order_and_equal_ones_by_token_id(
    kernels: Backend, logits: torch.Tensor, k: int
) -> None:
    """As a stable sort of the whole row says, whatever is selected underneath."""
    batch = torch.stack((logits, logits.flip(0)))
    values, ids = kernels.top_logits(batch, min(k, len(logits)))
    for row in range(2):
        order = batch[row].sort(descending=True, stable=True)
        assert torch.equal(values[row], order.values[:k])
        assert torch.equal(ids[row], order.indices[:k])


def test_top_logits_of_a_large_vocabulary(kernels: Backend) -> None:
    """Blocks, the tail past the last whole block, and ties across both."""
    generator = torch.Generator().manual_seed(0)
    for size in (128 * 80, 128 * 80 + 1, 128 * 90 + 127):
        logits = (torch.randn(4, size, generator=generator) * 2).bfloat16().float()
        logits[0, -1] = logits[0, 5] = 50.0
        for k in (1, 2, 9):
            values, ids = kernels.top_logits(logits, k)
            order = logits.sort(dim=1, descending=True, stable=True)
            assert torch.equal(values, order.values[:, :k])
            assert torch.equal(ids, order.indices[:, :k])


@given(logits=rows(), k=st.integers(0, 12), seed=st.integers(0, 2**20))
def test_logprobs_and_ranks_equal_their_definition(
    kernels: Backend, logits: torch.Tensor, k: int, seed: int
) -> None:
    """log softmax in float64; a rank is one more than the number of higher logits."""
    k = min(k, len(logits))
    targets = torch.randint(0, len(logits), (4,), generator=torch.Generator().manual_seed(seed))
    batch = logits.expand(4, -1).contiguous()
    ids, logprobs, ranks = kernels.gather_logprobs(batch, targets, k)
    exact = batch.double().log_softmax(dim=1)
    assert torch.equal(ids[:, 0], targets)
    assert torch.equal(ids[0, 1:], logits.sort(descending=True, stable=True).indices[:k])
    assert torch.allclose(logprobs.double(), exact.gather(1, ids), atol=1e-5, rtol=1e-6)
    assert torch.equal(ranks, (batch > batch.gather(1, targets[:, None])).sum(dim=1) + 1)


def test_argmax_takes_the_first_of_equals(kernels: Backend) -> None:
    """In float32 and in bfloat16 alike."""
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-torch.inf, -torch.inf, -9.0]])
    assert kernels.argmax(logits)[0].tolist() == [1, 0, 2]
    assert kernels.argmax(logits.bfloat16())[0].tolist() == [1, 0, 2]


@given(logits=rows(), number=st.floats(0, 1, exclude_max=True))
def test_one_of_the_likeliest_at_no_temperature_is_the_first_of_them(
    kernels: Backend, logits: torch.Tensor, number: float
) -> None:
    """So that rows that draw and rows that do not can be told to a device at once."""
    drawn = draw(kernels, logits, np.array([number]), temperature=0.0, top_k=1)
    assert drawn == kernels.argmax(logits[None])[0].tolist()


def test_argmax_tells_of_rows_that_are_no_numbers(kernels: Backend) -> None:
    """Wherever in the row the NaN stands; other rows keep their own highest logit."""
    for size in (1, 5, 130, 300):
        for place in {0, size // 2, size - 1}:
            logits = torch.randn(3, size)
            logits[1, place] = torch.nan
            ids, highest = kernels.argmax(logits)
            assert highest.isnan().tolist() == [False, True, False]
            assert highest[::2].tolist() == logits[::2].max(dim=1).values.tolist()
            assert ids[::2].tolist() == logits[::2].max(dim=1).indices.tolist()


@pytest.mark.parametrize("size", [1, 40, 70_000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_draw_from_what_cannot_be_drawn_from_ends(
    kernels: Backend, size: int, value: float
) -> None:
    """Logits that are no numbers or all infinite give some token, and no hang; others are right."""
    logits = torch.zeros(2, size)
    logits[0, -1] = logits[1, -1] = 50.0
    logits[0] = value
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.1)):
        none = torch.zeros(2, dtype=torch.float64)
        drawn = kernels.sample_tokens(
            logits, none + 1, torch.full((2,), top_k), none + top_p, none + min_p, none
        )
        assert 0 <= drawn[0] < size
        if (top_k, top_p, min_p) != (0, 1.0, 0.0):
            assert drawn[1] == size - 1


@pytest.mark.parametrize("size", [5, 200, 70_000])
def test_masked_rows_are_drawn_from_and_listed(kernels: Backend, size: int) -> None:
    """Where few tokens are left, the rest follows in the order of ids, and is never drawn."""
    allowed = sorted({1, size // 2, size - 1})
    logits = torch.full((2, size), -torch.inf)
    logits[:, allowed] = torch.arange(len(allowed)).float()
    k = min(size, 20)
    values, ids = kernels.top_logits(logits, k)
    others = [i for i in range(size) if i not in allowed]
    assert ids[0].tolist() == (allowed[::-1] + others)[:k]
    assert values[0].tolist() == logits[0, ids[0]].tolist()
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.01)):
        drawn = draw(
            kernels, logits[0], np.linspace(0, 1, 50), top_k=top_k, top_p=top_p, min_p=min_p
        )
        assert set(drawn) == set(allowed)


def test_what_is_no_number_names_tokens_of_its_own_row(kernels: Backend) -> None:
    """A row with NaN has NaN log-probabilities, and ids within the vocabulary."""
    logits = torch.randn(3, 40)
    logits[1, 7] = torch.nan
    ids, logprobs, _ = kernels.gather_logprobs(logits, torch.tensor([0, 1, 2]), 30)
    assert logprobs[1].isnan().all()
    assert not logprobs[::2].isnan().any()
    assert ((ids >= 0) & (ids < 40)).all()
    assert sorted(ids[0, 1:].tolist()) == logits[0].topk(30).indices.sort().values.tolist()


def test_every_thread_has_a_context_of_its_own_until_it_ends(kernels: Backend) -> None:
    """Threads that sample for the first time, all at once, and then are gone with their memory."""
    if kernels.name != "cpu":
        pytest.skip("the reference has none")
    from quire.kernels.cpu import sampling

    made: list[weakref.ref[Any]] = []
    barrier = threading.Barrier(8)
    logits = torch.randn(3, 500)
    expected = kernels.argmax(logits)[0].tolist()
    wrong: list[object] = []

    def work() -> None:
        barrier.wait()
        for _ in range(20):
            if kernels.argmax(logits)[0].tolist() != expected:
                wrong.append(1)
        made.append(weakref.ref(sampling._own.context))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert len(made) == 8
    assert all(each() is None for each in made)


@given(
    vocab_size=st.integers(1, 200),
    num_words=st.integers(0, 7),
    rows=st.lists(st.integers(0, 4), unique=True),
    seed=st.integers(0, 2**20),
)
def test_a_bitmask_leaves_what_it_allows(
    kernels: Backend, vocab_size: int, num_words: int, rows: list[int], seed: int
) -> None:
    """Bit by bit as in Python's integers; past the last word nothing is allowed."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (len(rows), num_words), dtype=np.uint32)
    words[rng.random(words.shape) < 0.3] = 0
    words[rng.random(words.shape) < 0.3] = 2**32 - 1
    logits = torch.from_numpy(rng.standard_normal((5, vocab_size), dtype=np.float32))
    expected = logits.clone()
    for row, mask in zip(rows, words.tolist(), strict=True):
        bits = sum(word << (32 * i) for i, word in enumerate(mask))
        for token_id in range(vocab_size):
            if not bits >> token_id & 1:
                expected[row, token_id] = -torch.inf
    index = torch.tensor(rows, dtype=torch.int64)
    kernels.apply_bitmask(logits, index, torch.from_numpy(words.view(np.int32)))
    assert torch.equal(logits, expected)
