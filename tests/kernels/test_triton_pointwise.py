"""Triton's norms, rotation, activations and tables: the reference's, on a GPU or interpreted.

What is expected is the reference's result in float64. A bound is a multiple of the type's unit.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton.backend import TritonBackend
from quire.kernels.triton.configs import trying

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

from quire.kernels.triton import norms  # noqa: E402  (kernels need triton)
from quire.kernels.triton.activation import KINDS  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
EXAMPLES = max(settings().max_examples // 2, 25)

TRITON, REFERENCE = TritonBackend(), ReferenceBackend()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view into a wider tensor, with NaN beside them."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double().cpu()


def assert_close(got: torch.Tensor, exact: torch.Tensor | None, dtype, *, units: float, scale=1.0):
    assert exact is not None
    assert got.dtype is dtype
    assert got.shape == exact.shape
    if got.numel():
        error = (got.cpu().double() - exact).abs().max().item()
        assert error <= units * torch.finfo(dtype).eps * max(exact.abs().max().item(), scale)


sizes = st.one_of(st.integers(1, 300), st.sampled_from([1000, 1024, 1025, 2500]))


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    size=sizes,
    offset=st.sampled_from([0.0, 1.0]),
    weighted=st.booleans(),
    wide_weight=st.booleans(),
    block=st.sampled_from([None, 1024]),
)
def test_rms_norm_is_the_reference(seed, dtype, shape, size, offset, weighted, wide_weight, block):
    """Of rows and of heads, as views, whole or piece by piece."""
    x = strided(draw(seed, *shape, size, dtype=dtype))
    weight = draw(seed + 1, size, dtype=torch.float32 if wide_weight else dtype)
    weight = weight if weighted else None
    with trying("norm", {} if block is None else {"BLOCK": block}):
        got = TRITON.rms_norm(x, weight, 1e-6, weight_offset=offset)
    exact = REFERENCE.rms_norm(double(x), double(weight), 1e-6, weight_offset=offset)
    assert_close(got, exact, dtype, units=8 if dtype is torch.float32 else 1)


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(0, 5),
    size=sizes,
    weighted=st.booleans(),
    block=st.sampled_from([None, 1024]),
)
def test_add_rms_norm_is_a_sum_and_its_norm(seed, dtype, rows, size, weighted, block):
    """The sum is torch's, bit for bit, and the norm is of that; inputs stay."""
    x, residual = (strided(draw(seed + i, rows, size, dtype=dtype)) for i in range(2))
    before = x.clone(), residual.clone()
    weight = draw(seed + 2, size, dtype=dtype) if weighted else None
    with trying("norm", {} if block is None else {"BLOCK": block}):
        normed, total = TRITON.add_rms_norm(x, residual, weight, 1e-5, weight_offset=1.0)
    assert torch.equal(total, x + residual)
    exact = REFERENCE.rms_norm(double(total), double(weight), 1e-5, weight_offset=1.0)
    assert_close(normed, exact, dtype, units=8 if dtype is torch.float32 else 1)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(0, 5),
    size=sizes,
    parts=st.sampled_from(["", "weight", "bias", "weight bias"]),
    shift=st.sampled_from([0.0, 10.0]),
    block=st.sampled_from([None, 1024]),
)
def test_layer_norm_is_the_reference(seed, dtype, rows, size, parts, shift, block):
    """Also where the mean is far from 0."""
    x = strided((draw(seed, rows, size) + shift).to(dtype))
    weight = draw(seed + 1, size, dtype=dtype) if "weight" in parts else None
    bias = draw(seed + 2, size, dtype=dtype) if "bias" in parts else None
    with trying("norm", {} if block is None else {"BLOCK": block}):
        got = TRITON.layer_norm(x, weight, bias, 1e-5)
    wide = x.double().cpu()
    exact = REFERENCE.layer_norm(wide, double(weight), double(bias), 1e-5)
    spread = 1.0
    if rows:
        spread += shift / wide.std(-1, correction=0).min().clamp(min=3e-3).item()
    assert_close(got, exact, dtype, units=8 * spread if dtype is torch.float32 else 2, scale=2)


