"""Native products of weights in codes that stand for floats, against their dequantized weights."""

from __future__ import annotations

import ctypes

import pytest
import torch
from float_coded_weights import draw_outliers, draw_weight, outlier_sizes
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import available_backends
from quire.kernels.cpu import structs
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.models.adapter import DeltaSlice, LinearDelta

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

KINDS = ("fp8", "table", "tables")
SPLIT = 2.0**-16
"""What the second half of a number split in two bfloat16 may be off, of inputs and of a table."""
ROUNDED = 2.0**-8
"""What a number rounded to bfloat16 may be off."""


def multiply(
    x: torch.Tensor,
    weight: QuantizedWeight | torch.Tensor,
    bias: torch.Tensor | None = None,
    num_threads: int = 1,
    *,
    rounds_inputs: bool = False,
) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return PackedLinear(weight, bias, rounds_inputs=rounds_inputs)(x)
    finally:
        torch.set_num_threads(before)


def goes_by_tiles(isa: str, weight: QuantizedWeight) -> bool:
    """Whether inputs are split, and products need not have the bits of those of floats."""
    units = weight.group_size % 32 == 0 or weight.scales.shape[1] == 1
    return isa.startswith("amx") and units and weight.kind == "fp8"


def assert_same(
    found: torch.Tensor, expected: torch.Tensor, *, is_split: bool, size: float | torch.Tensor
) -> None:
    """Bit for bit, or, of split inputs, to 2^-15 of the sizes of what is added up."""
    if is_split:
        assert ((found - expected).abs() <= 2.0**-15 * size).all()
    else:
        assert torch.equal(found, expected)


def drawn(*kinds: str) -> st.SearchStrategy[QuantizedWeight]:
    return st.builds(
        draw_weight,
        kind=st.sampled_from(kinds),
        out_features=st.integers(1, 70),
        in_features=st.integers(1, 300),
        group_size=st.sampled_from((None, 8, 24, 32, 64, 80, 128, 256)),
        seed=st.integers(0, 2**32 - 1),
        has_order=st.booleans(),
        has_factors=st.booleans(),
        has_outliers=st.booleans(),
    )


