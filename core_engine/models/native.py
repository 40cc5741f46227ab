"""NativeForward: a decoder handed over, once, to the CPU's native kernels."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import OutOfMemoryError, QuireError
from quire.kernels.cpu import structs
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
    nobody else can read them.

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
        self._model = self._make_model(embedding_scale)
        self._table_rows = 0

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
        call = structs.Batch(
            *(each.data_ptr() for each in held),
            tables.data_ptr(),
            tables.stride(0),
            kv_caches[0][0].shape[1],
            batch.seq_lens.shape[0],
            num_tokens,
            hidden.data_ptr(),
        )
        self._check(
            self._library.quire_forward(self._context, self._model, call, torch.get_num_threads())
        )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows of what :meth:`forward` returned.

        Returns
        -------
        Tensor[num_rows, vocab_size], float32
        """
        hidden = hidden.contiguous()
        logits = torch.empty(
            hidden.shape[0], self._spec.vocab_size, dtype=torch.float32, device="cpu"
        )
        self._check(
            self._library.quire_logits(
                self._context,
                self._model,
                hidden.data_ptr(),
                hidden.shape[0],
                logits.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return logits

    def likeliest(
        self, hidden: torch.Tensor, indices: torch.Tensor
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the likeliest token after some rows of what :meth:`forward` returned.

        Parameters
        ----------
        hidden : Tensor[num_tokens, hidden_size], float32
        indices : Tensor[num_rows], int64

        Returns
        -------
        token_ids : ndarray[num_rows], int64
        highest : ndarray[num_rows], float32
            Their logits; NaN where any of the row's is.
        """
        num_rows = indices.shape[0]
        token_ids = np.empty(num_rows, dtype=np.int64)
        highest = np.empty(num_rows, dtype=np.float32)
        self._check(
            self._library.quire_likeliest(
                self._context,
                self._model,
                hidden.data_ptr(),
                indices.data_ptr(),
                num_rows,
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
            layer.cache_dtype = _dtype(key.dtype)
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
                table.data_ptr(), None, None, width, spec.vocab_size, _dtype(weights.dtype)
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
            _dtype(weights.dtype),
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
            _dtype(weight.dtype),
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
            _dtype(weight.dtype),
        )

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _dtype(dtype: torch.dtype) -> int:
    return structs.DTYPES[str(dtype).removeprefix("torch.")]


def _padded(bias: torch.Tensor) -> torch.Tensor:
    size = math.ceil(len(bias) / structs.BLOCK) * structs.BLOCK
    return torch.nn.functional.pad(bias, (0, size - len(bias)))
