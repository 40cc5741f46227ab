"""QuantizedOperations: products with weights in codes, as every backend offers them."""

from __future__ import annotations

from typing import Protocol

import torch

from quire.kernels.quantized import QuantizedWeight


class QuantizedOperations(Protocol):
    """The part of `quire.kernels.interface.Backend` that knows quantized weights."""

    def quantized_linear(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``x @ dequantized(weight).T + bias``, in the type of `x`.

        Inputs are rounded first where the weight says so, see `QuantizedWeight.activations`; else
        no input may lose more than a part in 2^15 of the largest of its group, nor an entry of a
        table more than a part in 2^15 of the table's largest; and their product as much again.
        In a model of bfloat16, inputs may be rounded to that instead, as those of plain weights
        are; and, where an output has a table and one scale, its entries times that scale.

        Parameters
        ----------
        x : Tensor[num_tokens, in_features]
        weight : QuantizedWeight
        bias : Tensor[out_features], optional

        Returns
        -------
        Tensor[num_tokens, out_features]
        """

    def quantized_embedding(
        self, ids: torch.Tensor, weight: QuantizedWeight, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return rows of a dequantized weight.

        Parameters
        ----------
        ids : Tensor[num_tokens], int64
        weight : QuantizedWeight
        dtype
            Of the result.

        Returns
        -------
        Tensor[num_tokens, in_features]
        """
