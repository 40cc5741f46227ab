"""NativeModel: a decoder's weights in the native kernels' order, and described to them."""

from __future__ import annotations

import ctypes
import math

import torch

from quire.errors import OutOfMemoryError, QuireError
from quire.kernels.cpu import structs
from quire.kernels.cpu.blocks import dtype_of
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.quantized import QuantizedWeight
from quire.models.mlp import inner_mlps, is_expert
from quire.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
)
from quire.models.weights import Weights
from quire.parallel.place import WHOLE, Place
from quire.utils import huge_pages


def pack(library: ctypes.CDLL, dtype: torch.dtype, weight: QuantizedWeight) -> PackedCodes | None:
    """Bring a weight in codes into the native kernels' order; None: they cannot multiply it.

    In a model of bfloat16, its inputs may be rounded to that, as a plain weight's are.
    """
    try:
        return PackedCodes(library, weight, _allocate, rounds_inputs=dtype == torch.bfloat16)
    except ValueError:
        return None
    except MemoryError as error:
        size = weight.num_bytes / 2**20
        raise OutOfMemoryError(f"no memory for a weight in codes of {size:.0f} MiB") from error


def _allocate(num_bytes: int) -> torch.Tensor:
    return huge_pages.allocate((num_bytes,), torch.uint8)


def check(status: int) -> None:
    """Raise what a call of the library answered, unless it is 0."""
    if status == -1:
        raise OutOfMemoryError(
            "no memory for a step: lower max_num_batched_tokens, or max_num_seqs"
        )
    if status != 0:
        raise QuireError(
            "the native kernels cannot start a thread: lower torch.set_num_threads(), or "
            "raise the limit on the number of processes"
        )


