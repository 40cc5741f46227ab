"""DecodeGraphs: steps of one token per sequence, recorded once and then given as one call.

Such a step is hundreds of small kernels, and a device is done with each before the host has asked
for the next. A graph asks for all of them at once. It reads and writes the same memory each time:
so what changes is copied into tensors that stay where they are, and a batch is padded up to one of
a few sizes, each of which is recorded when it first comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quire.engine.batch import ForwardBatch
from quire.kernels.attention.choice import records_decode
from quire.utils.device import graph_class_name, has_graphs, module_of, new_stream, synchronize

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.kernels.interface import Backend
    from quire.models.decoder import Decoder

logger = logging.getLogger("quire")

LARGEST = 512
"""Sequences of the largest batch that is recorded: beyond, kernels are long enough."""

Run = Callable[[], None]


class DecodeBackend(Protocol):
    """What a backend has whose attention can be recorded.

    Its `write_kv` leaves out tokens whose slot is negative, and its `paged_attention` gives zeros
    to a sequence of length 0.
    """

    def make_decode_plan(
        self, num_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> Any:
        """Return a plan for one token of each sequence, whose tensors stay where they are."""

    def fill_decode_plan(
        self, plan: Any, seq_lens: torch.Tensor, block_tables: torch.Tensor
    ) -> None:
        """Bring a step's lengths and blocks into a plan; waits for nothing, allocates nothing.

        Parameters
        ----------
        plan : object
        seq_lens : Tensor[num_seqs], int32, on the CPU
            Perhaps fewer than the plan has; the others are of length 0.
        block_tables : Tensor[num_seqs, width], int32, on the device
            Perhaps narrower than the plan's.
        """


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Give the device all of it once more; waits for nothing."""


class GraphDevice(Protocol):
    """What graphs need of a device: a real one, or one that tests stand in for."""

    def capture(self, run: Run) -> Graph:
        """Record what `run` gives the device, which does not do it now.

        Whatever it fails by, the device goes on with other things as before.
        """


class TorchGraphs:
    """The graphs of a device as torch has them; all of them share one pool of memory.

    Only one of them runs at a time, so what one needs while it runs, another may, too.

    Parameters
    ----------
    device : torch.device
        One that :func:`quire.utils.device.has_graphs` has them of.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = module_of(device)
        self._pool = self._module.graph_pool_handle()
        self._stream = new_stream(device)

    def capture(self, run: Run) -> Graph:
        """See `GraphDevice.capture`."""
        module = self._module
        graph: Graph = getattr(module, graph_class_name(self._device))()
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
        if self._device.type == "cuda":
            # Other threads may copy and allocate meanwhile: that is no part of it.
            options["capture_error_mode"] = "thread_local"
        before = module.current_stream(self._device)
        try:
            with module.graph(graph, **options):
                run()
        except BaseException:
            # torch leaves the stream that it recorded on where ending that fails.
            module.set_stream(before)
            raise
        return graph


def why_eager(
    config: EngineConfig,
    model: Decoder,
    kernels: Backend,
    device: torch.device,
) -> str | None:
    """Return why no step of a model is recorded; None where they are.

    Parameters
    ----------
    config : EngineConfig
    model : Decoder
        Bound.
    kernels : Backend
    device : torch.device
    """
    if config.enforce_eager:
        return "enforce_eager=True"
    if not has_graphs(device):
        return f"torch has no graphs of devices of type {device.type!r}"
    if config.parallel.num_ranks > 1:
        return "several ranks compute the model"
    if not records_decode(kernels):
        return f"the {kernels.name} kernels read a step's lengths on the host"
    if model.waits_for_device:
        return f"mixtures of experts by the {kernels.name} kernels wait for the device"
    return None


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences that are recorded, ascending: 1, 2, 4, 8, 16, 24, ...

    The last is `max_num_seqs`, or `LARGEST`.
    """
    largest = min(max_num_seqs, LARGEST)
    sizes = [size for size in (1, 2, 4, *range(8, LARGEST + 1, 8)) if size < largest]
    return [*sizes, largest]


