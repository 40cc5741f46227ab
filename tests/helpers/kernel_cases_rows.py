"""Comparisons of what works row by row: norms, rotation, activations, lookup, products."""

from __future__ import annotations

from typing import Any

import torch
from kernel_draw import Draw, agree

from quire.kernels.reference.backend import ReferenceBackend

REFERENCE = ReferenceBackend()
KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh")


def _width(draw: Draw) -> int:
    return draw.size(1, 200, draw.rng.choice([4096, 5120, 8192]))


def rms_norm(draw: Draw, backend: Any) -> None:
    """Of rows, and of single heads."""
    axes = [draw.size(1, 5, 300)]
    width = _width(draw)
    if draw.rng.random() < 0.3:
        axes, width = [draw.size(1, 5, 300), draw.rng.choice([2, 8])], draw.rng.choice([16, 128])
    x = draw.noise(*axes, width) * draw.rng.choice([0.01, 1.0, 20.0])
    x = x.to(draw.dtype)
    weight = draw.noise(width) if draw.rng.random() < 0.8 else None
    offset = draw.rng.choice([0.0, 1.0])
    got = backend.rms_norm(
        draw.strided(x), None if weight is None else draw.here(weight), 1e-5, weight_offset=offset
    )
    plain = None if weight is None else weight.float()
    expected = REFERENCE.rms_norm(x.float(), plain, 1e-5, weight_offset=offset)
    agree("rms_norm", got, expected, draw.dtype)


def add_rms_norm(draw: Draw, backend: Any) -> None:
    """The sum, and the norm of the sum as it is returned."""
    rows, width = draw.size(0, 5, 300), _width(draw)
    x, residual, weight = draw.noise(rows, width), draw.noise(rows, width), draw.noise(width)
    normed, total = backend.add_rms_norm(
        draw.strided(x), draw.strided(residual), draw.here(weight), 1e-5
    )
    agree("add_rms_norm: the sum", total, x.float() + residual.float(), draw.dtype)
    expected = REFERENCE.rms_norm(total.cpu().float(), weight.float(), 1e-5)
    agree("add_rms_norm: the norm", normed, expected, draw.dtype)


def layer_norm(draw: Draw, backend: Any) -> None:
    """Also where the mean is far from 0."""
    rows, width = draw.size(1, 5, 300), max(2, _width(draw))
    x = (draw.noise(rows, width).float() + draw.rng.choice([0.0, 5.0])).to(draw.dtype)
    weight, bias = (draw.noise(width) if draw.rng.random() < 0.7 else None for _ in range(2))
    here = [None if each is None else draw.here(each) for each in (weight, bias)]
    plain = [None if each is None else each.float() for each in (weight, bias)]
    got = backend.layer_norm(draw.strided(x), *here, 1e-5)
    expected = REFERENCE.layer_norm(x.float(), *plain, 1e-5)
    agree("layer_norm", got, expected, draw.dtype, largest=5.0)


def rotary_embedding(draw: Draw, backend: Any) -> None:
    """Of all of a head or its beginning, of halves or of neighbours."""
    tokens = draw.size(1, 5, 300)
    kv_heads = draw.rng.choice([1, 2, 8])
    heads = kv_heads * draw.rng.choice([1, 4])
    head_dim = draw.rng.choice([8, 16, 24, 64, 80, 128])
    half = draw.rng.choice([head_dim // 2, head_dim // 4]) or 1
    query, key = draw.noise(tokens, heads, head_dim), draw.noise(tokens, kv_heads, head_dim)
    kind = draw.rng.choice([draw.dtype, torch.float32])
    angles = 6.3 * draw.uniform(tokens, half).float()
    cos, sin = angles.cos().to(kind), angles.sin().to(kind)
    interleaved = draw.rng.random() < 0.5
    got = backend.rotary_embedding(
        draw.strided(query), draw.strided(key), draw.here(cos), draw.here(sin),
        interleaved=interleaved,
    )  # fmt: skip
    expected = REFERENCE.rotary_embedding(
        query.float(), key.float(), cos.float(), sin.float(), interleaved=interleaved
    )
    for name, one, other in zip(("query", "key"), got, expected, strict=True):
        agree(f"rotary_embedding: {name}", one, other, draw.dtype)


def activation(draw: Draw, backend: Any) -> None:
    """Every kind, of numbers small and large."""
    x = (draw.noise(draw.size(0, 5, 200), _width(draw)) * 3).to(draw.dtype)
    kind = draw.rng.choice(KINDS)
    got = backend.activation(draw.here(x), kind)
    agree(f"activation {kind}", got, REFERENCE.activation(x.float(), kind), draw.dtype)


def act_and_mul(draw: Draw, backend: Any) -> None:
    """Every kind, of odd widths too."""
    x = (draw.noise(draw.size(0, 5, 100), 2 * draw.size(1, 100, 14336)) * 3).to(draw.dtype)
    kind = draw.rng.choice(KINDS)
    got = backend.act_and_mul(draw.here(x), kind)
    agree(f"act_and_mul {kind}", got, REFERENCE.act_and_mul(x.float(), kind), draw.dtype)


def linear(draw: Draw, backend: Any) -> None:
    """With and without a bias."""
    rows, inputs, outputs = draw.size(0, 5, 300), draw.size(1, 80, 2048), draw.size(1, 80, 2000)
    x, weight = draw.noise(rows, inputs), draw.noise(outputs, inputs)
    bias = draw.noise(outputs) if draw.rng.random() < 0.5 else None
    got = backend.linear(draw.here(x), draw.here(weight), None if bias is None else draw.here(bias))
    expected = REFERENCE.linear(x.float(), weight.float(), None if bias is None else bias.float())
    agree("linear", got, expected, draw.dtype)


def embedding(draw: Draw, backend: Any) -> None:
    """Rows as they are."""
    rows, width = draw.size(1, 50, 10_000), draw.size(1, 50, 256)
    table = draw.noise(rows, width)
    kind = draw.rng.choice([torch.int32, torch.int64])
    ids = draw.integers(0, rows, draw.size(0, 9, 3000)).to(kind)
    got = backend.embedding(draw.here(ids), draw.here(table))
    agree("embedding", got, table[ids.long()].float(), draw.dtype, factor=0)


ROWS = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "rotary_embedding": rotary_embedding,
    "activation": activation,
    "act_and_mul": act_and_mul,
    "linear": linear,
    "embedding": embedding,
}
