"""ModelRunner: ForwardBatch -> hidden states and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from quire.engine.batch import ForwardBatch
from quire.engine.graphs import DecodeGraphs
from quire.engine.host_cache import HostCache, make_host_cache
from quire.errors import DeviceLostError
from quire.kernels.kv_rows import row_width
from quire.utils.device import give_back_cached, make_current
from quire.utils.freed_memory import return_freed_memory

if TYPE_CHECKING:
    from quire.engine.graphs import GraphDevice
    from quire.kernels.interface import Backend
    from quire.models.adapter import PreparedAdapter
    from quire.models.decoder import Decoder
    from quire.parallel.group import Exchanged


class Runner(Protocol):
    """What an engine needs of a model, wherever it runs: `ModelRunner`'s methods."""

    device: torch.device
    model: Decoder
    can_go_ahead: bool
    """Whether a step may be launched before the tokens of the last one are known."""

    def set_adapter(self, slot: int, adapter: PreparedAdapter | None) -> None:
        """See `ModelRunner.set_adapter`."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `ModelRunner.forward`."""

    def logits(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `ModelRunner.logits`."""

    def likeliest(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelRunner.likeliest`."""

    def make_host_cache(self, num_bytes: float) -> HostCache | None:
        """See `ModelRunner.make_host_cache`."""

    def exchanged(self) -> Exchanged | None:
        """See `ModelRunner.exchanged`."""

    def close(self) -> None:
        """End what runs beside this process, such as other ranks."""


class ModelRunner:
    """A model and its KV cache on one device.

    Parameters
    ----------
    model : Decoder
    kernels : Backend
    num_blocks, block_size : int
        Shape of the KV cache, the null block included.
    kv_cache_dtype : torch.dtype
        What keys and values are kept in: a float type, or codes with scales, in int8 or
        float8_e4m3fn.

    Attributes
    ----------
    graphs : DecodeGraphs or None
        What steps of one token per sequence go by, where `use_graphs` was called.
    """

    can_go_ahead = True

    def __init__(
        self,
        model: Decoder,
        kernels: Backend,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.device = device
        self.graphs: DecodeGraphs | None = None
        self._make_graphs: Callable[[], None] = lambda: None
        self._kernels = kernels
        self._allocate = partial(
            _allocate, model, kernels, num_blocks, block_size, kv_cache_dtype, device
        )
        self._kv_caches = self._allocate()

    def sleep(self) -> None:
        """Let the KV cache's memory go, and graphs that were recorded with it."""
        self._kv_caches = []
        self.graphs = None
        return_freed_memory()
        give_back_cached(self.device)

    def wake_up(self) -> None:
        """Take memory for a KV cache again, where there is none.

        Raises
        ------
        MemoryError
            There is not enough of it.
        """
        if not self._kv_caches:
            self._kv_caches = self._allocate()
            self._make_graphs()

    def use_graphs(self, device: GraphDevice, *, max_num_seqs: int, max_model_len: int) -> None:
        """Have steps of one token per sequence go by graphs; see `DecodeGraphs`."""

        def make() -> None:
            self.graphs = DecodeGraphs(
                self.model,
                self._kernels,
                self._kv_caches,
                device=self.device,
                graph_device=device,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            )

        self._make_graphs = make
        make()

    def set_adapter(self, slot: int, adapter: PreparedAdapter | None) -> None:
        """Put an adapter into one of the model's slots, or nothing; between two steps."""
        self.model.set_adapter(slot, adapter)

    def forward(self, batch: ForwardBatch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Compute a step: write its keys and values, return ``[num_tokens, hidden_size]``.

        Parameters
        ----------
        batch : ForwardBatch
        hidden : Tensor[num_tokens, hidden_size], optional
            What the stage before made, where the model has several.

        Returns
        -------
        Tensor[num_tokens, hidden_size]
            Perhaps written over by the next step.
        """
        make_current(self.device)
        if hidden is None and self.graphs is not None and self.graphs.takes(batch):
            computed = self.graphs.forward(batch)
            if computed is not None:
                return computed
        return self.model.forward(batch, self._kv_caches, hidden)

    def make_host_cache(self, num_bytes: float) -> HostCache | None:
        """Return host memory for blocks of the KV cache; None where there is none to be had."""
        return make_host_cache([each for pair in self._kv_caches for each in pair], num_bytes)

    def exchanged(self) -> Exchanged | None:
        """Return what exchanges with other ranks took so far; None: there are none, or no count."""
        return None

    def close(self) -> None:
        """End what runs beside this process: nothing."""

    def logits(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits after the given tokens, ``[num_indices, vocab_size]``, float32.

        Parameters
        ----------
        hidden : Tensor[num_tokens, hidden_size]
        indices : Tensor[num_indices], int64
        adapter_slots : Tensor[num_indices], int32, on the CPU, optional
            Which of the model's adapters each of them has, -1 for none.
        """
        return self.model.compute_logits(hidden.index_select(0, indices), adapter_slots)

    def likeliest(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest tokens after the given ones, and their logits.

        Where it can, without all the other logits ever being in memory. As
        :meth:`quire.kernels.interface.Backend.argmax` does for logits. The parameters are those
        of :meth:`logits`.
        """
        native = self.model.native
        if native is None:
            ids, highest = self._kernels.argmax(self.logits(hidden, indices, adapter_slots))
            first = self.model.vocab_rows.start
            return ids + first if first else ids, highest
        if adapter_slots is None:
            return native.likeliest(hidden, indices)
        return native.likeliest(hidden, indices, adapter_slots)


def _allocate(
    model: Decoder,
    kernels: Backend,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        kernels.allocate_kv_cache(num_blocks, block_size, num_heads, head_dim, dtype, device)
        for num_heads, head_dim in model.kv_cache_layers()
    ]


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error of a step means that there is no device to go on with.

    An error of an accelerator's own stays with its process: every later call has it, too.
    """
    own = getattr(torch, "AcceleratorError", DeviceLostError)
    return isinstance(error, (DeviceLostError, own))


def kv_bytes_per_block(layers: Iterable[Sequence[int]], block_size: int, dtype: torch.dtype) -> int:
    """Return what one block of some layers' keys and values takes, in bytes.

    Parameters
    ----------
    layers
        From ``Decoder.kv_cache_layers``.
    block_size, dtype
    """
    elements = sum(2 * num_heads * row_width(head_dim, dtype) for num_heads, head_dim in layers)
    return elements * block_size * dtype.itemsize
