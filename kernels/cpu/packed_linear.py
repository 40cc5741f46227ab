"""PackedLinear: one projection by the native library, by itself."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quire.kernels.cpu import structs
from quire.kernels.cpu.blocks import dtype_of
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.packed_adapter import Delta, PackedAdapter, PlacedDelta
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.quantized import QuantizedWeight


class PackedLinear:
    """Computes ``x @ weight.T + bias`` in float32.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32 or bfloat16, or QuantizedWeight
        Copied; of an even number of inputs where it is bfloat16.
    bias : Tensor[out_features], float32, optional
    deltas : sequence of Delta, optional
        What rows that have an adapter get besides, by slot.
    rounds_inputs : bool, optional
        Of a weight in codes: see `PackedCodes`.

    Raises
    ------
    LibraryError
        There is no native library.
    ValueError
        The library has no product with such a weight.
    MemoryError
        There is not enough memory.
    """

    def __init__(
        self,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None = None,
        deltas: Sequence[Delta] = (),
        *,
        rounds_inputs: bool = False,
    ) -> None:
        self._library = load_library()
        self._context = self._library.quire_context_new()
        if not self._context:
            raise MemoryError("no memory for a product")
        finalizer = weakref.finalize(self, self._library.quire_context_free, self._context)
        finalizer.atexit = False
        # A model that is nothing but its output matrix.
        self._model = structs.Model()
        if isinstance(weight, QuantizedWeight):
            self._packed = PackedCodes(self._library, weight, rounds_inputs=rounds_inputs)
            self._model.head = self._packed.matrix(bias)
        else:
            self._model.head = self._pack(weight, bias)
        self._model.hidden_size = self._model.head.in_features
        out_features = self._model.head.out_features
        self._adapters = [
            PackedAdapter(self._library, 1, [PlacedDelta(0, delta, 0, out_features)])
            for delta in deltas
        ]
        table = (structs.Adapter * len(deltas))(*(each.struct for each in self._adapters))
        self._model.adapters = ctypes.addressof(table)
        self._table = table

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> structs.Matrix:
        self._weight = weight.contiguous().clone()
        out_features, in_features = weight.shape
        dtype = dtype_of(weight)
        if dtype == structs.DTYPES["bfloat16"] and in_features % 2:
            raise ValueError(f"a bfloat16 weight has {in_features} inputs; it must be even")
        self._tail = torch.zeros(structs.BLOCK * in_features, dtype=weight.dtype, device="cpu")
        status = self._library.quire_pack(
            self._weight.data_ptr(),
            out_features,
            in_features,
            dtype,
            self._tail.data_ptr(),
            torch.get_num_threads(),
        )
        if status:
            raise MemoryError("no memory for a packed weight")
        self._bias = None
        if bias is not None:
            self._bias = F.pad(bias.float(), (0, -out_features % structs.BLOCK))
        return structs.Matrix(
            self._weight.data_ptr(),
            self._tail.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            in_features,
            out_features,
            dtype,
        )

    def __call__(self, x: torch.Tensor, adapter_slots: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply rows.

        Parameters
        ----------
        x : Tensor[num_rows, in_features]
        adapter_slots : Tensor[num_rows], int32, optional
            Which delta each row gets; -1: none.

        Returns
        -------
        Tensor[num_rows, out_features], float32
        """
        x = x.to(torch.float32).contiguous()
        result = torch.empty(
            x.shape[0], self._model.head.out_features, dtype=torch.float32, device="cpu"
        )
        status = self._library.quire_logits(
            self._context,
            ctypes.byref(self._model),
            x.data_ptr(),
            x.shape[0],
            None if adapter_slots is None else adapter_slots.data_ptr(),
            result.data_ptr(),
            torch.get_num_threads(),
        )
        if status:
            raise MemoryError("no memory for a product")
        return result