def test_norms_take_what_no_program_holds(monkeypatch):
    """Long rows are gone over piece by piece, many short ones side by side."""
    monkeypatch.setattr(norms, "_MANY_ROWS", 32)
    for dtype in DTYPES:
        x, residual = draw(0, 2, 40_000, dtype=dtype), draw(1, 2, 40_000, dtype=dtype)
        units = 8 if dtype is torch.float32 else 1
        exact = REFERENCE.layer_norm(double(x), None, None, 1e-5)
        assert_close(TRITON.layer_norm(x, None, None, 1e-5), exact, dtype, units=units)
        normed, total = TRITON.add_rms_norm(x, residual, None, 1e-5)
        assert torch.equal(total, x + residual)
        exact = REFERENCE.rms_norm(double(total), None, 1e-5)
        assert_close(normed, exact, dtype, units=units)
        x = draw(2, 13, 9, 24, dtype=dtype)[:, 1:]
        exact = REFERENCE.rms_norm(double(x), None, 1e-5)
        assert_close(TRITON.rms_norm(x, None, 1e-5), exact, dtype, units=units)
    x = torch.full((2, 64), 300.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(TRITON.rms_norm(x, None, 1e-6), torch.ones_like(x))


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.integers(0, 4),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    half=st.integers(1, 9),
    rest=st.sampled_from([0, 0, 2, 5]),
    interleaved=st.booleans(),
    fused=st.booleans(),
    wide_angles=st.booleans(),
)
def test_rotary_embedding_is_the_reference(
    seed, dtype, tokens, heads, half, rest, interleaved, fused, wide_angles
):
    """Partial or whole, halves or neighbours, query and key of one projection or of two."""
    head_dim = 2 * half + rest
    qkv = draw(seed, tokens, sum(heads) + heads[1], head_dim, dtype=dtype)
    query, key, _ = qkv.split_with_sizes((*heads, heads[1]), 1)
    if not fused:
        query, key = query.clone(), strided(key)
    before = query.clone(), key.clone()
    angles = draw(seed + 1, tokens, half) * 10
    cos, sin = strided(angles.cos()), angles.sin()
    if not wide_angles:
        cos, sin = cos.to(dtype), sin.to(dtype)
    got = TRITON.rotary_embedding(query, key, cos, sin, interleaved=interleaved)
    exact = REFERENCE.rotary_embedding(
        *map(double, before), double(cos), double(sin), interleaved=interleaved
    )
    for x, original, result, wanted in zip((query, key), before, got, exact, strict=True):
        assert torch.equal(x, original)
        assert_close(result, wanted, dtype, units=2)
        assert torch.equal(result[:, :, 2 * half :], original[:, :, 2 * half :])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=max(EXAMPLES // 3, 8))
@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(0, 4),
    size=st.one_of(st.integers(1, 70), st.sampled_from([256, 700])),
    scale=st.sampled_from([0.05, 1.0, 7.0]),
)
def test_activations_are_the_reference(kind, seed, dtype, rows, size, scale):
    """Every kind, alone and times the other half, of a view of rows."""
    x = strided(draw(seed, rows, 2 * size, dtype=dtype) * scale)
    before = x.clone()
    got = TRITON.activation(x, kind)
    exact = REFERENCE.activation(double(x), kind)
    assert_close(got, exact, dtype, units=4, scale=0)
    gated = exact[:, :size] * double(x)[:, size:]
    assert_close(TRITON.act_and_mul(x, kind), gated, dtype, units=4, scale=0)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # of numpy
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_what_is_no_number(kind):
    """No number stays none, and infinities are what they are for torch."""
    values = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 88.0, -88.0, 1e4, -1e4, 1e-4]
    for dtype in DTYPES:
        x = torch.tensor([values], dtype=dtype, device=DEVICE)
        got = TRITON.activation(x, kind).cpu().float()
        expected = REFERENCE.activation(x.float().cpu(), kind).to(dtype).float()
        if kind not in ("relu", "relu_squared", "tanh"):
            # 0 times infinity, or its limit: torch's own kernels disagree.
            got[0, 1:3] = expected[0, 1:3] = 0.0
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=tolerance, atol=1e-30)


def test_an_unknown_activation_is_named():
    """As the reference does."""
    x = torch.zeros(1, 2, device=DEVICE)
    for function in (TRITON.activation, TRITON.act_and_mul):
        with pytest.raises(ValueError, match=r"'swish'.*silu.*gelu_tanh"):
            function(x, "swish")


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    dtype=dtypes,
    index=st.sampled_from([torch.int32, torch.int64]),
    tokens=st.integers(0, 20),
    size=st.one_of(st.integers(1, 50), st.just(1500)),
)
def test_embedding_looks_up_rows(seed, dtype, index, tokens, size):
    """Exactly the rows that are asked for, of a table that may be a view."""
    weight = strided(draw(seed, 11, size, dtype=dtype))
    ids = torch.randint(11, (tokens,), generator=torch.Generator().manual_seed(seed))
    got = TRITON.embedding(ids.to(DEVICE, index), weight)
    assert torch.equal(got.cpu(), weight.cpu()[ids])
    assert got.dtype is dtype


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy
def test_what_is_no_number_stays_in_its_row(monkeypatch):
    """In norms and rotations, whatever rows a program takes."""
    monkeypatch.setattr(norms, "_MANY_ROWS", 32)
    x = draw(0, 40, 24)
    cos, sin = draw(1, 40, 4), draw(2, 40, 4)
    operations = [
        lambda x: TRITON.rms_norm(x, None, 1e-5),
        lambda x: TRITON.layer_norm(x, None, None, 1e-5),
        lambda x: TRITON.add_rms_norm(x, x, None, 1e-5)[0],
        lambda x: torch.cat(
            TRITON.rotary_embedding(x.view(-1, 3, 8)[:40], x.view(-1, 3, 8)[:40], cos, sin), 1
        ),
    ]
    for operation in operations:
        clean = operation(x)
        broken = x.clone()
        broken[3, 7], broken[5, 2] = torch.nan, torch.inf
        got = operation(broken)
        assert not got[3].isfinite().all()
        assert not got[5].isfinite().all()
        others = [0, 1, 2, 4, *range(6, len(got))]
        assert torch.equal(got[others], clean[others])


