"""The module tree ``vllm`` as data: which names there are, and what of quire each one is."""

from __future__ import annotations

from typing import Final

_OWN = "quire.integrations.vllm"

_LLM = {"LLM": f"{_OWN}.llm:LLM"}
_ENGINE_ARGS = {
    "EngineArgs": f"{_OWN}.engine_args:EngineArgs",
    "AsyncEngineArgs": f"{_OWN}.engine_args:AsyncEngineArgs",
}
_ENGINE = {"LLMEngine": f"{_OWN}.llm_engine:LLMEngine"}
_ASYNC = f"{_OWN}.async_engine:AsyncLLM"
_SAMPLING = {"SamplingParams": f"{_OWN}.sampling_params:SamplingParams"}
_POOLING = {"PoolingParams": f"{_OWN}.pooling_params:PoolingParams"}
_PROMPTS = {
    "PromptType": "quire.prompts:Prompt",
    "TextPrompt": "quire.prompts:TextPrompt",
    "TokensPrompt": "quire.prompts:TokensPrompt",
}
_OUTPUTS = {
    "ClassificationOutput": f"{_OWN}.outputs:ClassificationOutput",
    "ClassificationRequestOutput": f"{_OWN}.outputs:ClassificationRequestOutput",
    "CompletionOutput": "quire.outputs:CompletionOutput",
    "EmbeddingOutput": f"{_OWN}.outputs:EmbeddingOutput",
    "EmbeddingRequestOutput": f"{_OWN}.outputs:EmbeddingRequestOutput",
    "PoolingOutput": f"{_OWN}.outputs:PoolingOutput",
    "PoolingRequestOutput": f"{_OWN}.outputs:PoolingRequestOutput",
    "RequestOutput": "quire.outputs:RequestOutput",
    "ScoringOutput": f"{_OWN}.outputs:ScoringOutput",
    "ScoringRequestOutput": f"{_OWN}.outputs:ScoringRequestOutput",
}
_VERSION = {
    "__version__": f"{_OWN}.release:VERSION",
    "__version_tuple__": f"{_OWN}.release:VERSION_TUPLE",
}
_LOGPROBS = {
    "Logprob": "quire.outputs:Logprob",
    "PromptLogprobs": f"{_OWN}.outputs:PromptLogprobs",
    "SampleLogprobs": f"{_OWN}.outputs:SampleLogprobs",
}
_LORA = {"LoRARequest": f"{_OWN}.lora_request:LoRARequest"}
_TOKENIZER = {"get_tokenizer": f"{_OWN}.tokenizers:get_tokenizer"}
_CHAT = f"{_OWN}.tokenizers:resolve_chat_template"
_ENDINGS = {
    name: f"{_OWN}.parallel_state:{name}"
    for name in (
        "cleanup_dist_env_and_memory",
        "destroy_distributed_environment",
        "destroy_model_parallel",
    )
}
_ERRORS = {
    name: f"{_OWN}.exceptions:{name}"
    for name in (
        "GenerationError",
        "LoRAAdapterNotFoundError",
        "VLLMClientError",
        "VLLMError",
        "VLLMNotFoundError",
        "VLLMServerError",
        "VLLMUnprocessableEntityError",
        "VLLMValidationError",
    )
}
_UTILS = {
    "FlexibleArgumentParser": f"{_OWN}.engine_args:FlexibleArgumentParser",
    "random_uuid": f"{_OWN}.engine_args:random_uuid",
}
_SERVER = {"main": f"{_OWN}.server:main", "run_server": f"{_OWN}.server:run_server"}

SURFACE: Final[dict[str, dict[str, str]]] = {
    "vllm": {
        **_VERSION,
        **_LLM,
        **_ENGINE_ARGS,
        **_ENGINE,
        "AsyncLLMEngine": _ASYNC,
        **_SAMPLING,
        **_POOLING,
        **_PROMPTS,
        **_OUTPUTS,
    },
    "vllm.distributed": _ENDINGS,
    "vllm.distributed.parallel_state": _ENDINGS,
    "vllm.engine": {},
    "vllm.engine.arg_utils": _ENGINE_ARGS,
    "vllm.engine.async_llm_engine": {"AsyncLLMEngine": _ASYNC},
    "vllm.engine.llm_engine": _ENGINE,
    "vllm.entrypoints": {},
    "vllm.entrypoints.chat_utils": {"resolve_hf_chat_template": _CHAT},
    "vllm.entrypoints.cli": {},
    "vllm.entrypoints.cli.main": {"main": f"{_OWN}.command:main"},
    "vllm.entrypoints.llm": _LLM,
    "vllm.entrypoints.openai": {},
    "vllm.entrypoints.openai.api_server": _SERVER,
    "vllm.entrypoints.openai.run_batch": {"main": f"{_OWN}.server:run_batch"},
    "vllm.exceptions": _ERRORS,
    "vllm.inputs": _PROMPTS,
    "vllm.logger": {"init_logger": f"{_OWN}.logger:init_logger"},
    "vllm.logprobs": _LOGPROBS,
    "vllm.lora": {},
    "vllm.lora.request": _LORA,
    "vllm.outputs": _OUTPUTS,
    "vllm.platforms": {"current_platform": f"{_OWN}.platform:current_platform"},
    "vllm.pooling_params": _POOLING,
    "vllm.renderers": {},
    "vllm.renderers.hf": {"resolve_chat_template": _CHAT},
    "vllm.sampling_params": {
        **_SAMPLING,
        "BeamSearchParams": "quire.sampling_params:BeamSearchParams",
        "GuidedDecodingParams": f"{_OWN}.sampling_params:GuidedDecodingParams",
        "RequestOutputKind": "quire.sampling_params:RequestOutputKind",
        "StructuredOutputsParams": f"{_OWN}.sampling_params:StructuredOutputsParams",
    },
    "vllm.sequence": _LOGPROBS,
    "vllm.tokenizers": _TOKENIZER,
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.tokenizer": _TOKENIZER,
    "vllm.utils": _UTILS,
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": _UTILS["FlexibleArgumentParser"]},
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.async_llm": {"AsyncLLM": _ASYNC},
    "vllm.v1.engine.llm_engine": _ENGINE,
    "vllm.v1.metrics": {},
    "vllm.v1.metrics.reader": {
        name: f"{_OWN}.metrics:{name}" for name in ("Counter", "Gauge", "Metric")
    },
    "vllm.version": _VERSION,
}
"""By module: its names, each as ``"module:attribute"`` of what stands behind it."""

RUNNABLE: Final = {
    "vllm.__main__": "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.main": "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server": "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.openai.run_batch": "vllm.entrypoints.openai.run_batch",
}
"""What ``python -m`` can run, and the module whose ``main`` that is."""


def children(name: str) -> list[str]:
    """Return the modules right below one, by their own names."""
    prefix = f"{name}."
    below = [each[len(prefix) :] for each in SURFACE if each.startswith(prefix)]
    return sorted(each for each in below if "." not in each)


def words(name: str) -> str:
    """Say what a module offers."""
    names = sorted({*SURFACE[name], *children(name)} - {"__version__", "__version_tuple__"})
    return ", ".join(names) or "nothing"
