"""AnyEngine: what a loop steps, and what callers ask of it between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from quire.errors import RequestFailedError
from quire.outputs import RequestOutput

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.adapter_slots import LostAdapters
    from quire.engine.cache_map import KVCacheMap
    from quire.engine.processor import ModelLimits, Processor
    from quire.engine.request import Request
    from quire.lora.store import AdapterStore
    from quire.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

StepOutput = RequestOutput | RequestFailedError
"""What a step says of a request: both have ``request_id``; a failure is the last word."""


class Later(Generic[T]):
    """An answer that others have a part in: what asked for it waits, and the engine goes on.

    Parameters
    ----------
    finish : callable
        Waits for the others, and returns the whole answer.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self.finish = finish


class AnyEngine(Protocol):
    """An engine, or several copies of one among which requests are divided."""

    config: EngineConfig
    tokenizer: Tokenizer | None
    limits: ModelLimits
    processor: Processor
    adapters: AdapterStore
    lost_adapters: LostAdapters

    @property
    def num_blocks(self) -> int:
        """KV blocks that requests can use."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is in flight."""

    def check_queue(self, longest: int) -> None:
        """Refuse one more request where as many as this have to wait."""

    def add_request(self, request: Request) -> None:
        """Queue a request."""

    def abort(self, request_ids: Iterable[str]) -> Sequence[StepOutput]:
        """End requests now; return the last outputs that there are at once."""

    def step(self) -> Sequence[StepOutput]:
        """Compute one step and return the news of the requests it touched."""

    def restart(self, error: BaseException) -> Sequence[StepOutput]:
        """End every request in flight with an error, and begin with new books."""

    def release_adapters(self) -> None:
        """Let the memory of adapters go that nobody needs any more."""

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests in flight keep their blocks."""

    def kv_cache_map(self) -> KVCacheMap | Later[KVCacheMap]:
        """Return which block of the KV cache holds what."""

    def metrics(self) -> dict[str, float] | Later[dict[str, float]]:
        """Return counters since the start, and gauges of this moment."""

    def count_adapters(
        self,
    ) -> dict[str, tuple[int, int]] | Later[dict[str, tuple[int, int]]]:
        """Return by adapters' names how many requests have begun, and how many wait."""

    def close(self) -> None:
        """Drop all requests and let everything go."""
