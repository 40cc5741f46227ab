"""Fabric: all the connections among the ranks of one model, and each rank's ends of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.parallel.torch_group import TorchGroup, TorchLink, make_process_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.distributed_c10d import Store

    from quire.parallel.group import Exchanged, Group, Link
    from quire.parallel.place import Place


@dataclass(frozen=True)
class Ends:
    """What a rank holds of its model's connections.

    Attributes
    ----------
    group : Group or None
        The ranks of its stage; None: it is the only one.
    before, after : Link or None
        From the stage before, to the stage after; None: there is none.
    home : Link or None
        From the last stage's rank to the first's of the same number; None elsewhere.
    exchanged : callable or None
        What this rank's exchanges took so far; None: nobody counts.
    """

    group: Group | None = None
    before: Link | None = None
    after: Link | None = None
    home: Link | None = None
    exchanged: Callable[[], Exchanged] | None = None


def connections(tensor_size: int, num_stages: int) -> dict[str, list[int]]:
    """Return every connection by its name, with the ranks that have ends of it, in order."""
    named: dict[str, list[int]] = {}
    if tensor_size > 1:
        for stage in range(num_stages):
            first = stage * tensor_size
            named[f"stage{stage}"] = list(range(first, first + tensor_size))
    if num_stages > 1:
        for rank in range((num_stages - 1) * tensor_size):
            named[f"link{rank}"] = [rank, rank + tensor_size]
        last = (num_stages - 1) * tensor_size
        for rank in range(tensor_size):
            named[f"home{rank}"] = [last + rank, rank]
    return named


def names_of(place: Place) -> dict[str, str]:
    """Return the connections that a rank has an end of, by the field of `Ends`."""
    names: dict[str, str] = {}
    if place.tensor_size > 1:
        names["group"] = f"stage{place.stage}"
    if not place.is_first_stage:
        names["before"] = f"link{place.rank - place.tensor_size}"
    if not place.is_last_stage:
        names["after"] = f"link{place.rank}"
    if place.num_stages > 1 and (place.is_first_stage or place.is_last_stage):
        names["home"] = f"home{place.tensor_rank}"
    return names


def connect_by_torch(
    store: Store,
    place: Place,
    device: torch.device,
    seconds: float,
    address: str | None = None,
    is_lost: Callable[[], bool] | None = None,
) -> Ends:
    """Connect a rank by torch.distributed; all ranks call this at once.

    Parameters
    ----------
    store
        That all ranks have.
    place
    device
        Of the tensors.
    seconds
        How long an operation may take.
    address
        Of this machine, where the others reach it; None: found by the machine's name.
    is_lost
        Asked while others are waited for, on a CPU; True ends that.
    """
    ranks_of = connections(place.tensor_size, place.num_stages)
    fields = {name: field for field, name in names_of(place).items()}
    ends: dict[str, Group | Link] = {}
    for name, ranks in ranks_of.items():  # in the same order everywhere
        if name not in fields:
            continue
        rank = ranks.index(place.rank)
        group = make_process_group(store, name, rank, len(ranks), device, seconds, address)
        field = fields[name]
        if field == "group":
            ends[field] = TorchGroup(group, rank, len(ranks), is_lost)
        else:
            ends[field] = TorchLink(group, rank, device, is_lost)
    return Ends(**ends)  # type: ignore[arg-type]
