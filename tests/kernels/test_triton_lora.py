"""Triton's products with adapters, against plain torch: on a GPU, or in its interpreter."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.lora import AdapterSlots, Expand, ExpandSlice, LoraRows, Shrink
from quire.kernels.reference.lora import lora_expand, lora_shrink
from quire.kernels.triton.backend import TritonBackend

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
RANKS = [0, 1, 3, 8, 16, 17, 40]
NUM_SLOTS = 5


class Draw:
    """Random tensors and adapters of one seed, on the CPU."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def strided(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Rows that stand apart, with NaN between them."""
        wide = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=dtype)
        wide[:, : shape[1]] = self.noise(*shape)
        return wide[:, : shape[1]]

    def shrink(self, in_features: int, dtype: torch.dtype) -> Shrink | None:
        rank = self.rng.choice([None, *RANKS])
        if rank is None:
            return None
        return Shrink(self.noise(rank, in_features).to(dtype), self.noise(rank))

    def expand(self, out_features: int, width: int, dtype: torch.dtype) -> Expand | None:
        if self.rng.random() < 0.2:
            return None
        borders = sorted(self.rng.choices(range(out_features + 1), k=4))
        slices = []
        for first, end in zip(borders[::2], borders[1::2], strict=True):
            start = self.rng.randint(0, width)
            rank = self.rng.randint(0, width - start)
            slices.append(ExpandSlice(first, start, self.noise(end - first, rank).to(dtype)))
        self.rng.shuffle(slices)
        factor, offset = (
            self.noise(out_features) if self.rng.random() < 0.4 else None for _ in range(2)
        )
        return Expand(tuple(slices), factor, offset)


def on_device(value: Any) -> Any:
    """The same with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, AdapterSlots):
        return AdapterSlots(map(on_device, value))
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{e.name: on_device(getattr(value, e.name)) for e in fields(value)})
    return value


def rows_of(slots: list[int]) -> tuple[LoraRows, LoraRows]:
    """For the reference, and for the kernels."""
    made = [LoraRows.of(torch.tensor(slots, dtype=torch.int32), each) for each in (CPU, DEVICE)]
    assert made[0] is not None
    assert made[1] is not None
    return made[0], made[1]


# Some adapters with a few rows, here and there, or one with many.
owners = st.one_of(
    st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=24),
    st.builds(lambda n, m: [2] * n + [0, -1] * m, st.integers(33, 70), st.integers(0, 3)),
).filter(lambda slots: max(slots) >= 0)


def compare_shrunk(
    x: torch.Tensor, adapters: AdapterSlots[Any], theirs: AdapterSlots[Any], slots: list[int]
) -> torch.Tensor:
    rows, on_gpu = rows_of(slots)
    expected = lora_shrink(x, adapters, rows)
    got = TritonBackend().lora_shrink(x.to(DEVICE), theirs, on_gpu).cpu()
    assert got.shape == expected.shape
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, expected, atol=2e-6 * x.shape[1] + 1e-5, rtol=1e-5)
    for row, slot in enumerate(slots):
        adapter = adapters[slot] if slot >= 0 else None
        assert not got[row, 0 if adapter is None else len(adapter.scales) :].any()
    return got


def compare_expanded(
    y: torch.Tensor,
    shrunk: torch.Tensor,
    adapters: AdapterSlots[Any],
    theirs: AdapterSlots[Any],
    slots: list[int],
) -> torch.Tensor:
    """Rounded once: off by a unit of the type at most, and by what float32 sums gather."""
    rows, on_gpu = rows_of(slots)
    # Rows stand apart, with something between them that is to stay.
    wide = torch.full((len(y), y.shape[1] + 3), torch.nan, dtype=y.dtype, device=DEVICE)
    wide[:, : y.shape[1]] = y
    got = wide[:, : y.shape[1]]
    TritonBackend().lora_expand(got, shrunk.to(DEVICE), theirs, on_gpu)
    assert wide[:, y.shape[1] :].isnan().all()
    exact = y.double()
    lora_expand(exact, shrunk, adapters, rows)
    error = (got.cpu().double() - exact).abs()
    assert (error <= ROUNDING[y.dtype] * exact.abs() + 4e-5).all()
    for row, slot in enumerate(slots):
        if slot < 0 or adapters[slot] is None:
            assert torch.equal(got[row].cpu(), y[row])
    return got.cpu()


@given(
    seed=st.integers(0, 2**31),
    slots=owners,
    dtype=st.sampled_from(DTYPES),
    in_features=st.sampled_from([1, 20, 64, 130, 600]),
)
def test_shrinking(seed, slots, dtype, in_features):
    """A row by its own adapter; twice, with another adapter in one of the places."""
    draw = Draw(seed)
    x = draw.strided(dtype, len(slots), in_features)
    dtypes = draw.rng.choice([[dtype], [torch.float32], [dtype, torch.float32]])
    adapters = AdapterSlots(
        draw.shrink(in_features, draw.rng.choice(dtypes)) for _ in range(NUM_SLOTS)
    )
    theirs = on_device(adapters)
    compare_shrunk(x, adapters, theirs, slots)
    place = draw.rng.randrange(NUM_SLOTS)
    adapters[place] = draw.shrink(in_features, draw.rng.choice(dtypes))
    theirs[place] = on_device(adapters[place])
    compare_shrunk(x, adapters, theirs, slots)


@given(
    seed=st.integers(0, 2**31),
    slots=owners,
    dtype=st.sampled_from(DTYPES),
    out_features=st.sampled_from([1, 12, 128, 300]),
)
def test_expanding(seed, slots, dtype, out_features):
    """A row gains by its own adapter's slices, then factor and offset; the others keep bits."""
    draw = Draw(seed)
    width = draw.rng.choice([0, 1, 8, 20, 40])
    shrunk = draw.noise(len(slots), width)
    y = draw.noise(len(slots), out_features).to(dtype)
    dtypes = draw.rng.choice([[dtype], [torch.float32], [dtype, torch.float32]])
    adapters = AdapterSlots(
        draw.expand(out_features, width, draw.rng.choice(dtypes)) for _ in range(NUM_SLOTS)
    )
    theirs = on_device(adapters)
    compare_expanded(y, shrunk, adapters, theirs, slots)
    place = draw.rng.randrange(NUM_SLOTS)
    adapters[place] = draw.expand(out_features, width, draw.rng.choice(dtypes))
    theirs[place] = on_device(adapters[place])
    compare_expanded(y, shrunk, adapters, theirs, slots)


