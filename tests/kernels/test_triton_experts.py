"""Triton's mixtures of experts, against plain torch: on a GPU, or in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.reference.experts import mix_stacked_experts as mix_by_torch
from quire.kernels.reference.experts import route as route_by_torch
from quire.kernels.triton.backend import TritonBackend

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
ROUNDING = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
KINDS = ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh"]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mixture:
    """Random experts, and tokens that have chosen among them."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        *,
        num_tokens: int,
        num_experts: int,
        per_token: int,
        hidden: int = 40,
        inner: int = 24,
        held: range | None = None,
    ) -> None:
        self.dtype = dtype
        self.held = range(num_experts) if held is None else held
        self.x = noise(seed, num_tokens, hidden).to(dtype)
        self.gate_up = (noise(seed + 1, len(self.held), 2 * inner, hidden) / hidden**0.5).to(dtype)
        self.down = (noise(seed + 2, len(self.held), hidden, inner) / inner**0.5).to(dtype)
        # Some experts are chosen by many, some by none.
        logits = noise(seed + 3, num_tokens, num_experts) + 2 * noise(seed + 4, num_experts)
        self.weights, self.chosen = route_by_torch(logits, per_token, normalized=True)

    def run(self, kind: str = "silu", rows: list[int] | None = None) -> torch.Tensor:
        """By the kernels, all rows or some."""
        which = slice(None) if rows is None else rows
        return (
            TritonBackend()
            .mix_stacked_experts(
                self.x[which].to(DEVICE),
                self.weights[which].to(DEVICE),
                self.chosen[which].to(DEVICE),
                self.gate_up.to(DEVICE),
                self.down.to(DEVICE),
                kind,
                first_expert=self.held.start,
            )
            .cpu()
        )

    def check(self, kind: str) -> None:
        """What is computed is off by the roundings between the products, and of the result."""
        expected = mix_by_torch(
            self.x.float(), self.weights, self.chosen, self.gate_up.float(), self.down.float(),
            kind, first_expert=self.held.start,
        )  # fmt: skip
        got = self.run(kind)
        assert got.dtype is self.dtype
        assert got.shape == expected.shape
        largest = expected.abs().amax().clamp(min=1.0) if expected.numel() else 1.0
        assert ((got.float() - expected).abs() <= ROUNDING[self.dtype] * largest).all()


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.sampled_from([0, 1, 2, 7, 33]),
    num_experts=st.integers(1, 9),
    sizes=st.tuples(st.sampled_from([1, 8, 40, 130]), st.sampled_from([1, 24, 70])),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_a_mixture_is_the_sum_of_its_experts(
    seed, dtype, num_tokens, num_experts, sizes, kind, data
):
    """Of any size; where some experts are elsewhere, these add nothing."""
    per_token = data.draw(st.integers(1, num_experts))
    first = data.draw(st.integers(0, num_experts - 1))
    held = range(first, data.draw(st.integers(first, num_experts)))
    Mixture(
        seed,
        dtype,
        num_tokens=num_tokens,
        num_experts=num_experts,
        per_token=per_token,
        hidden=sizes[0],
        inner=sizes[1],
        held=held if data.draw(st.booleans()) else None,
    ).check(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [60, 150])
def test_tiles_of_many_rows(dtype, num_tokens):
    """Of 64 and of 128, some full and some not."""
    Mixture(5, dtype, num_tokens=num_tokens, num_experts=3, per_token=2).check("silu")


def test_many_experts_and_pairs():
    """More pairs than are sorted at once, more experts than have any."""
    Mixture(
        6, torch.float16, num_tokens=300, num_experts=40, per_token=6, hidden=16, inner=16
    ).check("silu")


def test_a_row_has_the_same_bits_in_any_company_of_few():
    """As long as tiles are of one size."""
    mixture = Mixture(1, torch.float16, num_tokens=12, num_experts=4, per_token=2)
    together = mixture.run()
    for row in range(12):
        assert torch.equal(mixture.run(rows=[row])[0], together[row])
    assert torch.equal(mixture.run(rows=[7, 3, 11]), together[[7, 3, 11]])


