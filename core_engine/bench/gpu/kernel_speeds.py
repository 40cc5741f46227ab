"""How fast single operations are, at the sizes of a model of 8 billion weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quire.bench.gpu.attention_speeds import decode_attention, prefill_attention
from quire.bench.gpu.clock import Clock
from quire.bench.gpu.mixture_speeds import adapters, experts
from quire.bench.gpu.quantized_speeds import quantized_products
from quire.bench.gpu.sampling_speeds import sampling
from quire.bench.gpu.setting import Setting
from quire.kernels import get_backend

if TYPE_CHECKING:
    from quire.kernels import Backend


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the operations are measured at.

    Attributes
    ----------
    rows : int
        Tokens of a step that computes prompts.
    hidden, inner : int
    heads, kv_heads, head_dim : int
    sequences, context : int
        Of a step that generates.
    prompt : int
        The longest prompt.
    """

    rows: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    context: int
    prompt: int
    vocab_size: int


_USUAL = Sizes(4096, 4096, 14336, 32, 8, 128, 32, 8192, 8192, 128256)
_TINY = Sizes(16, 64, 96, 4, 2, 16, 3, 64, 64, 512)

Part = Callable[["Setting", Clock, "Backend", Sizes], None]


def measure(setting: Setting) -> None:
    """Measure each operation; one that fails is told of, and the others go on."""
    kernels = get_backend(setting.device)
    clock = Clock(setting.device)
    sizes = _TINY if setting.tiny else _USUAL
    parts: list[Part] = [
        decode_attention,
        prefill_attention,
        quantized_products,
        experts,
        pointwise,
        sampling,
        adapters,
    ]
    for part in parts:
        if setting.left < 0:
            setting.report(part.__name__.replace("_", " "), [], "", note="cut: no time")
            continue
        try:
            part(setting, clock, kernels, sizes)
        except Exception as error:
            note = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            setting.report(part.__name__.replace("_", " "), [], "", note=note)
        clock.close()
        clock = Clock(setting.device)


def pointwise(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure norms, rotation, activation and lookup, all of which only read and write."""
    device, dtype = setting.device, setting.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, residual = noise(sizes.rows, sizes.hidden), noise(sizes.rows, sizes.hidden)
    weight, bias = noise(sizes.hidden), noise(sizes.hidden)
    query = noise(sizes.rows, sizes.heads, sizes.head_dim)
    key = noise(sizes.rows, sizes.kv_heads, sizes.head_dim)
    angles = torch.rand(sizes.rows, sizes.head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    both = noise(sizes.rows, 2 * sizes.inner)
    table = noise(8 * sizes.rows, sizes.hidden)
    ids = torch.randint(0, 8 * sizes.rows, (sizes.rows,), device=device)
    turned = 2 * (query.nbytes + key.nbytes) + cos.nbytes + sin.nbytes
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "rms_norm": (lambda: kernels.rms_norm(x, weight, 1e-5), 2 * x.nbytes),
        "add_rms_norm": (lambda: kernels.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes),
        "layer_norm": (lambda: kernels.layer_norm(x, weight, bias, 1e-5), 2 * x.nbytes),
        "rotary_embedding": (lambda: kernels.rotary_embedding(query, key, cos, sin), turned),
        "act_and_mul": (lambda: kernels.act_and_mul(both, "silu"), 1.5 * both.nbytes),
        "activation": (lambda: kernels.activation(both, "gelu_tanh"), 2 * both.nbytes),
        "embedding": (lambda: kernels.embedding(ids, table), 2 * x.nbytes),
    }
    each = setting.seconds / 100
    for name, (call, num_bytes) in calls.items():
        times = clock.times(call, each)
        setting.report_bytes(f"{name}, {sizes.rows} rows", times, num_bytes)
