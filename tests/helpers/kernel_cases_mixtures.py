"""Comparisons of what computes rows with weights of their own: adapters, and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kernel_draw import Draw, Mismatch, agree

from quire.kernels.lora import Expand, ExpandSlice, LoraRows, Shrink
from quire.kernels.reference.backend import ReferenceBackend

REFERENCE = ReferenceBackend()
CPU = torch.device("cpu")


def _slots(draw: Draw) -> torch.Tensor:
    rows = draw.size(1, 12, 1500)
    return draw.integers(-1, draw.rng.choice([1, 4]) + 1, rows).int()


def _shrinks(draw: Draw, inputs: int) -> list[Shrink | None]:
    ranks = [draw.rng.choice([None, 0, 1, 3, 8, 16, 64]) for _ in range(5)]
    return [
        None if rank is None else Shrink(draw.noise(rank, inputs), draw.noise(rank).float())
        for rank in ranks
    ]


def _expands(draw: Draw, outputs: int, width: int) -> list[Expand | None]:
    made: list[Expand | None] = []
    for _ in range(5):
        if draw.rng.random() < 0.2:
            made.append(None)
            continue
        borders = sorted(draw.rng.choices(range(outputs + 1), k=4))
        slices = []
        for first, end in zip(borders[::2], borders[1::2], strict=True):
            start = draw.rng.randint(0, width)
            rank = draw.rng.randint(0, width - start)
            slices.append(ExpandSlice(first, start, draw.noise(end - first, rank)))
        factor, offset = (
            draw.noise(outputs).float() if draw.rng.random() < 0.3 else None for _ in range(2)
        )
        made.append(Expand(tuple(slices), factor, offset))
    return made


def lora_shrink(draw: Draw, backend: Any) -> None:
    """Adapters of any ranks in one batch, and rows without one."""
    slots, inputs = _slots(draw), draw.size(1, 80, 4096)
    rows = LoraRows.of(slots, CPU)
    if rows is None:
        return
    x, adapters = draw.noise(len(slots), inputs), _shrinks(draw, inputs)
    here = [each and Shrink(draw.here(each.a), draw.here(each.scales)) for each in adapters]
    there = LoraRows.of(slots, draw.device)
    got = backend.lora_shrink(draw.here(x), here, there)
    plain = [each and Shrink(each.a.float(), each.scales) for each in adapters]
    expected = REFERENCE.lora_shrink(x.float(), plain, rows)
    # Columns beyond the highest rank among the rows' adapters mean nothing more than 0.
    width = expected.shape[1]
    if got.shape[1] > width and got[:, width:].any():
        raise Mismatch("lora_shrink: there is something beyond the highest rank")
    agree("lora_shrink", got[:, :width], expected, draw.dtype)


def lora_expand(draw: Draw, backend: Any) -> None:
    """Gains of slices, factors and offsets; rows without an adapter keep their bits."""
    slots, outputs, width = _slots(draw), draw.size(1, 80, 4096), draw.rng.choice([1, 8, 16])
    rows = LoraRows.of(slots, CPU)
    if rows is None:
        return
    y, shrunk = draw.noise(len(slots), outputs), draw.noise(len(slots), width).float()
    adapters = _expands(draw, outputs, width)

    def moved(each: Expand) -> Expand:
        return Expand(
            tuple(replace(part, b=draw.here(part.b)) for part in each.slices),
            None if each.factor is None else draw.here(each.factor),
            None if each.offset is None else draw.here(each.offset),
        )

    got = draw.here(y)
    there = LoraRows.of(slots, draw.device)
    backend.lora_expand(got, draw.here(shrunk), [each and moved(each) for each in adapters], there)
    expected = y.float()
    plain = [
        each and replace(each, slices=tuple(replace(s, b=s.b.float()) for s in each.slices))
        for each in adapters
    ]
    REFERENCE.lora_expand(expected, shrunk, plain, rows)
    agree("lora_expand", got, expected, draw.dtype)
    none = slots < 0
    agree("lora_expand: rows without one", got.cpu()[none], y[none].float(), draw.dtype, factor=0)


def _routed(draw: Draw, tokens: int, experts: int, per_token: int) -> Any:
    logits = draw.noise(tokens, experts, dtype=torch.float32)
    return logits, REFERENCE.route(logits, per_token, normalized=True)


def route(draw: Draw, backend: Any) -> None:
    """The experts of the highest scores, and what they count."""
    tokens, experts = draw.size(0, 9, 2000), draw.rng.choice([2, 8, 60, 128])
    per_token = draw.rng.randint(1, min(8, experts))
    normalized = draw.rng.random() < 0.5
    logits = draw.noise(tokens, experts)
    got = backend.route(draw.here(logits), per_token, normalized=normalized)
    expected = REFERENCE.route(logits.float(), per_token, normalized=normalized)
    agree("route: weights", got[0], expected[0], torch.float32)
    # Of equal scores any may be chosen.
    scores = logits.float()
    if tokens:
        found = scores.gather(1, got[1].cpu())
        agree("route: scores", found, scores.gather(1, expected[1]), torch.float32, factor=0)
        if any(len(set(row)) != per_token for row in got[1].tolist()):
            raise Mismatch("route: an expert comes twice")


def mix_experts(draw: Draw, backend: Any) -> None:
    """Experts that are functions; some may be elsewhere."""
    tokens, experts, width = (
        draw.size(0, 12, 600),
        draw.rng.choice([2, 5, 8]),
        draw.size(1, 40, 512),
    )
    per_token = draw.rng.randint(1, 2)
    x = draw.noise(tokens, width)
    matrices = [draw.noise(width, width) * width**-0.5 for _ in range(experts)]
    here = [draw.here(each) for each in matrices]
    _, (weights, chosen) = _routed(draw, tokens, experts, per_token)
    held = [draw.rng.random() < 0.8 for _ in range(experts)]
    functions = [(lambda r, m=m: r @ m) if has else None for m, has in zip(here, held, strict=True)]
    plain = [
        (lambda r, m=m: r @ m.float()) if has else None
        for m, has in zip(matrices, held, strict=True)
    ]
    got = backend.mix_experts(draw.here(x), draw.here(weights), draw.here(chosen), functions)
    expected = REFERENCE.mix_experts(x.float(), weights, chosen, plain)
    agree("mix_experts", got, expected, draw.dtype, largest=1e-3)


def mix_stacked_experts(draw: Draw, backend: Any) -> None:
    """Gated experts whose weights stand together, by their definition, one after the other."""
    tokens, experts = draw.size(0, 12, 700), draw.rng.choice([2, 5, 8, 16])
    width, inner = draw.size(1, 50, 1024), draw.size(1, 40, 768)
    per_token = draw.rng.randint(1, min(4, experts))
    first = draw.rng.choice([0, 0, 1])
    held = draw.rng.randint(1, experts - first)
    gate_up = draw.noise(held, 2 * inner, width) * width**-0.5
    down = draw.noise(held, width, inner) * inner**-0.5
    kind = draw.rng.choice(["silu", "gelu_tanh"])
    x = draw.noise(tokens, width)
    _, (weights, chosen) = _routed(draw, tokens, experts, per_token)
    got = backend.mix_stacked_experts(
        draw.here(x), draw.here(weights), draw.here(chosen), draw.here(gate_up), draw.here(down),
        kind, first_expert=first,
    )  # fmt: skip
    expected = torch.zeros(tokens, width)
    for number in range(held):
        share = (weights * (chosen == first + number)).sum(1, keepdim=True)
        between = REFERENCE.act_and_mul(x.float() @ gate_up[number].float().T, kind)
        made = between.to(draw.dtype).float() @ down[number].float().T
        expected += share * made
    agree("mix_stacked_experts", got, expected, draw.dtype, largest=1e-3)


MIXTURES = {
    "lora_shrink": lora_shrink,
    "lora_expand": lora_expand,
    "route": route,
    "mix_experts": mix_experts,
    "mix_stacked_experts": mix_stacked_experts,
}
