"""Weights in integer codes within a step: gates, embeddings, likeliest tokens, adapters."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from coded_weights import Draw, coded_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import available_backends, get_backend
from quire.kernels.cpu import structs
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize, quantized_linear
from quire.models.adapter import DeltaSlice, LinearDelta

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)


class Step:
    """A model of no norms and at most one layer, whose attention gives nothing.

    Its embeddings are the output matrix, which is in codes.
    """

    def __init__(
        self,
        head: QuantizedWeight,
        mlp: tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight] | None = None,
    ) -> None:
        self.library = get_backend("cpu", "cpu").library
        self.context = self.library.quire_context_new()
        self.kept: list[object] = []
        width = head.in_features
        self.model = structs.Model()
        self.model.hidden_size = self.model.embedding_size = width
        self.model.head = self.model.embed = self.matrix(head)
        self.model.embed_is_packed = 1
        if mlp is None:
            return
        layer = structs.Layer(num_heads=1, num_kv_heads=1, head_dim=8, scale=1.0, gated=1)
        zeros = torch.zeros
        nothing = QuantizedWeight(
            "int8", zeros(24, width, dtype=torch.int8), zeros(24, 1), width, width
        )
        out = QuantizedWeight("int4", zeros(width, 4, dtype=torch.uint8), zeros(width, 1), 8, 8)
        layer.qkv, layer.out = self.matrix(nothing), self.matrix(out)
        layer.gate, layer.up, layer.down = (self.matrix(each) for each in mlp)
        caches = [torch.zeros(16, 1, 8) for _ in range(2)]
        layer.key_cache, layer.value_cache = (cache.data_ptr() for cache in caches)
        self.model.layers, self.model.num_layers = ctypes.pointer(layer), 1
        self.kept += [layer, caches]

    def matrix(self, weight: QuantizedWeight) -> structs.Matrix:
        self.kept.append(PackedCodes(self.library, weight))
        return self.kept[-1].matrix()  # type: ignore[attr-defined]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of tokens that follow each other."""
        count = len(ids)
        hidden = torch.empty(count, self.model.hidden_size)
        place = torch.arange(count)
        starts = torch.tensor([0, count], dtype=torch.int32)
        lens = torch.tensor([count], dtype=torch.int32)
        table = torch.zeros(1, 1, dtype=torch.int32)
        batch = structs.Batch(
            *(each.data_ptr() for each in (ids, place, place, starts, lens, table)),
            1,
            16,
            1,
            count,
            hidden.data_ptr(),
            None,
        )
        assert self.library.quire_forward(self.context, self.model, batch, 2) == 0
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result = torch.empty(len(hidden), self.model.head.out_features)
        arguments = (hidden.data_ptr(), len(hidden), None, result.data_ptr(), 2)
        assert self.library.quire_logits(self.context, self.model, *arguments) == 0
        return result

    def likeliest(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(hidden)
        rows, ids, highest = torch.arange(count), torch.empty(count).long(), torch.empty(count)
        pointers = (hidden.data_ptr(), rows.data_ptr(), count, None, ids.data_ptr())
        status = self.library.quire_likeliest(
            self.context, self.model, *pointers, highest.data_ptr(), 2
        )
        assert status == 0
        return ids, highest

    def __del__(self) -> None:
        self.library.quire_context_free(self.context)


@given(draw=coded_weights(max_in=100), seed=st.integers(0, 2**31))
def test_embeddings_are_rows_of_a_coded_output_matrix(isa: str, draw: Draw, seed: int) -> None:
    """A tied embedding is read from the blocks: what its codes stand for, to one rounding."""
    weight = draw.weight()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, draw.out_features, (5,), generator=generator)
    torch.testing.assert_close(
        Step(weight).forward(ids), dequantize(weight.select(ids)), rtol=1e-6, atol=0
    )


