"""From logits to tokens on a GPU: what is prepared for the kernels; nothing waits for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from quire.kernels.triton import draw as drawing
from quire.kernels.triton import edits, logprobs
from quire.kernels.triton.logit_rows import CHUNK, finish_argmax, survey

_MOST_TOP = 64
"""Highest logits that are searched chunk by chunk; for more of them, the row is sorted."""

_SMALL = 128
"""Candidates that are drawn from in the shorter of two ways."""


class _Shape(NamedTuple):
    """How rows of logits are cut."""

    vocab_size: int
    stride: int
    num_chunks: int
    chunks: int
    """A power of 2 at least as large as `num_chunks`."""
    grid: tuple[int, int]
    """Chunks by rows."""


def _shape_of(logits: torch.Tensor) -> _Shape:
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    chunks = triton.next_power_of_2(num_chunks)
    return _Shape(vocab_size, logits.stride(0), num_chunks, chunks, (num_chunks, num_rows))


def _in_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _survey(
    logits: torch.Tensor, shape: _Shape, *, sums: bool = False, spans: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `quire.kernels.triton.logit_rows.survey` finds."""
    num_rows = len(logits)
    bests = logits.new_empty(num_rows, shape.num_chunks, dtype=torch.int64)
    summed = logits.new_empty(num_rows, shape.num_chunks, dtype=torch.float32) if sums else bests
    size = shape.num_chunks * CHUNK // drawing.SPAN
    spanned = logits.new_empty(num_rows, size, dtype=torch.int32) if spans else bests
    survey[shape.grid](
        logits,
        bests,
        summed,
        spanned,
        shape.vocab_size,
        shape.stride,
        shape.num_chunks,
        WITH_SUMS=sums,
        WITH_SPANS=spans,
        SPAN=drawing.SPAN,
        CHUNK=CHUNK,
        num_warps=8,
    )
    return bests, summed, spanned


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.argmax`."""
    logits = _in_rows(logits)
    num_rows = len(logits)
    ids = logits.new_empty(num_rows, dtype=torch.int64)
    highest = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        shape = _shape_of(logits)
        bests, _, _ = _survey(logits, shape)
        finish_argmax[(num_rows,)](
            bests, ids, highest, shape.num_chunks, CHUNKS=shape.chunks, num_warps=1
        )
    return ids, highest


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.log_softmax`."""
    logits = _in_rows(logits)
    out = logits.new_empty(logits.shape, dtype=torch.float32)
    if len(logits):
        shape = _shape_of(logits)
        bests, sums, _ = _survey(logits, shape, sums=True)
        logprobs.subtract_normalizer[shape.grid](
            logits,
            bests,
            sums,
            out,
            shape.vocab_size,
            shape.stride,
            shape.num_chunks,
            CHUNK=CHUNK,
            CHUNKS=shape.chunks,
            num_warps=8,
        )
    return out


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """See `quire.kernels.interface.Backend.apply_penalties`."""
    num_entries = len(rows)
    if num_entries:
        columns = (rows, token_ids, counts, presence, frequency, repetition)
        edits.penalize[(triton.cdiv(num_entries, 256),)](
            logits,
            *(column.contiguous() for column in columns),
            logits.stride(0),
            num_entries,
            BLOCK=256,
        )


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """See `quire.kernels.interface.Backend.apply_bitmask`."""
    vocab_size = logits.shape[1]
    if len(rows):
        edits.mask_logits[(triton.cdiv(vocab_size, CHUNK), len(rows))](
            logits,
            rows.contiguous(),
            bitmask,
            vocab_size,
            logits.stride(0),
            bitmask.shape[1],
            bitmask.stride(0),
            CHUNK=CHUNK,
            num_warps=8,
        )


def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.top_logits`."""
    logits = _in_rows(logits)
    k = min(k, logits.shape[1])
    return _top(logits, k, None, _shape_of(logits))[:2]


