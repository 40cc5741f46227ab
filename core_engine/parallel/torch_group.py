"""TorchGroup and TorchLink: tensors between ranks by torch.distributed, on one machine or several.

Process groups are made here directly, from a store: torch's default group is the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOK = timedelta(seconds=0.5)
"""How often a rank that waits for another looks whether that one is known to be lost."""


class LostError(ConnectionError):
    """Waiting for other ranks was ended, because one of them is no more."""


def make_process_group(
    store: Store,
    name: str,
    rank: int,
    size: int,
    device: torch.device,
    seconds: float,
    address: str | None = None,
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
        Of the tensors: gloo for the CPU, NCCL for what torch calls CUDA (RCCL on AMD's), XCCL for
        Intel's GPUs.
    seconds
        How long an operation may take.
    address
        Of this machine, where others reach it; None: gloo goes by the machine's own name.
    """
    from torch.distributed import distributed_c10d

    own = distributed_c10d.PrefixStore(name, store)
    patience = timedelta(seconds=seconds)
    if device.type == "cpu":
        gloo: Any = distributed_c10d.ProcessGroupGloo
        if address is None:
            return gloo(own, rank, size, patience)
        of_gloo = gloo._Options()
        of_gloo._timeout = patience
        of_gloo._devices = [gloo.create_device(hostname=address)]
        return gloo(own, rank, size, of_gloo)
    name_of_kind = {"cuda": "ProcessGroupNCCL", "xpu": "ProcessGroupXCCL"}.get(device.type)
    kind: Any = getattr(distributed_c10d, name_of_kind, None) if name_of_kind else None
    if kind is not None:
        options = kind.Options()
        options._timeout = patience
        return kind(own, rank, size, options)
    raise ValueError(f"no process group is known for devices of type {device.type!r}")


def _wait(work: Any, device: torch.device, is_lost: Callable[[], bool] | None) -> None:
    """Wait for what other ranks take part in, unless one of them is lost.

    A machine that is gone closes no connections.
    """
    if is_lost is None or device.type != "cpu":
        work.wait()
        return
    while True:
        try:
            work.wait(_LOOK)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # which raises what it failed by, if it did
                return
            if is_lost():
                raise LostError("another rank of the model is lost") from None


class TorchGroup:
    """The ranks of a stage; see `quire.parallel.group.Group`.

    Parameters
    ----------
    group
        From `make_process_group`.
    rank, size
        Within it.
    is_lost
        Asked while others are waited for, on a CPU; True ends that.
    """

    native = None

    def __init__(
        self, group: Any, rank: int, size: int, is_lost: Callable[[], bool] | None = None
    ) -> None:
        self._group = group
        self._is_lost = is_lost
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
        _wait(self._group.allgather([every], [x]), x.device, self._is_lost)
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
    is_lost
        As `TorchGroup` has it.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        device: torch.device,
        is_lost: Callable[[], bool] | None = None,
    ) -> None:
        self._group = group
        self._rank = rank
        self._device = device
        self._is_lost = is_lost

    def send(self, x: torch.Tensor) -> None:
        """See `Link.send`."""
        self._hand_over(x.contiguous())

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Link.receive`."""
        x = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._hand_over(x)
        return x

    def _hand_over(self, x: torch.Tensor) -> None:
        from torch.distributed.distributed_c10d import BroadcastOptions

        # And not `send` and `recv`: gloo closes the connection where waiting for those is ended.
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        _wait(self._group.broadcast([x], options), x.device, self._is_lost)