class DecodeGraphs:
    """A model's steps of one token per sequence, by graphs.

    Parameters
    ----------
    model : Decoder
        Bound; its tables of positions are filled here, and do not move from then on.
    kernels : Backend and DecodeBackend
    kv_caches : list of (Tensor, Tensor)
    device : torch.device
    graph_device : GraphDevice
    max_num_seqs : int
    max_model_len : int
        Most tokens of a sequence, the one that is computed included.
    """

    def __init__(
        self,
        model: Decoder,
        kernels: Any,
        kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
        *,
        device: torch.device,
        graph_device: GraphDevice,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv_caches = kv_caches
        self._device = device
        self._graph_device = graph_device
        self._sizes = graph_sizes(max_num_seqs)
        self._max_len = max_model_len
        self._block_size = kv_caches[0][0].shape[1]
        self._max_blocks = -(-max_model_len // self._block_size)
        # As recorded; the model's own may be others one day.
        self._tables = model.reserve_positions(max_model_len + 1)
        self._inputs = _Inputs(self._sizes[-1], device)
        self._hidden: torch.Tensor | None = None
        self._recorded: dict[int, _Recorded] = {}
        self.is_on = True

    @property
    def recorded_sizes(self) -> list[int]:
        """The sizes that have been recorded so far."""
        return sorted(self._recorded)

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether a step can go by a graph: one token for each of not too many sequences."""
        return (
            self.is_on
            and batch.adapter_slots is None
            and batch.num_tokens == batch.num_seqs <= self._sizes[-1]
            and batch.positions.dim() == 1
            and batch.block_tables.shape[1] <= self._max_blocks
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Compute a step that `takes` says can be; None: it has to go operation by operation.

        Returns
        -------
        Tensor[num_tokens, hidden_size] or None
            Written over by the next step that goes by a graph.
        """
        count = batch.num_seqs
        size = next(each for each in self._sizes if each >= count)
        recorded = self._recorded.get(size)
        if recorded is None:
            return self._record(batch, size)
        self._fill(recorded.plan, batch, size)
        recorded.graph.replay()
        assert self._hidden is not None
        return self._hidden[:count]

    def _record(self, batch: ForwardBatch, size: int) -> torch.Tensor | None:
        """Compute a step as it will be recorded, which compiles what is not yet; then record it."""
        began = time.perf_counter()
        try:
            plan = self._kernels.make_decode_plan(
                size, self._max_blocks, self._block_size, self._device
            )
            static = self._inputs.batch(size, self._max_len, plan)
            self._fill(plan, batch, size)
            # Twice: the first may bring into memory what the second only finds there. What it
            # writes into the KV cache is what the step has to, however often.
            hidden = self._model.forward(static, self._kv_caches)
            if self._hidden is None:
                shape = (self._sizes[-1], hidden.shape[1])
                self._hidden = torch.zeros(shape, dtype=hidden.dtype, device=self._device)
            into = self._hidden[:size]

            def run() -> None:
                into.copy_(self._model.forward(static, self._kv_caches))

            run()
            synchronize(self._device)
            graph = self._graph_device.capture(run)
        except Exception as error:
            self._give_up(size, error)
            return None
        self._recorded[size] = _Recorded(plan, graph)
        seconds = time.perf_counter() - began
        logger.debug("a step of %d sequences was recorded in %.2f s", size, seconds)
        return self._hidden[: batch.num_seqs]

    def _fill(self, plan: Any, batch: ForwardBatch, size: int) -> None:
        self._inputs.fill(batch, size)
        self._kernels.fill_decode_plan(plan, batch.seq_lens, batch.block_tables)

    def _give_up(self, size: int, error: Exception) -> None:
        """Go on without graphs, and say why."""
        why = type(error).__name__
        if text := str(error).strip():
            why += f": {text.splitlines()[0]}"
        if isinstance(error, torch.OutOfMemoryError):
            why += "; lower gpu_memory_utilization or max_num_seqs to have room for graphs"
        if self._recorded:
            logger.warning(
                "a step of %d sequences could not be recorded as a graph, so such and all sizes "
                "that were not yet run operation by operation: %s", size, why
            )  # fmt: skip
            self._sizes = self.recorded_sizes
            return
        self.is_on = False
        self._hidden = None
        logger.warning(
            "no graphs: a step of %d sequences could not be recorded, so steps run operation by "
            "operation: %s", size, why
        )  # fmt: skip


class _Recorded:
    """A size's plan, which a step is brought into, and its graph."""

    __slots__ = ("graph", "plan")

    def __init__(self, plan: Any, graph: Graph) -> None:
        self.plan = plan
        self.graph = graph


class _Inputs:
    """What graphs of all sizes read: the first so many rows of tensors that stay.

    A padded row is some token that was there before, at its place; nothing of it is kept.
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        self._ids, self._positions, self._slots = (
            torch.zeros(largest, dtype=torch.int64, device=device) for _ in range(3)
        )

    def batch(self, size: int, max_len: int, plan: Any) -> ForwardBatch:
        """Return the batch that a graph of a size is recorded with."""
        return ForwardBatch(
            input_ids=self._ids[:size],
            positions=self._positions[:size],
            query_start_loc=torch.arange(size + 1, dtype=torch.int32),
            # On the host, and the same for every step: the plan has the real ones.
            seq_lens=torch.full((size,), max_len, dtype=torch.int32),
            block_tables=torch.zeros(size, 0, dtype=torch.int32),
            slot_mapping=self._slots[:size],
            logits_indices=torch.zeros(0, dtype=torch.int64),
            attention=plan,
        )

    def fill(self, batch: ForwardBatch, size: int) -> None:
        """Bring a step's tokens in; from the device, where they already are."""
        count = batch.num_seqs
        torch._foreach_copy_(
            [self._ids[:count], self._positions[:count], self._slots[:count]],
            [batch.input_ids, batch.positions, batch.slot_mapping],
        )
        if count < size:
            self._slots[count:size].fill_(-1)