def test_experts_of_different_ranks_add_up():
    """What two ranks make of a row is, together, what one would."""
    whole = Mixture(2, torch.float32, num_tokens=9, num_experts=5, per_token=3)
    expected = whole.run()
    gate_up, down = whole.gate_up, whole.down
    total = torch.zeros(expected.shape)
    for held in (range(3), range(3, 5)):
        whole.held = held
        whole.gate_up, whole.down = gate_up[held.start : held.stop], down[held.start : held.stop]
        total += whole.run()
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, which computes by numpy
def test_what_is_no_number_stays_in_its_row():
    """It makes its row no numbers, and no other row."""
    mixture = Mixture(3, torch.float32, num_tokens=6, num_experts=4, per_token=2)
    clean = mixture.run()
    mixture.x[2, 3] = torch.nan
    mixture.weights[4] = torch.nan
    got = mixture.run()
    assert got[[2, 4]].isnan().all()
    assert torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_an_unknown_activation_is_refused():
    """As everywhere."""
    mixture = Mixture(3, torch.float32, num_tokens=1, num_experts=1, per_token=1)
    with pytest.raises(ValueError, match="activation kind is 'swish'"):
        mixture.run("swish")


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(0, 6),
    num_experts=st.integers(1, 70),
    normalized=st.booleans(),
    data=st.data(),
)
def test_routing(seed, dtype, num_tokens, num_experts, normalized, data):
    """The highest shares, in descending order; logits all differ here."""
    per_token = data.draw(st.integers(1, min(num_experts, 40)))
    logits = torch.stack(
        [
            torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed + row)) / 8
            for row in range(num_tokens)
        ]
        or [torch.empty(0, num_experts)]
    ).view(num_tokens, num_experts)
    wide = torch.cat([logits, torch.full((num_tokens, 3), torch.nan)], 1).to(dtype).to(DEVICE)
    weights, chosen = TritonBackend().route(wide[:, :num_experts], per_token, normalized=normalized)
    expected, numbers = route_by_torch(logits, per_token, normalized=normalized)
    assert weights.dtype is torch.float32
    assert torch.equal(chosen.cpu(), numbers)
    torch.testing.assert_close(weights.cpu(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_routing_by_equal_logits_and_by_what_is_no_number():
    """Of equal experts the first; each is chosen once, whatever the logits are."""
    logits = torch.zeros(4, 6, device=DEVICE)
    logits[1, 4] = 1
    logits[2] = torch.nan
    logits[3, 1] = torch.inf
    weights, chosen = TritonBackend().route(logits, 3, normalized=True)
    assert chosen[:2].tolist() == [[0, 1, 2], [4, 0, 1]]
    assert all(len(set(row)) == 3 and max(row) < 6 for row in chosen.tolist())
    assert weights[2:].isnan().all()
    assert weights[:2].sum(1).sub(1).abs().max() < 1e-6


_COMPILE = """
import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.triton.configs import config_for
from quire.kernels.triton.experts_products import (
    KINDS,
    add_experts,
    count_pairs,
    expert_products,
    order_pairs,
    route_rows,
)

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def build(kernel, pointers, constants, capability, **options):
    # All else is a number: 1 is a constant, the others are multiples of 16 unless they change.
    changing = {param.name for param in kernel.params if param.do_not_specialize}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = pointers.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and name not in changing:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.shared <= 100 * 1024
    print(kernel.fn.__name__)
    return built.asm["ptx"]


PAIRS = {
    "weights": "*fp32", "chosen": "*i64", "counts": "*i32", "order": "*i32", "tiles": "*i32",
    "num_tiles": "*i32",
}
MIXED = {name: "*bf16" for name in ("logits", "made", "x", "weight", "out")}
for capability in (80, 90):
    build(count_pairs, PAIRS, {"PAIRS": 1024}, capability)
    for experts, per_token in ((8, 2), (128, 8)):
        choices = {"PER_TOKEN": per_token, "CHOICES": per_token}
        build(
            route_rows, PAIRS | MIXED, {**choices, "NORMALIZED": True, "EXPERTS": experts},
            capability, num_warps=1,
        )
        build(order_pairs, PAIRS, {"ROWS": 16, "EXPERTS": experts, "PAIRS": 1024}, capability)
        build(add_experts, PAIRS | MIXED, {**choices, "BLOCK": 1024}, capability)
    tile = {"PRECISION": "tf32x3", "ROWS": 16, "OUTPUTS": 32, "INPUTS": 64, "TOGETHER": 8}
    for kind in sorted(KINDS):
        build(expert_products, PAIRS | MIXED, {**tile, "KIND": kind}, capability)
    for dtype, rows, kind in itertools.product(NAMES, (16, 64, 256), ("silu", None)):
        config = dict(
            config_for(
                "experts", torch.device("cpu"), rows=rows, hidden=4096, inner=14336,
                dtype=str(dtype).removeprefix("torch."),
            )
        )
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        outputs = config["UP_OUTPUTS" if kind else "DOWN_OUTPUTS"]
        tile = {"ROWS": config["ROWS"], "INPUTS": config["INPUTS"], "OUTPUTS": outputs}
        text = build(
            expert_products,
            PAIRS | {name: f"*{NAMES[dtype]}" for name in MIXED},
            {
                **tile, "KIND": kind, "PRECISION": "tf32x3", "TOGETHER": 8,
                **({} if kind else {"per_row": 1}),
            },
            capability, **options,
        )
        assert "mma" in text and "cp.async.cg" in text and "cp.async.ca" not in text
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For two generations, of every type: by tensor cores, in their memory, by wide reads."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 64
