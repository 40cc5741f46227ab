"""Decoder: runs any model that a DecoderSpec describes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.errors import AdapterError
from quire.kernels.lora import LoraRows
from quire.kernels.quantized import QuantizedWeight
from quire.models.adapter import Adapter, PreparedAdapter
from quire.models.adapter_check import check_adapter
from quire.models.adapter_operations import AdapterOperations
from quire.models.adapter_share import share_of_adapter
from quire.models.batch import Batch
from quire.models.layers import (
    KVCache,
    Layer,
    Step,
    bind_add_norm,
    bind_layer,
    bind_norm,
)
from quire.models.linear import Apply, Linear, LinearMethod, WeightMethod
from quire.models.mlp import is_expert, stack_experts, stacked_experts
from quire.models.parameters import (
    all_linears,
    create_parameters,
    embedding_linears,
    linears_of_rank,
    table,
)
from quire.models.rotary import RotaryTable
from quire.models.spec import DecoderSpec, RotarySpec
from quire.models.split import split_spec, split_vocab
from quire.models.weights import Weights
from quire.parallel.place import WHOLE, Place

if TYPE_CHECKING:
    import ctypes

    from quire.kernels import Backend
    from quire.models.native import NativeForward
    from quire.parallel.group import Group


logger = logging.getLogger(__name__)


class Decoder:
    """A decoder-only language model over a paged KV cache.

    It is made in two moves: the constructor allocates the parameters, which a loader then fills
    through `weights`; `bind` makes it runnable. Adapters are made ready by `prepare_adapter`, from
    any thread, and computed with once `set_adapter` has put them into a slot.

    Of a model that several ranks compute together it is what one of them has: its stage's layers,
    and its share of each. Names are those of the whole model all the same.

    Parameters
    ----------
    spec
        What the whole model is made of.
    device, dtype
        Of weights and activations.
    kernels
        The operations, from ``quire.kernels.get_backend(device)``.
    method
        How the layers' projections are stored and applied; None: by what their weights are.
    max_adapters
        Slots for adapters; 0: there can be none, and nothing is spent on them.
    place
        Which of the model's ranks this is.
    group
        The ranks of its stage; needed where they are several.

    Attributes
    ----------
    spec : DecoderSpec
        Of the whole model.
    place : Place
    group : Group or None
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
        place: Place = WHOLE,
        group: Group | None = None,
    ) -> None:
        if place.tensor_size > 1 and (
            group is None or (group.rank, group.size) != (place.tensor_rank, place.tensor_size)
        ):
            raise ValueError(f"{place} needs the group of its stage")
        self.spec = spec
        self.place = place
        self.group = group
        self._own_spec = split_spec(spec, place)
        self._own_layers = place.layers(spec.num_layers)
        self.max_adapters = max_adapters
        self.weights = Weights(device, dtype)
        self._kernels = kernels
        self._bound = False
        self._mark = object()  # by which it knows its own adapters
        self._filled_slots: set[int] = set()
        self._method: LinearMethod = method or WeightMethod()
        self._embedding_size = spec.embedding_size or spec.hidden_size
        self._project_in, self._project_out = embedding_linears(spec)
        self._projections = all_linears(spec)
        self._adaptable = {
            name: linear for name, linear in self._projections.items() if not is_expert(name)
        }
        create_parameters(spec, self._method, self.weights, place)
        # The CPU's kernels take each expert's weight, and order it, by itself.
        if (
            hasattr(self._method, "stacked")
            and hasattr(kernels, "mix_stacked_experts")
            and getattr(kernels, "library", None) is None
        ):
            for index in self._own_layers:
                mlp = self._own_spec.layers[index].mlp
                stack_experts(f"layers.{index}.mlp", mlp, spec.hidden_size, self.weights)

    def create_lm_head(self) -> None:
        """Allocate an output matrix of its own."""
        if self.place.is_last_stage:
            WeightMethod().create(table("lm_head", self.spec, self.place), self.weights)
        else:
            self.weights.leave("lm_head.weight")

    def untie(self) -> None:
        """Have an output matrix other than the embedding, whatever the configuration says."""
        self.spec = replace(self.spec, tie_word_embeddings=False)
        self._own_spec = split_spec(self.spec, self.place)
        self.create_lm_head()
        if not self.place.is_first_stage:
            self.weights.leave("embed.weight")

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
        spec, weights, kernels = self._own_spec, self.weights, self._kernels
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
            own = self.own_linears()
            self._adapters = AdapterOperations(self.max_adapters, own, weights, kernels)
            method = self._adapters.method(method)
        self._tables: list[RotaryTable] = []
        indices: dict[RotarySpec, int] = {}
        self._rotary_indices: list[int | None] = []
        self._layers: list[Layer] = []
        reduce = self.group.reduce if self.group is not None and self._is_shared else None
        for number in self._own_layers:
            layer = spec.layers[number]
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
                    reduce,
                )
            )
        self._position_weight = weights.get("embed_positions.weight")
        # The scale is rounded to the weights' dtype, as it was in training.
        self._embedding_scale = None
        if spec.embedding_scale is not None:
            self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=weights.dtype).item()
        self.native = None if library is None else self._bind_natively(library)
        self._into = self._out_of = self._lookup = self._head = None
        if self.native is None and self.place.is_first_stage:
            self._lookup = self._bind_lookup()
            self._into = self._bind_projection(self._project_in, plain)
        if self.native is None and self.place.is_last_stage:
            self._out_of = self._bind_projection(self._project_out, plain)
            self._head = plain.bind(table(self._name_of("lm_head"), spec), weights, kernels)
        self._final_norm = self._final_add_norm = None
        if spec.final_norm is not None and self.place.is_last_stage:
            self._final_norm = bind_norm("final_norm", spec.final_norm, weights, kernels)
            self._final_add_norm = bind_add_norm("final_norm", spec.final_norm, weights, kernels)

    def _native_library(self) -> ctypes.CDLL | None:
        """The native kernels, where they can run the model, if its codes can be packed."""
        library: ctypes.CDLL | None = getattr(self._kernels, "library", None)
        if library is None or type(self._method) is not WeightMethod:
            return None
        if self._is_shared and self._comm is None:
            return None
        from quire.models import native

        return library if native.supports(self._own_spec, self.weights) else None

    def _bind_natively(self, library: ctypes.CDLL) -> NativeForward:
        from quire.models import native

        return native.NativeForward(
            library,
            self._own_spec,
            self.weights,
            tables=self._tables,
            rotary_indices=self._rotary_indices,
            embedding_scale=self._embedding_scale,
            max_adapters=self.max_adapters,
            place=self.place,
            vocab_rows=self.vocab_rows,
            comm=self._comm,
        )

    def _bind_projection(self, linear: Linear | None, method: LinearMethod) -> Apply | None:
        return None if linear is None else method.bind(linear, self.weights, self._kernels)

    def _bind_lookup(self) -> Apply:
        """Return ``ids -> embeddings``, for ids counted from the first that is here."""
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
        return "embed" if name == "lm_head" and self.spec.tie_word_embeddings else name

    @property
    def _is_shared(self) -> bool:
        """Whether other ranks have other shares of the same layers."""
        return self.place.tensor_size > 1

    @property
    def _comm(self) -> int | None:
        """What the native kernels sum by over the ranks of the stage, if they do."""
        return self.group.native if self.group is not None and self._is_shared else None

    @property
    def vocab_rows(self) -> range:
        """The tokens whose embeddings and logits are here: all, unless ranks share them."""
        return split_vocab(self.spec.vocab_size, self.place)

    @property
    def waits_for_device(self) -> bool:
        """Whether a step needs to know, on the CPU, which experts its tokens have chosen.

        It cannot be captured in a graph then. To be asked once the decoder is bound.
        """
        spec, waits = self._own_spec, not getattr(self._kernels, "mixes_without_waiting", False)
        return any(
            spec.layers[index].mlp.experts is not None
            and (
                waits
                or stacked_experts(
                    f"layers.{index}.mlp",
                    spec.layers[index].mlp,
                    spec.hidden_size,
                    self._method,
                    self.weights,
                    self._kernels,
                )
                is None
            )
            for index in self._own_layers
        )

    def kv_cache_layers(self) -> list[tuple[int, int]]:
        """``(num_kv_heads, head_dim)`` of the KV cache of each layer that is here."""
        layers = [self._own_spec.layers[index].attention for index in self._own_layers]
        return [(each.num_kv_heads, each.head_dim) for each in layers]

    def reserve_positions(self, max_length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make the rotary tables reach so far at once, and return them.

        They stay where they are until a step needs more. Otherwise they grow as sequences do.
        """
        return [each.reserve(max_length) for each in self._tables]

    def weight_bytes(self) -> int:
        """Bytes of all weights here, as they are kept; a tied embedding counts once."""
        return self.weights.num_bytes()

    def code_kinds(self) -> set[str]:
        """Return the kinds of codes that weights are in."""
        return {kind for each in self.weights.all_coded().values() for kind in each.kinds}

    def projections(self) -> Mapping[str, Linear]:
        """Return all projections of the whole model's layers, and ``lm_head``, by name.

        ``lm_head`` is there also where it is the embedding.
        """
        return self._projections

    def linears(self) -> Mapping[str, Linear]:
        """Return the projections that an adapter may change: all but those of single experts.

        They are those of the whole model.
        """
        return self._adaptable

    def own_linears(self) -> Mapping[str, Linear]:
        """Of `linears`, those that this rank has something of, and what that is."""
        if self.place.is_whole:
            return self._adaptable
        own = linears_of_rank(self.spec, self.place)
        return {name: linear for name, linear in own.items() if name in self._adaptable}

    def check_whole(self, name: str) -> None:
        """Check that all of a parameter is here, to be read for an adapter.

        Raises
        ------
        AdapterError
            Other ranks have some of it, or all.
        """
        if not self.weights.is_whole(name):
            raise AdapterError(
                f"the adapter is one for which the model's {name} has to be read, of which this "
                "process has a share at most: such adapters need tensor_parallel_size=1 and "
                "pipeline_parallel_size=1"
            )

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

        Raises
        ------
        AdapterError
            See `check_whole`.
        """
        self.check_whole(f"{self._name_of(name)}.weight")
        linear = self._projections.get(name)
        if linear is None and name != "embed":
            raise ValueError(f"the model has no weight {name!r}")
        if linear is not None and name != "lm_head" and self.native is None:
            return self._method.read(linear, self.weights)
        name = self._name_of(name)
        if self.native is not None:
            return self.native.read_weight(name)
        matrix = table(name, self.spec) if linear is None or linear.name == "lm_head" else linear
        return WeightMethod().read(matrix, self.weights)

    def is_coded(self, name: str) -> bool:
        """Whether a weight, named as in `read_weight`, is in codes, at least in part."""
        return self.weights.coded(f"{self._name_of(name)}.weight") is not None

    def read_bias(self, name: str) -> torch.Tensor | None:
        """Copy a projection's bias, ``[out_features]``, to the CPU; None where it has none.

        Raises
        ------
        AdapterError
            See `check_whole`.
        """
        self.check_whole(f"{name}.bias")
        bias = self.weights.get(f"{name}.bias")
        return None if bias is None else bias.to("cpu", copy=True)

    def prepare_adapter(self, adapter: Adapter) -> PreparedAdapter:
        """Bring an adapter into the form that steps read; from any thread, also during a step.

        Parameters
        ----------
        adapter
            Of the whole model. Its tensors are used up: they belong to the result, which may change
            them.

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
        if not self.place.is_whole:
            adapter = share_of_adapter(adapter, self.own_linears(), self.vocab_rows, self.place)
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
    def forward(
        self, batch: Batch, kv_caches: list[KVCache], hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute one step of the layers that are here, and write its keys and values.

        Parameters
        ----------
        batch
            The step's tokens.
        kv_caches
            ``(key_cache, value_cache)`` of each layer that is here.
        hidden : Tensor[num_tokens, hidden_size], float32, optional
            What the stage before returned; the first stage has none before it.

        Returns
        -------
        Tensor[num_tokens, hidden_size]
            After the final norm; of a stage that is not the last, what the next one needs, float32.
        """
        if (hidden is None) != self.place.is_first_stage:
            raise ValueError("every stage but the first, and no other, goes on from another")
        self._check_slots(batch.adapter_slots, len(batch.input_ids))
        if self.native is not None:
            return self.native.forward(batch, kv_caches, hidden)
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
        if hidden is None:
            x = self._embed(batch.input_ids, positions)
        else:
            x = hidden.to(self.weights.dtype)
        residual: torch.Tensor | None = None
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            x, residual = layer(x, residual, step, cache)
        if not self.place.is_last_stage:
            return (x if residual is None else x + residual).float()
        if residual is None:
            return x if self._final_norm is None else self._final_norm(x)
        if self._final_add_norm is None:
            return x + residual
        return self._final_add_norm(x, residual)[0]

    def _embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self._look_up(input_ids)
        if self._embedding_scale is not None:
            x = x * self._embedding_scale
        if self._into is not None:
            x = self._into(x)
        if self._position_weight is not None and self.spec.learned_positions is not None:
            offset = self.spec.learned_positions.offset
            x = x + self._kernels.embedding(positions + offset, self._position_weight)
        return x

    def _look_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self._lookup is not None
        absent = None
        if self._is_shared:
            rows = self.vocab_rows
            absent = (input_ids < rows.start) | (input_ids >= rows.stop)
            input_ids = (input_ids - rows.start).masked_fill(absent, 0)
        x = self._lookup(input_ids)
        if self._adapters is not None:
            self._adapters.embed(input_ids, x)
        if absent is not None and self.group is not None:
            x = self.group.reduce(x.masked_fill(absent[:, None], 0))
        return x

    @torch.inference_mode()
    def compute_logits(
        self, hidden: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of the tokens in `vocab_rows`, float32; on the last stage.

        Parameters
        ----------
        hidden : Tensor[num_rows, hidden_size]
            Rows of what `forward` returned.
        adapter_slots : Tensor[num_rows], int32, on the CPU, optional
            The slot of each row's adapter, -1 for none.

        Returns
        -------
        Tensor[num_rows, len(vocab_rows)]
        """
        self._check_slots(adapter_slots, len(hidden))
        if self.native is not None:
            return self.native.logits(hidden, adapter_slots)
        if self._out_of is not None:
            hidden = self._out_of(hidden)
        assert self._head is not None
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
