"""NativeForward: a decoder handed over, once, to the CPU's native kernels."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import ConfigError, OutOfMemoryError
from quire.kernels.cpu import structs
from quire.kernels.cpu.blocks import unpack
from quire.kernels.cpu.packed_adapter import PackedAdapter, PlacedDelta
from quire.models.adapter import Adapter
from quire.models.native_model import NativeModel, check
from quire.models.spec import DecoderSpec
from quire.models.weights import Weights
from quire.parallel.place import WHOLE, Place
from quire.parallel.shared_memory import failure_of

if TYPE_CHECKING:
    from quire.models.batch import Batch
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
        if layer.mlp.experts is not None:
            widths.append(layer.mlp.experts.shared_size or 0)
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
        What is here of the model, its parameters filled.
    tables : list of RotaryTable
    rotary_indices : list of (int or None)
        For each layer that is here, which of the tables it rotates by.
    embedding_scale : float or None
    max_adapters : int
        Slots for adapters.
    place : Place
        Which of the model's ranks this is.
    vocab_rows : range, optional
        The tokens that embedding and output matrix are here for; None: all.
    comm : int or None
        Address of the rank's ``quire_comm``, needed where it is not alone in its stage.
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
        place: Place = WHOLE,
        vocab_rows: range | None = None,
        comm: int | None = None,
    ) -> None:
        self._library = library
        self._place_in_model = place
        self._own_layers = place.layers(len(spec.layers))
        self._vocab_rows = range(spec.vocab_size) if vocab_rows is None else vocab_rows
        self._comm = comm
        self._weights = weights
        self._spec = spec
        self._tables = tables
        self._rotary_indices = rotary_indices
        self._caches: list[KVCache] | None = None
        self._context = library.quire_context_new()
        if not self._context:
            raise OutOfMemoryError("no memory for the native kernels")
        finalizer = weakref.finalize(self, library.quire_context_free, self._context)
        finalizer.atexit = False  # a thread may be in a step until the process ends
        self._adapters = (structs.Adapter * max_adapters)()
        self._in_slot: list[PackedAdapter | None] = [None] * max_adapters
        made = NativeModel(
            library,
            spec,
            weights,
            embedding_scale,
            place=place,
            first_token=self._vocab_rows.start,
            comm=comm,
        )
        made.model.adapters = ctypes.addressof(self._adapters)
        self._made = made  # it holds what the structs point to
        self._layers, self._model = made.layers, made.model
        self._with_own_head: dict[int, structs.Model] = {}  # by slot
        self._table_rows = 0

    # -- adapters --------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter) -> PackedAdapter:
        """Bring an adapter into the form that the kernels read, beside whatever runs."""
        head = adapter.lm_head_weight
        if head is not None and self._weights.dtype == torch.float32:
            head = head.float()  # of bfloat16, some CPUs would round its inputs to that, too
        try:
            return PackedAdapter(
                self._library,
                len(self._own_layers) * len(structs.PROJECTIONS) + 1,
                self._place(adapter),
                embed=adapter.embed_weight,
                embedding=adapter.embedding,
                head=head,
            )
        except (RuntimeError, MemoryError) as error:
            size = sum(each.nbytes for each in adapter.tensors()) / 2**20
            raise OutOfMemoryError(f"no memory for an adapter of {size:.0f} MiB") from error

    def _place(self, adapter: Adapter) -> Iterator[PlacedDelta]:
        """Say which of the library's products each delta belongs to."""
        numbers = {name: number for number, name in enumerate(structs.PROJECTIONS)}
        for name, delta in adapter.linears.items():
            if name == "lm_head":
                last = len(self._own_layers) * len(numbers)
                yield PlacedDelta(last, delta, 0, len(self._vocab_rows))
                continue
            _, layer, *_, projection = name.split(".")
            first = self._own_layers.index(int(layer)) * len(numbers)
            if projection == "gate_up":
                size = self._weights.shape(f"{name}.weight")[0] // 2
                yield PlacedDelta(first + numbers["gate"], delta, 0, size)
                yield PlacedDelta(first + numbers["up"], delta, size, size, shrinks=False)
            else:
                num_rows = self._weights.shape(f"{name}.weight")[0]
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
            ``layers.0.mlp.gate_up``. In float32 where it is in codes, at least in part.
        """
        tied = self._spec.tie_word_embeddings
        if name == "lm_head" and tied:
            name = "embed"
        coded = self._weights.coded(f"{name}.weight")
        if coded is not None:
            return coded.read(unpack)
        weight = self._weights[f"{name}.weight"]
        if name == "embed" and not (tied and self._place_in_model.is_last_stage):
            return weight.clone()
        if name.endswith(".gate_up"):
            return torch.cat([unpack(half) for half in weight.chunk(2)])
        return unpack(weight)

    # -- steps -----------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, kv_caches: list[KVCache], hidden_in: torch.Tensor | None = None
    ) -> torch.Tensor:
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
        if hidden_in is not None:
            hidden_in = hidden_in.float().contiguous()
            if hidden_in.shape != hidden.shape:
                raise ValueError(f"hidden has the shape {list(hidden_in.shape)}")
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
            None if hidden_in is None else hidden_in.data_ptr(),
        )
        status = self._library.quire_forward(
            self._context, self._model, call, torch.get_num_threads()
        )
        if self._comm is not None and status != 0:
            raise failure_of(self._comm)
        check(status)
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
        Tensor[num_rows, len(vocab_rows)], float32
        """
        slots = self._slots(adapter_slots, hidden.shape[0])
        parts = self._by_head(slots)
        if parts[0][1] is None:
            return self._logits(parts[0][0], hidden, slots)
        assert slots is not None
        logits = torch.empty(
            hidden.shape[0], len(self._vocab_rows), dtype=torch.float32, device="cpu"
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
            hidden.shape[0], len(self._vocab_rows), dtype=torch.float32, device="cpu"
        )
        check(
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest token after some rows of what :meth:`forward` returned.

        Parameters
        ----------
        hidden : Tensor[num_tokens, hidden_size], float32
        indices : Tensor[num_rows], int64
        adapter_slots : Tensor[num_rows], int32, optional
            Of these rows, as in a batch.

        Returns
        -------
        token_ids : Tensor[num_rows], int64
            Of those in `vocab_rows`.
        highest : Tensor[num_rows], float32
            Their logits; NaN where any of the row's is.
        """
        num_rows = indices.shape[0]
        slots = self._slots(adapter_slots, num_rows)
        parts = self._by_head(slots)
        if parts[0][1] is None:
            return self._likeliest(parts[0][0], hidden, indices, slots)
        assert slots is not None
        token_ids = torch.empty(num_rows, dtype=torch.int64, device="cpu")
        highest = torch.empty(num_rows, dtype=torch.float32, device="cpu")
        for model, rows in parts:
            some = torch.from_numpy(rows)
            token_ids[some], highest[some] = self._likeliest(
                model, hidden, indices[some], slots[some]
            )
        return token_ids, highest

    def _likeliest(
        self,
        model: structs.Model,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        slots: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = indices.shape[0]
        token_ids = torch.empty(num_rows, dtype=torch.int64, device="cpu")
        highest = torch.empty(num_rows, dtype=torch.float32, device="cpu")
        check(
            self._library.quire_likeliest(
                self._context,
                model,
                hidden.data_ptr(),
                indices.data_ptr(),
                num_rows,
                None if slots is None else slots.data_ptr(),
                token_ids.data_ptr(),
                highest.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return token_ids, highest

    # -- what changes while it runs --------------------------------------------------------------

    @staticmethod
    def check_cache_dtype(dtype: torch.dtype) -> None:
        """Refuse a KV cache of a type that the kernels do not read.

        Raises
        ------
        ConfigError
            The message has those that they do read.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in structs.CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype={name!r} is none that the native CPU kernels read; set it to "
                "'auto', 'float32', 'bfloat16', 'fp8' or 'int8', or use dtype='float16', which "
                "runs without them"
            )

    def _attach(self, caches: list[KVCache]) -> None:
        for layer, (key, value) in zip(self._layers, caches, strict=True):
            layer.key_cache, layer.value_cache = key.data_ptr(), value.data_ptr()
            layer.cache_dtype = structs.CACHE_DTYPES[str(key.dtype).removeprefix("torch.")]
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