@given(
    draw=coded_weights(max_in=100, max_out=100),
    rows=st.integers(1, 16),
    kind=st.sampled_from(["int8", "int4"]),
    size=st.integers(1, 60),
)
def test_a_gated_product_is_that_of_both_coded_weights(
    isa: str, draw: Draw, rows: int, kind: str, size: int
) -> None:
    """What the gate lets through of the other, in a step: as the reference computes it."""
    gate = dataclasses.replace(draw, out_features=size)
    up = gate.weight().select(torch.arange(size - 1, -1, -1))
    down = Draw(kind, size, draw.in_features, 32, True, False, False, "float", None, draw.seed)
    head = Draw("int8", draw.in_features, 9, -1, False, False, False, "float", None, draw.seed)
    embedding = dataclasses.replace(head.weight(), scales=head.weight().scales / 30)
    weights = (gate.weight(), up, down.weight())
    ids = torch.arange(rows) % 9
    x = dequantize(embedding)[ids]
    step = Step(embedding, weights)
    inner = F.silu(quantized_linear(x, weights[0])) * quantized_linear(x, weights[1])
    expected = x + quantized_linear(inner, weights[2])
    # By far the most is lost where sums cancel each other.
    sizes = inner.abs() @ dequantize(weights[2]).abs().T
    sums = [x.abs() @ dequantize(each).abs().T for each in weights[:2]]
    bound = (sums[0] * (1 + sums[1])) @ dequantize(weights[2]).abs().T
    assert ((step.forward(ids) - expected).abs() <= 2e-4 * (sizes + bound) + 1e-6).all()
    for row in range(0, rows, 4):
        assert torch.equal(step.forward(ids[row : row + 1])[0], step.forward(ids)[row])


@settings(max_examples=10)
@given(draw=coded_weights(max_in=60), rows=st.sampled_from([1, 2, 5, 40]))
def test_the_likeliest_token_of_a_coded_output_matrix_is_that_of_its_logits(
    isa: str, draw: Draw, rows: int
) -> None:
    """Though no more than a stretch of 4,096 of them is there at a time."""
    step = Step(draw.weight(out_features=2 * 4096 + 3))
    generator = torch.Generator().manual_seed(draw.seed)
    hidden = torch.randn(rows, draw.in_features, generator=generator)
    ids, highest = step.likeliest(hidden)
    logits = step.logits(hidden)
    assert torch.equal(highest, logits.amax(1))
    assert torch.equal(logits.gather(1, ids[:, None])[:, 0], highest)


@given(
    draw=coded_weights(max_in=120),
    slots=st.lists(st.integers(-1, 1), min_size=1, max_size=60),
    rank=st.integers(1, 20),
)
def test_adapters_add_to_coded_products(isa: str, draw: Draw, slots: list[int], rank: int) -> None:
    """A row that has one gains what the adapter says of it; another has the bits of before."""
    weight = draw.weight()
    generator = torch.Generator().manual_seed(draw.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    deltas = [
        LinearDelta(
            a=normal(rank, draw.in_features),
            scales=normal(rank),
            slices=(DeltaSlice(0, 0, normal(draw.out_features, rank)),),
            bias=None,
            factor=None,
        )
        for _ in range(2)
    ]
    x, slot = normal(len(slots), draw.in_features), torch.tensor(slots, dtype=torch.int32)
    linear = PackedLinear(weight, None, deltas)
    plain, result = linear(x), linear(x, slot)
    assert torch.equal(result[slot < 0], plain[slot < 0])
    for number, delta in enumerate(deltas):
        rows = slot == number
        gain = (delta.scales * (x[rows] @ delta.a.T)) @ delta.slices[0].b.T
        torch.testing.assert_close(result[rows], plain[rows] + gain, rtol=1e-4, atol=1e-2)
        for row in torch.nonzero(rows).flatten().tolist()[::7]:
            alone = linear(x[row : row + 1], slot[row : row + 1])
            assert torch.equal(alone[0], result[row])
