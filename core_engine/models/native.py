"""NativeForward: a decoder handed over, once, to the CPU's native kernels."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import OutOfMemoryError, QuireError
from quire.kernels.cpu import structs
from quire.kernels.cpu.blocks import dtype_of, unpack
from quire.kernels.cpu.packed_adapter import PackedAdapter, PlacedDelta
from quire.models.adapter import Adapter
from quire.models.spec import AttentionSpec, DecoderSpec, LayerSpec, NormSpec
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.models.decoder import Batch
    from quire.models.layers import KVCache
    from quire.models.rotary import RotaryTable


def supports(spec: DecoderSpec, weights: Weights) -> bool:
    """Whether the native kernels can run such a model: of the dtypes, and all widths even."""
    widths = [spec.hidden_size, spec.embedding_size or 0]
    for layer in spec.layers:
        widths += [
            layer.attention.num_heads * layer.attention.head_dim,
            layer.mlp.intermediate_size,
        ]
    return (
        weights.device.type == "cpu"
        and weights.dtype in (torch.float32, torch.bfloat16)
        and all(width % 2 == 0 for width in widths)
    )


class NativeForward:
    """Runs steps of one decoder by the native library.

    Weights of projections are brought into another order, in place, when it is made: from then on
    :meth:`read_weight` is the way to read them.

    Parameters
    ----------
    library
        From :func:`quire.kernels.cpu.library.load_library`.
    spec, weights
        The model, its parameters filled.
    tables : list of RotaryTable
    rotary_indices : list of (int or None)
        For each layer, which of the tables it rotates by.
    embedding_scale : float or None
    max_adapters : int
        Slots for adapters.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: DecoderSpec,
        weights: Weights,
        *,
        tables: list[RotaryTable],
        rotary_indices: list[int | None],
        embedding_scale: float | None,
        max_adapters: int = 0,
    ) -> None:
        self._library = library
        self._weights = weights
        self._spec = spec
        self._tables = tables
        self._rotary_indices = rotary_indices
        self._caches: list[KVCache] | None = None
        self._kept: list[torch.Tensor] = []  # what the structs point to and nobody else holds
        self._context = library.quire_context_new()
        if not self._context:
            raise OutOfMemoryError("no memory for the native kernels")
        finalizer = weakref.finalize(self, library.quire_context_free, self._context)
        finalizer.atexit = False  # a thread may be in a step until the process ends
        self._layers = (structs.Layer * len(spec.layers))()
        for number, layer in enumerate(spec.layers):
            self._fill_layer(self._layers[number], f"layers.{number}", layer)
        self._adapters = (structs.Adapter * max_adapters)()
        self._in_slot: list[PackedAdapter | None] = [None] * max_adapters
        self._model = self._make_model(embedding_scale)
        self._with_own_head: dict[int, structs.Model] = {}  # by slot
        self._table_rows = 0

    # -- adapters --------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter) -> PackedAdapter:
        """Bring an adapter into the form that the kernels read, beside whatever runs."""
        try:
            return PackedAdapter(
                self._library,
                len(self._spec.layers) * len(structs.PROJECTIONS) + 1,
                self._place(adapter),
                embed=adapter.embed_weight,
                embedding=adapter.embedding,
                head=adapter.lm_head_weight,
            )
        except (RuntimeError, MemoryError) as error:
            size = sum(each.nbytes for each in adapter.tensors()) / 2**20
            raise OutOfMemoryError(f"no memory for an adapter of {size:.0f} MiB") from error

    def _place(self, adapter: Adapter) -> Iterator[PlacedDelta]:
        """Say which of the library's products each delta belongs to."""
        numbers = {name: number for number, name in enumerate(structs.PROJECTIONS)}
        for name, delta in adapter.linears.items():
            if name == "lm_head":
                last = len(self._spec.layers) * len(numbers)
                yield PlacedDelta(last, delta, 0, self._spec.vocab_size)
                continue
            _, layer, _, projection = name.split(".")
            first = int(layer) * len(numbers)
            if projection == "gate_up":
                size = self._spec.layers[int(layer)].mlp.intermediate_size
                yield PlacedDelta(first + numbers["gate"], delta, 0, size)
                yield PlacedDelta(first + numbers["up"], delta, size, size, shrinks=False)
            else:
                num_rows = self._weights[f"{name}.weight"].shape[0]
                yield PlacedDelta(first + numbers[projection], delta, 0, num_rows)

    def set_adapter(self, slot: int, form: PackedAdapter | None) -> None:
        """Put an adapter into a slot, or nothing; between steps."""
        self._adapters[slot] = structs.Adapter() if form is None else form.struct
        self._in_slot[slot] = form
        self._with_own_head.pop(slot, None)
        if form is not None and form.head is not None:
            model = structs.Model.from_buffer_copy(self._model)
            model.head = form.head
            self._with_own_head[slot] = model

    def _slots(self, adapter_slots: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
        """Check which adapters rows have: the kernels take it as it is."""
        if adapter_slots is None:
            return None
        highest = int(adapter_slots.numpy().max(initial=-1))
        if highest >= len(self._in_slot) or adapter_slots.shape != (num_rows,):
            raise ValueError(
                f"adapter_slots has the shape {list(adapter_slots.shape)} and {highest} as its "
                f"highest; there are {num_rows} rows, and slots below {len(self._in_slot)}"
            )
        return adapter_slots.to(torch.int32).contiguous()

    def _by_head(
        self, adapter_slots: torch.Tensor | None
    ) -> list[tuple[structs.Model, npt.NDArray[np.intp] | None]]:
        """Return each output matrix that rows are multiplied with, and which; None: all."""
        if adapter_slots is None or not self._with_own_head:
            return [(self._model, None)]
        slots = adapter_slots.numpy()
        own = [slot for slot in np.unique(slots).tolist() if slot in self._with_own_head]
        if not own:
            return [(self._model, None)]
        found = [(self._with_own_head[slot], np.flatnonzero(slots == slot)) for slot in own]
        others = np.flatnonzero(~np.isin(slots, own))
        if len(others):
            found.append((self._model, others))
        return list(found)

    def read_weight(self, name: str) -> torch.Tensor:
        """Return a copy of a weight, ``[out, in]``, in plain order.

        Parameters
        ----------
        name : str
            ``embed``, ``lm_head`` (also where it is tied), or a projection's, such as
            ``layers.0.mlp.gate_up``.
        """
        tied = "lm_head.weight" not in self._weights
        if name == "lm_head" and tied:
            name = "embed"
        weight = self._weights[f"{name}.weight"]
        if name == "embed" and not tied:
            return weight.clone()
        if name.endswith(".gate_up"):
            return torch.cat([unpack(half) for half in weight.chunk(2)])
        return unpack(weight)

    # -- steps -----------------------------------------------------------------------------------

    def forward(self, batch: Batch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Compute a step; see :meth:`quire.models.decoder.Decoder.forward`.

        Returns
        -------
        Tensor[num_tokens, hidden_size], float32
        """
        if kv_caches is not self._caches:
            self._attach(kv_caches)
        # By numpy, which keeps the interpreter: masks are being filled by another thread.
        self._extend_tables(int(batch.seq_lens.numpy().max()))
        num_tokens = batch.input_ids.shape[0]
        hidden = torch.empty(num_tokens, self._spec.hidden_size, dtype=torch.float32, device="cpu")
        held = [
            batch.input_ids.contiguous(),
            batch.positions.contiguous(),
            batch.slot_mapping.contiguous(),
            batch.query_start_loc.contiguous(),
            batch.seq_lens.contiguous(),
        ]
        tables = batch.block_tables
        if tables.stride(1) != 1:
            tables = tables.contiguous()
        slots = self._slots(getattr(batch, "adapter_slots", None), num_tokens)
        call = structs.Batch(
            *(each.data_ptr() for each in held),
            tables.data_ptr(),
            tables.stride(0),
            kv_caches[0][0].shape[1],
            batch.seq_lens.shape[0],
            num_tokens,
            hidden.data_ptr(),
            None if slots is None else slots.data_ptr(),
        )
        self._check(
            self._library.quire_forward(self._context, self._model, call, torch.get_num_threads())
        )
        return hidden

    def logits(
        self, hidden: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of rows of what :meth:`forward` returned.

        Parameters
        ----------
        hidden : Tensor[num_rows, hidden_size], float32
        adapter_slots : Tensor[num_rows], int32, optional
            As in a batch.

        Returns
        -------
        Tensor[num_rows, vocab_size], float32
        """
        slots = self._slots(adapter_slots, hidden.shape[0])
        parts = self._by_head(slots)
        if parts[0][1] is None:
            return self._logits(parts[0][0], hidden, slots)
        assert slots is not None
        logits = torch.empty(
            hidden.shape[0], self._spec.vocab_size, dtype=torch.float32, device="cpu"
        )
        for model, rows in parts:
            some = torch.from_numpy(rows)
            logits[some] = self._logits(model, hidden[some], slots[some])
        return logits

    def _logits(
        self, model: structs.Model, hidden: torch.Tensor, slots: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(
            hidden.shape[0], self._spec.vocab_size, dtype=torch.float32, device="cpu"
        )
        self._check(
            self._library.quire_logits(
                self._context,
                model,
                hidden.data_ptr(),
                hidden.shape[0],
                None if slots is None else slots.data_ptr(),
                logits.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return logits

    def likeliest(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the likeliest token after some rows of what :meth:`forward` returned.

        Parameters
        ----------
        hidden : Tensor[num_tokens, hidden_size], float32
        indices : Tensor[num_rows], int64
        adapter_slots : Tensor[num_rows], int32, optional
            Of these rows, as in a batch.

        Returns
        -------
        token_ids : ndarray[num_rows], int64
        highest : ndarray[num_rows], float32
            Their logits; NaN where any of the row's is.
        """
        num_rows = indices.shape[0]
        slots = self._slots(adapter_slots, num_rows)
        parts = self._by_head(slots)
        if parts[0][1] is None:
            return self._likeliest(parts[0][0], hidden, indices, slots)
        assert slots is not None
        token_ids = np.empty(num_rows, dtype=np.int64)
        highest = np.empty(num_rows, dtype=np.float32)
        for model, rows in parts:
            some = torch.from_numpy(rows)
            token_ids[rows], highest[rows] = self._likeliest(
                model, hidden, indices[some], slots[some]
            )
        return token_ids, highest

    def _likeliest(
        self,
        model: structs.Model,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        slots: torch.Tensor | None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        num_rows = indices.shape[0]
        token_ids = np.empty(num_rows, dtype=np.int64)
        highest = np.empty(num_rows, dtype=np.float32)
        self._check(
            self._library.quire_likeliest(
                self._context,
                model,
                hidden.data_ptr(),
                indices.data_ptr(),
                num_rows,
                None if slots is None else slots.data_ptr(),
                token_ids.ctypes.data,
                highest.ctypes.data,
                torch.get_num_threads(),
            )
        )
        return token_ids, highest

    @staticmethod
    def _check(status: int) -> None:
        if status == -1:
            raise OutOfMemoryError(
                "no memory for a step: lower max_num_batched_tokens, or max_num_seqs"
            )
        if status != 0:
            raise QuireError(
                "the native kernels cannot start a thread: lower torch.set_num_threads(), or "
                "raise the limit on the number of processes"
            )

    # -- what changes while it runs --------------------------------------------------------------

    def _attach(self, caches: list[KVCache]) -> None:
        for layer, (key, value) in zip(self._layers, caches, strict=True):
            layer.key_cache, layer.value_cache = key.data_ptr(), value.data_ptr()
            layer.cache_dtype = dtype_of(key)
        self._caches = caches

    def _extend_tables(self, max_length: int) -> None:
        if max_length <= self._table_rows or not self._tables:
            return
        pointers = []
        for table in self._tables:
            cos, sin = table.reserve(max_length)
            pointers.append((cos.data_ptr(), sin.data_ptr()))
            self._table_rows = cos.shape[0]
        for layer, index in zip(self._layers, self._rotary_indices, strict=True):
            if index is not None:
                layer.cos, layer.sin = pointers[index]

    # -- what does not ---------------------------------------------------------------------------

    def _make_model(self, embedding_scale: float | None) -> structs.Model:
        spec, weights = self._spec, self._weights
        width = spec.embedding_size or spec.hidden_size
        tied = "lm_head.weight" not in weights
        head = self._matrix("embed.weight" if tied else "lm_head.weight")
        embed = head if tied else structs.Matrix()
        if not tied:
            table = weights["embed.weight"]
            embed = structs.Matrix(
                table.data_ptr(), None, None, width, spec.vocab_size, dtype_of(table)
            )
        positions = None
        if spec.learned_positions is not None:
            table = weights["embed_positions.weight"]
            positions = table[spec.learned_positions.offset :].data_ptr()
        none = structs.Matrix()
        projects = width != spec.hidden_size
        return structs.Model(
            self._layers,
            len(spec.layers),
            dtype_of(weights["embed.weight"]),
            spec.hidden_size,
            width,
            tied,
            embedding_scale or 0.0,
            embed,
            positions,
            self._matrix("project_in.weight") if projects else none,
            self._matrix("project_out.weight") if projects else none,
            head,
            self._norm("final_norm", spec.final_norm),
            spec.logits_softcap or 0.0,
            ctypes.addressof(self._adapters),
        )

    def _fill_layer(self, out: structs.Layer, name: str, spec: LayerSpec) -> None:
        for norm in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
            setattr(out, norm, self._norm(f"{name}.{norm}", getattr(spec, norm)))
        attention, mlp = spec.attention, spec.mlp
        for norm in ("q_norm", "k_norm"):
            setattr(out, norm, self._norm(f"{name}.attention.{norm}", attention.qk_norm))
        out.qkv = self._matrix(f"{name}.attention.qkv.weight")
        out.out = self._matrix(f"{name}.attention.out.weight")
        if mlp.gated:
            size = mlp.intermediate_size
            both = f"{name}.mlp.gate_up.weight"
            out.gate = self._matrix(both, slice(0, size))
            out.up = self._matrix(both, slice(size, 2 * size))
        else:
            out.up = self._matrix(f"{name}.mlp.up.weight")
        out.down = self._matrix(f"{name}.mlp.down.weight")
        out.residual = structs.RESIDUALS[spec.residual]
        out.activation = structs.ACTIVATIONS[mlp.activation]
        out.gated = mlp.gated
        self._fill_attention(out, attention)

    def _fill_attention(self, out: structs.Layer, spec: AttentionSpec) -> None:
        out.num_heads, out.num_kv_heads = spec.num_heads, spec.num_kv_heads
        out.head_dim = spec.head_dim
        out.sliding_window = spec.sliding_window or 0
        if spec.rotary is not None:
            out.rotary_dim = 2 * len(spec.rotary.inv_freq)
            out.interleaved = spec.rotary.interleaved
        out.scale = spec.scale
        out.softcap = spec.softcap or 0.0
        out.clip_qkv = spec.clip_qkv or 0.0
        if spec.alibi_slopes is not None:
            slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float32, device="cpu")
            out.alibi_slopes = self._keep(slopes)

    def _norm(self, name: str, spec: NormSpec | None) -> structs.Norm:
        if spec is None:
            return structs.Norm()
        weight, bias = self._weights.get(f"{name}.weight"), self._weights.get(f"{name}.bias")
        return structs.Norm(
            structs.NORM_KINDS[spec.kind],
            spec.eps,
            None if weight is None else self._keep(weight.float() + spec.weight_offset),
            None if bias is None else self._keep(bias.float()),
        )

    def _matrix(self, name: str, rows: slice = slice(None)) -> structs.Matrix:
        """Pack a weight, or some of its rows, and describe it."""
        weight = self._weights[name][rows]
        out_features, in_features = weight.shape
        tail = None
        rest = out_features % structs.BLOCK
        if rest:
            tail = torch.zeros(structs.BLOCK * in_features, dtype=weight.dtype, device="cpu")
        status = self._library.quire_pack(
            weight.data_ptr(),
            out_features,
            in_features,
            dtype_of(weight),
            None if tail is None else self._keep(tail),
            torch.get_num_threads(),
        )
        self._check(status)
        bias = self._weights.get(name.removesuffix(".weight") + ".bias")
        return structs.Matrix(
            weight.data_ptr(),
            None if tail is None else tail.data_ptr(),
            None if bias is None else self._keep(_padded(bias[rows].float())),
            in_features,
            out_features,
            dtype_of(weight),
        )

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _padded(bias: torch.Tensor) -> torch.Tensor:
    size = math.ceil(len(bias) / structs.BLOCK) * structs.BLOCK
    return torch.nn.functional.pad(bias, (0, size - len(bias)))
