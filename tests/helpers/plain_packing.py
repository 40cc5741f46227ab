"""AWQ's, GPTQ's and SqueezeLLM's tensors, made one number at a time from the formats' definitions.

What `quire.quantization` reads is compared with these: nothing here is shared with it, and words
are Python's integers, into which each code is shifted at the place that the format gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which half of a byte, from the lowest on, AWQ's gemm layout has each of eight outputs."""


def signed(word: int) -> int:
    """Return the int32 of the same bits."""
    assert 0 <= word < 1 << 32
    return word - (1 << 32) if word >> 31 else word


def stream(codes: Sequence[int], bits: int) -> list[int]:
    """Return codes as words: 32 // bits in each, or 32 codes of 3 bits in three words."""
    per_run = 32 if bits == 3 else 32 // bits
    words_per_run = 3 if bits == 3 else 1
    words = []
    for first in range(0, len(codes), per_run):
        joined = 0
        for place, code in enumerate(codes[first : first + per_run]):
            assert 0 <= code < 1 << bits
            joined |= int(code) << place * bits
        for _ in range(words_per_run):
            words.append(signed(joined & 0xFFFFFFFF))
            joined >>= 32
    return words


def columns(matrix: np.ndarray, bits: int) -> torch.Tensor:
    """Return each column of ``[rows, columns]`` as a stream down: ``[words, columns]``."""
    return torch.tensor([stream(each, bits) for each in matrix.T.tolist()], dtype=torch.int32).t()


def rows(matrix: np.ndarray, bits: int) -> torch.Tensor:
    """Return each row of ``[rows, columns]`` as a stream: ``[rows, words]``."""
    return torch.tensor([stream(each, bits) for each in matrix.tolist()], dtype=torch.int32)


def gptq(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    bits: int,
    *,
    version: str = "gptq",
    g_idx: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """Codes ``[out, in]``, zeros and float16 scales ``[out, groups]`` as GPTQ's tensors."""
    stored = (zeros - 1) % (1 << bits) if version == "gptq" else zeros
    tensors = {
        "qweight": columns(codes.T, bits).contiguous(),
        "qzeros": rows(stored.T, bits),
        "scales": torch.tensor(scales.T.copy()),
    }
    if g_idx is not None:
        tensors["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    return tensors


def _awq_words(matrix: np.ndarray) -> torch.Tensor:
    result = []
    for row in matrix.tolist():
        words = []
        for first in range(0, len(row), 8):
            word = 0
            for output in range(8):
                word |= row[first + output] << 4 * AWQ_PLACES[output]
            words.append(signed(word))
        result.append(words)
    return torch.tensor(result, dtype=torch.int32)


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, torch.Tensor]:
    """Codes ``[out, in]``, zeros and scales ``[out, groups]`` in AWQ's gemm layout."""
    return {
        "qweight": _awq_words(codes.T),
        "qzeros": _awq_words(zeros.T),
        "scales": torch.tensor(scales.T.copy()),
    }


def squeezellm(codes: np.ndarray, table: np.ndarray, bits: int) -> dict[str, torch.Tensor]:
    """Codes ``[out, in]`` and a table ``[out, 2**bits]`` as SqueezeLLM's tensors."""
    return {"qweight": columns(codes.T, bits).contiguous(), "lookup_table": torch.tensor(table)}


def dequantized(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray
) -> torch.Tensor:
    """Return ``(code - zero) * scale`` in float32, the zero and scale being of the input's group.

    Parameters
    ----------
    codes : array[out, in]
    zeros, scales : array[out, groups]
    g_idx : array[in]
    """
    whole = codes.astype(np.int64) - zeros.astype(np.int64)[:, g_idx]
    return torch.tensor(whole.astype(np.float32) * scales.astype(np.float32)[:, g_idx])
