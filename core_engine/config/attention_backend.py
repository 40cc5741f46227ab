"""Who computes attention: names of an argument, and of the environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from quire.config.checks import refuse
from quire.errors import ConfigError, NotSupportedError
from quire.utils.checks import shown
from quire.utils.suggest import nearest

logger = logging.getLogger("quire")

ATTENTION_BACKENDS = {
    "TRITON": "TRITON",
    "TRITON_ATTN": "TRITON",
    "TRITON_ATTN_VLLM_V1": "TRITON",
    "SDPA": "SDPA",
    "TORCH_SDPA": "SDPA",
    "FLASH_ATTN": "FLASH_ATTN",
    "FLASH_ATTN_VLLM_V1": "FLASH_ATTN",
    "FLASHINFER": "FLASHINFER",
    "FLASHINFER_VLLM_V1": "FLASHINFER",
}
"""Who computes attention, by all names that are known for it; see `quire.kernels.attention`."""

_OURS = "'TRITON', 'SDPA', 'FLASH_ATTN', 'FLASHINFER'"

_OF_VLLM = frozenset(
    {
        "BLOCK_SPARSE_FLASH_ATTN",
        "CPU_ATTN",
        "CUTLASS_MLA",
        "DUAL_CHUNK_FLASH_ATTN",
        "FLASHINFER_MLA",
        "FLASHMLA",
        "FLASH_ATTN_MLA",
        "FLEX_ATTENTION",
        "IPEX",
        "PALLAS",
        "ROCM_AITER_FA",
        "ROCM_AITER_MLA",
        "ROCM_FLASH",
        "TREE_ATTN",
        "TRITON_MLA",
        "XFORMERS",
    }
)
"""Other names that vLLM has; none of them is used here."""


def attention_backend(name: str, value: Any) -> str:
    """Take the name of who computes attention, in any case; return it as quire has it."""
    kept = ATTENTION_BACKENDS.get(value.strip().upper()) if isinstance(value, str) else None
    if kept is not None:
        return kept
    if isinstance(value, str) and value.strip().upper() in _OF_VLLM:
        raise NotSupportedError(
            f"{name}={shown(value)} is not offered by this version of quire: use one of {_OURS}, "
            "or leave it out"
        )
    raise refuse(name, value, f"one of {_OURS}")


def honour_attention_backend(
    environ: Mapping[str, str] = os.environ, *, of_vllm: bool = False
) -> str | None:
    """Return who is to compute attention by the environment; None: nobody is named.

    QUIRE_ATTENTION_BACKEND takes what the engine argument ``attention_backend`` does, and the names
    that QUIRE_KERNELS takes, which it stands for then. VLLM_ATTENTION_BACKEND goes after it and
    takes the latter; vLLM's own names are for vLLM, are logged there and have no effect.

    Parameters
    ----------
    environ : mapping of str to str
    of_vllm : bool
        Whether to read vLLM's variable.

    Raises
    ------
    ConfigError
        Nobody knows the name, or QUIRE_KERNELS says another.
    """
    name = environ.get("QUIRE_ATTENTION_BACKEND", "").strip()
    if name:
        if name.upper() in ATTENTION_BACKENDS:
            return ATTENTION_BACKENDS[name.upper()]
        _honour("QUIRE_ATTENTION_BACKEND", name, environ)
        return None
    name = environ.get("VLLM_ATTENTION_BACKEND", "").strip()
    if name and of_vllm:
        _honour("VLLM_ATTENTION_BACKEND", name, environ)
    return None


def _honour(variable: str, name: str, environ: Mapping[str, str]) -> None:
    if name.upper() in _OF_VLLM or name.upper() in ATTENTION_BACKENDS:
        logger.warning(
            "%s=%s has no effect; attention_backend= or QUIRE_ATTENTION_BACKEND can be one of %s",
            variable,
            name,
            _OURS,
        )
        return
    from quire.kernels import available_backends

    known = available_backends()
    if name.lower() not in known:
        ours = [*ATTENTION_BACKENDS] if variable.startswith("QUIRE") else []
        others = ATTENTION_BACKENDS if ours else [*ATTENTION_BACKENDS, *_OF_VLLM]
        guess = nearest(name, [*known, *others])
        hint = "" if guess is None else f"; did you mean {guess}?"
        raise ConfigError(f"{variable}={name!r} must be one of {', '.join(ours + known)}{hint}")
    chosen = environ.get("QUIRE_KERNELS")
    if chosen and chosen != name.lower():
        raise ConfigError(f"{variable}={name!r} and QUIRE_KERNELS={chosen!r} contradict each other")
    os.environ["QUIRE_KERNELS"] = name.lower()
