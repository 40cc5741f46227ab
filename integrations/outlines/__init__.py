"""Outlines on quire's own engine, in this process.

``models.vllm(name)``, ``models.VLLM(llm)`` and ``from_quire(llm)`` return a model that Outlines
takes wherever it takes one of its own; ``generate`` and ``samplers`` are the API of Outlines 0.x.
Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quire.utils.progress import quiet_tqdm

if TYPE_CHECKING:
    from quire.integrations.outlines import generate, models, samplers
    from quire.integrations.outlines.installation import install, uninstall
    from quire.integrations.outlines.models import AsyncVLLM, from_quire
    from quire.integrations.outlines.processors import OutlinesProcessor, outlines_processor
    from quire.sampling_params import SamplingParams

_HERE = __name__
_MODULES = ("models", "generate", "samplers")
_HOMES = {
    "from_quire": f"{_HERE}.models",
    "AsyncVLLM": f"{_HERE}.models",
    "OutlinesProcessor": f"{_HERE}.processors",
    "outlines_processor": f"{_HERE}.processors",
    "install": f"{_HERE}.installation",
    "uninstall": f"{_HERE}.installation",
    "SamplingParams": "quire.sampling_params",
}

__all__ = [
    "AsyncVLLM",
    "OutlinesProcessor",
    "SamplingParams",
    "from_quire",
    "generate",
    "install",
    "models",
    "outlines_processor",
    "samplers",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    quiet_tqdm()  # before Outlines
    if name in _MODULES:
        return import_module(f"{_HERE}.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # the next access does not come here
        return value
    raise AttributeError(f"module {__name__!r} has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
