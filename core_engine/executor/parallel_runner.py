"""ParallelRunner: a model that several processes compute, as an engine sees it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize

import torch

from quire.engine.batch import ForwardBatch
from quire.executor.messages import pack
from quire.executor.rank_runner import of_step
from quire.executor.wire import adapter_to_message, batch_to_message
from quire.parallel.group import Exchanged
from quire.utils.threads import StepThreads

if TYPE_CHECKING:
    from quire.executor.rank_runner import RankRunner
    from quire.executor.ranks import Ranks
    from quire.models.adapter import Adapter, PreparedAdapter
    from quire.models.decoder import Decoder


class ParallelRunner:
    """What `ModelRunner` is where there is one process: rank 0's part, and the telling of others.

    Parameters
    ----------
    own : RankRunner
        Rank 0.
    ranks : Ranks
        The others, their KV caches allocated.
    adapters : SpreadAdapters
        Where the engine has its adapters from.
    block_size : int
        Of the KV cache.
    num_threads : int or None
        That rank 0 computes with; None: as many as it would alone.
    close : callable
        Ends the other ranks.
    """

    can_go_ahead = False

    def __init__(
        self,
        own: RankRunner,
        ranks: Ranks,
        adapters: SpreadAdapters,
        block_size: int,
        num_threads: int | None,
        close: Callable[[], None],
    ) -> None:
        self._close = close
        self._threads = StepThreads(num_threads)
        self._own = own
        self._adapters = adapters
        self._ranks = ranks
        self._block_size = block_size
        self.model: Decoder = own.model
        self.device = own.device

    def set_adapter(self, slot: int, adapter: PreparedAdapter | None) -> None:
        """See `ModelRunner.set_adapter`."""
        self._adapters.set(slot, adapter)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `ModelRunner.forward`."""
        with self._together("forward", batch=batch_to_message(batch, self._block_size)):
            hidden = self._own.forward(batch)
        assert hidden is not None
        return hidden

    def logits(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `ModelRunner.logits`; ``hidden`` is, or is a part of, what `forward` returned."""
        indices = of_step(hidden, indices)
        with self._together("logits", indices=indices.cpu(), adapter_slots=adapter_slots):
            logits = self._own.logits(None, indices, adapter_slots)
        assert logits is not None
        return logits

    def likeliest(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelRunner.likeliest`."""
        indices = of_step(hidden, indices)
        with self._together("likeliest", indices=indices.cpu(), adapter_slots=adapter_slots):
            found = self._own.likeliest(None, indices, adapter_slots)
        assert found is not None
        return found

    @contextmanager
    def _together(self, what: str, **message: Any) -> Iterator[None]:
        """Have the other ranks do the same as this one.

        Where this one fails, they have begun what they cannot end, and all is lost.
        """
        self._threads.use()
        self._ranks.tell({"what": what, **message})
        try:
            yield
        except BaseException as error:
            raise self._ranks.loss(error) from error

    def make_host_cache(self, num_bytes: float) -> None:
        """See `ModelRunner.make_host_cache`; there is none for several ranks."""

    def exchanged(self) -> Exchanged | None:
        """See `ModelRunner.exchanged`; of rank 0."""
        return self._own.exchanged()

    def exchanged_of_all(self) -> list[Exchanged]:
        """Return what each rank's exchanges took so far; between two steps.

        Nothing where nobody counts.
        """
        own = self._own.exchanged()
        if own is None:
            return []
        self._ranks.tell({"what": "count"})
        return [own, *(Exchanged(*each["exchanged"]) for each in self._ranks.collect("counted"))]

    def close(self) -> None:
        """End the other processes."""
        self._threads.give_back()
        self._close()


class SpreadAdapters:
    """Adapters that all ranks have a part of each.

    Parameters
    ----------
    model : Decoder
        Rank 0's part.
    ranks : Ranks
    """

    def __init__(self, model: Decoder, ranks: Ranks) -> None:
        self._ranks = ranks
        self._model = model
        self._numbers = itertools.count()
        self._keys: WeakKeyDictionary[PreparedAdapter, int] = WeakKeyDictionary()
        self._dropped: deque[int] = deque()

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """See `Decoder.prepare_adapter`; from any thread."""
        key = next(self._numbers)
        # Before it is used up; and sent only once it is known to fit.
        data = pack({"what": "prepare", "key": key, "adapter": adapter_to_message(adapter)})
        prepared = self._model.prepare_adapter(adapter)
        self._ranks.tell_packed(data)
        self._keys[prepared] = key
        finalize(prepared, self._dropped.append, key).atexit = False
        return prepared

    def set(self, slot: int, prepared: PreparedAdapter | None) -> None:
        """See `Decoder.set_adapter`."""
        key = None if prepared is None else self._keys[prepared]
        self._model.set_adapter(slot, prepared)
        self._ranks.tell({"what": "set_adapter", "slot": slot, "key": key})
        # Not as they are let go: that may be anywhere, also while something is being sent.
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if dropped:
            self._ranks.tell({"what": "drop", "keys": dropped})
