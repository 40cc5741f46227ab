"""Weights in integer codes, drawn; a strategy of hypothesis and what it draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from quire.kernels.quantized import QuantizedWeight


@dataclass(frozen=True)
class Draw:
    """What a weight is like; :meth:`weight` makes one, the same each time."""

    kind: str
    in_features: int
    out_features: int
    group_size: int
    has_zeros: bool
    has_order: bool
    has_factors: bool
    activations: str
    activation_scale: float | None
    seed: int

    def weight(self, out_features: int | None = None) -> QuantizedWeight:
        """Return the weight, or one of the same inputs with other outputs."""
        rows = self.out_features if out_features is None else out_features
        generator = torch.Generator().manual_seed(self.seed + rows)
        inputs = torch.Generator().manual_seed(self.seed)

        def integers(low: int, high: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(low, high, (rows, width), generator=generator).to(dtype)

        size = self.group_size if self.group_size > 0 else self.in_features
        num_groups = -(-self.in_features // size)
        if self.kind == "int8":
            codes = integers(-128, 128, self.in_features, torch.int8)
        else:
            codes = integers(0, 256, (self.in_features + 1) // 2, torch.uint8)
        order = torch.randperm(self.in_features, generator=inputs) if self.has_order else None
        factors = 0.1 + torch.rand(self.in_features, generator=inputs)
        zeros = integers(-256, 257, num_groups, torch.int16) if self.has_zeros else None
        return QuantizedWeight(
            kind=self.kind,  # type: ignore[arg-type]
            codes=codes,
            scales=0.01 + torch.rand(rows, num_groups, generator=generator),
            in_features=self.in_features,
            group_size=size,
            zeros=zeros,
            order=order,
            input_factors=factors if self.has_factors else None,
            activations=self.activations,  # type: ignore[arg-type]
            activation_scale=self.activation_scale,
        )


GROUP_SIZES = (8, 16, 24, 32, 64, 96, 128, 136, 192, 256, -1)


@st.composite
def coded_weights(draw: st.DrawFn, max_in: int = 400, max_out: int = 70) -> Draw:
    """Weights that the native kernels know, of any shape."""
    activations = draw(st.sampled_from(["float", "float", "int8", "fixed"]))
    return Draw(
        kind=draw(st.sampled_from(["int8", "int4"])),
        in_features=draw(st.integers(1, max_in)),
        out_features=draw(st.integers(1, max_out)),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        has_zeros=draw(st.booleans()),
        has_order=draw(st.booleans()),
        has_factors=activations == "float" and draw(st.booleans()),
        activations="float" if activations == "float" else "int8",
        activation_scale=0.017 if activations == "fixed" else None,
        seed=draw(st.integers(0, 2**31)),
    )