def _top(
    logits: torch.Tensor, k: int, targets: torch.Tensor | None, shape: _Shape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the k highest logits and their ids, and how many, per chunk, are above a target's."""
    num_rows = len(logits)
    by_chunks = 0 < k <= _MOST_TOP
    per_chunk = k if by_chunks else 0
    tops = logits.new_empty(num_rows, shape.num_chunks * per_chunk, dtype=torch.int64)
    higher = logits.new_empty(num_rows, shape.num_chunks, dtype=torch.int32)
    if num_rows and (by_chunks or targets is not None):
        logprobs.top_of_chunks[shape.grid](
            logits,
            higher if targets is None else targets,
            tops,
            higher,
            shape.vocab_size,
            shape.stride,
            shape.num_chunks,
            per_chunk,
            WITH_RANKS=targets is not None,
            CHUNK=CHUNK,
            num_warps=8,
        )
    if not by_chunks:
        found = logits[:, : 0 if k == 0 else None].sort(dim=1, descending=True, stable=True)
        return found.values[:, :k].float(), found.indices[:, :k], higher
    # What was packed is all different, so that its order is that of logits, then of ids.
    best = tops.topk(k, dim=1).values
    ids = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    return logits.gather(1, ids).float(), ids, higher


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.gather_logprobs`."""
    logits = _in_rows(logits)
    num_rows = len(logits)
    k = min(k, logits.shape[1])
    ids = logits.new_empty(num_rows, k + 1, dtype=torch.int64)
    found = logits.new_empty(num_rows, k + 1, dtype=torch.float32)
    ranks = logits.new_empty(num_rows, dtype=torch.int64)
    if num_rows:
        shape = _shape_of(logits)
        targets = token_ids.contiguous()
        bests, sums, _ = _survey(logits, shape, sums=True)
        values, top_ids, higher = _top(logits, k, targets, shape)
        logprobs.finish_logprobs[(num_rows,)](
            logits,
            targets,
            top_ids.contiguous(),
            values.contiguous(),
            higher,
            bests,
            sums,
            ids,
            found,
            ranks,
            shape.stride,
            shape.num_chunks,
            k,
            BLOCK=256,
            CHUNKS=shape.chunks,
        )
    return ids, found, ranks


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.sample_tokens`."""
    logits = _in_rows(logits)
    num_rows = len(logits)
    ids = logits.new_empty(num_rows, dtype=torch.int64)
    if num_rows == 0:
        return ids
    shape = _shape_of(logits)
    bests, _, spans = _survey(logits, shape, spans=True)
    thresholds = logits.new_empty(num_rows, dtype=torch.int32)
    counters = logits.new_empty(num_rows, dtype=torch.int32)
    candidates = logits.new_empty(num_rows, drawing.ROOM, dtype=torch.int64)
    masses = logits.new_empty(num_rows, shape.num_chunks, dtype=torch.int64)
    limits = [each.contiguous() for each in (temperature, top_k, top_p, min_p)]
    sizes: dict[str, Any] = {"ROOM": drawing.ROOM, "CHUNKS": shape.chunks}
    drawing.choose_threshold[(num_rows,)](
        bests,
        spans,
        *limits,
        thresholds,
        counters,
        shape.vocab_size,
        shape.num_chunks,
        spans.shape[1],
        FEW=drawing.FEW,
        MOST=drawing.MOST,
        SPANS=triton.next_power_of_2(spans.shape[1]),
        num_warps=4,
        **sizes,
    )
    drawing.gather[shape.grid](
        logits,
        bests,
        thresholds,
        counters,
        candidates,
        masses,
        *limits,
        shape.vocab_size,
        shape.stride,
        shape.num_chunks,
        CHUNK=CHUNK,
        num_warps=8,
        **sizes,
    )
    drawing.draw[(num_rows,)](
        logits,
        bests,
        thresholds,
        counters,
        candidates,
        masses,
        *limits,
        uniform.contiguous(),
        ids,
        shape.vocab_size,
        shape.stride,
        shape.num_chunks,
        SMALL=_SMALL,
        CHUNK=CHUNK,
        num_warps=8,
        **sizes,
    )
    return ids
