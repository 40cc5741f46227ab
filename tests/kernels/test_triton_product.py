"""Triton's products with weights in codes, against plain torch: on a GPU, or in its interpreter."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import KernelError, available_backends, get_backend
from quire.kernels.quantized import Kind, Outliers, QuantizedWeight
from quire.kernels.reference.quantized import quantized_embedding as rows_by_torch
from quire.kernels.reference.quantized import quantized_linear as by_torch
from quire.kernels.triton.backend import TritonBackend
from quire.kernels.triton.configs import trying

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

from quire.kernels.triton.quantized import num_splits, plan_product  # noqa: E402  (needs triton)

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw_weight(
    kind: Kind, shape: tuple[int, int], group_size: int, seed: int, parts: set[str]
) -> QuantizedWeight:
    """A random weight with the parts that are named."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    num_groups = -(-columns // group_size)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if kind == "int8":
        codes = integers(-128, 128, rows, columns).to(torch.int8)
    elif kind == "fp8":
        codes = integers(0, 256, rows, columns).to(torch.uint8)
        codes[codes & 127 == 127] = 1  # no NaN
        codes = codes.view(torch.float8_e4m3fn)
    else:
        codes = integers(0, 256, rows, (columns + 1) // 2).to(torch.uint8)
    has_zeros = "zeros" in parts and kind in ("int8", "int4")
    table = None
    if kind == "table4":
        table = torch.randn(*((rows, 16) if "tables" in parts else (16,)), generator=generator)
    weight = QuantizedWeight(
        kind,
        codes,
        torch.rand(rows, num_groups, generator=generator) + 0.1,
        columns,
        group_size,
        zeros=integers(-256, 257, rows, num_groups).short() if has_zeros else None,
        order=torch.randperm(columns, generator=generator) if "order" in parts else None,
        table=table,
    )
    if "outliers" in parts:
        counts = integers(0, 3, rows).clamp(max=columns)
        places = [torch.randperm(columns, generator=generator)[:n].sort().values for n in counts]
        values = 3 * torch.randn(int(counts.sum()), generator=generator)
        first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        weight = replace(weight, outliers=Outliers(first, torch.cat(places).int(), values))
    if "factors" not in parts:
        return weight
    return replace(weight, input_factors=torch.rand(columns, generator=generator) + 0.5)


def on_device(weight: QuantizedWeight) -> QuantizedWeight:
    moved = {name: each.to(DEVICE) for name, each in weight.tensors().items() if "." not in name}
    outliers = weight.outliers
    if outliers is not None:
        outliers = Outliers(
            outliers.first.to(DEVICE), outliers.columns.to(DEVICE), outliers.values.to(DEVICE)
        )
    return replace(weight, **moved, outliers=outliers)


def compare(
    weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """The kernel's result is off by rounding: of sums in float32, and of the result once."""
    got = TritonBackend().quantized_linear(
        x.to(DEVICE), on_device(weight), None if bias is None else bias.to(DEVICE)
    )
    assert got.dtype is dtype
    expected = by_torch(x.float(), weight, None if bias is None else bias.float())
    # What is taken off for the zeros may be large beside what is left.
    largest = expected.abs().amax().clamp(min=1e-3)
    if weight.zeros is not None:
        sums = x.float().abs().sum(1).amax() * weight.scales.amax() * 512
        largest = torch.maximum(largest, sums / 64)
    if weight.table is not None:
        # What is left of an entry may be 2^-15 of the largest.
        sums = x.float().abs().sum(1).amax() * weight.scales.amax() * weight.table.abs().amax()
        largest = torch.maximum(largest, sums / 16)
    assert (got.cpu().float() - expected).abs().amax() <= ROUNDING[dtype] * largest


parts = st.sets(st.sampled_from(["zeros", "order", "factors", "outliers", "tables"]))
kinds = st.sampled_from(["int8", "int4", "fp8", "table4"])
group_sizes = st.sampled_from([7, 8, 32, 40, 64, 128, 1000])
EXAMPLES = max(settings().max_examples // 2, 20)


@settings(max_examples=EXAMPLES)
@given(
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    num_rows=st.sampled_from([0, 1, 2, 17, 40]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    group_size=group_sizes,
    parts=parts,
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_product_is_that_of_the_dequantized_weight(
    kind, dtype, num_rows, shape, group_size, parts, has_bias, seed
):
    """Of any size, with groups that do not divide it, zero points, tables, outliers, factors."""
    weight = draw_weight(kind, shape, group_size, seed, parts)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if has_bias else None
    if num_rows == 0:
        got = TritonBackend().quantized_linear(x.to(DEVICE), on_device(weight))
        assert got.shape == (0, shape[0])
        return
    compare(weight, x, bias, dtype)


@settings(max_examples=EXAMPLES)
@given(
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    num_rows=st.sampled_from([1, 5, 20, 35]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    group_size=group_sizes,
    parts=st.sets(st.sampled_from(["zeros", "order", "outliers", "tables"])),
    step=st.sampled_from([None, 0.01]),
    seed=st.integers(0, 2**32 - 1),
)
def test_inputs_are_rounded_to_8_bits_where_the_weight_says_so(
    kind, dtype, num_rows, shape, group_size, parts, step, seed
):
    """Row by row or by a fixed step; integers are then multiplied as such."""
    weight = draw_weight(kind, shape, group_size, seed, parts)
    weight = replace(weight, activations="int8", activation_scale=step)
    x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    compare(weight, x, None, dtype)


def test_every_code_of_fp8_is_the_number_that_it_is():
    """All 256, those below the normal numbers and what is no number among them."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    weight = QuantizedWeight("fp8", codes[:, None], torch.ones(256, 1), 1, 1)
    for dtype in DTYPES:
        x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
        got = TritonBackend().quantized_linear(x, on_device(weight)).cpu().float()[0]
        assert torch.equal(got.nan_to_num(12345), codes.float().nan_to_num(12345))


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, which computes by numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("activations", "step"), [("float", None), ("int8", None), ("int8", 0.1)])
def test_what_is_no_number_stays_in_its_row(activations, step, value):
    """It makes its row no numbers, and no other row."""
    weight = draw_weight("int8", (40, 50), 16, 0, {"zeros"})
    weight = replace(weight, activations=activations, activation_scale=step)
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    clean = TritonBackend().quantized_linear(x.to(DEVICE), on_device(weight)).cpu()
    x[3, 7] = value
    got = TritonBackend().quantized_linear(x.to(DEVICE), on_device(weight)).cpu()
    assert not got[3].isfinite().any()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(got[others], clean[others])


@settings(max_examples=EXAMPLES)
@given(
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(0, 6),
    shape=st.tuples(st.integers(1, 20), st.one_of(st.integers(1, 70), st.just(1100))),
    group_size=group_sizes,
    parts=parts,
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_a_table_are_those_of_the_dequantized_weight(
    kind, dtype, num_tokens, shape, group_size, parts, seed
):
    """Bit for bit, in the result's type."""
    weight = draw_weight(kind, shape, group_size, seed, parts)
    ids = torch.randint(shape[0], (num_tokens,), generator=torch.Generator().manual_seed(seed))
    got = TritonBackend().quantized_embedding(ids.to(DEVICE), on_device(weight), dtype)
    assert got.dtype is dtype
    assert torch.equal(got.cpu(), rows_by_torch(ids, weight, dtype))


def test_few_outputs_are_computed_in_parts():
    """Inputs are shared out among programs; what comes out is the same but for rounding."""
    for kind, group_size in itertools.product(("int8", "int4", "fp8", "table4"), (32, 4096)):
        weight = draw_weight(kind, (12, 1024), group_size, 0, {"zeros"})
        config = plan_product(weight, 2, torch.float16).config
        assert num_splits(weight, 2, config) > 1
        x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).half()
        compare(weight, x, torch.randn(12).half(), torch.float16)
    assert num_splits(weight, 512, plan_product(weight, 512, torch.float16).config) == 1


def test_many_tiles_are_each_computed_once():
    """However they are put in order: bands of eight, and what is left of them."""
    weight = draw_weight("int8", (70, 40), 40, 0, {"order"})
    x = torch.randn(180, 40, generator=torch.Generator().manual_seed(0))
    with trying("quantized_product", {"ROWS": 16, "OUTPUTS": 16}):
        compare(weight, x, None, torch.float32)


def test_blocks_of_columns_fit_groups():
    """A block is of one group, or its codes become values; a product is never too short."""
    for kind, group_size, dtype in itertools.product(
        ("int8", "int4", "fp8"), (7, 16, 32, 64, 96, 128, 4096), (torch.float16, torch.int8)
    ):
        weight = draw_weight(kind, (32, 4096), group_size, 0, set())
        plan = plan_product(weight, 4, dtype)
        assert plan.config["INPUTS"] >= 32
        assert plan.by_values == (group_size in (7, 16, 32, 96))
        if not plan.by_values:
            assert group_size % plan.config["INPUTS"] == 0


def test_a_view_is_multiplied_as_it_is():
    """Inputs of any strides, and a bias that is a view."""
    weight = draw_weight("int8", (10, 21), 21, 0, set())
    x = torch.randn(3, 42, generator=torch.Generator().manual_seed(0))[:, ::2]
    compare(weight, x, torch.randn(20)[::2], torch.float32)


def test_rounded_inputs_with_factors_are_refused():
    """As the reference does: no format has both."""
    weight = replace(draw_weight("int8", (3, 8), 8, 0, {"factors"}), activations="int8")
    with pytest.raises(ValueError, match="cannot have factors"):
        TritonBackend().quantized_linear(torch.zeros(1, 8, device=DEVICE), on_device(weight))


def test_the_backend_is_for_gpus_alone():
    """It is offered where there is one, and refused for a CPU by name."""
    assert ("triton" in available_backends()) is ON_GPU
    assert not TritonBackend.supports(torch.device("cpu"))
    with pytest.raises(KernelError, match="'triton' does not support device 'cpu'"):
        get_backend("cpu", "triton")
    if ON_GPU:
        assert get_backend("cuda").name == "triton"


_COMPILE = """
import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.triton import configs
from quire.kernels.triton.quantized_product import quantized_product

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8"}
SIZES = ("num_rows", "num_outputs", "num_inputs", "num_groups", "group_size", "x_stride")
MORE_SIZES = ("x_odd", "row_bytes", "split_size")
ALIGNED = {"x", "codes", "num_inputs", "x_stride", "row_bytes", "x_odd", "split_size"}
cases = itertools.product(("int8", "int4", "fp8", "table4"), NAMES, (1, 4096), (False, True))
for kind, dtype, rows, by_values in cases:
    if dtype is torch.int8 and (by_values or kind in ("fp8", "table4")):
        continue
    config = dict(
        configs.config_for(
            "quantized_product", torch.device("cpu"), rows=rows, kind=kind, dtype=str(dtype)[6:]
        )
    )
    if by_values or kind == "table4":
        config |= {name: min(config[name], 64) for name in ("ROWS", "OUTPUTS", "INPUTS")}
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        "KIND": kind,
        "BY_VALUES": by_values,
        "IN_PAIRS": dtype is torch.bfloat16 and not by_values and kind != "table4",
        "IS_APART": rows > 32 and kind in ("int4", "table4"),
        "ONE_GROUP": not by_values and rows > 32,
        "HAS_ZEROS": kind in ("int8", "int4"),
        "HAS_STEPS": dtype is torch.int8,
        "HAS_BIAS": True,
        "IN_PARTS": rows == 1,
        "TABLE_STRIDE": 16 if kind == "table4" else 0,
        **config,
    }
    signature = {
        "x": f"*{NAMES[dtype]}",
        "x_low": f"*{NAMES[dtype]}",
        "codes": "*i8" if kind == "int8" else "*u8",
        "scales": "*fp32",
        "zeros": "*i16",
        "table": "*fp32",
        "steps": "*fp32",
        "bias": "*fp32",
        "out": "*fp32" if rows == 1 else "*bf16" if dtype is torch.int8 else f"*{NAMES[dtype]}",
        **dict.fromkeys((*SIZES, *MORE_SIZES), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    names = enumerate(quantized_product.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if name in ALIGNED}
    source = ASTSource(
        fn=quantized_product, signature=signature, constexprs=constants, attrs=aligned
    )
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options=options)
        uses_tensor_cores = "mma" in built.asm["ptx"]
        assert uses_tensor_cores or dtype is torch.float32, (kind, dtype, capability)
        # Codes come by copies that nobody waits for.
        assert "cp.async" in built.asm["ptx"], (kind, dtype, rows, capability)
        assert built.metadata.shared <= (160 if capability == 80 else 227) * 1024
        print(kind, NAMES[dtype], rows, capability)
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """For two generations, of every kind and type: by tensor cores, in their memory."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * (4 * 3 * 2 * 2 + 2 * 2)
