"""From logits to tokens by the native library; see `quire.kernels.interface.Backend`."""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np
import torch

from quire.kernels.cpu import structs
from quire.kernels.cpu.library import load_library
from quire.kernels.reference import sampling as reference


class _Context:
    """Memory for the library's calls, freed with the object."""

    def __init__(self) -> None:
        library = load_library()
        self.pointer = library.quire_context_new()
        if not self.pointer:
            raise MemoryError("no memory for the native kernels")
        weakref.finalize(self, library.quire_context_free, self.pointer).atexit = False


_own = threading.local()
"""Each thread's context, which ends with the thread."""


class NativeSampling:
    """The operations on logits; what is not float32 in rows goes to the reference."""

    @staticmethod
    def _call(name: str, *arguments: object) -> None:
        context = getattr(_own, "context", None)
        if context is None:
            context = _own.context = _Context()
        status = getattr(load_library(), name)(context.pointer, *arguments, torch.get_num_threads())
        if status == -1:
            raise MemoryError("no memory to choose tokens in")
        if status:
            raise RuntimeError("the native kernels cannot start a thread to choose tokens on")

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.argmax`."""
        if not _suits(logits):
            return reference.argmax(logits)
        ids = np.empty(len(logits), dtype=np.int64)
        highest = np.empty(len(logits), dtype=np.float32)
        self._call("quire_argmax", _rows(logits), ids.ctypes.data, highest.ctypes.data)
        return torch.from_numpy(ids), torch.from_numpy(highest)

    def apply_penalties(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        counts: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
        repetition: torch.Tensor,
    ) -> None:
        """See `quire.kernels.interface.Backend.apply_penalties`."""
        columns = [rows, token_ids, counts, presence, frequency, repetition]
        if not _suits(logits):
            reference.apply_penalties(logits, *columns)
            return
        columns = [column.contiguous() for column in columns]
        what = structs.Penalties(*(column.data_ptr() for column in columns), len(rows))
        load_library().quire_penalize(logits.data_ptr(), logits.stride(0), ctypes.byref(what))

    def apply_bitmask(
        self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor
    ) -> None:
        """See `quire.kernels.interface.Backend.apply_bitmask`."""
        if not _suits(logits):
            reference.apply_bitmask(logits, rows, bitmask)
            return
        rows, bitmask = rows.contiguous(), bitmask.contiguous()
        load_library().quire_mask(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            rows.data_ptr(),
            len(rows),
            bitmask.data_ptr(),
            bitmask.shape[1],
        )

    def top_logits(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.top_logits`."""
        if not _suits(logits):
            return reference.top_logits(logits, k)
        shape = len(logits), min(k, logits.shape[1])
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        ids = torch.empty(shape, dtype=torch.int64, device="cpu")
        self._call("quire_top", _rows(logits), shape[1], values.data_ptr(), ids.data_ptr())
        return values, ids

    def gather_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.gather_logprobs`."""
        if not _suits(logits):
            return reference.gather_logprobs(logits, token_ids, k)
        k = min(k, logits.shape[1])
        token_ids = token_ids.contiguous()
        ids = torch.empty((len(logits), k + 1), dtype=torch.int64, device="cpu")
        logprobs = torch.empty((len(logits), k + 1), dtype=torch.float32, device="cpu")
        ranks = torch.empty(len(logits), dtype=torch.int64, device="cpu")
        self._call(
            "quire_log_probabilities",
            _rows(logits),
            token_ids.data_ptr(),
            k,
            ids.data_ptr(),
            logprobs.data_ptr(),
            ranks.data_ptr(),
        )
        return ids, logprobs, ranks

    def sample_tokens(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.sample_tokens`."""
        if not _suits(logits):
            return reference.sample_tokens(logits, temperature, top_k, top_p, min_p, uniform)
        ids = np.empty(len(logits), dtype=np.int64)
        heat = np.maximum(temperature.numpy(), reference.LEAST_TEMPERATURE)
        held = [each.contiguous() for each in (top_k, top_p, min_p, uniform)]
        how = structs.Draw(heat.ctypes.data, *(each.data_ptr() for each in held))
        self._call("quire_draw", _rows(logits), ctypes.byref(how), ids.ctypes.data)
        return torch.from_numpy(ids)


def _suits(logits: torch.Tensor) -> bool:
    return (
        logits.dtype is torch.float32
        and logits.device.type == "cpu"
        and logits.shape[1] > 0
        and logits.stride(1) == 1
    )


def _rows(logits: torch.Tensor) -> structs.Logits:
    return structs.Logits(logits.data_ptr(), logits.stride(0), *logits.shape)