def test_a_row_has_the_same_bits_in_any_company_of_few():
    """However many rows there are, as long as no adapter has more than 32 of them."""
    draw = Draw(3)
    slots = [0, 1, -1, 0, 4, 2, 2, 0, 1] * 3
    shrinks = AdapterSlots(
        Shrink(draw.noise(rank, 700), draw.noise(rank)) for rank in (8, 16, 4, 1, 8)
    )
    expands = AdapterSlots(
        Expand((ExpandSlice(0, 0, draw.noise(50, len(each.scales))),)) for each in shrinks
    )
    ours = on_device(shrinks), on_device(expands)
    x, y = draw.noise(len(slots), 700), draw.noise(len(slots), 50)
    kernels = TritonBackend()

    def run(numbers: list[int]) -> torch.Tensor:
        rows = LoraRows.of(torch.tensor([slots[i] for i in numbers], dtype=torch.int32), DEVICE)
        changed = y[numbers].to(DEVICE)
        if rows is not None:
            shrunk = kernels.lora_shrink(x[numbers].to(DEVICE), ours[0], rows)
            kernels.lora_expand(changed, shrunk, ours[1], rows)
        return changed.cpu()

    together = run(list(range(len(slots))))
    for row in range(9):
        assert torch.equal(run([row])[0], together[row])
    assert torch.equal(run([20, 3, 4, 5]), together[[20, 3, 4, 5]])


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, which computes by numpy
@pytest.mark.parametrize("slots", [[0, 1, 0], [0, 0, 1], [-1, 0, 1]])
def test_a_nan_stays_in_its_row(slots):
    """Also among the rows of one adapter."""
    _, rows = rows_of(slots)
    draw = Draw(0)
    shrinks = on_device(AdapterSlots(Shrink(draw.noise(4, 6), torch.ones(4)) for _ in range(2)))
    expands = on_device(AdapterSlots(Expand((ExpandSlice(0, 0, draw.noise(5, 4)),)) for _ in "ab"))
    kernels = TritonBackend()
    x, y = draw.noise(3, 6), draw.noise(3, 5)
    made = []
    for spoiled in (False, True):
        if spoiled:
            x[1] = torch.nan
        changed = y.to(DEVICE)
        shrunk = kernels.lora_shrink(x.to(DEVICE), shrinks, rows)
        kernels.lora_expand(changed, shrunk, expands, rows)
        made.append(changed.cpu())
    assert torch.isnan(made[1][1]).all()
    assert torch.equal(made[0][::2], made[1][::2])


_COMPILE = """
import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl

from quire.kernels.triton.lora_products import expand_rows, shrink_rows, sum_parts

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


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
ROWS = {"order": "*i64", "tiles": "*i32", "table": "*i64", "slots": "*i32"}
for capability, dtype, rows, ranks in itertools.product((80, 90), NAMES, (16, 64), (16, 64)):
    matrix = {"MATRIX": TYPES[dtype], "ALIGNED": 16 // dtype.itemsize, "PRECISION": "tf32x3"}
    text = build(
        shrink_rows,
        {**ROWS, "x": f"*{NAMES[dtype]}", "parts": "*fp32"},
        {**matrix, "ROWS": rows, "RANKS": ranks, "INPUTS": 256 // dtype.itemsize},
        capability, num_warps=4, num_stages=3,
    )
    assert "mma" in text and "cp.async.cg" in text and "cp.async.ca" not in text
    text = build(
        expand_rows,
        {
            **ROWS, "y": f"*{NAMES[dtype]}", "shrunk": "*fp32", "stretches": "*i64",
            "blocks": "*i64",
        },
        {**matrix, "ROWS": rows, "OUTPUTS": 128, "RANKS": min(ranks, 32)},
        capability, num_warps=4, num_stages=2,
    )
    assert "mma" in text and "cp.async.cg" in text
for parts in ({}, {"num_parts": 1}):
    build(
        sum_parts,
        {**ROWS, "parts": "*fp32", "shrunk": "*fp32"},
        {**parts, "ROWS": 16, "RANKS": 16}, 90, num_warps=2,
    )
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For two generations, of every type: by tensor cores, in their memory, by wide reads."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 50
