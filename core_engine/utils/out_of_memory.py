"""What is said when memory ends while an engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.errors import OutOfMemoryError
from quire.utils.device import is_accelerator, memory_info
from quire.utils.memory import available_memory, format_bytes


@contextmanager
def named_out_of_memory(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn whatever says that memory has ended into an error that says what to do.

    Parameters
    ----------
    what : str
        What it was needed for.
    device : torch.device
    advice : str
        What to change, such as ``"lower max_num_seqs=256"``.

    Raises
    ------
    OutOfMemoryError
    """
    try:
        yield
    except OutOfMemoryError as error:
        if not is_accelerator(device):
            raise
        raise OutOfMemoryError(f"{error} ({_left(device)}): {advice}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"no memory for {what} ({_left(device)}): {advice} ({str(error).splitlines()[0]})"
            if str(error).strip()
            else f"no memory for {what} ({_left(device)}): {advice}"
        ) from error


def _left(device: torch.device) -> str:
    if not is_accelerator(device):
        return f"{format_bytes(available_memory())} are free"
    free, total = memory_info(device)
    return f"{format_bytes(free)} of the {format_bytes(total)} of {device} are free"
