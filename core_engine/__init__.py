"""quire: a self-contained paged-attention LLM engine.

The public names below are loaded when they are first used, so that ``import quire`` costs
milliseconds and brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LLM": "quire.llm",
    "AsyncLLM": "quire.async_llm",
    "EngineConfig": "quire.config",
    "BeamSearchParams": "quire.sampling_params",
    "RequestOutputKind": "quire.sampling_params",
    "SamplingParams": "quire.sampling_params",
    "AddedRow": "quire.logits_processor",
    "BatchChange": "quire.logits_processor",
    "LogitsProcessor": "quire.logits_processor",
    "StructuredOutputsParams": "quire.structured_outputs",
    "BeamSearchOutput": "quire.outputs",
    "BeamSearchSequence": "quire.outputs",
    "CompletionOutput": "quire.outputs",
    "Logprob": "quire.outputs",
    "RequestMetrics": "quire.outputs",
    "RequestOutput": "quire.outputs",
    "ConfigError": "quire.errors",
    "DeviceLostError": "quire.errors",
    "EmbeddingOutput": "quire.outputs",
    "EmbeddingRequestOutput": "quire.outputs",
    "EngineBusyError": "quire.errors",
    "EngineClosedError": "quire.errors",
    "InvalidRequestError": "quire.errors",
    "ModelLoadError": "quire.errors",
    "ModelNotFoundError": "quire.errors",
    "NotSupportedError": "quire.errors",
    "OutOfMemoryError": "quire.errors",
    "PoolingParams": "quire.pooling_params",
    "LoRARequest": "quire.lora_request",
    "AdapterError": "quire.errors",
    "QuireError": "quire.errors",
    "RankError": "quire.errors",
    "ReplicaError": "quire.errors",
    "RequestFailedError": "quire.errors",
    "StructureIncompleteError": "quire.errors",
    "TokenizerError": "quire.errors",
    "UnsupportedModelError": "quire.errors",
}

__all__ = [
    "LLM",
    "AdapterError",
    "AddedRow",
    "AsyncLLM",
    "BatchChange",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ConfigError",
    "DeviceLostError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineBusyError",
    "EngineClosedError",
    "EngineConfig",
    "InvalidRequestError",
    "LoRARequest",
    "LogitsProcessor",
    "Logprob",
    "ModelLoadError",
    "ModelNotFoundError",
    "NotSupportedError",
    "OutOfMemoryError",
    "PoolingParams",
    "QuireError",
    "RankError",
    "ReplicaError",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructureIncompleteError",
    "StructuredOutputsParams",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
]

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM
    from quire.config import EngineConfig
    from quire.errors import (
        AdapterError,
        ConfigError,
        DeviceLostError,
        EngineBusyError,
        EngineClosedError,
        InvalidRequestError,
        ModelLoadError,
        ModelNotFoundError,
        NotSupportedError,
        OutOfMemoryError,
        QuireError,
        RankError,
        ReplicaError,
        RequestFailedError,
        StructureIncompleteError,
        TokenizerError,
        UnsupportedModelError,
    )
    from quire.llm import LLM
    from quire.logits_processor import AddedRow, BatchChange, LogitsProcessor
    from quire.lora_request import LoRARequest
    from quire.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from quire.pooling_params import PoolingParams
    from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from quire.structured_outputs import StructuredOutputsParams


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