@given(
    weight=drawn("fp8"),
    rows=st.integers(1, 40),
    has_bias=st.booleans(),
    num_threads=st.integers(1, 2),
    rounds_inputs=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_those_of_the_dequantized_weights(
    isa: str,
    weight: QuantizedWeight,
    rows: int,
    has_bias: bool,
    num_threads: int,
    rounds_inputs: bool,
    seed: int,
) -> None:
    """To the rounding of float32, or of inputs that may be rounded.

    And of each row alone, bit for bit what it is in company.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, weight.in_features, generator=generator)
    bias = torch.randn(weight.out_features, generator=generator) if has_bias else None
    result = multiply(x, weight, bias, num_threads, rounds_inputs=rounds_inputs)
    plain = dequantize(weight).double()
    exact = x.double() @ plain.T
    sizes = x.double().abs() @ plain.abs().T
    if weight.outliers is not None:
        # Here they are added to sums, there to weights, of which they may take off what is added.
        sizes += x.double().abs() @ outlier_sizes(weight).T
    if bias is not None:
        exact += bias.double()
        sizes += bias.double().abs()
    steps = (weight.in_features + 5) * 2.0**-23
    if goes_by_tiles(isa, weight):
        steps += ROUNDED if rounds_inputs and weight.kind == "fp8" else SPLIT
    assert ((result - exact).abs() <= steps * sizes + 1e-30).all()
    for row in range(0, rows, 7):
        alone = multiply(x[row : row + 1], weight, bias, rounds_inputs=rounds_inputs)
        assert torch.equal(alone[0], result[row])


@pytest.mark.parametrize("rows", [1, 3, 4, 17])
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_codes_and_floats_make_the_same_bits(isa: str, group_size: int | None, rows: int) -> None:
    """A product with codes is the one with the dequantized weight in float32; by tiles, nearly."""
    weight = draw_weight("fp8", 50, 300, group_size, seed=5)
    x = torch.randn(rows, 300)
    plain = dequantize(weight)
    assert_same(
        multiply(x, weight),
        multiply(x, plain),
        is_split=goes_by_tiles(isa, weight),
        size=x.abs() @ plain.abs().T,
    )


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("group_size", [None, 32, 128, 24])
def test_inputs_that_may_be_rounded_are_where_that_is_faster(
    isa: str, group_size: int | None, rows: int
) -> None:
    """To bfloat16, once, by tiles; by other instructions they stay as they are."""
    weight = draw_weight("fp8", 83, 300, group_size, seed=6)
    x = torch.randn(rows, 300)
    inputs = x.bfloat16().float() if goes_by_tiles(isa, weight) else x
    assert torch.equal(multiply(x, weight, rounds_inputs=True), multiply(inputs, weight))


@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "table"])
def test_what_is_no_finite_number_makes_none(isa: str, kind: str, rounds_inputs: bool) -> None:
    """Also where an input is split in two, of which the first alone could be infinite."""
    weight = draw_weight(kind, 20, 96, 32, seed=2)
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(3, 96)
        x[1, 40] = value
        result = multiply(x, weight, rounds_inputs=rounds_inputs)
        assert not result[1].isfinite().any()
        others = multiply(x[::2].contiguous(), weight, rounds_inputs=rounds_inputs)
        assert torch.equal(result[::2], others)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 24, 32, 33, 129, 256, 300])
@pytest.mark.parametrize("kind", ["fp8", "fp8, rounded", "table"])
def test_rows_of_codes_are_alone_what_they_are_in_company(isa: str, kind: str, rows: int) -> None:
    """However they are taken together, and with as many columns as are summed up in stretches."""
    kind, _, rounded = kind.partition(", ")
    for group_size in (64, None):
        weight = draw_weight(kind, 40, 1160, group_size, seed=4)
        x = torch.randn(rows, 1160)
        result = multiply(x, weight, None, 2, rounds_inputs=bool(rounded))
        for row in {0, rows // 2, rows - 1}:
            alone = multiply(x[row : row + 1], weight, rounds_inputs=bool(rounded))
            assert torch.equal(alone[0], result[row])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_make_no_rows(isa: str, kind: str) -> None:
    """A step may have nothing for a product."""
    assert multiply(torch.empty(0, 40), draw_weight(kind, 20, 40, 8, seed=0)).shape == (0, 20)


@pytest.mark.parametrize("rows", [1, 8])
def test_every_code_of_fp8_is_decoded_exactly(isa: str, rows: int) -> None:
    """Subnormal ones, both zeros and the largest; what is no number crashes nothing."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 2.0**-100, 127.9, 0.1):
        scales = torch.full((256, 1), scale)
        weight = QuantizedWeight("fp8", codes.view(256, 1), scales, 1, 1)
        result = multiply(torch.ones(rows, 1), weight)
        expected = (codes.float() * scale).expand(rows, 256)
        numbers = ~torch.isnan(codes.float())
        assert torch.equal(result[:, numbers], expected[:, numbers])


def test_fp8_under_scales_that_would_overflow_is_left_to_others() -> None:
    """A weight beyond 50,000 is hardly one; where it is, it is no infinity."""
    weight = draw_weight("fp8", 20, 40, 8, seed=0)
    weight.scales[3, 2] = 128.0
    with pytest.raises(ValueError, match="a scale of fp8 codes reaches 128"):
        PackedCodes(load_library(), weight)


@given(weight=drawn(*KINDS), rounds_inputs=st.booleans())
def test_packed_codes_are_read_as_they_were(weight: QuantizedWeight, rounds_inputs: bool) -> None:
    """Bit for bit, whole and by rows; so adapters and tied embeddings see what was loaded."""
    packed = PackedCodes(load_library(), weight, rounds_inputs=rounds_inputs)
    ids = torch.tensor([0, weight.out_features - 1, weight.out_features // 2, 0])
    for found, expected in ((packed.read(), weight), (packed.rows(ids), weight.select(ids))):
        tensors, others = found.tensors(), expected.tensors()
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype
            if name == "codes":
                tensor, others[name] = tensor.view(torch.uint8), others[name].view(torch.uint8)
            assert torch.equal(tensor, others[name]), name
        assert torch.equal(dequantize(found), dequantize(expected))


def test_tables_are_kept_once() -> None:
    """Those of outputs are a tenth of a weight: what is read back is what is multiplied."""
    for out_features in (32, 50):
        packed = PackedCodes(load_library(), draw_weight("tables", out_features, 40, 8, seed=0))
        table = packed.read().table
        assert table is not None
        assert table.data_ptr() in [each.data_ptr() for each in packed._kept]


def test_outliers_beside_integer_codes_are_refused() -> None:
    """The native integer products do not add them."""
    outliers = draw_outliers(torch.Generator().manual_seed(0), 4, 8)
    weight = QuantizedWeight(
        "int8", torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1), 8, 8, outliers=outliers
    )
    with pytest.raises(ValueError, match="outliers beside int8"):
        PackedCodes(load_library(), weight)


def test_factors_of_inputs_that_are_rounded_to_8_bits_are_refused() -> None:
    """By the native products as by the reference, which says what neither can."""
    codes, scales = torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1)
    weight = QuantizedWeight(
        "int8", codes, scales, 8, 8, input_factors=torch.ones(8), activations="int8"
    )
    with pytest.raises(ValueError, match="8 bits cannot have factors"):
        PackedCodes(load_library(), weight)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_add_to_codes_what_they_add_to_floats(isa: str, kind: str, rows: int) -> None:
    """Bit for bit or nearly, in rows that have an adapter and in those that have none."""
    weight = draw_weight(kind, 70, 96, 32, seed=7)
    delta = LinearDelta(
        a=torch.randn(5, 96), scales=torch.rand(5), slices=(DeltaSlice(0, 0, torch.randn(70, 5)),)
    )
    x, slots = torch.randn(rows, 96), torch.arange(rows, dtype=torch.int32) % 2 - 1
    slots = slots.flip(0).contiguous()
    found = PackedLinear(weight, None, [delta])(x, slots)
    plain = dequantize(weight)
    assert_same(
        found,
        PackedLinear(plain, None, [delta])(x, slots),
        is_split=goes_by_tiles(isa, weight) or kind != "fp8",
        size=(1 if kind == "fp8" else 8) * x.abs() @ plain.abs().T,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_output_is_found_in_codes(isa: str, kind: str) -> None:
    """The output matrix is cut into stretches, its tables and outliers with it."""
    weight = draw_weight(kind, 8230, 24, None, seed=3, has_outliers=True)
    x = torch.randn(5, 24)
    linear = PackedLinear(weight)
    logits = linear(x)
    ids = torch.empty(5, dtype=torch.int64)
    highest = torch.empty(5)
    indices = torch.arange(5)
    status = linear._library.quire_likeliest(
        linear._context,
        ctypes.byref(linear._model),
        x.data_ptr(),
        indices.data_ptr(),
        5,
        None,
        ids.data_ptr(),
        highest.data_ptr(),
        2,
    )
    assert status == 0
    assert torch.equal(ids, logits.argmax(1))
    assert torch.equal(highest, logits.amax(1))


def run_model(model: structs.Model, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of one sequence, whose cache is one block."""
    hidden = torch.empty(len(ids), model.hidden_size)
    places = torch.arange(len(ids))
    lens = torch.tensor([0, len(ids)], dtype=torch.int32)
    table = torch.zeros(1, dtype=torch.int32)
    batch = structs.Batch()
    batch.input_ids = ids.data_ptr()
    batch.positions = batch.slot_mapping = places.data_ptr()
    batch.query_start_loc, batch.seq_lens = lens.data_ptr(), lens[1:].data_ptr()
    batch.block_tables, batch.block_table_stride = table.data_ptr(), 1
    batch.block_size, batch.num_seqs, batch.num_tokens = len(ids), 1, len(ids)
    batch.hidden = hidden.data_ptr()
    library = load_library()
    context = library.quire_context_new()
    try:
        assert library.quire_forward(context, ctypes.byref(model), ctypes.byref(batch), 1) == 0
    finally:
        library.quire_context_free(context)
    return hidden


@given(weight=drawn(*KINDS), rounds_inputs=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_a_tied_embedding_is_read_from_codes(
    isa: str, weight: QuantizedWeight, rounds_inputs: bool, seed: int
) -> None:
    """Each number is the dequantized weight's, also where products round it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, weight.out_features, (4,), generator=generator)
    packed = PackedCodes(load_library(), weight, rounds_inputs=rounds_inputs)
    model = structs.Model()
    model.hidden_size = model.embedding_size = weight.in_features
    model.embed_is_packed = True
    model.embed = model.head = packed.matrix()
    assert torch.equal(run_model(model, ids), dequantize(weight)[ids])


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    ("gate_kind", "up_kind"),
    [
        *((kind, kind) for kind in KINDS),
        ("table", "tables"),
        ("fp8", "normal fp8"),
        ("tables", "rounded tables"),
    ],
)
def test_gated_products_of_codes_are_those_of_floats(
    isa: str, gate_kind: str, up_kind: str, rows: int
) -> None:
    """Bit for bit or nearly, in a layer that does nothing else."""
    is_rounded = up_kind.startswith("rounded")
    group_size = None if is_rounded else 32
    gate = draw_weight(gate_kind, 50, 96, group_size, seed=1)
    up = draw_weight(up_kind.split()[-1], 50, 96, group_size, seed=2)
    if up_kind.startswith("normal"):  # none of its codes is subnormal, as many of the gate's are
        codes = up.codes.view(torch.uint8)
        codes[codes & 0x78 == 0] |= 0x10
    ids, embed = torch.arange(rows), torch.randn(rows, 96)
    rest = {
        "qkv": PackedLinear(torch.zeros(24, 96)),
        "out": PackedLinear(torch.zeros(96, 8)),
        "down": PackedLinear(torch.randn(96, 50)),
    }

    def run(gate: QuantizedWeight | torch.Tensor, up: QuantizedWeight | torch.Tensor):
        parts = {
            **rest,
            "gate": PackedLinear(gate, rounds_inputs=is_rounded),
            "up": PackedLinear(up, rounds_inputs=is_rounded),
        }
        caches = torch.zeros(2, rows, 8)
        layer = structs.Layer()
        for name, part in parts.items():
            setattr(layer, name, part._model.head)
        layer.gated, layer.num_heads, layer.num_kv_heads, layer.head_dim = True, 1, 1, 8
        layer.scale = 1.0
        layer.key_cache, layer.value_cache = caches[0].data_ptr(), caches[1].data_ptr()
        model = structs.Model()
        model.layers, model.num_layers = ctypes.pointer(layer), 1
        model.hidden_size = model.embedding_size = 96
        model.embed = structs.Matrix(embed.data_ptr(), None, None, 96, rows, 0, None)
        return run_model(model, ids)

    found = run(gate, up)
    assert not torch.equal(found, embed)
    expected = run(dequantize(gate), dequantize(up))
    is_split = goes_by_tiles(isa, gate) or gate_kind != "fp8"
    # By steps of 16 bits, or to bfloat16.
    rounded = 2**8 if is_rounded else 1 if gate_kind == "fp8" else 8
    assert_same(found, expected, is_split=is_split, size=rounded * expected.abs().amax())
