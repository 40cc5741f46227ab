"""The layers of a decoder: a spec's parts turned, once, into functions over bound weights.

Each ``*_linears``/``create_norm`` function says which parameters a part has; each ``bind_*``
function returns what a step calls. All choices are made while binding, so that a step runs
straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quire.models.linear import Apply, Linear, LinearMethod
from quire.models.mlp import bind_mlp, create_router, mlp_linears
from quire.models.spec import AttentionSpec, LayerSpec, NormSpec
from quire.models.split import split_layer, split_linear
from quire.models.weights import Weights
from quire.parallel.place import WHOLE, Place

if TYPE_CHECKING:
    from quire.kernels import Backend

KVCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each ``[num_blocks, block_size, num_kv_heads, head_dim]``."""


@dataclass(slots=True)
class Step:
    """What all layers share in one forward pass.

    Attributes
    ----------
    slot_mapping : Tensor[num_tokens], int64
        Where keys and values go.
    plan : object
        The attention backend's plan.
    rotary : list of (Tensor, Tensor)
        Cosine and sine ``[num_tokens, rotated_dims / 2]`` of each rotary table of the model.
    """

    slot_mapping: torch.Tensor
    plan: Any
    rotary: list[tuple[torch.Tensor, torch.Tensor]]


AddNorm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Attention = Callable[[torch.Tensor, Step, KVCache], torch.Tensor]
Layer = Callable[
    [torch.Tensor, "torch.Tensor | None", Step, KVCache],
    tuple[torch.Tensor, "torch.Tensor | None"],
]
"""``(x, residual, step, cache) -> (x, residual)``; the hidden state is ``x + residual``."""


def create_norm(name: str, spec: NormSpec | None, size: int, weights: Weights) -> None:
    """Allocate the parameters of a norm, if there is one."""
    if spec is not None and spec.weight:
        weights.create(f"{name}.weight", (size,))
    if spec is not None and spec.bias:
        weights.create(f"{name}.bias", (size,))


def attention_linears(name: str, spec: AttentionSpec, hidden_size: int) -> tuple[Linear, Linear]:
    """Return the fused projection to queries, keys and values, and the one back."""
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    parts = {"q": query, "k": key, "v": key}
    qkv = Linear(f"{name}.qkv", hidden_size, parts, spec.qkv_bias, spec.num_kv_heads, "rows")
    out = Linear(f"{name}.out", query, {"out": hidden_size}, spec.out_bias, split="columns")
    return qkv, out


def layer_linears(name: str, spec: LayerSpec, hidden_size: int) -> list[Linear]:
    """Return all projections of one decoder layer that are here."""
    return [
        *attention_linears(f"{name}.attention", spec.attention, hidden_size),
        *mlp_linears(f"{name}.mlp", spec.mlp, hidden_size),
    ]


def own_linears(name: str, spec: LayerSpec, hidden_size: int, place: Place) -> list[Linear]:
    """Return the projections of one decoder layer that a rank of its stage has something of.

    They are the whole model's, with what of each is the rank's.
    """
    here = {each.name for each in layer_linears(name, split_layer(spec, place), hidden_size)}
    return [
        split_linear(linear, place)
        for linear in layer_linears(name, spec, hidden_size)
        if linear.name in here
    ]


def create_layer(
    name: str,
    spec: LayerSpec,
    hidden_size: int,
    method: LinearMethod,
    weights: Weights,
    place: Place = WHOLE,
) -> None:
    """Allocate what a rank has of the parameters of one decoder layer.

    Parameters
    ----------
    name, spec, hidden_size
        Of the whole layer.
    method, weights
    place
        Whose stage has the layer.
    """
    for linear in own_linears(name, spec, hidden_size, place):
        method.create(linear, weights)
    create_router(f"{name}.mlp", spec.mlp, hidden_size, weights)
    for norm in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        create_norm(f"{name}.{norm}", getattr(spec, norm), hidden_size, weights)
    for norm in ("q_norm", "k_norm"):
        head_dim = spec.attention.head_dim
        create_norm(f"{name}.attention.{norm}", spec.attention.qk_norm, head_dim, weights)


def bind_norm(name: str, spec: NormSpec, weights: Weights, kernels: Backend) -> Apply:
    """Return ``x -> norm(x)``."""
    weight, bias, eps = weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), spec.eps
    if spec.kind == "layer":
        layer_norm = kernels.layer_norm
        return lambda x: layer_norm(x, weight, bias, eps)
    rms_norm, offset = kernels.rms_norm, spec.weight_offset
    return lambda x: rms_norm(x, weight, eps, weight_offset=offset)


