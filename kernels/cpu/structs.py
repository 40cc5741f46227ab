"""The structs of native/abi.h, field by field: what the library is handed."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

DTYPES = {"float32": 0, "bfloat16": 1}
CODES = {"int8": 2, "int4": 3, "fp8": 4, "table4": 5}
CACHE_DTYPES = {**DTYPES, "int8": CODES["int8"], "float8_e4m3fn": CODES["fp8"]}
NORM_KINDS = {None: 0, "rms": 1, "layer": 2}
ACTIVATIONS = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "quick_gelu": 3,
    "relu": 4,
    "relu_squared": 5,
    "tanh": 6,
}
GATED_AT_ONCE, GATED_APART = 1, 2
RESIDUALS = {"sequential": 0, "parallel": 1, "post": 2}

BLOCK = 16
"""Output features of a packed weight's block."""


class Norm(ctypes.Structure):
    """A normalisation; all zeros: none."""

    _fields_ = (("kind", c_int32), ("eps", c_float), ("weight", c_void_p), ("bias", c_void_p))


class Codes(ctypes.Structure):
    """What a weight in codes has besides its blocks."""

    _fields_ = (
        ("unit", c_int64),
        ("block_bytes", c_int64),
        ("scales_units", c_int32),
        ("has_zeros", c_int32),
        ("order", c_void_p),
        ("factors", c_void_p),
        ("tables", c_void_p),
        ("has_tables", c_int32),
        ("has_bfloat16_tables", c_int32),
        ("has_subnormals", c_int32),
        ("rounds_to_bfloat16", c_int32),
        ("rounds_to_int8", c_int32),
        ("activation_scale", c_float),
        ("outlier_first", c_void_p),
        ("outlier_columns", c_void_p),
        ("outlier_values", c_void_p),
    )


class Matrix(ctypes.Structure):
    """A packed weight."""

    _fields_ = (
        ("blocks", c_void_p),
        ("tail", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("codes", c_void_p),
    )


class DeltaSlice(ctypes.Structure):
    """Some outputs of a projection that gain by an adapter."""

    _fields_ = (
        ("b", Matrix),
        ("first_output", c_int64),
        ("first_rank", c_int64),
        ("rank", c_int64),
    )


class Delta(ctypes.Structure):
    """What an adapter does to a projection; all zeros: nothing."""

    _fields_ = (
        ("a", Matrix),
        ("scales", c_void_p),
        ("slices", c_void_p),
        ("num_slices", c_int64),
        ("bias", c_void_p),
        ("factor", c_void_p),
    )


PROJECTIONS = ("qkv", "out", "gate", "up", "down")
"""A layer's deltas, in order."""


class Adapter(ctypes.Structure):
    """An adapter; all zeros: none."""

    _fields_ = (
        ("deltas", c_void_p),
        ("width", c_int64),
        ("embed", Matrix),
        ("embed_a", Matrix),
        ("embed_b", Matrix),
        ("embed_scale", c_float),
    )


class Packing(ctypes.Structure):
    """Rows that are to be brought into blocks."""

    _fields_ = (
        ("rows", c_void_p),
        ("blocks", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
    )


class CodesPacking(ctypes.Structure):
    """A weight in codes, and the blocks that it is brought into or comes from."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("blocks", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("row_bytes", c_int64),
        ("num_groups", c_int64),
        ("units_per_group", c_int64),
        ("dtype", c_int32),
        ("layout", c_void_p),
    )


class Expert(ctypes.Structure):
    """One expert of a mixture."""

    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix), ("gated", c_int32))


class Mixture(ctypes.Structure):
    """Experts, of which a router chooses some for each token."""

    _fields_ = (
        ("experts", c_void_p),
        ("router", Matrix),
        ("num_experts", c_int32),
        ("per_token", c_int32),
        ("is_normalized", c_int32),
        ("has_shared_gate", c_int32),
        ("width", c_int64),
        ("most_inputs", c_int64),
        ("row_bytes", c_int64),
        ("first_held", c_int32),
        ("num_held", c_int32),
    )


class Layer(ctypes.Structure):
    """A decoder layer, with its KV cache."""

    _fields_ = (
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("attention_post_norm", Norm),
        ("mlp_post_norm", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("mixture", c_void_p),
        ("residual", c_int32),
        ("activation", c_int32),
        ("gated", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("sliding_window", c_int32),
        ("rotary_dim", c_int32),
        ("interleaved", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("clip_qkv", c_float),
        ("cache_dtype", c_int32),
        ("alibi_slopes", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
    )


class Model(ctypes.Structure):
    """A decoder."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", c_int32),
        ("dtype", c_int32),
        ("hidden_size", c_int64),
        ("embedding_size", c_int64),
        ("embed_is_packed", c_int32),
        ("embedding_scale", c_float),
        ("embed", Matrix),
        ("positions", c_void_p),
        ("project_in", Matrix),
        ("project_out", Matrix),
        ("head", Matrix),
        ("final_norm", Norm),
        ("logits_softcap", c_float),
        ("adapters", c_void_p),
        ("first_token", c_int64),
        ("comm", c_void_p),
    )


class Batch(ctypes.Structure):
    """The tensors of one step."""

    _fields_ = (
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("block_table_stride", c_int64),
        ("block_size", c_int32),
        ("num_seqs", c_int32),
        ("num_tokens", c_int64),
        ("hidden", c_void_p),
        ("adapter_slots", c_void_p),
        ("hidden_in", c_void_p),
    )


class Logits(ctypes.Structure):
    """Rows of logits."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("num_rows", c_int64),
        ("vocab", c_int64),
    )


class Draw(ctypes.Structure):
    """What each row is drawn by."""

    _fields_ = (
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("uniform", c_void_p),
    )


class Penalties(ctypes.Structure):
    """Logits to be lowered, and by what."""

    _fields_ = (
        ("rows", c_void_p),
        ("token_ids", c_void_p),
        ("counts", c_void_p),
        ("presence", c_void_p),
        ("frequency", c_void_p),
        ("repetition", c_void_p),
        ("num_entries", c_int64),
    )


class SharedSizes(ctypes.Structure):
    """What the memory is divided into that the ranks of a model share; of native/comm.h."""

    _fields_ = (
        ("tensor_size", c_int32),
        ("num_stages", c_int32),
        ("capacity", c_int64),
        ("link_capacity", c_int64),
        ("link_pieces", c_int32),
    )


class CommCounters(ctypes.Structure):
    """What a rank's exchanges took so far; of native/comm.h."""

    _fields_ = (
        ("operations", c_int64),
        ("bytes", c_int64),
        ("waited", c_int64),
        ("took", c_int64),
    )
