"""Decoder: runs any model that a DecoderSpec describes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from quire.kernels.lora import LoraRows
from quire.kernels.quantized import QuantizedWeight
from quire.models.adapter import Adapter, PreparedAdapter
from quire.models.adapter_check import check_adapter
from quire.models.adapter_operations import AdapterOperations
from quire.models.layers import (
    KVCache,
    Layer,
    Step,
    bind_add_norm,
    bind_layer,
    bind_norm,
    create_layer,
    create_norm,
    layer_linears,
)
from quire.models.linear import Apply, Linear, LinearMethod, WeightMethod
from quire.models.mlp import is_expert
from quire.models.rotary import RotaryTable
from quire.models.spec import DecoderSpec, RotarySpec
from quire.models.weights import Weights

if TYPE_CHECKING:
    import ctypes

    from quire.kernels import Backend
    from quire.models.native import NativeForward


logger = logging.getLogger(__name__)


class Batch(Protocol):
    """What a decoder needs of a step: an engine's ``ForwardBatch`` has it.

    Attributes
    ----------
    input_ids, positions, slot_mapping : Tensor[num_tokens], int64
        Tokens, their places in their sequences, and where keys and values go.
    query_start_loc : Tensor[num_seqs + 1], int32, on the CPU
        Where each sequence's tokens begin.
    seq_lens : Tensor[num_seqs], int32, on the CPU
        Tokens of each sequence once the step has run.
    block_tables : Tensor[num_seqs, max_blocks], int32
        The KV blocks of each sequence.
    attention : object or None
        What ``kernels.plan_attention`` returned for this step; None until it is needed.
    adapter_slots : Tensor[num_tokens], int32, on the CPU, or None
        The slot of each token's adapter, -1 for none; None: no token has one.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    attention: Any
    adapter_slots: torch.Tensor | None