def bind_add_norm(name: str, spec: NormSpec, weights: Weights, kernels: Backend) -> AddNorm:
    """Return ``(x, residual) -> (norm(x + residual), x + residual)``."""
    if spec.kind == "rms":
        weight, eps, offset = weights.get(f"{name}.weight"), spec.eps, spec.weight_offset
        fused = kernels.add_rms_norm
        return lambda x, residual: fused(x, residual, weight, eps, weight_offset=offset)
    norm = bind_norm(name, spec, weights, kernels)

    def add_norm(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return norm(total), total

    return add_norm


def bind_attention(
    name: str,
    spec: AttentionSpec,
    hidden_size: int,
    rotary_index: int | None,
    method: LinearMethod,
    weights: Weights,
    kernels: Backend,
) -> Attention:
    """Return ``(x, step, cache) -> attention(x)``, which also writes keys and values."""
    qkv, out = attention_linears(name, spec, hidden_size)
    project, project_out = method.bind(qkv, weights, kernels), method.bind(out, weights, kernels)
    rotate, write_kv, attend = kernels.rotary_embedding, kernels.write_kv, kernels.paged_attention
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    shape = (-1, sum(heads), spec.head_dim)
    clip = spec.clip_qkv
    interleaved = spec.rotary is not None and spec.rotary.interleaved
    q_norm = k_norm = None
    if spec.qk_norm is not None:
        q_norm = bind_norm(f"{name}.q_norm", spec.qk_norm, weights, kernels)
        k_norm = bind_norm(f"{name}.k_norm", spec.qk_norm, weights, kernels)
    slopes = None
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float32, device=weights.device)
    options: dict[str, Any] = {
        "scale": spec.scale,
        "sliding_window": spec.sliding_window,
        "softcap": spec.softcap,
        "alibi_slopes": slopes,
    }

    def attention(x: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        projected = project(x)
        if clip is not None:
            projected = projected.clamp(-clip, clip)
        query, key, value = projected.view(shape).split_with_sizes(heads, 1)
        if q_norm is not None and k_norm is not None:
            query, key = q_norm(query), k_norm(key)
        if rotary_index is not None:
            cos, sin = step.rotary[rotary_index]
            query, key = rotate(query, key, cos, sin, interleaved=interleaved)
        key_cache, value_cache = cache
        write_kv(key, value, key_cache, value_cache, step.slot_mapping)
        mixed = attend(query, key_cache, value_cache, step.plan, **options)
        return project_out(mixed.flatten(1))

    return attention


def bind_layer(
    name: str,
    spec: LayerSpec,
    hidden_size: int,
    rotary_index: int | None,
    method: LinearMethod,
    weights: Weights,
    kernels: Backend,
    reduce: Apply | None = None,
) -> Layer:
    """Return the function of one decoder layer.

    `reduce` sums what attention, and MLP, are on each of the ranks that share them, and `spec` is
    what the layer is on this one.
    """
    attention = bind_attention(
        f"{name}.attention", spec.attention, hidden_size, rotary_index, method, weights, kernels
    )
    mlp = bind_mlp(f"{name}.mlp", spec.mlp, hidden_size, method, weights, kernels)
    if reduce is not None:
        attention, mlp = _attention_then(reduce, attention), _then(reduce, mlp)
    if spec.attention_post_norm is not None:
        post = bind_norm(f"{name}.attention_post_norm", spec.attention_post_norm, weights, kernels)
        attention = _attention_then(post, attention)
    if spec.mlp_post_norm is not None:
        post = bind_norm(f"{name}.mlp_post_norm", spec.mlp_post_norm, weights, kernels)
        mlp = _then(post, mlp)
    norm = bind_norm(f"{name}.attention_norm", spec.attention_norm, weights, kernels)
    add_norm = bind_add_norm(f"{name}.attention_norm", spec.attention_norm, weights, kernels)
    mlp_norm_name = f"{name}.mlp_norm"
    if spec.residual == "parallel":
        mlp_norm = None
        if spec.mlp_norm is not None:
            mlp_norm = bind_norm(mlp_norm_name, spec.mlp_norm, weights, kernels)
        return _parallel(norm, add_norm, attention, mlp_norm, mlp)
    if spec.mlp_norm is None:
        raise ValueError(f"{name}: mlp_norm may be None only with a parallel residual")
    mlp_add_norm = bind_add_norm(mlp_norm_name, spec.mlp_norm, weights, kernels)
    if spec.residual == "post":
        return _post(attention, add_norm, mlp, mlp_add_norm)
    return _sequential(norm, add_norm, attention, mlp_add_norm, mlp)


def _then(after: Apply, before: Apply) -> Apply:
    return lambda x: after(before(x))


def _attention_then(after: Apply, attention: Attention) -> Attention:
    return lambda x, step, cache: after(attention(x, step, cache))


def _sequential(
    norm: Apply, add_norm: AddNorm, attention: Attention, mlp_add_norm: AddNorm, mlp: Apply
) -> Layer:
    def layer(
        x: torch.Tensor, residual: torch.Tensor | None, step: Step, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            normed, total = norm(x), x
        else:
            normed, total = add_norm(x, residual)
        normed, total = mlp_add_norm(attention(normed, step, cache), total)
        return mlp(normed), total

    return layer


def _parallel(
    norm: Apply, add_norm: AddNorm, attention: Attention, mlp_norm: Apply | None, mlp: Apply
) -> Layer:
    def layer(
        x: torch.Tensor, residual: torch.Tensor | None, step: Step, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            normed, total = norm(x), x
        else:
            normed, total = add_norm(x, residual)
        attended = attention(normed, step, cache)
        return attended + mlp(normed if mlp_norm is None else mlp_norm(total)), total

    return layer


def _post(attention: Attention, add_norm: AddNorm, mlp: Apply, mlp_add_norm: AddNorm) -> Layer:
    def layer(
        x: torch.Tensor, _residual: torch.Tensor | None, step: Step, cache: KVCache
    ) -> tuple[torch.Tensor, None]:
        x, _ = add_norm(attention(x, step, cache), x)
        x, _ = mlp_add_norm(mlp(x), x)
        return x, None

    return layer
