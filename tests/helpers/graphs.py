"""Stand-ins for a device with graphs, on a CPU: attention over static plans, and recordings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels.reference.backend import ReferenceBackend

FOUND_ON_THE_HOST = {"_local_scalar_dense", "nonzero", "_unique2", "bincount", "masked_select"}
"""Operations whose result the host has to wait for, or whose shape."""


@dataclass
class StaticPlan:
    """Lengths and blocks of sequences with one token each, in tensors that stay."""

    seq_lens: torch.Tensor
    tables: torch.Tensor


class StaticBackend(ReferenceBackend):
    """The reference, with attention of single tokens that nobody reads on the host."""

    name = "static"

    def __init__(self):
        self.plans = []

    def make_decode_plan(self, num_seqs, max_blocks, block_size, device):
        plan = StaticPlan(
            torch.zeros(num_seqs, dtype=torch.int32),
            torch.zeros(num_seqs, max_blocks, dtype=torch.int32),
        )
        self.plans.append(plan)
        return plan

    def fill_decode_plan(self, plan, seq_lens, block_tables):
        count, width = block_tables.shape
        assert len(seq_lens) == count
        plan.seq_lens[count:] = 0
        plan.seq_lens[:count].copy_(seq_lens)
        plan.tables[:count, :width].copy_(block_tables)

    def write_kv(self, key, value, key_cache, value_cache, slot_mapping):
        # A real kernel leaves negative slots out; here they go where nobody reads: slot 0 is the
        # null block's, which is made zero again.
        kept = slot_mapping >= 0
        slots = slot_mapping.where(kept, 0)
        for rows, cache in ((key, key_cache), (value, value_cache)):
            rows = rows.where(kept[:, None, None], 0)
            cache.flatten(0, 1).index_copy_(0, slots, rows.to(cache.dtype))

    def paged_attention(
        self, query, key_cache, value_cache, plan, *,
        scale, sliding_window=None, softcap=None, alibi_slopes=None,
    ):  # fmt: skip
        if not isinstance(plan, StaticPlan):
            return ReferenceBackend.paged_attention(
                query, key_cache, value_cache, plan, scale=scale, sliding_window=sliding_window,
                softcap=softcap, alibi_slopes=alibi_slopes,
            )  # fmt: skip
        keys, values = (
            cache[plan.tables.long()].flatten(1, 2).float() for cache in (key_cache, value_cache)
        )
        repeats = query.shape[1] // keys.shape[2]
        keys, values = (each.repeat_interleave(repeats, 2) for each in (keys, values))
        scores = torch.einsum("nhd,nlhd->nhl", query.float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places, lens = torch.arange(keys.shape[1]), plan.seq_lens[:, None]
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[:, None] * (places - lens + 1)[:, None]
        seen = places < lens
        if sliding_window is not None:
            seen = seen & (places >= lens - sliding_window)
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("nhl,nlhd->nhd", weights, values).to(query.dtype)


class _Strict(TorchDispatchMode):
    """What a device refuses while it records: whatever the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # Lengths are on the host: what is read of one that nothing was computed from is free.
        if name in FOUND_ON_THE_HOST and not getattr(args[0], "is_host", False):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        if name == "max" and isinstance(result, torch.Tensor) and args[0].dtype is torch.int32:
            result.is_host = True
        return result


class FakeGraphs:
    """A device that records by keeping what is run, and does that anew.

    Attributes
    ----------
    events : list of str
        "capture" and "replay", in their order.
    """

    def __init__(self, fail=None):
        self.events = []
        self.fail = fail

    def capture(self, run):
        if self.fail is not None:
            raise self.fail
        with _Strict():
            run()  # here it is done, too; on a device nothing is
        self.events.append("capture")
        return _FakeGraph(run, self.events)


class _FakeGraph:
    def __init__(self, run, events):
        self._run, self._events = run, events

    def replay(self):
        self._events.append("replay")
        self._run()
