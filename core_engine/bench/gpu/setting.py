"""Setting: what a part of ``quire bench gpu`` is told, and how it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quire.bench.gpu.figure import Figure


@dataclass(slots=True, kw_only=True)
class Setting:
    """Where a part measures, for how long, and beside what.

    Attributes
    ----------
    device : torch.device
    part : str
        Its name.
    tiny : bool
        Sizes for a CPU, at which figures mean nothing: to see that everything runs.
    seconds : float
        In which it is to be done; it leaves out what does not fit.
    tell : callable
        Takes each figure as soon as there is one.
    copied : float
        Bytes that the device reads and writes per second when it copies; 0: not known.
    multiplied : float
        Operations per second that it makes in a large product; 0: not known.
    """

    device: torch.device
    part: str
    tiny: bool
    seconds: float
    tell: Callable[[Figure], None]
    copied: float = 0.0
    multiplied: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def report(self, name: str, values: list[float], unit: str, **more: Any) -> None:
        """Tell a figure of this part."""
        self.tell(Figure(part=self.part, name=name, values=values, unit=unit, **more))

    def report_bytes(self, name: str, seconds: list[float], num_bytes: float, **more: Any) -> None:
        """Tell how many bytes a second were read and written, as a share of copying."""
        rates = [num_bytes / each / 1e9 for each in seconds]
        if self.copied:
            median = sorted(rates)[len(rates) // 2]
            more = {"ratio": median * 1e9 / self.copied, "ratio_to": "of copy", **more}
        self.report(name, rates, "GB/s", **more)

    def report_flops(self, name: str, seconds: list[float], flops: float, **more: Any) -> None:
        """Tell how many operations a second were made, as a share of a large product's."""
        rates = [flops / each / 1e12 for each in seconds]
        if self.multiplied:
            median = sorted(rates)[len(rates) // 2]
            more = {"ratio": median * 1e12 / self.multiplied, "ratio_to": "of matmul", **more}
        self.report(name, rates, "TFLOP/s", **more)
