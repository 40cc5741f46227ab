"""How much of an accelerator's memory the largest step takes, found by computing one.

What is left beside weights and such a step becomes KV cache: what a step needs is known only to the
kernels that compute it, and a cache that leaves too little fails at the first busy moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.batch import ForwardBatch
from quire.engine.graphs import LARGEST, graph_sizes
from quire.sampling.sampler import Sampler
from quire.sampling_params import SamplingParams
from quire.utils.device import module_of, synchronize
from quire.utils.transfers import upload

if TYPE_CHECKING:
    from quire.kernels.interface import Backend
    from quire.models.decoder import Decoder
    from quire.models.linear import Linear

GRAPH_BYTES = 8 << 20
"""What a device's driver takes for one graph, about, beside the memory that it computes in."""


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """The largest step that can come.

    Attributes
    ----------
    num_tokens : int
        Of all sequences together.
    num_seqs : int
    max_len : int
        Tokens of the longest sequence.
    block_size : int
        Of the KV cache.
    kv_cache_dtype : str
    has_graphs : bool
        Whether steps of one token per sequence are recorded, up to so many.
    max_adapters, adapter_rank : int
        Adapters that there are slots for, and the highest rank of one.
    adapter_dtype : str
    """

    num_tokens: int
    num_seqs: int
    max_len: int
    block_size: int
    kv_cache_dtype: str
    has_graphs: bool = False
    max_adapters: int = 0
    adapter_rank: int = 0
    adapter_dtype: str = "float32"

    def graph_bytes(self) -> int:
        """Return what graphs of all sizes take beside what they compute in."""
        if not self.has_graphs:
            return 0
        sizes = graph_sizes(self.num_seqs)
        blocks = -(-self.max_len // self.block_size)
        return sum(GRAPH_BYTES + 4 * size * blocks for size in sizes)

    def adapter_bytes(self, linears: Iterable[Linear]) -> int:
        """Return what adapters in all slots take at most, which come there one day.

        Parameters
        ----------
        linears : iterable of Linear
            What they may change, of which a rank has its part.
        """
        numbers = 0
        for linear in linears:
            rows, columns = linear.own_rows, linear.own_columns
            outputs = linear.out_features if rows is None else sum(map(len, rows))
            inputs = linear.in_features if columns is None else len(columns)
            numbers += len(linear.parts) * inputs + outputs
        itemsize: int = getattr(torch, self.adapter_dtype).itemsize
        return self.max_adapters * self.adapter_rank * numbers * itemsize


class MemoryDevice(Protocol):
    """What is asked of a device's memory: a real one's, or one that tests stand in for."""

    def begin(self) -> None:
        """Count from here: what is taken now counts as nothing."""

    def peak(self) -> int:
        """Return the most bytes that tensors took at once since `begin`."""

    def give_back(self) -> None:
        """Give the system what torch keeps, and no tensor has."""


class TorchMemory:
    """The memory of an accelerator, as torch counts it.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = module_of(device)
        self._before = 0

    def begin(self) -> None:
        """See `MemoryDevice.begin`."""
        synchronize(self._device)
        self._module.reset_peak_memory_stats(self._device)
        self._before = int(self._module.memory_allocated(self._device))

    def peak(self) -> int:
        """See `MemoryDevice.peak`."""
        synchronize(self._device)
        return int(self._module.max_memory_allocated(self._device)) - self._before

    def give_back(self) -> None:
        """See `MemoryDevice.give_back`."""
        synchronize(self._device)
        self._module.empty_cache()


def measure_step(
    model: Decoder, kernels: Backend, size: StepSize, memory: MemoryDevice, device: torch.device
) -> int:
    """Compute the largest step, with what is chosen from its logits; return the bytes it takes.

    All ranks of a stage call this at once. What stays is what a first step leaves behind: compiled
    kernels, tables of positions, the workspaces of libraries.

    Parameters
    ----------
    model : Decoder
        Bound; of a stage that is not the first it is given hidden states of zeros.
    kernels : Backend
    size : StepSize
    memory : MemoryDevice
    device : torch.device

    Returns
    -------
    int
        The KV cache not counted.
    """
    model.reserve_positions(size.max_len + 1)
    batches = [largest_batch(size, device)]
    if size.has_graphs:
        count = min(size.num_seqs, LARGEST)
        batches.append(_batch([(1, size.max_len)] * count, size, device))
    dtype = getattr(torch, size.kv_cache_dtype)
    num_blocks = max(int(each.slot_mapping.max()) for each in batches) // size.block_size + 1
    # One for all layers of a shape: what is in it means nothing.
    of_shape = {
        shape: kernels.allocate_kv_cache(num_blocks, size.block_size, *shape, dtype, device)
        for shape in set(model.kv_cache_layers())
    }
    caches = [of_shape[shape] for shape in model.kv_cache_layers()]
    peaks = []
    for index, batch in enumerate(batches):
        memory.begin()
        hidden = model.forward(batch, caches, _before(model, batch.num_tokens, device))
        if index == 0:
            _choose(model, kernels, hidden, size.num_seqs, device)
        del hidden
        peaks.append(memory.peak())
        batch.attention = None
    del caches, of_shape, batch, batches
    memory.give_back()
    # What graphs compute in is theirs alone, beside what other steps take.
    return sum(peaks) + size.graph_bytes() + size.adapter_bytes(model.own_linears().values())


def largest_batch(size: StepSize, device: torch.device) -> ForwardBatch:
    """Return a step of as many tokens as there can be.

    They are of as few sequences as can have them, and where there is room for one more it is of
    full length and has one token in the step.
    """
    parts = []
    rest = size.num_tokens
    if size.num_seqs > 1 and rest > 1:
        parts.append((1, size.max_len))
        rest -= 1
    while rest and len(parts) < size.num_seqs:
        count = min(rest, size.max_len)
        parts.append((count, count))
        rest -= count
    return _batch(parts, size, device)


def _batch(parts: Sequence[tuple[int, int]], size: StepSize, device: torch.device) -> ForwardBatch:
    """Return a step of sequences, each with so many tokens in it, and so many at its end.

    What a sequence has before the step is the null block, again and again.
    """
    block_size = size.block_size
    tables = np.zeros((len(parts), -(-max(end for _, end in parts) // block_size)), dtype=np.int32)
    positions, slots = [], []
    next_block = 1
    for row, (count, end) in enumerate(parts):
        own = np.arange(end - count, end)
        first = own[0] // block_size
        blocks = np.arange(next_block, next_block + own[-1] // block_size - first + 1)
        tables[row, first : first + len(blocks)] = blocks
        positions.append(own)
        slots.append(blocks[own // block_size - first] * block_size + own % block_size)
        next_block += len(blocks)
    counts = [count for count, _ in parts]
    arrays: list[npt.NDArray[Any]] = [np.concatenate(positions), tables, np.concatenate(slots)]
    at, in_blocks, into = upload(arrays, device)
    return ForwardBatch(
        input_ids=torch.zeros(sum(counts), dtype=torch.int64, device=device),
        positions=at,
        query_start_loc=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        seq_lens=torch.tensor([end for _, end in parts], dtype=torch.int32),
        block_tables=in_blocks,
        slot_mapping=into,
        logits_indices=torch.zeros(0, dtype=torch.int64, device=device),
    )


def _before(model: Decoder, num_tokens: int, device: torch.device) -> torch.Tensor | None:
    if model.place.is_first_stage:
        return None
    return torch.zeros(num_tokens, model.spec.hidden_size, dtype=torch.float32, device=device)


def _choose(
    model: Decoder, kernels: Backend, hidden: torch.Tensor, num_rows: int, device: torch.device
) -> None:
    """Have tokens chosen for as many rows as there can be, with much to do for each."""
    rows = np.arange(num_rows)
    vocab_size = model.spec.vocab_size
    logits = None
    if model.place.is_last_stage:
        (wanted,) = upload([rows % len(hidden)], device)
        logits = model.compute_logits(hidden[wanted])
    if logits is None or logits.shape[1] < vocab_size:
        # Some rank has all of them, made of what each has: it may be this one.
        logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
    sampler = Sampler(vocab_size=vocab_size, max_num_seqs=num_rows, device=device, kernels=kernels)
    params = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1, logprobs=1, max_tokens=1
    )
    for row in rows.tolist():
        sampler.add(
            row, params, seed=row, prompt_token_ids=[0], output_token_ids=[], eos_token_ids=()
        )
    sampler.sample(logits, rows)
