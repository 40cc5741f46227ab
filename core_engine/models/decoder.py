"""Decoder: runs any model that a DecoderSpec describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from quire.models.layers import (
    KVCache,
    Layer,
    Step,
    bind_add_norm,
    bind_layer,
    bind_norm,
    create_layer,
    create_norm,
)
from quire.models.linear import Apply, DenseMethod, Linear, LinearMethod
from quire.models.rotary import RotaryTable
from quire.models.spec import DecoderSpec, RotarySpec
from quire.models.weights import Weights

if TYPE_CHECKING:
    import ctypes

    from quire.kernels import Backend
    from quire.models.native import NativeForward


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
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    attention: Any


class Decoder:
    """A decoder-only language model over a paged KV cache.

    It is made in two moves: the constructor allocates the parameters, which a loader then fills
    through `weights`; `bind` makes it runnable.

    Parameters
    ----------
    spec
        What the model is made of.
    device, dtype
        Of weights and activations.
    kernels
        The operations, from ``quire.kernels.get_backend(device)``.
    method
        How projections are stored and applied; None: dense. Embedding and output matrix are
        always dense.

    Attributes
    ----------
    spec : DecoderSpec
    weights : Weights
        Parameters: ``embed``, ``embed_positions``, ``project_in``, ``layers.{i}.attention_norm``,
        ``layers.{i}.attention.{qkv,out,q_norm,k_norm}``, ``layers.{i}.mlp_norm``,
        ``layers.{i}.mlp.{gate_up,up,down}``, ``layers.{i}.{attention,mlp}_post_norm``,
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
    ) -> None:
        self.spec = spec
        self.weights = Weights(device, dtype)
        self._kernels = kernels
        self._bound = False
        self._method: LinearMethod = method or DenseMethod()
        width = spec.embedding_size or spec.hidden_size
        self._project_in = self._project_out = None
        if width != spec.hidden_size:
            self._project_in = Linear("project_in", width, {"hidden": spec.hidden_size})
            self._project_out = Linear("project_out", spec.hidden_size, {"embedding": width})
        self._allocate(width)

    def _allocate(self, width: int) -> None:
        spec, weights, dense = self.spec, self.weights, DenseMethod()
        weights.create("embed.weight", (spec.vocab_size, width))
        if spec.learned_positions is not None:
            table = spec.learned_positions
            num_rows = table.num_positions + table.offset
            weights.create("embed_positions.weight", (num_rows, spec.hidden_size))
        for linear in (self._project_in, self._project_out):
            if linear is not None:
                dense.create(linear, weights)
        for index, layer in enumerate(spec.layers):
            create_layer(f"layers.{index}", layer, spec.hidden_size, self._method, weights)
        create_norm("final_norm", spec.final_norm, spec.hidden_size, weights)
        if not spec.tie_word_embeddings:
            self.create_lm_head()

    def create_lm_head(self) -> None:
        """Allocate an output matrix of its own."""
        width = self.spec.embedding_size or self.spec.hidden_size
        self.weights.create("lm_head.weight", (self.spec.vocab_size, width))

    def bind(self) -> None:
        """Bind the filled parameters; to be called once, before `forward`."""
        if self._bound:  # the native kernels would bring the weights into their order once more
            raise RuntimeError("a decoder is bound once")
        self._bound = True
        spec, weights, kernels = self.spec, self.weights, self._kernels
        dense = DenseMethod()
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
            self._layers.append(
                bind_layer(
                    f"layers.{number}",
                    layer,
                    spec.hidden_size,
                    index,
                    self._method,
                    weights,
                    kernels,
                )
            )
        self._embed_weight = weights["embed.weight"]
        self._position_weight = weights.get("embed_positions.weight")
        self._into = self._bind_projection(self._project_in, dense)
        self._out_of = self._bind_projection(self._project_out, dense)
        has_head = "lm_head.weight" in weights
        self._head_weight = weights["lm_head.weight"] if has_head else self._embed_weight
        # The scale is rounded to the weights' dtype, as it was in training.
        self._embedding_scale = None
        if spec.embedding_scale is not None:
            self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=weights.dtype).item()
        self.native = None
        library = getattr(kernels, "library", None)
        if library is not None and type(self._method) is DenseMethod:
            self.native = self._bind_natively(library)
        self._final_norm = self._final_add_norm = None
        if spec.final_norm is not None:
            self._final_norm = bind_norm("final_norm", spec.final_norm, weights, kernels)
            self._final_add_norm = bind_add_norm("final_norm", spec.final_norm, weights, kernels)

    def _bind_natively(self, library: ctypes.CDLL) -> NativeForward | None:
        from quire.models import native

        if not native.supports(self.spec, self.weights):
            return None
        return native.NativeForward(
            library,
            self.spec,
            self.weights,
            tables=self._tables,
            rotary_indices=self._rotary_indices,
            embedding_scale=self._embedding_scale,
        )

    def _bind_projection(self, linear: Linear | None, method: LinearMethod) -> Apply | None:
        return None if linear is None else method.bind(linear, self.weights, self._kernels)

    def kv_cache_layers(self) -> list[tuple[int, int]]:
        """``(num_kv_heads, head_dim)`` of each layer's KV cache."""
        return [
            (layer.attention.num_kv_heads, layer.attention.head_dim) for layer in self.spec.layers
        ]

    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied embedding counts once."""
        return self.weights.num_bytes()

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
        if self.native is not None:
            return self.native.forward(batch, kv_caches)
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
        embedding = self._kernels.embedding
        x = embedding(input_ids, self._embed_weight)
        if self._embedding_scale is not None:
            x = x * self._embedding_scale
        if self._into is not None:
            x = self._into(x)
        if self._position_weight is not None and self.spec.learned_positions is not None:
            offset = self.spec.learned_positions.offset
            x = x + embedding(positions + offset, self._position_weight)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32.

        Parameters
        ----------
        hidden : Tensor[num_rows, hidden_size]
            Rows of what `forward` returned.

        Returns
        -------
        Tensor[num_rows, vocab_size]
        """
        if self.native is not None:
            return self.native.logits(hidden)
        if self._out_of is not None:
            hidden = self._out_of(hidden)
        logits = self._kernels.linear(hidden, self._head_weight).float()
        cap = self.spec.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
