"""WeightFormat and Quantizer: where a projection's codes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from quire.kernels.quantized import QuantizedWeight


@dataclass(frozen=True)
class Kinds:
    """The tensors that a quantized module has in a checkpoint, by what follows its name and a dot.

    Attributes
    ----------
    required
        Such as ``qweight``.
    optional
        Such as ``g_idx``. A bias is not among them: it is never quantized.
    """

    required: frozenset[str]
    optional: frozenset[str] = frozenset()


class WeightFormat(Protocol):
    """A way in which checkpoints keep quantized weights; made from their configuration."""

    @property
    def name(self) -> str:
        """As in ``quantization=`` and ``quant_method``."""

    def kinds(self, module: str) -> Kinds | None:
        """Say which tensors a module has.

        Parameters
        ----------
        module
            The checkpoint's own name, such as ``model.layers.0.self_attn.q_proj``.

        Returns
        -------
        Kinds or None
            None: the module is not quantized.
        """

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """Bring a module's tensors into codes of this project's.

        Parameters
        ----------
        module
            For messages of nothing but the module: who calls names it.
        tensors
            By kind; all required ones are there. They may be mapped files: the result shares no
            memory with them, and nothing keeps them.
        shape
            ``(out_features, in_features)`` by the model's configuration.

        Raises
        ------
        ModelLoadError
            A tensor has another shape or type, or values that make no weight; the message names
            the kind, what it has, and what it needs.
        """


class Quantizer(Protocol):
    """Makes codes of plain weights while a model is loaded."""

    @property
    def name(self) -> str:
        """As in ``quantization=``."""

    def quantize(self, name: str, weight: torch.Tensor) -> QuantizedWeight | None:
        """Return a weight in codes.

        Parameters
        ----------
        name
            The decoder's: ``layers.0.mlp.down``, with its part if it is one of a fused
            projection: ``layers.0.attention.qkv.q``; ``lm_head``, also where it is the embedding.
        weight : Tensor[out_features, in_features]
            Of a floating-point type; not changed or kept.

        Returns
        -------
        QuantizedWeight or None
            None: it stays as it is.
        """
