"""CpuBackend: a whole decoder as one native call, native sampling, else the reference."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from quire.kernels.cpu.library import LibraryError, load_library
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.cpu.sampling import NativeSampling
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend


@cache
def why_missing() -> str | None:
    """Return why there is no native library; None if there is one.

    Raises
    ------
    LibraryError
        There is none, and QUIRE_REQUIRE_NATIVE=1 says that there must be.
    """
    try:
        load_library()
    except LibraryError as error:
        if os.environ.get("QUIRE_REQUIRE_NATIVE") == "1":
            raise
        return str(error)
    return None


class CpuBackend(NativeSampling, ReferenceBackend):
    """For CPUs, where the native library was built.

    A model that :mod:`quire.models.native` can hand over as a whole runs there; any other goes
    through the operations one by one, which are the reference's.
    """

    name = "cpu"
    priority = 10

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether `device` is the CPU and the library can be loaded."""
        return device.type == "cpu" and why_missing() is None

    @staticmethod
    def quantized_linear(
        x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`.

        The weight is brought into blocks for the one product: that costs a fraction of what it
        takes to dequantize it. A decoder that runs as a whole keeps its weights in blocks.
        """
        try:
            product = PackedLinear(weight, bias)
        except ValueError:  # groups that the native kernels do not know
            return ReferenceBackend.quantized_linear(x, weight, bias)
        return product(x).to(x.dtype)

    @property
    def library(self) -> ctypes.CDLL:
        """The native library."""
        return load_library()