class NativeModel:
    """The structs of a decoder, and what they point to.

    Plain weights of projections are brought into another order, in place.

    Parameters
    ----------
    library
        From :func:`quire.kernels.cpu.library.load_library`.
    spec, weights
        What is here of the model, its parameters filled, codes packed by `pack`.
    embedding_scale : float or None
    place
        Which of the model's ranks this is.
    first_token
        The first that embedding and output matrix are here for.
    comm
        Address of the rank's ``quire_comm``, if it is not alone in its stage.

    Attributes
    ----------
    layers : ctypes array of structs.Layer
        Those of the rank's stage, without rotary tables and KV caches.
    model : structs.Model
        Without adapters.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: DecoderSpec,
        weights: Weights,
        embedding_scale: float | None,
        *,
        place: Place = WHOLE,
        first_token: int = 0,
        comm: int | None = None,
    ) -> None:
        self._library = library
        self._weights = weights
        self._spec = spec
        self._place = place
        self._kept: list[torch.Tensor] = []  # what the structs point to and nobody else holds
        self._structs: list[object] = []
        numbers = place.layers(len(spec.layers))
        self.layers = (structs.Layer * len(numbers))()
        for out, number in zip(self.layers, numbers, strict=True):
            self._fill_layer(out, f"layers.{number}", spec.layers[number])
        self.model = self._make_model(embedding_scale)
        self.model.first_token = first_token
        self.model.comm = comm

    def _make_model(self, embedding_scale: float | None) -> structs.Model:
        spec, weights, place = self._spec, self._weights, self._place
        width = spec.embedding_size or spec.hidden_size
        tied, none = spec.tie_word_embeddings, structs.Matrix()
        head, embed, is_packed = none, none, False
        if place.is_last_stage:
            head = self._matrix("embed.weight" if tied else "lm_head.weight")
        if place.is_first_stage and tied and place.is_last_stage:
            embed, is_packed = head, True
        elif place.is_first_stage and weights.coded("embed.weight") is not None:
            embed, is_packed = self._matrix("embed.weight"), True
        elif place.is_first_stage:
            table = weights["embed.weight"]
            embed = structs.Matrix(table.data_ptr(), None, None, width, len(table), dtype_of(table))
        positions = None
        if spec.learned_positions is not None and place.is_first_stage:
            table = weights["embed_positions.weight"]
            positions = table[spec.learned_positions.offset :].data_ptr()
        projects = width != spec.hidden_size
        return structs.Model(
            self.layers,
            len(self.layers),
            structs.DTYPES[str(weights.dtype).removeprefix("torch.")],
            spec.hidden_size,
            width,
            is_packed,
            embedding_scale or 0.0,
            embed,
            positions,
            self._matrix("project_in.weight") if projects and place.is_first_stage else none,
            self._matrix("project_out.weight") if projects and place.is_last_stage else none,
            head,
            self._norm("final_norm", spec.final_norm if place.is_last_stage else None),
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
        if mlp.experts is not None:
            self._fill_mixture(out, f"{name}.mlp", mlp, mlp.experts)
        else:
            self._fill_mlp(out, f"{name}.mlp", mlp)
        out.residual = structs.RESIDUALS[spec.residual]
        out.activation = structs.ACTIVATIONS[mlp.activation]
        self._fill_attention(out, attention)

    def _fill_mlp(self, out: structs.Layer | structs.Expert, name: str, spec: MlpSpec) -> None:
        if spec.gated:
            size = spec.intermediate_size
            both = f"{name}.gate_up.weight"
            out.gate = self._matrix(both, slice(0, size))
            out.up = self._matrix(both, slice(size, 2 * size))
            at_once = self._are_alike(both)
            out.gated = structs.GATED_AT_ONCE if at_once else structs.GATED_APART
        else:
            out.up = self._matrix(f"{name}.up.weight")
        out.down = self._matrix(f"{name}.down.weight")

    def _fill_mixture(
        self, out: structs.Layer, name: str, spec: MlpSpec, mixture: ExpertsSpec
    ) -> None:
        held = mixture.held if mixture.held is not None else range(mixture.num_experts)
        experts = (structs.Expert * len(held))()
        each = iter(experts)
        for inner, one in inner_mlps(name, spec).items():
            self._fill_mlp(next(each) if is_expert(f"{inner}.") else out, inner, one)
        # In float32, so that rounding sends no token elsewhere.
        router = self._weights[f"{name}.router.weight"].float()
        gate = self._weights.get(f"{name}.shared_gate.weight")
        if gate is not None:
            router = torch.cat((router, gate.float()))
        router = router.clone()
        self._keep(router)
        made = structs.Mixture(
            ctypes.addressof(experts),
            self._plain_matrix(router, None),
            mixture.num_experts,
            mixture.per_token,
            mixture.normalized,
            gate is not None,
            spec.intermediate_size,
            first_held=held.start,
            num_held=len(held),
        )
        self._library.quire_measure(made)
        self._structs += [experts, made]
        out.mixture = ctypes.addressof(made)

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
        bias = self._weights.get(name.removesuffix(".weight") + ".bias")
        if bias is not None:
            bias = bias[rows]
        coded = self._weights.coded(name)
        if coded is None:
            return self._plain_matrix(self._weights[name][rows], bias)
        matrix = coded.matrix(rows.start or 0)
        if isinstance(matrix, torch.Tensor):
            return self._plain_matrix(matrix, bias)
        assert isinstance(matrix, PackedCodes)  # by `pack`
        return matrix.matrix(bias)

    def _are_alike(self, name: str) -> bool:
        """Whether both matrices of a weight can be multiplied in one pass over the inputs."""
        coded = self._weights.coded(name)
        if coded is None:
            return True
        first, second = coded.matrices() or (None, None)
        if isinstance(first, PackedCodes) and isinstance(second, PackedCodes):
            return first.is_like(second)
        return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)

    def _plain_matrix(self, weight: torch.Tensor, bias: torch.Tensor | None) -> structs.Matrix:
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
        check(status)
        return structs.Matrix(
            weight.data_ptr(),
            None if tail is None else tail.data_ptr(),
            None if bias is None else self._keep(_padded(bias.float())),
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
