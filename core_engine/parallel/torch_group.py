"""TorchGroup and TorchLink: tensors between ranks by torch.distributed, on one machine or several.

Process groups are made here directly, from a store: torch's default group is the program's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def make_process_group(
    store: Store, name: str, rank: int, size: int, device: torch.device, seconds: float
) -> Any:
    """Return a process group of some ranks; all of them call this at once.

    Parameters
    ----------
    store
        That all of them have.
    name
        Of the group, by which its entries of the store are told from others'.
    rank, size
        Of this process within the group.
    device
        Of the tensors: NCCL for CUDA devices, gloo for the CPU.
    seconds
        How long an operation may take.
    """
    from torch.distributed import distributed_c10d

    own = distributed_c10d.PrefixStore(name, store)
    patience = timedelta(seconds=seconds)
    if device.type == "cpu":
        return distributed_c10d.ProcessGroupGloo(own, rank, size, patience)
    if device.type == "cuda":
        kind = distributed_c10d.ProcessGroupNCCL
        options = kind.Options()
        options._timeout = patience
        return kind(own, rank, size, options)
    raise ValueError(f"no process group is known for devices of type {device.type!r}")


class TorchGroup:
    """The ranks of a stage; see `quire.parallel.group.Group`.

    Parameters
    ----------
    group
        From `make_process_group`.
    rank, size
        Within it.
    """

    native = None

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group.reduce`.

        What ranks send is summed here, and not by the library, which may take them in any order.
        """
        every = self._all(x.float())
        total = every[0]
        for each in every[1:]:
            total = total + each
        return total.to(x.dtype)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `Group.gather`."""
        every = self.gather_everywhere(x)
        return every if self.rank == 0 else None

    def gather_everywhere(self, x: torch.Tensor) -> torch.Tensor:
        """Return all ranks' tensors, ``[size, *x.shape]``, on every rank."""
        return torch.stack(self._all(x))

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([every], [x]).wait()
        return every


class TorchLink:
    """Two ranks, one of which sends; see `quire.parallel.group.Link`.

    Parameters
    ----------
    group
        From `make_process_group`, of two.
    rank
        Within it: 0 sends to 1.
    device
        Of what is received.
    """

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self._group = group
        self._rank = rank
        self._device = device

    def send(self, x: torch.Tensor) -> None:
        """See `Link.send`."""
        self._group.send([x.contiguous()], 1 - self._rank, 0).wait()

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Link.receive`."""
        x = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._group.recv([x], 1 - self._rank, 0).wait()
        return x
