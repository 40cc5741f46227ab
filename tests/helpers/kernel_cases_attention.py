"""Comparisons of what reads and writes the paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from kernel_draw import Draw, Mismatch, agree

from quire.kernels.kv_rows import row_width
from quire.kernels.reference.backend import ReferenceBackend

REFERENCE = ReferenceBackend()
CODES = (torch.int8, torch.float8_e4m3fn)


class Pages:
    """Sequences of drawn lengths over a cache of shuffled blocks, on the CPU and on the device.

    Parameters
    ----------
    draw : Draw
    backend : Backend
    counts, lengths : list of int
        Tokens of each sequence in the step, and with those before it.
    first_block : int
        Of the device's cache, where blocks begin that the CPU's cache has from 1 on.
    """

    def __init__(
        self,
        draw: Draw,
        backend: Any,
        counts: list[int],
        lengths: list[int],
        *,
        kept: torch.dtype,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        first_block: int = 1,
    ) -> None:
        needed = [-(-length // block_size) for length in lengths]
        num_blocks = 1 + sum(needed)
        order = (1 + torch.randperm(num_blocks - 1, generator=draw.generator)).int()
        tables = torch.zeros(len(lengths), max(needed) + draw.rng.randint(0, 3), dtype=torch.int32)
        first = 0
        for row, count in enumerate(needed):
            tables[row, :count] = order[first : first + count]
            first += count
        shape = (block_size, kv_heads, head_dim)
        self.shape, self.kept = shape, kept
        slots = torch.cat(
            [
                tables[row, torch.arange(length) // block_size].long() * block_size
                + torch.arange(length) % block_size
                for row, length in enumerate(lengths)
            ]
        )
        keys, values = (draw.noise(len(slots), kv_heads, head_dim) for _ in range(2))
        cpu = torch.device("cpu")
        # What is expected is in float32: of the numbers as the cache has them, or their codes.
        exact = kept if kept in CODES else torch.float32
        self.expected = REFERENCE.allocate_kv_cache(num_blocks, *shape, exact, cpu)
        shift = (first_block - 1) * block_size
        self.caches = backend.allocate_kv_cache(
            num_blocks + first_block - 1, *shape, kept, draw.device
        )
        plain = (keys, values)
        if kept not in CODES:
            plain = tuple(each.to(kept).float() for each in plain)
        REFERENCE.write_kv(*plain, *self.expected, slots)
        backend.write_kv(draw.here(keys), draw.here(values), *self.caches, draw.here(slots + shift))
        self.written = self.caches[0].flatten(0, 1)[draw.here(slots + shift)]
        self.wanted = self.expected[0].flatten(0, 1)[slots]
        self.null = self.caches[0][0]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.starts = torch.tensor(starts, dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.tables = tables
        self.tables_here = draw.here(
            torch.where(tables > 0, tables + first_block - 1, tables).int()
        )
        self.block_size = block_size


def _kept(draw: Draw) -> torch.dtype:
    return draw.rng.choice([draw.dtype, draw.dtype, *CODES])


def write_kv(draw: Draw, backend: Any) -> None:
    """Rows as they are, or the same codes; the null block stays as it was."""
    lengths = [draw.size(1, 20, 500) for _ in range(draw.rng.randint(1, 4))]
    kept = _kept(draw)
    pages = Pages(
        draw, backend, lengths, lengths, kept=kept, kv_heads=draw.rng.choice([1, 2, 8]),
        head_dim=draw.rng.choice([8, 16, 64, 80, 128]), block_size=draw.rng.choice([4, 16, 32]),
    )  # fmt: skip
    if pages.null.view(torch.uint8).any():
        raise Mismatch("write_kv: something is in the null block")
    if kept not in CODES:
        agree("write_kv", pages.written, pages.wanted, draw.dtype, factor=0)
        return
    width = row_width(pages.shape[2], kept)
    got, wanted = pages.written.cpu().view(torch.uint8), pages.wanted.view(torch.uint8)
    scales = [each[..., width - 4 :].contiguous().view(torch.float32) for each in (got, wanted)]
    agree(f"write_kv {kept}: scales", scales[0], scales[1], torch.float32)
    codes = [each[..., : width - 4].contiguous().view(kept).float() for each in (got, wanted)]
    # A division that is rounded otherwise may put a number that lies between two codes to either.
    differ = float((codes[0] != codes[1]).float().mean())
    if differ > 0.01:
        raise Mismatch(f"write_kv {kept}: {differ:.1%} of the codes are others")


def _attend(
    draw: Draw, backend: Any, counts: list[int], lengths: list[int], what: str, first_block: int = 1
) -> None:
    kv_heads = draw.rng.choice([1, 2, 8] if draw.big else [1, 2])
    heads = kv_heads * draw.rng.choice([1, 2, 4, 7])
    head_dim = draw.rng.choice([32, 64, 80, 96, 128, 256] if draw.big else [8, 16, 24, 40])
    kept = _kept(draw)
    pages = Pages(
        draw, backend, counts, lengths, kept=kept, kv_heads=kv_heads, head_dim=head_dim,
        block_size=draw.rng.choice([8, 16, 16, 32]), first_block=first_block,
    )  # fmt: skip
    query = draw.noise(sum(counts), heads, head_dim)
    window = draw.rng.choice([None, None, 1, 7, 200])
    softcap = draw.rng.choice([None, None, 5.0])
    slopes = draw.uniform(heads).float() * 0.2 if draw.rng.random() < 0.2 else None
    options = {"scale": head_dim**-0.5, "sliding_window": window, "softcap": softcap}
    # Plans work out what they are given on the CPU; block tables lie where the cache is.
    plan = backend.plan_attention(pages.starts, pages.lengths, pages.tables_here, pages.block_size)
    got = backend.paged_attention(
        draw.strided(query), *pages.caches, plan, **options,
        alibi_slopes=None if slopes is None else draw.here(slopes),
    )  # fmt: skip
    plan = REFERENCE.plan_attention(pages.starts, pages.lengths, pages.tables, pages.block_size)
    expected = REFERENCE.paged_attention(
        query.float(), *pages.expected, plan, **options, alibi_slopes=slopes
    )
    name = str(kept).removeprefix("torch.")
    told = f"{what}, {name} cache, heads {heads}/{kv_heads} of {head_dim}, window {window}"
    # Codes of two writers may differ where a number lies between two; see `write_kv`.
    loose = 300.0 if kept in CODES and draw.dtype is torch.float32 else 1.0
    agree(told, got, expected, draw.dtype, largest=1.0, factor=loose)


def decode(draw: Draw, backend: Any) -> None:
    """Steps of one token each, of short sequences and long ones."""
    count = draw.size(1, 4, 24)
    lengths = [draw.rng.choice([1, 2, draw.size(1, 90, 2000)]) for _ in range(count)]
    _attend(draw, backend, [1] * count, lengths, "decode")


def prefill(draw: Draw, backend: Any) -> None:
    """Prompts from their beginning, or their rest after a cached beginning."""
    count = draw.rng.randint(1, 3)
    counts = [draw.size(1, 40, 400) for _ in range(count)]
    lengths = [each + draw.rng.choice([0, 0, draw.size(1, 50, 500)]) for each in counts]
    _attend(draw, backend, counts, lengths, "prefill")


def mixed(draw: Draw, backend: Any) -> None:
    """Steps that compute prompts and generate at once."""
    counts = [draw.rng.choice([1, 1, draw.size(1, 20, 300)]) for _ in range(draw.size(2, 5, 12))]
    lengths = [each + draw.rng.choice([0, draw.size(0, 40, 600)]) for each in counts]
    _attend(draw, backend, counts, lengths, "mixed")


def far(draw: Draw, backend: Any) -> None:
    """Blocks whose places do not fit 32 bits, where there is memory for that."""
    first = 4
    if draw.big and draw.device.type != "cpu":
        free, _ = torch.get_device_module(draw.device).mem_get_info(draw.device)
        if free > 24 << 30:
            first = (1 << 31) // (32 * 8 * 32) + 1000
    if draw.dtype is torch.float32:
        draw = Draw(draw.seed, draw.device, torch.float16, big=draw.big)  # of half the size
    _far(draw, backend, first)


def _far(draw: Draw, backend: Any, first: int) -> None:
    counts, lengths = ([1, 40, 1], [700, 90, 33]) if draw.big else ([1, 3], [40, 20])
    pages = Pages(
        draw, backend, counts, lengths, kept=draw.dtype, kv_heads=8, head_dim=32, block_size=32,
        first_block=first,
    )  # fmt: skip
    agree("far: write_kv", pages.written, pages.wanted, draw.dtype, factor=0)
    query = draw.noise(sum(counts), 16, 32)
    plan = backend.plan_attention(pages.starts, pages.lengths, pages.tables_here, 32)
    got = backend.paged_attention(draw.here(query), *pages.caches, plan, scale=32**-0.5)
    plan = REFERENCE.plan_attention(pages.starts, pages.lengths, pages.tables, 32)
    expected = REFERENCE.paged_attention(query.float(), *pages.expected, plan, scale=32**-0.5)
    agree("far: attention", got, expected, draw.dtype, largest=1.0)


def decode_plan(draw: Draw, backend: Any) -> None:
    """Plans whose tensors stay, filled anew for each step; rows that stand for nothing are 0."""
    rows = draw.size(2, 5, 32)
    most = draw.size(20, 90, 2000)
    for _ in range(2):
        used = draw.rng.randint(1, rows)
        lengths = [draw.rng.randint(1, most) for _ in range(used)]
        pages = Pages(
            draw, backend, [1] * used, lengths, kept=draw.dtype, kv_heads=2,
            head_dim=draw.rng.choice([32, 128] if draw.big else [16]), block_size=16,
        )  # fmt: skip
        max_blocks = -(-most // 16) + 4
        plan = backend.make_decode_plan(rows, max_blocks, 16, draw.device)
        tables = torch.zeros(rows, max_blocks, dtype=torch.int32)
        tables[:used, : pages.tables.shape[1]] = pages.tables
        seq_lens = torch.zeros(rows, dtype=torch.int32)
        seq_lens[:used] = pages.lengths
        told = draw.rng.choice([used, rows])  # those that are not told are empty
        backend.fill_decode_plan(plan, seq_lens[:told], draw.here(tables[:told]))
        head_dim = pages.shape[2]
        query = draw.noise(rows, 4, head_dim)
        got = backend.paged_attention(draw.here(query), *pages.caches, plan, scale=head_dim**-0.5)
        whole = REFERENCE.plan_attention(pages.starts, pages.lengths, pages.tables, 16)
        expected = torch.zeros(rows, 4, head_dim)
        expected[:used] = REFERENCE.paged_attention(
            query[:used].float(), *pages.expected, whole, scale=head_dim**-0.5
        )
        agree("decode plan", got, expected, draw.dtype, largest=1.0)


def negative_slots(draw: Draw, backend: Any) -> None:
    """Rows that stand for nothing are not written."""
    if not hasattr(backend, "make_decode_plan"):  # what needs them is offered with it
        return
    shape = (draw.rng.choice([8, 16]), draw.rng.choice([1, 2]), draw.rng.choice([16, 64]))
    kept = _kept(draw)
    count = draw.size(1, 30, 600)
    num_blocks = 2 + -(-count // shape[0])
    caches = backend.allocate_kv_cache(num_blocks, *shape, kept, draw.device)
    slots = shape[0] + torch.randperm(count, generator=draw.generator)
    keys, values = draw.noise(count, *shape[1:]), draw.noise(count, *shape[1:])
    backend.write_kv(draw.here(keys), draw.here(values), *caches, draw.here(slots))
    before = [each.clone() for each in caches]
    some = draw.uniform(count) < 0.5
    some[0] = True
    slots[some] = -1
    other = torch.where(some[:, None, None], keys + 1, keys)
    backend.write_kv(draw.here(other), draw.here(values), *caches, draw.here(slots))
    for one, same in zip(caches, before, strict=True):
        if not torch.equal(one.view(torch.uint8), same.view(torch.uint8)):
            raise Mismatch("write_kv: a row of a negative slot was written")


ATTENTION = {
    "write_kv": write_kv,
    "write_kv (negative slots)": negative_slots,
    "paged_attention (decode)": decode,
    "paged_attention (prefill)": prefill,
    "paged_attention (mixed)": mixed,
    "paged_attention (far blocks)": far,
    "make_decode_plan": decode_plan,
}
