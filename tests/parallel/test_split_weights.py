"""What ranks have of each parameter is, put together, the parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError, ModelLoadError
from quire.kernels.reference.quantized import dequantize
from quire.models.layers import layer_linears, own_linears
from quire.models.linear import Linear, WeightMethod
from quire.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
)
from quire.models.split import check_split, split_layer, split_spec, split_vocab, vocab_chunk
from quire.models.weights import Layout, Weights
from quire.parallel.place import Place
from quire.quantization.rounding import Grid, round_int4, round_int8

CPU = torch.device("cpu")
NORM = NormSpec("rms", 1e-6)


@dataclass(frozen=True)
class Draw:
    layer: LayerSpec
    hidden_size: int
    tensor_size: int
    expert_parallel: bool


@st.composite
def layers(draw: st.DrawFn) -> Draw:
    """A layer that so many ranks can share."""
    size = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if n % size == 0 or size % n == 0]))
    heads = math.lcm(size, kv_heads) * draw(st.integers(1, 3))
    attention = AttentionSpec(
        heads, kv_heads, draw(st.integers(1, 5)), 1.0, draw(st.booleans()), draw(st.booleans())
    )
    experts = None
    if draw(st.booleans()):
        shared = draw(st.none() | st.integers(1, 4))
        experts = ExpertsSpec(
            draw(st.integers(size, 7)), 1, False, shared_size=shared and shared * size
        )
    mlp = MlpSpec(draw(st.integers(1, 6)) * size, "silu", draw(st.booleans()), True, experts)
    expert_parallel = experts is not None and draw(st.booleans())
    layer = LayerSpec(attention, mlp, NORM, NORM)
    return Draw(layer, draw(st.integers(1, 9)), size, expert_parallel)


def places(draw: Draw) -> list[Place]:
    ranks = range(draw.tensor_size)
    return [Place.of_rank(each, draw.tensor_size, 1, draw.expert_parallel) for each in ranks]


def numbered(*shape: int) -> torch.Tensor:
    """A tensor in which no number is there twice."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def filled(linear: Linear, whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What is here of a weight, of which a checkpoint has the whole."""
    weights = Weights(CPU, torch.float32)
    WeightMethod().create(linear, weights)
    name = f"{linear.name}.weight"
    if layout == "transposed":
        whole = whole.t().contiguous()
    elif layout == "grouped":
        grouped = torch.empty_like(whole)
        grouped[linear.ungrouped_rows()] = whole
        whole = grouped
    weights.fill(name, "", layout, whole)
    assert weights.is_loaded(name)
    return weights[name]


def filled_by_parts(linear: Linear, whole: torch.Tensor) -> torch.Tensor:
    weights = Weights(CPU, torch.float32)
    WeightMethod().create(linear, weights)
    name = f"{linear.name}.weight"
    for part, rows in zip(linear.parts, whole.split(list(linear.parts.values())), strict=True):
        weights.fill(name, part if len(linear.parts) > 1 else "", "plain", rows)
    return weights[name]


def together(linears: list[Linear], shares: list[torch.Tensor]) -> torch.Tensor:
    """Put shares together by what each linear says that its rank has."""
    first = linears[0]
    whole = torch.full((first.out_features, first.in_features), math.nan)
    for linear, share in zip(linears, shares, strict=True):
        columns = linear.own_columns or range(linear.in_features)
        there = here = 0
        owns = linear.own_rows or tuple(range(size) for size in linear.parts.values())
        for own, size in zip(owns, linear.parts.values(), strict=True):
            rows = slice(there + own.start, there + own.stop)
            whole[rows, columns.start : columns.stop] = share[here : here + len(own)]
            here, there = here + len(own), there + size
        assert here == len(share)
    return whole


@given(draw=layers(), data=st.data())
def test_shares_put_together_are_the_whole(draw: Draw, data: st.DataObject) -> None:
    """However the rows lie in the checkpoint, fused there or not."""
    whole = {each.name: each for each in layer_linears("layers.0", draw.layer, draw.hidden_size)}
    found: dict[str, list[Linear]] = {name: [] for name in whole}
    for place in places(draw):
        for linear in own_linears("layers.0", draw.layer, draw.hidden_size, place):
            found[linear.name].append(linear)
    for name, linears in found.items():
        weight = numbered(whole[name].out_features, whole[name].in_features)
        fused: list[Layout] = ["plain", "transposed"]
        if name.endswith(".qkv"):
            fused.append("grouped")
        layout = data.draw(st.sampled_from(fused))
        shares = [filled(each, weight, layout) for each in linears]
        assert torch.equal(together(linears, shares), weight)
        for linear, share in zip(linears, shares, strict=True):
            assert torch.equal(filled_by_parts(linear, weight), share)


@given(draw=layers())
def test_shares_have_the_shapes_of_the_rank_s_own_layer(draw: Draw) -> None:
    """What is allocated is what a step multiplies with."""
    for place in places(draw):
        shapes = {
            each.name: (each.out_features, each.in_features)
            for each in layer_linears("layers.0", split_layer(draw.layer, place), draw.hidden_size)
        }
        own = own_linears("layers.0", draw.layer, draw.hidden_size, place)
        assert {each.name: each.cut.own_shape for each in own} == shapes


