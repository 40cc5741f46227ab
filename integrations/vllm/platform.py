"""vLLM's ``current_platform``: what the engine would run on."""

from __future__ import annotations

import platform
from functools import cached_property
from typing import Any


class Platform:
    """Answers what scripts ask before they choose; torch is asked when the first question comes."""

    @cached_property
    def device_type(self) -> str:
        """``"cpu"``, ``"cuda"`` (ROCm too) or ``"xpu"``."""
        from quire.utils.device import choose_device

        return choose_device("auto").type

    @property
    def device_name(self) -> str:
        """The same."""
        return self.device_type

    def is_cpu(self) -> bool:
        """Whether models run on the CPU."""
        return self.device_type == "cpu"

    def is_rocm(self) -> bool:
        """Whether torch was built for AMD's GPUs, and finds one."""
        import torch

        return self.device_type == "cuda" and torch.version.hip is not None

    def is_cuda(self) -> bool:
        """Whether torch finds a GPU of NVIDIA's."""
        return self.device_type == "cuda" and not self.is_rocm()

    def is_cuda_alike(self) -> bool:
        """Whether the device's type is ``cuda``."""
        return self.device_type == "cuda"

    def is_xpu(self) -> bool:
        """Whether torch finds a GPU of Intel's."""
        return self.device_type == "xpu"

    def is_tpu(self) -> bool:
        """Return False."""
        return False

    is_hpu = is_neuron = is_out_of_tree = is_tpu

    def get_device_name(self, device_id: int = 0) -> str:
        """Return what the device calls itself."""
        if self.is_cpu():
            return platform.processor() or platform.machine()
        import torch

        name: str = torch.get_device_module(self.device_type).get_device_name(device_id)
        return name

    def get_device_capability(self, device_id: int = 0) -> Any:
        """Return ``(major, minor)`` of a GPU of NVIDIA's; None elsewhere."""
        if not self.is_cuda():
            return None
        import torch

        return torch.cuda.get_device_capability(device_id)

    def device_count(self) -> int:
        """Return how many such devices there are."""
        if self.is_cpu():
            return 1
        import torch

        count: int = torch.get_device_module(self.device_type).device_count()
        return count


current_platform = Platform()
