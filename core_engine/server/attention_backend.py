"""QUIRE_ATTENTION_BACKEND and VLLM_ATTENTION_BACKEND: who computes attention."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from quire.errors import ConfigError
from quire.utils.suggest import nearest

logger = logging.getLogger("quire")

_OF_VLLM = frozenset(
    {
        "BLOCK_SPARSE_FLASH_ATTN",
        "CPU_ATTN",
        "CUTLASS_MLA",
        "DUAL_CHUNK_FLASH_ATTN",
        "FLASHINFER",
        "FLASHINFER_MLA",
        "FLASHINFER_VLLM_V1",
        "FLASHMLA",
        "FLASH_ATTN",
        "FLASH_ATTN_MLA",
        "FLASH_ATTN_VLLM_V1",
        "FLEX_ATTENTION",
        "IPEX",
        "PALLAS",
        "ROCM_AITER_FA",
        "ROCM_AITER_MLA",
        "ROCM_FLASH",
        "TORCH_SDPA",
        "TREE_ATTN",
        "TRITON_ATTN",
        "TRITON_ATTN_VLLM_V1",
        "TRITON_MLA",
        "XFORMERS",
    }
)
"""Names that stand for a library of vLLM's; none of them is used here."""


def honour_attention_backend(environ: Mapping[str, str] = os.environ) -> None:
    """Let the environment choose the kernels, of which attention is one.

    QUIRE_ATTENTION_BACKEND goes before VLLM_ATTENTION_BACKEND; both take the names that
    QUIRE_KERNELS takes. One of vLLM's own names is logged and has no effect.

    Raises
    ------
    ConfigError
        Nobody knows the name, or QUIRE_KERNELS says another.
    """
    for variable in ("QUIRE_ATTENTION_BACKEND", "VLLM_ATTENTION_BACKEND"):
        name = environ.get(variable, "").strip()
        if name:
            _honour(variable, name, environ)
            return


def _honour(variable: str, name: str, environ: Mapping[str, str]) -> None:
    if name.upper() in _OF_VLLM:
        logger.warning(
            "%s=%s has no effect: attention is computed by quire's kernels", variable, name
        )
        return
    from quire.kernels import available_backends

    known = available_backends()
    if name.lower() not in known:
        guess = nearest(name, [*known, *_OF_VLLM])
        hint = "" if guess is None else f"; did you mean {guess}?"
        raise ConfigError(f"{variable}={name!r} must be one of {', '.join(known)}{hint}")
    chosen = environ.get("QUIRE_KERNELS")
    if chosen and chosen != name.lower():
        raise ConfigError(f"{variable}={name!r} and QUIRE_KERNELS={chosen!r} contradict each other")
    os.environ["QUIRE_KERNELS"] = name.lower()
