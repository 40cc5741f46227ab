"""embedding on a GPU: rows of a table, by ids that lie on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.configs import config_for


@triton.jit
def gather_rows(ids, table, out, size, table_stride, id_stride, BLOCK: tl.constexpr):
    """Copy ``BLOCK`` elements of the row ``ids[program]`` of ``[num_rows, size]``."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    row = tl.load(ids + token * id_stride).to(tl.int64)
    found = tl.load(table + row * table_stride + column, mask=there, other=0)
    tl.store(out + token * size + column, found, mask=there)


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.embedding`."""
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    size = weight.shape[1]
    out = torch.empty(ids.shape[0], size, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    config = config_for("embedding", weight.device, size=size, dtype=str(weight.dtype)[6:])
    gather_rows[(ids.shape[0], -(-size // config["BLOCK"]))](
        ids, weight, out, size, weight.stride(0), ids.stride(0), **config
    )
    return out