class Decoder:
    """A decoder-only language model over a paged KV cache.

    It is made in two moves: the constructor allocates the parameters, which a loader then fills
    through `weights`; `bind` makes it runnable. Adapters are made ready by `prepare_adapter`, from
    any thread, and computed with once `set_adapter` has put them into a slot.

    Parameters
    ----------
    spec
        What the model is made of.
    device, dtype
        Of weights and activations.
    kernels
        The operations, from ``quire.kernels.get_backend(device)``.
    method
        How the layers' projections are stored and applied; None: by what their weights are.
    max_adapters
        Slots for adapters; 0: there can be none, and nothing is spent on them.

    Attributes
    ----------
    spec : DecoderSpec
    max_adapters : int
    weights : Weights
        Parameters: ``embed``, ``embed_positions``, ``project_in``, ``layers.{i}.attention_norm``,
        ``layers.{i}.attention.{qkv,out,q_norm,k_norm}``, ``layers.{i}.mlp_norm``,
        ``layers.{i}.mlp.{gate_up,up,down}`` or, of a mixture of experts,
        ``layers.{i}.mlp.{experts.{j},shared}.{gate_up,up,down}`` and
        ``layers.{i}.mlp.{router,shared_gate}``, ``layers.{i}.{attention,mlp}_post_norm``,
        ``final_norm``, ``project_out``, ``lm_head``; each followed by ``.weight`` or ``.bias``.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Backend,
        method: LinearMethod | None = None,
        max_adapters: int = 0,
    ) -> None:
        self.spec = spec
        self.max_adapters = max_adapters
        self.weights = Weights(device, dtype)
        self._kernels = kernels
        self._bound = False
        self._mark = object()  # by which it knows its own adapters
        self._filled_slots: set[int] = set()
        self._method: LinearMethod = method or WeightMethod()
        self._embedding_size = width = spec.embedding_size or spec.hidden_size
        self._project_in = self._project_out = None
        if width != spec.hidden_size:
            self._project_in = Linear("project_in", width, {"hidden": spec.hidden_size})
            self._project_out = Linear("project_out", spec.hidden_size, {"embedding": width})
        every = [
            linear
            for index, layer in enumerate(spec.layers)
            for linear in layer_linears(f"layers.{index}", layer, spec.hidden_size)
        ]
        every.append(self._matrix("lm_head"))
        self._projections = {linear.name: linear for linear in every}
        self._adaptable = {
            name: linear for name, linear in self._projections.items() if not is_expert(name)
        }
        self._allocate(width)

    def _allocate(self, width: int) -> None:
        spec, weights, plain = self.spec, self.weights, WeightMethod()
        weights.create("embed.weight", (spec.vocab_size, width))
        if spec.learned_positions is not None:
            table = spec.learned_positions
            num_rows = table.num_positions + table.offset
            weights.create("embed_positions.weight", (num_rows, spec.hidden_size))
        for linear in (self._project_in, self._project_out):
            if linear is not None:
                plain.create(linear, weights)
        for index, layer in enumerate(spec.layers):
            create_layer(f"layers.{index}", layer, spec.hidden_size, self._method, weights)
        create_norm("final_norm", spec.final_norm, spec.hidden_size, weights)
        if not spec.tie_word_embeddings:
            self.create_lm_head()

    def create_lm_head(self) -> None:
        """Allocate an output matrix of its own."""
        self.weights.create("lm_head.weight", (self.spec.vocab_size, self._embedding_size))

    def settle(self, name: str) -> None:
        """Bring a weight that came in codes into the form that steps read.

        To be called when all of it is there: what came as plain tensors beside its codes, and the
        codes as they came, are let go.

        Parameters
        ----------
        name
            A projection's, or ``embed``, ``lm_head``.
        """
        cuts = None
        if name.endswith(".gate_up"):  # two matrices to the native kernels
            cuts = [self.weights.shape(f"{name}.weight")[0] // 2] * 2
        coded = self.weights.settle_codes(f"{name}.weight", cuts)
        library = self._native_library()
        if coded is not None and library is not None:
            from quire.models.native_model import pack

            coded.pack(partial(pack, library, self.weights.dtype))

    def bind(self) -> None:
        """Bind the filled parameters; to be called once, before `forward`."""
        if self._bound:  # the native kernels would bring the weights into their order once more
            raise RuntimeError("a decoder is bound once")
        self._bound = True
        spec, weights, kernels = self.spec, self.weights, self._kernels
        plain, method = WeightMethod(), self._method
        library = self._native_library()
        coded = self.weights.all_coded()
        if library is not None and any(each.matrices() is None for each in coded.values()):
            library = None
            names = [name for name, each in coded.items() if each.matrices() is None]
            logger.warning(
                "the native kernels do not run this model: %s of its quantized weights (%s first) "
                "are in parts of several kinds, or in groups of a size that no multiple of 8 "
                "divides; each product takes far longer so",
                len(names),
                names[0],
            )
            for each in coded.values():
                each.unpack()
        self._adapters = None
        if self.max_adapters and library is None:
            self._adapters = AdapterOperations(self.max_adapters, self.linears(), weights, kernels)
            method = self._adapters.method(method)
        self._tables: list[RotaryTable] = []
        indices: dict[RotarySpec, int] = {}
        self._rotary_indices: list[int | None] = []
        self._layers: list[Layer] = []
        for number, layer in enumerate(spec.layers):
            rotary = layer.attention.rotary
            index = None
            if rotary is not None:
                index = indices.setdefault(rotary, len(indices))
                if index == len(self._tables):
                    self._tables.append(RotaryTable(rotary, weights.device))
            self._rotary_indices.append(index)
            if library is not None:  # codes would be unpacked for operations that nobody calls
                continue
            self._layers.append(
                bind_layer(
                    f"layers.{number}",
                    layer,
                    spec.hidden_size,
                    index,
                    method,
                    weights,
                    kernels,
                )
            )
        self._position_weight = weights.get("embed_positions.weight")
        # The scale is rounded to the weights' dtype, as it was in training.
        self._embedding_scale = None
        if spec.embedding_scale is not None:
            self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=weights.dtype).item()
        self.native = None if library is None else self._bind_natively(library)
        if self.native is None:
            self._lookup = self._bind_lookup()
            self._into = self._bind_projection(self._project_in, plain)
            self._out_of = self._bind_projection(self._project_out, plain)
            self._head = plain.bind(self._matrix(self._name_of("lm_head")), weights, kernels)
        self._final_norm = self._final_add_norm = None
        if spec.final_norm is not None:
            self._final_norm = bind_norm("final_norm", spec.final_norm, weights, kernels)
            self._final_add_norm = bind_add_norm("final_norm", spec.final_norm, weights, kernels)

    def _native_library(self) -> ctypes.CDLL | None:
        """The native kernels, where they can run the model, if its codes can be packed."""
        library: ctypes.CDLL | None = getattr(self._kernels, "library", None)
        if library is None or type(self._method) is not WeightMethod:
            return None
        from quire.models import native

        return library if native.supports(self.spec, self.weights) else None

    def _bind_natively(self, library: ctypes.CDLL) -> NativeForward:
        from quire.models import native

        return native.NativeForward(
            library,
            self.spec,
            self.weights,
            tables=self._tables,
            rotary_indices=self._rotary_indices,
            embedding_scale=self._embedding_scale,
            max_adapters=self.max_adapters,
        )

    def _bind_projection(self, linear: Linear | None, method: LinearMethod) -> Apply | None:
        return None if linear is None else method.bind(linear, self.weights, self._kernels)

    def _bind_lookup(self) -> Apply:
        """Return ``ids -> embeddings``."""
        kernels, dtype = self._kernels, self.weights.dtype
        coded = self.weights.coded("embed.weight")
        if coded is None:
            plain = self.weights["embed.weight"]
            return lambda ids: kernels.embedding(ids, plain)
        [weight] = coded.pieces
        assert isinstance(weight, QuantizedWeight)  # an embedding has no parts
        return lambda ids: kernels.quantized_embedding(ids, weight, dtype)

    def _name_of(self, name: str) -> str:
        """Whose weight a projection has: an output matrix may have the embedding's."""
        tied = name == "lm_head" and "lm_head.weight" not in self.weights
        return "embed" if tied else name

    def _matrix(self, name: str) -> Linear:
        """The embedding, or the output matrix, as a projection."""
        return Linear(name, self._embedding_size, {name: self.spec.vocab_size})

    def kv_cache_layers(self) -> list[tuple[int, int]]:
        """``(num_kv_heads, head_dim)`` of each layer's KV cache."""
        return [
            (layer.attention.num_kv_heads, layer.attention.head_dim) for layer in self.spec.layers
        ]

    def weight_bytes(self) -> int:
        """Bytes of all weights, as they are kept; a tied embedding counts once."""
        return self.weights.num_bytes()

    def code_kinds(self) -> set[str]:
        """Return the kinds of codes that weights are in."""
        return {kind for each in self.weights.all_coded().values() for kind in each.kinds}

    def projections(self) -> Mapping[str, Linear]:
        """Return all projections of the layers, and ``lm_head``, by name.

        ``lm_head`` is there also where it is the embedding.
        """
        return self._projections

    def linears(self) -> Mapping[str, Linear]:
        """Return the projections that an adapter may change: all but those of single experts."""
        return self._adaptable

    def read_weight(self, name: str) -> torch.Tensor:
        """Copy a weight to the CPU; from any thread, once the decoder is bound.

        Parameters
        ----------
        name
            A name in `projections`, or ``embed``.

        Returns
        -------
        Tensor[out_features, in_features]
            Its rows in the order of the projection's parts; the embedding has one per token. In
            float32 where it is in codes.
        """
        linear = self._projections.get(name)
        if linear is None and name != "embed":
            raise ValueError(f"the model has no weight {name!r}")
        if linear is not None and name != "lm_head" and self.native is None:
            return self._method.read(linear, self.weights)
        name = self._name_of(name)
        if self.native is not None:
            return self.native.read_weight(name)
        matrix = self._matrix(name) if linear is None or linear.name == "lm_head" else linear
        return WeightMethod().read(matrix, self.weights)

    def is_coded(self, name: str) -> bool:
        """Whether a weight, named as in `read_weight`, is in codes, at least in part."""
        return self.weights.coded(f"{self._name_of(name)}.weight") is not None

    def read_bias(self, name: str) -> torch.Tensor | None:
        """Copy a projection's bias, ``[out_features]``, to the CPU; None where it has none."""
        bias = self.weights.get(f"{name}.bias")
        return None if bias is None else bias.to("cpu", copy=True)

    def prepare_adapter(self, adapter: Adapter) -> PreparedAdapter:
        """Bring an adapter into the form that steps read; from any thread, also during a step.

        Parameters
        ----------
        adapter
            Its tensors are used up: they belong to the result, which may change them.

        Raises
        ------
        AdapterError
            It does not fit the model.
        OutOfMemoryError
            There is no memory for it.
        """
        if not self.max_adapters:
            raise ValueError("an adapter needs a slot; the decoder was made with max_adapters=0")
        check_adapter(adapter, self.linears(), self.spec.vocab_size, self._embedding_size)
        if self.native is not None:
            packed = self.native.prepare(adapter)
            return PreparedAdapter(adapter.digest, packed.num_bytes, packed, self._mark)
        num_bytes = sum(each.nbytes for each in adapter.tensors())
        return PreparedAdapter(adapter.digest, num_bytes, adapter, self._mark)

    def set_adapter(self, slot: int, prepared: PreparedAdapter | None) -> None:
        """Put an adapter into a slot, in place of what was there; not during a step.

        Parameters
        ----------
        slot
            From 0 to ``max_adapters - 1``.
        prepared
            From `prepare_adapter` of this decoder; None empties the slot. The slot keeps its memory
            until then.
        """
        if not 0 <= slot < self.max_adapters:
            raise ValueError(f"slot is {slot}; it must be below max_adapters={self.max_adapters}")
        if prepared is not None and prepared.decoder is not self._mark:
            raise ValueError(f"{prepared!r} was not prepared by this decoder")
        form = None if prepared is None else prepared.form
        if self.native is not None:
            self.native.set_adapter(slot, form)
        elif self._adapters is not None:
            self._adapters.set(slot, form)
        if prepared is None:
            self._filled_slots.discard(slot)
        else:
            self._filled_slots.add(slot)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Compute one step and write its keys and values into the cache.

        Parameters
        ----------
        batch
            The step's tokens.
        kv_caches
            ``(key_cache, value_cache)`` of each layer.

        Returns
        -------
        Tensor[num_tokens, hidden_size]
            After the final norm.
        """
        self._check_slots(batch.adapter_slots, len(batch.input_ids))
        if self.native is not None:
            return self.native.forward(batch, kv_caches)
        if self._adapters is not None:
            slots = batch.adapter_slots
            self._adapters.rows = None if slots is None else LoraRows.of(slots, self.weights.device)
        if batch.attention is None:
            block_size = kv_caches[0][0].shape[1]
            batch.attention = self._kernels.plan_attention(
                batch.query_start_loc, batch.seq_lens, batch.block_tables, block_size
            )
        positions = batch.positions
        rotary = []
        if self._tables:
            max_length = int(batch.seq_lens.max())
            rotary = [table.lookup(positions, max_length) for table in self._tables]
        step = Step(batch.slot_mapping, batch.attention, rotary)
        x = self._embed(batch.input_ids, positions)
        residual: torch.Tensor | None = None
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            x, residual = layer(x, residual, step, cache)
        if residual is None:
            return x if self._final_norm is None else self._final_norm(x)
        if self._final_add_norm is None:
            return x + residual
        return self._final_add_norm(x, residual)[0]

    def _embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self._lookup(input_ids)
        if self._adapters is not None:
            self._adapters.embed(input_ids, x)
        if self._embedding_scale is not None:
            x = x * self._embedding_scale
        if self._into is not None:
            x = self._into(x)
        if self._position_weight is not None and self.spec.learned_positions is not None:
            offset = self.spec.learned_positions.offset
            x = x + self._kernels.embedding(positions + offset, self._position_weight)
        return x

    @torch.inference_mode()
    def compute_logits(
        self, hidden: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits, float32.

        Parameters
        ----------
        hidden : Tensor[num_rows, hidden_size]
            Rows of what `forward` returned.
        adapter_slots : Tensor[num_rows], int32, on the CPU, optional
            The slot of each row's adapter, -1 for none.

        Returns
        -------
        Tensor[num_rows, vocab_size]
        """
        self._check_slots(adapter_slots, len(hidden))
        if self.native is not None:
            return self.native.logits(hidden, adapter_slots)
        if self._out_of is not None:
            hidden = self._out_of(hidden)
        logits = self._head(hidden).float()
        if self._adapters is not None and adapter_slots is not None:
            self._adapters.head(hidden, logits, adapter_slots)
        cap = self.spec.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _check_slots(self, adapter_slots: torch.Tensor | None, num_rows: int) -> None:
        """See that every row's adapter is there: nobody's text is another's, or the base's."""
        if adapter_slots is None:
            return
        if adapter_slots.shape != (num_rows,):
            raise ValueError(
                f"adapter_slots has the shape {list(adapter_slots.shape)}; there are {num_rows} "
                "rows"
            )
        for slot in np.unique(adapter_slots.numpy()).tolist():
            if slot >= 0 and slot not in self._filled_slots:
                raise ValueError(f"adapter_slots has {slot}; no adapter is in that slot")
