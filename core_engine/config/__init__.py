"""What an engine is made with: every argument of it, its check and its default.

The names are those of ``vllm.LLM`` and its engine arguments. Each of them falls in one of three
groups: fields of the configurations in ``engine_config.py``; arguments that are checked and then
have no effect here, because quire has nothing that they could switch (:data:`NO_EFFECT`); and
arguments that this version does not offer (:data:`NOT_OFFERED`), which pass only when they ask for
nothing.
"""

from __future__ import annotations

from quire.config.compatibility import NO_EFFECT, NOT_OFFERED
from quire.config.engine_config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
    argument_names,
    init_signature,
)
from quire.config.lora_config import LoRAConfig
from quire.config.parallel_config import ParallelConfig

__all__ = [
    "NOT_OFFERED",
    "NO_EFFECT",
    "CacheConfig",
    "EngineConfig",
    "LoRAConfig",
    "ModelConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "StructuredOutputsConfig",
    "argument_names",
    "init_signature",
]
