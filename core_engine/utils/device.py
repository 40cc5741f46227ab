"""Devices: which there are, and what every kind of accelerator of torch's can be asked for.

Nothing here names a maker: torch calls AMD's GPUs ``cuda``, Intel's ``xpu``, and others by names of
their own. What a device's module of torch lacks is said to be absent, or done by other means.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from quire.errors import ConfigError

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
"""Environment variables that say which devices of a type a process finds."""


def is_accelerator(device: torch.device) -> bool:
    """Whether a device has memory and streams of its own: any but the CPU."""
    return device.type != "cpu"


def module_of(device: torch.device) -> Any:
    """Return torch's module for a type of device: ``torch.cuda``, ``torch.xpu``, ..."""
    return torch.get_device_module(device)


def found_accelerator() -> str | None:
    """Return the type of the accelerator that torch finds here; None where there is none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def choose_device(name: str) -> torch.device:
    """Return the device that a configuration names.

    Parameters
    ----------
    name : str
        ``"auto"`` is an accelerator where torch finds one, and the CPU elsewhere. One without a
        number stays without: see `with_index`.

    Raises
    ------
    ConfigError
        When torch finds no such device.
    """
    if name == "auto":
        found = found_accelerator()
        name = found if found is not None and found != "mps" and count_devices(found) else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = count_devices(kind)
    if int(index or 0) >= count:
        raise ConfigError(
            f"device={name!r}: torch finds {count} such devices here; "
            "use device='cpu', or install a torch build for the device"
        )
    return torch.device(name)


def with_index(device: torch.device) -> torch.device:
    """Return an accelerator by its number: without one, that which is current in this thread.

    Other threads have another current one, and a device without a number would be that.
    """
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, current_index(device.type))


def count_devices(kind: str) -> int:
    """Return how many devices of a type torch finds; 0 where it does not know the type."""
    try:
        module = torch.get_device_module(kind)
        return int(module.device_count()) if module.is_available() else 0
    except (AttributeError, RuntimeError):
        return 0


def current_index(kind: str) -> int:
    """Return the number of the device that is current in this thread."""
    current = getattr(torch.get_device_module(kind), "current_device", None)
    return 0 if current is None else int(current())


def make_current(device: torch.device) -> None:
    """Have this thread launch on a device; each thread has a current one, 0 at first.

    Kernels that are no operations of torch's, Triton's among them, go to the current device,
    wherever their tensors are.
    """
    if device.type == "cpu" or device.index is None:
        return
    module = torch.get_device_module(device)
    if device.index != module.current_device():
        module.set_device(device.index)


def device_name(device: torch.device) -> str:
    """Return what the maker calls a device; its type where nobody says."""
    name = getattr(module_of(device), "get_device_name", None)
    return device.type if name is None else str(name(device))


def device_names() -> list[str]:
    """Return what the makers call all accelerators that torch finds."""
    kind = found_accelerator()
    if kind is None:
        return []
    return [device_name(torch.device(kind, i)) for i in range(count_devices(kind))]


def memory_info(device: torch.device) -> tuple[int, int]:
    """Return the bytes of an accelerator that are free, to any process, and all that it has."""
    module = module_of(device)
    ask = getattr(module, "mem_get_info", None)
    if ask is not None:
        free, total = ask(device)
        return int(free), int(total)
    # Others' memory is not known then.
    total = int(module.get_device_properties(device).total_memory)
    return total - int(module.memory_reserved(device)), total


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU has."""
    if is_accelerator(device):
        module_of(device).synchronize(device)


def give_back_cached(device: torch.device) -> None:
    """Give an accelerator's memory back that torch keeps for later, and no tensor has."""
    if is_accelerator(device):
        module_of(device).empty_cache()


def new_stream(device: torch.device) -> Any:
    """Return a stream beside the current one; None on a CPU, which has none."""
    return module_of(device).Stream(device=device) if is_accelerator(device) else None


def on_stream(device: torch.device, stream: Any) -> AbstractContextManager[Any]:
    """Return a context in which a stream is the current one."""
    context: AbstractContextManager[Any] = module_of(device).stream(stream)
    return context


def new_event(device: torch.device) -> Any:
    """Return an event of a device, to be recorded on its streams; None on a CPU."""
    return module_of(device).Event() if is_accelerator(device) else None


def has_graphs(device: torch.device) -> bool:
    """Whether torch can record what a device is given, and give it all of that again at once."""
    if not is_accelerator(device):
        return False
    module = module_of(device)
    return all(
        hasattr(module, name) for name in (graph_class_name(device), "graph", "graph_pool_handle")
    )


def graph_class_name(device: torch.device) -> str:
    """Return what the module of a device calls its graphs: ``CUDAGraph``, ``XPUGraph``."""
    return f"{device.type.upper()}Graph"
