"""DecoderSpec: what a decoder-only language model is made of, as data.

A family (quire.models.families) writes a spec from a configuration; quire.models.decoder runs it.
Nothing here touches a tensor or a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """One normalisation over the last axis.

    Attributes
    ----------
    kind
        ``"rms"`` (root mean square, no mean taken away) or ``"layer"`` (LayerNorm).
    eps
        Added to the mean square, or to the variance.
    weight, bias
        Which parameters it has. A bias needs ``kind="layer"``.
    weight_offset
        Added to the weight; 1.0 where a checkpoint stores the difference from one (Gemma).
    """

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    weight_offset: float = 0.0


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding (Su et al., arXiv:2104.09864) with its frequencies worked out.

    Attributes
    ----------
    inv_freq
        Radians per position of each rotated pair; ``2 * len(inv_freq)`` of a head's dimensions
        are rotated, the first ones.
    magnitude
        Factor on cosine and sine (YaRN and LongRoPE use it to sharpen attention).
    interleaved
        Whether a pair is two neighbours, and not a dimension and the one half a head later.
    """

    inv_freq: tuple[float, ...]
    magnitude: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention of one layer.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim
        Query head ``i`` attends with key/value head ``i // (num_heads // num_kv_heads)``.
    scale
        Factor on ``query . key``.
    qkv_bias, out_bias
        Biases of the projections into and out of the heads.
    rotary
        None: queries and keys are not rotated.
    alibi_slopes
        One per head: ``slope * (key position - query position)`` is added to the scaled score
        (Press et al., arXiv:2108.12409).
    sliding_window
        A token sees itself and the ``sliding_window - 1`` tokens before it; None: all.
    softcap
        ``softcap * tanh(score / softcap)`` replaces the scaled score.
    qk_norm
        Norm over each query head and each key head, before rotation.
    clip_qkv
        Queries, keys and values are clamped to ``[-clip_qkv, clip_qkv]``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    rotary: RotarySpec | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    qk_norm: NormSpec | None = None
    clip_qkv: float | None = None


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts in place of one MLP (Shazeer et al., arXiv:1701.06538).

    A router ``[num_experts, hidden_size]`` gives each token a score for each expert. The few with
    the highest compute the token; their results are added, each times its score.

    Attributes
    ----------
    num_experts
        How many there are.
    per_token
        How many of them a token is computed by.
    normalized
        Whether a token's scores are divided by the sum of those that were chosen.
    scoring
        What makes scores of the router's products: ``"softmax"`` over all experts.
    shared_size
        Width of one more expert that computes every token; None: there is none.
    shared_gate
        Whether what that one makes is multiplied with ``sigmoid(x @ gate.T)``, a number per token.
    held
        The experts that are here, where a model's ranks share them out; None: all.
    """

    num_experts: int
    per_token: int
    normalized: bool
    scoring: Literal["softmax"] = "softmax"
    shared_size: int | None = None
    shared_gate: bool = False
    held: range | None = None


@dataclass(frozen=True)
class MlpSpec:
    """The feed-forward part of one layer.

    Attributes
    ----------
    intermediate_size
        Width between the two projections; of a mixture, between those of each expert.
    activation
        A kind that ``quire.kernels`` knows: silu, gelu, gelu_tanh, quick_gelu, relu, ...
    gated
        ``down(activation(gate(x)) * up(x))``, else ``down(activation(up(x)))``.
    bias
        Whether the projections have biases.
    experts
        None: it is one MLP for all tokens.
    """

    intermediate_size: int
    activation: str
    gated: bool = True
    bias: bool = False
    experts: ExpertsSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention, MLP, and how norms and residuals join them.

    Attributes
    ----------
    residual
        ``"sequential"``: ``x += attention(norm(x)); x += mlp(norm(x))``.
        ``"parallel"``: ``x += attention(norm(x)) + mlp(norm(x))``.
        ``"post"``: ``x = norm(x + attention(x)); x = norm(x + mlp(x))``.
    attention_norm, mlp_norm
        The norms of these formulas. ``mlp_norm=None`` with a parallel residual: the MLP reads what
        the attention reads.
    attention_post_norm, mlp_post_norm
        Norms on what attention and MLP add to the residual (Gemma 2).
    """

    attention: AttentionSpec
    mlp: MlpSpec
    attention_norm: NormSpec
    mlp_norm: NormSpec | None
    residual: Literal["sequential", "parallel", "post"] = "sequential"
    attention_post_norm: NormSpec | None = None
    mlp_post_norm: NormSpec | None = None


@dataclass(frozen=True)
class LearnedPositions:
    """A table of position embeddings, added to the token embeddings.

    Attributes
    ----------
    num_positions
        Positions that a sequence may have.
    offset
        Rows before that of position 0 (two in OPT).
    """

    num_positions: int
    offset: int = 0


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder-only language model.

    Attributes
    ----------
    architecture
        The name in the configuration that led here.
    vocab_size
        Rows of the embedding, and logits per token.
    hidden_size
        Width of the residual stream.
    layers
        From the embedding upwards.
    final_norm
        Norm before the logits.
    max_position
        Tokens that a sequence may have at most by what the model was made for.
    embedding_size
        Width of embedding and output matrix, with projections to and from `hidden_size` where they
        differ (OPT-350m). None: `hidden_size`.
    embedding_scale
        Factor on the token embeddings, rounded to the weights' dtype (Gemma).
    learned_positions
        None: positions enter through the attention alone.
    tie_word_embeddings
        Whether the output matrix is the embedding.
    logits_softcap
        ``softcap * tanh(logits / softcap)`` replaces the logits.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    max_position: int
    embedding_size: int | None = None
    embedding_scale: float | None = None
    learned_positions: LearnedPositions | None = None
    tie_word_embeddings: bool = False
    logits_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)
