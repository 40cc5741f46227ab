"""Mixtures of experts: each row gets what its experts make of it, and no more."""

from __future__ import annotations

import pytest
import torch
from backends import cpu_backends
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import get_backend

BACKENDS = cpu_backends()
sizes = st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(1, 20))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Expert:
    """A product that is computed row by row, and that knows what it was given."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.calls: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x)
        return torch.stack([row.float() @ self.weight for row in x]).to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(sizes=sizes, seed=st.integers(0, 2**31), normalized=st.booleans(), data=st.data())
def test_a_mixture_is_the_loop_over_its_rows(
    backend: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    seed: int,
    normalized: bool,
    data: st.DataObject,
) -> None:
    kernels = get_backend("cpu", backend)
    num_tokens, num_experts, width = sizes
    per_token = data.draw(st.integers(1, num_experts))
    x = noise(seed, num_tokens, width).to(dtype)
    logits = noise(seed + 1, num_tokens, num_experts).to(dtype)
    experts = [Expert(noise(seed + 2 + each, width, width)) for each in range(num_experts)]
    weights, chosen = kernels.route(logits, per_token, normalized=normalized)
    assert weights.dtype == torch.float32
    shares = logits.double().softmax(-1)
    for row in range(num_tokens):
        mine, others = chosen[row].tolist(), shares[row].clone()
        assert len(set(mine)) == per_token
        others[mine] = -1
        wanted = shares[row, mine]
        assert wanted.min() >= others.max() - 1e-6
        if normalized:
            wanted = wanted / wanted.sum()
        torch.testing.assert_close(weights[row].double(), wanted, rtol=1e-5, atol=1e-7)
    mixed = kernels.mix_experts(x, weights, chosen, experts)
    assert mixed.shape == x.shape
    assert mixed.dtype == dtype
    for number, expert in enumerate(experts):
        rows = (chosen == number).any(1).nonzero()[:, 0]
        assert len(expert.calls) == min(len(rows), 1)
        if len(rows):
            assert torch.equal(expert.calls[0], x[rows])
    for row in range(num_tokens):
        total = torch.zeros(width)
        for number in chosen[row].sort().values.tolist():
            share = weights[row][chosen[row] == number]
            total += experts[number](x[row : row + 1])[0].float() * share
        assert torch.equal(mixed[row], total.to(dtype))
        alone = kernels.mix_experts(
            x[row : row + 1], weights[row : row + 1], chosen[row : row + 1], experts
        )
        assert torch.equal(alone[0], mixed[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_stays_in_its_row(backend: str) -> None:
    kernels = get_backend("cpu", backend)
    x, logits = noise(0, 5, 8), noise(1, 5, 4)
    x[2, 3], logits[2] = torch.nan, torch.nan
    experts = [Expert(noise(each, 8, 8)) for each in range(4)]
    mixed = kernels.mix_experts(x, *kernels.route(logits, 2, normalized=True), experts)
    assert mixed[2].isnan().all()
    assert not mixed[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_experts", [4, 8, 60, 128])
def test_equal_scores_are_chosen_as_torch_chooses(backend: str, num_experts: int) -> None:
    logits = (noise(3, 50, num_experts) * 2).round()
    for per_token in (1, 2, 4):
        _, chosen = get_backend("cpu", backend).route(logits, per_token, normalized=False)
        assert torch.equal(chosen, logits.softmax(-1).topk(per_token).indices)