_COMPILE = """
import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.triton.activation import KINDS
from quire.kernels.triton.activation_kernel import activate
from quire.kernels.triton.embedding import gather_rows
from quire.kernels.triton.norm_kernels import layer_norm_rows, rms_norm_rows
from quire.kernels.triton.quantized_inputs import multiply_outliers, prepare_inputs
from quire.kernels.triton.quantized_product import add_parts
from quire.kernels.triton.quantized_rows import add_outliers, dequantize_rows
from quire.kernels.triton.rotary_kernel import rotate

FLOATS = ("eps", "offset", "fixed_step")


def compile_for_all(kernel, pointers, constants, num_warps):
    signature = {
        name: pointers.get(name)
        or ("constexpr" if name in constants else "fp32" if name in FLOATS else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        triton.compile(source, target=target, options={"num_warps": num_warps})
    print(kernel.fn.__name__)


for t in ("*bf16", "*fp32"):
    for (size, block, rows), given in itertools.product(
        ((4096, 4096, 1), (128, 128, 16), (40000, 16384, 1)), (False, True)
    ):
        blocks = {"SIZE": size, "BLOCK": block, "ROWS": rows, "HAS_WEIGHT": given}
        names = ("x", "residual", "weight", "total", "out")
        compile_for_all(
            rms_norm_rows, dict.fromkeys(names, t), {**blocks, "HAS_RESIDUAL": given}, 16
        )
        names = ("x", "weight", "bias", "out")
        compile_for_all(
            layer_norm_rows, dict.fromkeys(names, t), {**blocks, "HAS_BIAS": given}, 16
        )
    for interleaved, rest in ((False, 0), (True, 32)):
        constants = {
            "INTERLEAVED": interleaved,
            "NUM_HEADS": 32,
            "NUM_KV_HEADS": 8,
            "HEAD_DIM": 128,
            "HALF": 64 - rest // 2,
            "PAIRS": 64,
            "REST": rest,
            "HEADS": 8,
        }
        names = ("query", "key", "query_out", "key_out")
        pointers = {**dict.fromkeys(names, t), "cos": "*fp32", "sin": "*fp32"}
        compile_for_all(rotate, pointers, constants, 4)
    for kind in KINDS:
        constants = {"KIND": kind, "IS_GATED": True, "BLOCK": 1024}
        compile_for_all(activate, {"x": t, "out": t}, constants, 4)
    compile_for_all(gather_rows, {"ids": "*i64", "table": t, "out": t}, {"BLOCK": 1024}, 4)
    # What stands around products with codes.
    sparse = {"first": "*i64", "columns": "*i32", "values": "*fp32"}
    for given in (False, True):
        steps = {"HAS_STEPS": given, "HAS_BIAS": given, "BLOCK": 512}
        pointers = {"parts": "*fp32", "steps": "*fp32", "bias": t, "out": t}
        compile_for_all(add_parts, pointers, steps, 4)
        pointers = {"x": t, "order": "*i64", "factors": "*fp32", "steps": "*fp32", "low": "*bf16"}
        constants = {
            "HAS_ORDER": given,
            "HAS_FACTORS": not given,
            "IN_STEPS": given,
            "HAS_FIXED_STEP": False,
            "IN_PAIRS": not given,
            "IS_APART": given,
            "BLOCK": 1024,
        }
        pointers["out"] = "*i8" if given else "*bf16"
        compile_for_all(prepare_inputs, pointers, constants, 4)
        pointers = {"x": t, "factors": "*fp32", "steps": "*fp32", "out": "*fp32", **sparse}
        constants = {"HAS_FACTORS": not given, "IN_STEPS": given, "ROWS": 16, "BLOCK": 32}
        compile_for_all(multiply_outliers, pointers, constants, 2)
    compile_for_all(add_outliers, {"ids": "*i64", "out": "*fp32", **sparse}, {"BLOCK": 32}, 1)
    for kind in ("int8", "int4", "fp8", "table4"):
        pointers = {"ids": "*i64", "codes": "*i8" if kind == "int8" else "*u8", "out": t}
        pointers |= {"scales": "*fp32", "zeros": "*i16", "table": "*fp32"}
        pointers |= {"order": "*i64", "factors": "*fp32"}
        constants = {"KIND": kind, "HAS_ZEROS": kind == "int8", "HAS_ORDER": True}
        constants |= {"HAS_FACTORS": True, "TABLE_STRIDE": 16, "BLOCK": 1024}
        compile_for_all(dequantize_rows, pointers, constants, 4)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For two generations, in types that the interpreter knows and in one that it does not."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * (3 * 2 * 2 + 2 + len(KINDS) + 1 + 2 * 3 + 1 + 4)
