"""A model on several ranks in one process: each is a thread, and they meet at a barrier."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from quire.models.adapter import Adapter
from quire.models.decoder import Decoder
from quire.parallel.place import Place

_LONGEST_WAIT = 60.0


class _Meeting:
    """What the ranks of a stage bring along."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=_LONGEST_WAIT)
        self.brought: list[Any] = [None] * size


class ThreadGroup:
    """A `quire.parallel.group.Group` of threads."""

    native = None

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting = meeting

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.brought[self.rank] = x.clone()
        self._meeting.barrier.wait()
        brought = list(self._meeting.brought)
        self._meeting.barrier.wait()
        assert len({(each.shape, each.dtype) for each in brought}) == 1
        return brought

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self._all(x)
        total = first.float()
        for each in others:
            total = total + each.float()
        return total.to(x.dtype)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        brought = self._all(x)
        return None if self.rank else torch.stack(brought)


class Ranks:
    """All ranks of one model, which look like one `Decoder` to a `PagedRunner`.

    `load(place=, group=)` makes the decoder of a rank.
    """

    def __init__(
        self,
        load: Callable[..., Decoder],
        tensor_size: int = 1,
        num_stages: int = 1,
        expert_parallel: bool = False,
    ) -> None:
        self.decoders: list[Decoder] = []
        self._meetings = [_Meeting(tensor_size) for _ in range(num_stages)]
        self._size = tensor_size
        for rank in range(tensor_size * num_stages):
            place = Place.of_rank(rank, tensor_size, num_stages, expert_parallel)
            group = ThreadGroup(self._meetings[place.stage], place.tensor_rank)
            self.decoders.append(load(place=place, group=group))
        self.weights = self.decoders[0].weights

    def kv_cache_layers(self) -> list[tuple[int, int]]:
        return [layer for each in self.decoders for layer in each.kv_cache_layers()]

    def forward(self, batch: Any, kv_caches: list[Any]) -> list[torch.Tensor]:
        """Return what each rank of the last stage does."""
        caches: list[list[Any]] = []
        first = 0
        for each in self.decoders:
            end = first + len(each.kv_cache_layers())
            caches.append(kv_caches[first:end])
            first = end
        hidden: list[Any] = [None] * self._size
        for stage, meeting in enumerate(self._meetings):
            ranks = range(stage * self._size, (stage + 1) * self._size)

            def run(
                rank: int, meeting: _Meeting = meeting, before: list[Any] = hidden
            ) -> torch.Tensor:
                try:
                    return self.decoders[rank].forward(
                        copy.copy(batch), caches[rank], before[rank % self._size]
                    )
                except BaseException:
                    meeting.barrier.abort()
                    raise

            with ThreadPoolExecutor(self._size) as threads:
                hidden = list(threads.map(run, ranks))
            # Every rank of a stage goes on from the same bits.
            assert all(torch.equal(each, hidden[0]) for each in hidden)
        return hidden

    def compute_logits(
        self, hidden: list[torch.Tensor], slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        last = self.decoders[-self._size :]
        logits = [each.compute_logits(x, slots) for each, x in zip(last, hidden, strict=True)]
        for each, part in zip(last, logits, strict=True):
            assert part.shape[1] == len(each.vocab_rows)
        return torch.cat(logits, dim=1)

    def put(self, slot: int, adapter: Adapter) -> None:
        for each in self.decoders:
            each.set_adapter(slot, each.prepare_adapter(adapter))


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are slower with two threads each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
