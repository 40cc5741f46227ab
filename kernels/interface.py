"""Backend: what every kernel backend offers, and what each operation means.

Rules for all operations:

- All tensors are on one device, unless said otherwise. Every tensor may have any strides along
  its first axis; along the others it is contiguous, with these exceptions, which may be views
  into a wider tensor: ``x`` of the norms, ``query`` and ``key`` of `rotary_embedding`, ``query``
  of `paged_attention`, ``key`` and ``value`` of `write_kv`.
- A result is a new tensor or a view of one; inputs are never changed. The exceptions are
  `write_kv`, which writes into the caches, `lora_expand`, which changes a projection's result, and
  `apply_penalties` and `apply_bitmask`, which change their logits.
- Floating-point tensors are float32, bfloat16 or float16, and a result has the type of its first
  argument. Sums over a whole axis (norms, softmax, matrix products) are accumulated in float32
  or wider.
- What comes out for a token depends on the tokens beside it by float rounding at most, and not
  on whether they hold numbers: a NaN or an infinity stays within its sequence.
- No operation waits for the device, except where a shape must be known on the CPU.
- Operations may run on several threads at once, as long as they write to different tensors.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch

from quire.kernels.experts_interface import ExpertOperations
from quire.kernels.lora_interface import LoraOperations
from quire.kernels.quantized_interface import QuantizedOperations

AttentionPlan: TypeAlias = Any
"""What `Backend.plan_attention` returns: known to that backend alone."""


class Backend(ExpertOperations, LoraOperations, QuantizedOperations, Protocol):
    """The operations of a forward pass, on the devices that the backend supports."""

    @property
    def name(self) -> str:
        """The name it is asked for by, as in ``get_backend(device, name)``."""

    @property
    def priority(self) -> int:
        """The backend of the highest priority is chosen; the reference backend has 0."""

    def supports(self, device: torch.device) -> bool:
        """Whether the backend works here on tensors of `device`."""

    # Normalisation

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        """Divide by the root of the mean square (Zhang and Sennrich, arXiv:1910.07467).

        ``x / sqrt(mean(x ** 2) + eps) * (weight + weight_offset)`` over the last axis, rounded
        to the type of `x` once, at the end.

        Parameters
        ----------
        x : Tensor[..., size]
            Of any number of axes: ``[num_tokens, hidden_size]`` or, for norms of single heads,
            ``[num_tokens, num_heads, head_dim]``.
        weight : Tensor[size] or None
            None leaves the multiplication out.
        eps : float
        weight_offset : float
            1.0 for checkpoints that store ``weight - 1``.

        Returns
        -------
        Tensor[..., size]
        """

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to the residual stream, and normalise the sum as `rms_norm` does.

        Parameters
        ----------
        x, residual : Tensor[num_tokens, size]
        weight, eps, weight_offset
            As for `rms_norm`.

        Returns
        -------
        normed : Tensor[num_tokens, size]
            Of the sum as it is returned, rounded to its type.
        total : Tensor[num_tokens, size]
            ``x + residual``.
        """

    def layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Bring to mean 0 and variance 1 over the last axis (Ba et al., arXiv:1607.06450).

        ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, with the variance divided by the
        number of elements.

        Parameters
        ----------
        x : Tensor[..., size]
        weight, bias : Tensor[size] or None
        eps : float

        Returns
        -------
        Tensor[..., size]
        """

    # Positions

    def rotary_embedding(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate pairs of elements by an angle per token (Su et al., arXiv:2104.09864).

        A pair ``(a, b)`` becomes ``(a * cos - b * sin, b * cos + a * sin)``. With
        ``half = rotary_dim / 2``, pair ``i`` is made of elements ``i`` and ``i + half``, or of
        ``2 * i`` and ``2 * i + 1`` where `interleaved`. Elements from ``rotary_dim`` on stay.

        Parameters
        ----------
        query : Tensor[num_tokens, num_heads, head_dim]
        key : Tensor[num_tokens, num_kv_heads, head_dim]
        cos, sin : Tensor[num_tokens, rotary_dim / 2]
            Of the type of `query`, or float32; ``rotary_dim <= head_dim``.
        interleaved : bool

        Returns
        -------
        query : Tensor[num_tokens, num_heads, head_dim]
        key : Tensor[num_tokens, num_kv_heads, head_dim]
        """

    # Multi-layer perceptron

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """Apply a function to every element.

        Parameters
        ----------
        x : Tensor[num_tokens, size]
        kind : str
            ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` (its approximation by tanh),
            ``"quick_gelu"`` (``x * sigmoid(1.702 * x)``), ``"relu"``, ``"relu_squared"`` or
            ``"tanh"``.

        Returns
        -------
        Tensor[num_tokens, size]

        Raises
        ------
        ValueError
            `kind` is none of these.
        """

    def act_and_mul(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """Apply `activation` to the first half of the last axis, times the second half.

        Parameters
        ----------
        x : Tensor[num_tokens, 2 * size]
        kind : str
            As for `activation`.

        Returns
        -------
        Tensor[num_tokens, size]

        Raises
        ------
        ValueError
            `kind` is not known.
        """

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute ``x @ weight.T + bias``.

        Parameters
        ----------
        x : Tensor[num_tokens, in_features]
        weight : Tensor[out_features, in_features]
            Of the type of `x`.
        bias : Tensor[out_features] or None

        Returns
        -------
        Tensor[num_tokens, out_features]
        """

    def embedding(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Look up rows of a table.

        Parameters
        ----------
        ids : Tensor[num_tokens], int32 or int64
            Each from 0 to ``num_rows - 1``; the caller has checked it.
        weight : Tensor[num_rows, size]

        Returns
        -------
        Tensor[num_tokens, size]
        """

    # Attention over the paged KV cache

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate the KV cache of one layer, all zeros.

        On a CPU, memory is taken from the system page by page at the first write. Slot
        ``block * block_size + offset`` holds one token. Block 0, the null block, belongs to no
        sequence: nothing is ever written to it, and it stays zero.

        Parameters
        ----------
        num_blocks : int
            The null block included.
        block_size : int
            Tokens per block.
        num_kv_heads, head_dim : int
        dtype : torch.dtype
            A float type; or int8 or float8_e4m3fn for rows in codes, which are ``head_dim + 4``
            elements long: see `quire.kernels.kv_rows`.
        device : torch.device

        Returns
        -------
        key_cache, value_cache : Tensor[num_blocks, block_size, num_kv_heads, row_width]

        Raises
        ------
        MemoryError
            There is not enough of it; on other devices, the error of their allocator.
        """

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values into the cache.

        Parameters
        ----------
        key, value : Tensor[num_tokens, num_kv_heads, head_dim]
            Brought to the caches' type. In codes, each row has a scale of its own: the largest
            size in it over 127 (int8) or 448 (float8_e4m3fn), and codes are rounded to the
            nearest. A row that holds a NaN or an infinity stands for NaN as a whole.
        key_cache, value_cache : Tensor[num_blocks, block_size, num_kv_heads, row_width]
        slot_mapping : Tensor[num_tokens], int64
            Slots, all different, none in the null block.
        """

    def plan_attention(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> AttentionPlan:
        """Work out, once per step, what `paged_attention` needs in every layer.

        Parameters
        ----------
        query_start_loc : Tensor[num_seqs + 1], int32, on the CPU
            Sequence ``i`` owns the tokens ``query_start_loc[i]`` to
            ``query_start_loc[i + 1] - 1``; at least one each.
        seq_lens : Tensor[num_seqs], int32, on the CPU
            Tokens of each sequence in the KV cache once the step's own are written. A
            sequence's tokens in the step are the last of these.
        block_tables : Tensor[num_seqs, max_blocks], int32
            The blocks of each sequence in order. Entries past its end mean nothing; nor do
            those of blocks that no token of the step sees through a layer's sliding window.
            Not changed by the caller until the step's last layer has run.
        block_size : int
            As in the caches.

        Returns
        -------
        AttentionPlan
            For `paged_attention` of the same backend, for any layer of this step.
        """

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from each token to those before it in its sequence, and to itself.

        The score of a query at position ``i`` and a key at position ``j <= i`` is ``q . k *
        scale``; then, with a soft-cap, ``softcap * tanh(score / softcap)``; then, with ALiBi
        (Press et al., arXiv:2108.12409), ``score + slope * (j - i)``. The result is the mean of
        the values, weighted by the softmax of the scores.

        Parameters
        ----------
        query : Tensor[num_tokens, num_heads, head_dim]
            Query head ``h`` reads KV head ``h // (num_heads / num_kv_heads)`` (grouped-query
            attention, Ainslie et al., arXiv:2305.13245).
        key_cache, value_cache : Tensor[num_blocks, block_size, num_kv_heads, row_width]
            The step's own keys and values are in it already. Codes stand for ``code * scale``,
            rounded to float32, and rounded again to the type that is computed in.
        plan : AttentionPlan
            From `plan_attention` of this step.
        scale : float
        sliding_window : int or None
            A token sees so many keys at most, the last of them its own.
        softcap : float or None
        alibi_slopes : Tensor[num_heads], float32, or None

        Returns
        -------
        Tensor[num_tokens, num_heads, head_dim]
        """

    # From logits to tokens. Each row is worked on by itself: what comes out for a row is the
    # same, bit for bit, whatever rows stand beside it. Of equal logits, that of the lower token
    # id counts as the higher.

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find each row's most likely token.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]

        Returns
        -------
        token_ids : Tensor[num_rows], int64
        highest : Tensor[num_rows], float32
            Their logits; NaN where any of the row's is.
        """

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn logits into log-probabilities.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]

        Returns
        -------
        Tensor[num_rows, vocab_size], float32
        """

    def apply_penalties(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        counts: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
        repetition: torch.Tensor,
    ) -> None:
        """Lower, in place, the logits of tokens that have occurred.

        First the repetition penalty (Keskar et al., arXiv:1909.05858): a positive logit is
        divided by it, a negative one multiplied. Then ``frequency * count`` and, where the
        count is above 0, ``presence`` are taken off.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
            Changed.
        rows, token_ids : Tensor[num_entries], int64
            Which logits, each named once: the tokens of a row's prompt and output.
        counts : Tensor[num_entries], float32
            How often the token occurs in the row's output; 0 for one of the prompt alone.
        presence, frequency, repetition : Tensor[num_entries], float32
            The penalties of the entry's row.
        """

    def apply_bitmask(
        self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor
    ) -> None:
        """Rule out, in place, the tokens that a grammar does not allow.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
            Changed: -inf where a token is not allowed.
        rows : Tensor[num_masks], int64
            Which rows are masked, each named once; the others stay.
        bitmask : Tensor[num_masks, num_words], int32
            Bit ``i % 32`` of word ``i // 32`` is 1 where token ``i`` is allowed. Tokens past the
            last word are not.
        """

    def top_logits(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find each row's `k` highest logits, in descending order.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
        k : int
            From 1 to ``vocab_size``.

        Returns
        -------
        logits : Tensor[num_rows, k], float32
        token_ids : Tensor[num_rows, k], int64
        """

    def gather_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find the log-probabilities of given tokens, and of the `k` most likely ones.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]
        token_ids : Tensor[num_rows], int64
        k : int
            From 0 to ``vocab_size``.

        Returns
        -------
        token_ids : Tensor[num_rows, k + 1], int64
            The given token, then the most likely ones in descending order.
        logprobs : Tensor[num_rows, k + 1], float32
        ranks : Tensor[num_rows], int64
            Of the given token: 1 plus the number of tokens with a higher logit.
        """

    def sample_tokens(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Draw one token per row, by the inverse of the cumulative distribution.

        Logits are divided by the temperature. Of the distribution that results, `top_k` keeps
        so many of the most likely tokens; `min_p` then drops those less likely than so much
        times the likeliest; `top_p` (Holtzman et al., arXiv:1904.09751) then keeps the fewest
        of the most likely whose probability, among what is left, reaches it. The likeliest
        token is always kept. The draw is from what is kept, in the order of token ids where
        nothing can be dropped, in descending order of likelihood otherwise. A row whose highest
        logit is not finite gets some token of the vocabulary.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
        temperature : Tensor[num_rows], float64
            Close to 0, the likeliest token is all that is left.
        top_k : Tensor[num_rows], int64
            0 or less is all.
        top_p : Tensor[num_rows], float64
            1 is all.
        min_p : Tensor[num_rows], float64
            0 is all.
        uniform : Tensor[num_rows], float64
            In [0, 1): where in the cumulative distribution the token is taken from.

        Returns
        -------
        Tensor[num_rows], int64
        """
