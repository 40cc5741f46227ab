"""rms_norm, add_rms_norm and layer_norm on a GPU: how rows lie, and how many a program takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.kernels.triton.configs import bucket, config_for
from quire.kernels.triton.norm_kernels import layer_norm_rows, rms_norm_rows

_MANY_ROWS = 4096
"""From so many on, a program takes several short ones."""


class Rows(NamedTuple):
    """Rows of a tensor of any number of axes, as a matrix of matrices of them.

    Attributes
    ----------
    x : Tensor
        What they are read from: the tensor itself, or a copy where its strides are of no use.
    num_rows, inner : int
        All rows, and those of one inner matrix.
    outer_stride, inner_stride : int
        From one matrix to the next, and from one row.
    """

    x: torch.Tensor
    num_rows: int
    inner: int
    outer_stride: int
    inner_stride: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Rows:
        """Find the rows of a tensor; only what is no view of heads or tokens is copied."""
        if x.dim() > 3 or (x.dim() > 0 and x.stride(-1) != 1 and x.shape[-1] > 1):
            x = x.contiguous()
        num_rows = x.numel() // max(x.shape[-1], 1)
        if x.dim() == 3:
            return cls(x, num_rows, x.shape[1], x.stride(0), x.stride(1))
        if x.dim() == 2:
            return cls(x, num_rows, 1, x.stride(0), 0)
        return cls(x, num_rows, 1, x.shape[-1], 0)


def _blocks(x: torch.Tensor, num_rows: int) -> dict[str, int]:
    """Return the arguments that say how much a program takes: one long row, or short ones."""
    size = x.shape[-1]
    config = dict(config_for("norm", x.device, size=size, dtype=str(x.dtype)[6:]))
    whole = max(bucket(size), 16)
    rows = 1
    if whole <= config["BLOCK"]:
        # No more rows than there are: a decode step has few tokens, which are to run side by side.
        rows = min(config["BLOCK"] // whole, 16 if num_rows >= _MANY_ROWS else 1)
        config["BLOCK"] = whole
    return {**config, "ROWS": rows}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = Rows.of(x)
    blocks = _blocks(x, rows.num_rows)
    rms_norm_rows[(-(-rows.num_rows // blocks["ROWS"]),)](
        rows.x,
        rows.x,
        rows.x if weight is None else weight.contiguous(),
        out,
        out,
        rows.num_rows,
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        0,
        eps,
        weight_offset,
        SIZE=x.shape[-1],
        HAS_RESIDUAL=False,
        HAS_WEIGHT=weight is not None,
        **blocks,
    )
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.add_rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    if out.numel() == 0:
        return out, total
    x, residual = (each if each.stride(1) == 1 else each.contiguous() for each in (x, residual))
    blocks = _blocks(x, x.shape[0])
    rms_norm_rows[(-(-x.shape[0] // blocks["ROWS"]),)](
        x,
        residual,
        x if weight is None else weight.contiguous(),
        total,
        out,
        x.shape[0],
        1,
        x.stride(0),
        0,
        residual.stride(0),
        eps,
        weight_offset,
        SIZE=x.shape[1],
        HAS_RESIDUAL=True,
        HAS_WEIGHT=weight is not None,
        **blocks,
    )
    return out, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.layer_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = Rows.of(x)
    blocks = _blocks(x, rows.num_rows)
    layer_norm_rows[(-(-rows.num_rows // blocks["ROWS"]),)](
        rows.x,
        rows.x if weight is None else weight.contiguous(),
        rows.x if bias is None else bias.contiguous(),
        out,
        rows.num_rows,
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        eps,
        SIZE=x.shape[-1],
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **blocks,
    )
    return out
