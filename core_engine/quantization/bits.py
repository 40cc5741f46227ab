"""Codes of 2, 3, 4 and 8 bits in the int32 words of checkpoints, and in bytes.

The words of a row are one stream of bits, the lowest first: code ``k`` of ``bits`` bits begins at
bit ``k * bits``, so that codes of 3 bits may lie across two words. A stream ends with whole words,
one of 3 bits with whole groups of three, which have 32 codes.
"""

from __future__ import annotations

import torch

PANEL = 256
"""Outputs of a weight that are unpacked at once: one code to a byte or more, they take memory."""


def num_words(count: int, bits: int) -> int:
    """Return how many words `count` codes take."""
    return -(-count // 32) * 3 if bits == 3 else -(-count * bits // 32)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first codes of each row.

    Parameters
    ----------
    words : Tensor[..., num_words], int32
    bits : {2, 3, 4, 8}
    count
        Codes of a row; the others are padding.

    Returns
    -------
    Tensor[..., count], uint8
    """
    if words.stride(-1) != 1:
        # Not `contiguous`: a row of one word turned counts as that, with any stride.
        words = words.clone(memory_format=torch.contiguous_format)
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[..., :count].clone()
    if bits == 3:
        # 8 codes in 3 bytes; no wider integer is needed than holds these.
        triples = octets.reshape(*words.shape[:-1], -1, 3).to(torch.int32)
        joined = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = torch.stack([joined >> 3 * k & 7 for k in range(8)], dim=-1)
        return codes.to(torch.uint8).flatten(-2)[..., :count]
    mask = (1 << bits) - 1
    codes = torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(-2)[..., :count]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as words, padded with zeros; the inverse of `unpack`.

    Parameters
    ----------
    codes : Tensor[..., count]
        Integers from 0 to ``2**bits - 1``.
    bits : {2, 3, 4, 8}

    Returns
    -------
    Tensor[..., num_words], int32
    """
    words = num_words(codes.shape[-1], bits)
    padded = codes.new_zeros((*codes.shape[:-1], words * 32 // bits), dtype=torch.uint8)
    padded[..., : codes.shape[-1]] = codes
    if bits == 3:
        joined = padded[..., 0::8].to(torch.int32)
        for k in range(1, 8):
            joined |= padded[..., k::8].to(torch.int32) << 3 * k
        parts = [joined >> shift & 255 for shift in (0, 8, 16)]
        octets = torch.stack(parts, dim=-1).to(torch.uint8).flatten(-2)
    else:
        per_octet = 8 // bits
        octets = padded[..., 0::per_octet].contiguous()
        for k in range(1, per_octet):
            octets |= padded[..., k::per_octet] << bits * k
    return octets.view(torch.int32)


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Return codes of 4 bits two to a byte, the even column in the low half.

    Parameters
    ----------
    codes : Tensor[rows, count], uint8
        At most 15.

    Returns
    -------
    Tensor[rows, (count + 1) // 2], uint8
    """
    result = codes[:, 0::2].clone(memory_format=torch.contiguous_format)
    odd = codes[:, 1::2]
    result[:, : odd.shape[1]] |= odd << 4
    return result


def from_halves(codes: torch.Tensor, count: int) -> torch.Tensor:
    """Return the codes of `halves`, one to a byte."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, :count]
