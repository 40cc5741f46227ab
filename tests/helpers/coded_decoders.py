"""Decoders with weights in codes, and the plain ones that they are compared with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paged import PagedRunner

from quire.kernels import available_backends, get_backend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.quantization.registry import choose, config_of

BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]
CPU = torch.device("cpu")

SENSITIVE = ("qwen2-tied", "opt")
"""Tiny models whose random weights multiply what inputs are off several times as much as others'.

In float32, too: there, their logits are off by 4e-6 and 9e-6 of the largest, and those of others
that are compared by 2e-6 at most.
"""


def most_off(name: str, backend: str) -> float:
    """Return how far a tiny model's logits may be from those of the dequantized weights.

    As a share of the largest. The reference computes in float32. Native products with integer codes
    round inputs to 16 bits, by a step for each unit of columns: that is 2^-16 of the unit's largest
    input, and all that they are off (`test_natives_are_off_by_the_rounding_of_inputs`). Of a tiny
    model's logits it makes a few ten thousandths, of the sensitive ones' up to four thousandths.
    """
    if backend == "reference":
        return 1e-4
    return 5e-3 if name in SENSITIVE else 1e-3


def load_decoder(
    folder: Path,
    backend: str = "reference",
    quantization: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> Decoder:
    """Load a model as an engine would that has ``quantization`` and ``quantization_config``."""
    config = read_config(folder)
    weight_format, quantizer = choose(quantization, options, config_of(folder, config))
    return load_model(
        folder,
        config,
        device=CPU,
        dtype=dtype,
        kernels=get_backend(CPU, backend),
        weight_format=weight_format,
        quantizer=quantizer,
        **others,
    )


def plain_twin(decoder: Decoder, folder: Path, **others: Any) -> Decoder:
    """The plain model of a folder, float32, with what a decoder's codes stand for."""
    twin = load_decoder(folder, **others)
    for name in decoder.projections():
        if name == "lm_head" and "lm_head.weight" not in twin.weights:
            name = "embed"
        if decoder.is_coded(name):
            twin.weights[f"{name}.weight"].copy_(decoder.read_weight(name))
    return twin


def prefill(
    decoder: Decoder,
    lengths: Sequence[int] = (33, 7, 1),
    slots: Sequence[int] | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Logits at every position of random prompts, the same ones for the same lengths."""
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in lengths]
    runner = PagedRunner(
        decoder, get_backend(CPU), num_seqs=len(prompts), max_len=max(lengths), adapters=slots
    )
    return runner.prefill(prompts, seed=seed)


def assert_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], most: float) -> None:
    """`most` is a share of the largest logit."""
    for one, other in zip(ours, theirs, strict=True):
        worst, size = float((one - other).abs().max()), float(other.abs().max())
        assert worst <= most * (1 + size)