@given(draw=layers())
def test_every_expert_is_on_one_rank_and_every_bias_is_added_once(draw: Draw) -> None:
    counts: dict[str, int] = {}
    for place in places(draw):
        for linear in own_linears("layers.0", draw.layer, draw.hidden_size, place):
            if linear.bias and (linear.split == "columns" or ".experts." in linear.name):
                counts[linear.name] = counts.get(linear.name, 0) + 1
    sums = {name: n for name, n in counts.items() if name.endswith((".out", ".down"))}
    assert all(count == 1 for count in sums.values())
    if draw.expert_parallel:
        assert all(count == 1 for name, count in counts.items() if ".experts." in name)


@given(draw=layers(), group_size=st.sampled_from([2, 3, 8]), symmetric=st.booleans())
def test_codes_are_cut_to_the_same_values(draw: Draw, group_size: int, symmetric: bool) -> None:
    """Every share of a weight in codes is that share of what the codes stand for."""
    size = draw.tensor_size
    mlp = replace(draw.layer.mlp, intermediate_size=draw.layer.mlp.intermediate_size * group_size)
    layer = replace(draw.layer, mlp=mlp)
    for place in places(draw):
        for linear in own_linears("layers.0", layer, group_size * 2, place):
            if linear.name.endswith((".out", "shared.down")):
                continue  # their widths are no multiples
            noise = torch.randn(
                linear.out_features,
                linear.in_features,
                generator=torch.Generator().manual_seed(size),
            )
            weight = round_int4(noise, Grid(group_size, symmetric, clip=False))
            weights = Weights(CPU, torch.float32)
            WeightMethod().create(linear, weights)
            name = f"{linear.name}.weight"
            weights.put_codes(name, "", weight)
            coded = weights.settle_codes(name)
            assert coded is not None
            assert torch.equal(coded.read(), filled(linear, dequantize(weight), "plain"))


@given(vocab_size=st.integers(1, 300), size=st.integers(1, 8))
def test_tokens_are_shared_in_blocks(vocab_size: int, size: int) -> None:
    chunk = vocab_chunk(vocab_size, size)
    rows = [split_vocab(vocab_size, Place(rank, size)) for rank in range(size)]
    if (size - 1) * chunk < vocab_size:
        assert [token for each in rows for token in each] == list(range(vocab_size))
        assert all(len(each) == chunk for each in rows[:-1])
        assert size == 1 or chunk % 16 == 0


# Refused


def model(heads: int = 4, kv_heads: int = 2, inner: int = 12, **others: object) -> DecoderSpec:
    attention = AttentionSpec(heads, kv_heads, 8, 1.0)
    layer = LayerSpec(attention, MlpSpec(inner, "silu", **others), NORM, NORM)  # type: ignore[arg-type]
    return DecoderSpec("Any", 3040, 32, (layer,) * 2, NORM, 64)


@pytest.mark.parametrize(
    ("spec", "place", "expected"),
    [
        (
            model(),
            Place(0, 3),
            r"tensor_parallel_size=3 .* 4 attention heads, 2 key/value heads; 1, 2, 4 would",
        ),
        (model(inner=10), Place(0, 4), r"=4 .* it has an intermediate size of 10; 1, 2 would do"),
        (
            model(kv_heads=4),
            Place(0, 8),
            r"=8 .* 4 attention heads, an intermediate size of 12; 1, 2, 4 would",
        ),
        (model(12, 6), Place(0, 4), r"=4 .* 6 key/value heads; 1, 2, 3, 6, 12 would do"),
        (
            model(experts=ExpertsSpec(3, 1, False)),
            Place(0, 4, 0, 1, True),
            "3 experts; 1, 2 would do",
        ),
        (
            model(experts=ExpertsSpec(4, 1, False, shared_size=6)),
            Place(0, 4),
            "expert of the size 6; 1, 2 would",
        ),
        (model(), Place(0, 2, 0, 1, True), "enable_expert_parallel=True: the model has no experts"),
        (model(), Place(0, 1, 0, 3), "pipeline_parallel_size=3: the model has 2 layers; at most 2"),
        (
            replace(model(16, 16, 16), vocab_size=64),
            Place(0, 8),
            "64 tokens in blocks of 16; 1, 2, 4 would do",
        ),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(
    spec: DecoderSpec, place: Place, expected: str
) -> None:
    """With what it has, and which numbers would do."""
    with pytest.raises(ConfigError, match=expected):
        split_spec(spec, place)
    with pytest.raises(ConfigError, match=expected):
        check_split(spec, place)


def test_groups_are_not_cut() -> None:
    """With their size, the width, and which numbers of ranks would do."""
    spec = model(4, 4, 48)
    down = next(
        each
        for each in own_linears("layers.0", spec.layers[0], 32, Place(0, 4))
        if each.name.endswith(".down")
    )
    weights = Weights(CPU, torch.float32)
    WeightMethod().create(down, weights)
    weight = round_int4(torch.randn(32, 48), Grid(8, False, clip=False))
    expected = (
        r"groups of 8 columns, which tensor_parallel_size=4 would cut: it gives each rank 12 of "
        r"48; 1, 2, 3, 6 would do"
    )
    with pytest.raises(ModelLoadError, match=expected):
        weights.put_codes(f"{down.name}.weight", "", weight)
    weights.put_codes(f"{down.name}.weight", "", round_int8(torch.randn(32, 48)))
