"""What comparisons of kernels draw from a seed, and how near results must be; needs torch alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

TOLERANCE = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
"""How far a result may be off, as a share of the largest number of what is expected: a few
roundings of the type, since kernels multiply in it; of float32, those of a long sum."""


class Mismatch(AssertionError):
    """A result that is not what the reference has."""


@dataclass
class Draw:
    """Numbers of one seed, for one case.

    Attributes
    ----------
    seed : int
    device : torch.device
        Of the kernels; what is expected is computed on the CPU.
    dtype : torch.dtype
    big : bool
        Whether sizes are those of models, rather than what an interpreter can do.
    """

    seed: int
    device: torch.device
    dtype: torch.dtype
    big: bool = False
    rng: random.Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def size(self, low: int, high: int, most: int) -> int:
        """Draw a size up to `high`, or, where sizes are big, up to `most`."""
        if not self.big:
            return self.rng.randint(low, high)
        return self.rng.choice([self.rng.randint(low, high), self.rng.randint(low, most), most])

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Draw normal numbers, on the CPU."""
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draw float64 numbers from 0 to 1, on the CPU."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Draw int64 numbers from `low` to below `high`, on the CPU."""
        return torch.randint(low, high, shape, generator=self.generator)

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device."""
        return tensor.to(self.device, copy=True)

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device, as a view into a wider one with NaN beside it, or not."""
        if self.rng.random() < 0.5:
            return self.here(tensor)
        shape = (*tensor.shape[:-1], tensor.shape[-1] + 3)
        wide = torch.full(shape, torch.nan, dtype=tensor.dtype, device=self.device)
        wide[..., : tensor.shape[-1]] = tensor.to(self.device)
        return wide[..., : tensor.shape[-1]]


def agree(
    what: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    *,
    largest: float = 0.0,
    factor: float = 1.0,
) -> None:
    """Compare a result with what is expected, up to the rounding of its type.

    Parameters
    ----------
    what : str
        For the message.
    got, expected : Tensor
        `expected` is of float32 or wider, or of integers, which must be the same.
    dtype : torch.dtype
        That was computed in.
    largest : float
        Of numbers that took part, where the result's own are smaller.
    factor : float
        On the tolerance.
    """
    got = got.detach().cpu()
    expected = expected.detach().cpu()
    if got.shape != expected.shape:
        raise Mismatch(f"{what}: the shape {list(got.shape)} and not {list(expected.shape)}")
    if not got.numel():
        return
    if not expected.is_floating_point():
        if not torch.equal(got.long(), expected.long()):
            wrong = int((got.long() != expected.long()).sum())
            raise Mismatch(f"{what}: {wrong} of {got.numel()} numbers are others")
        return
    one, other = got.double(), expected.double()
    if not torch.equal(one.isfinite(), other.isfinite()):
        raise Mismatch(f"{what}: other numbers are infinite or none")
    infinite = ~one.isfinite()
    if not torch.equal(one[infinite].nan_to_num(7), other[infinite].nan_to_num(7)):
        raise Mismatch(f"{what}: infinities are others")
    errors = (one - other)[~infinite].abs()
    if not errors.numel():
        return
    scale = max(float(other[~infinite].abs().max()), largest, 1e-6)
    error, bound = float(errors.max()), factor * TOLERANCE[dtype] * scale
    if not error <= bound:
        raise Mismatch(f"{what}: off by {error:.3g}, more than {bound:.3g}")
