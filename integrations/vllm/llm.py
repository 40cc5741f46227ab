"""vLLM's LLM, over quire's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import quire
from quire.integrations.vllm.engine_args import EngineArgs, as_quire
from quire.integrations.vllm.exceptions import VLLMValidationError, translated
from quire.integrations.vllm.llm_engine import LLMEngine
from quire.integrations.vllm.metrics import Metric, as_metrics
from quire.integrations.vllm.model_access import collective_rpc
from quire.integrations.vllm.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from quire.integrations.vllm.pooling import classify, embed, encode, score
from quire.integrations.vllm.profiling import Profiler
from quire.integrations.vllm.prompts import all_prompts, params_for_quire, token_limit
from quire.integrations.vllm.sampling_params import SamplingParams
from quire.integrations.vllm.tokenizers import get_tokenizer
from quire.outputs import BeamSearchOutput, RequestOutput

__all__ = ["LLM"]


class LLM:
    """A model with its engine, for batches of prompts, as callers of vLLM know it.

    Parameters
    ----------
    model : str or path
    **kwargs
        vLLM's engine arguments. Those about how vLLM itself works change nothing; those that ask
        for what quire does not offer are refused.

    Attributes
    ----------
    quire : quire.LLM
        What does the work.

    Raises
    ------
    TypeError
        For an argument that vLLM does not have.
    quire.ConfigError, quire.ModelNotFoundError, quire.ModelLoadError, quire.OutOfMemoryError
        See :class:`quire.LLM`. The first is a ValueError as well.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any) -> None:
        self.quire = quire.LLM(model, **as_quire(kwargs))
        self._profiler = Profiler(self.quire, kwargs.get("profiler_config"))
        self._tokenizer: Any = None
        self.llm_engine = LLMEngine.of(self.quire)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """Return an LLM of these arguments."""
        return cls(**engine_args.arguments())

    # -- texts -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Any = None,
        prompt_token_ids: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, and return when all of them are complete, in their order.

        Parameters
        ----------
        prompts, sampling_params, use_tqdm, lora_request, priority
            As of :meth:`quire.LLM.generate`.
        prompt_token_ids
            As calls before vLLM 0.10 gave prompts.
        tokenization_kwargs : dict, optional
            ``truncate_prompt_tokens``.
        mm_processor_kwargs
            Models here read text: without effect.

        Raises
        ------
        VLLMValidationError
            A prompt or a parameter is wrong; nothing has run.
        GenerationError
            A request failed while it ran.
        """
        if prompts is None and prompt_token_ids is None:
            raise VLLMValidationError("prompts is missing: give a text, or token ids")
        if isinstance(prompts, (list, tuple)) and not prompts and prompt_token_ids is None:
            return []
        with translated():
            return self.quire.generate(
                all_prompts(prompts, prompt_token_ids),
                self._params(sampling_params, tokenization_kwargs),
                use_tqdm=use_tqdm,
                lora_request=_adapters(lora_request),
                priority=priority,
            )

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, written out by the model's chat template.

        Parameters are those of :meth:`quire.LLM.chat` and :meth:`generate`; of
        ``chat_template_content_format`` every value means what the template asks for.
        """
        with translated():
            return self.quire.chat(
                messages,
                self._params(sampling_params, tokenization_kwargs),
                use_tqdm,
                _adapters(lora_request),
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                priority=priority,
            )

    def beam_search(
        self,
        prompts: Any,
        params: Any,
        lora_request: Any = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the most likely completions of each prompt, see :meth:`quire.LLM.beam_search`.

        The engine's own bounds take the place of ``concurrency_limit``.
        """
        with translated():
            return self.quire.beam_search(
                all_prompts(prompts),
                params,
                use_tqdm=use_tqdm,
                lora_request=_adapters(lora_request),
            )

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: those the checkpoint recommends."""
        found = self.quire.get_default_sampling_params()
        return SamplingParams(**{name: getattr(found, name) for name in found.explicit_fields})

    def _params(self, params: Any, tokenization_kwargs: dict[str, Any] | None) -> Any:
        limit = token_limit(tokenization_kwargs)
        found = params_for_quire(params)
        if limit is None:
            return found
        if isinstance(found, list):
            return [self._shortened(each, limit) for each in found]
        return self._shortened(found, limit)

    def _shortened(self, params: Any, limit: int) -> Any:
        if params is None:
            params = self.quire.get_default_sampling_params()
        if not isinstance(params, quire.SamplingParams):
            return params  # for the engine to refuse
        return replace(params, truncate_prompt_tokens=limit)

    # -- numbers ---------------------------------------------------------------------------------

    def embed(self, prompts: Any, **options: Any) -> list[EmbeddingRequestOutput]:
        """Turn prompts into vectors.

        Parameters
        ----------
        prompts
            As in :meth:`generate`.
        **options
            ``pooling_params``, ``use_tqdm``, ``lora_request``, ``tokenization_kwargs``.
        """
        with translated():
            return embed(self.quire, prompts, **options)

    def classify(self, prompts: Any, **options: Any) -> list[ClassificationRequestOutput]:
        """Return the probabilities of prompts' classes, of a model that has a head for them.

        Parameters are those of :meth:`embed`.
        """
        with translated():
            return classify(self.quire, prompts, **options)

    def encode(
        self, prompts: Any, pooling_params: Any = None, **options: Any
    ) -> list[PoolingRequestOutput[Any]]:
        """Return what the model's head, or its last states, give for prompts.

        Parameters
        ----------
        prompts, pooling_params
            As in :meth:`embed`.
        **options
            Also ``pooling_task``: ``"embed"`` or ``"classify"``; by default what the model has.
        """
        with translated():
            return encode(self.quire, prompts, pooling_params, **options)

    def score(self, data_1: Any, data_2: Any, /, **options: Any) -> list[ScoringRequestOutput]:
        """Return how well each text of the first goes with its like of the second.

        By the model's head, where it was trained for pairs of texts and has one class; else by
        the cosine of their embeddings.

        Parameters
        ----------
        data_1, data_2 : str or list of str
            One text may stand against many.
        **options
            As in :meth:`embed`.
        """
        with translated():
            return score(self.quire, data_1, data_2, **options)

    # -- the model and the engine ----------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """Return the model's tokenizer, as transformers makes it."""
        if self._tokenizer is None:
            model = self.quire.config.model
            self._tokenizer = get_tokenizer(
                model.tokenizer or model.model,
                tokenizer_mode=model.tokenizer_mode,
                trust_remote_code=model.trust_remote_code,
                revision=model.tokenizer_revision or model.revision,
                download_dir=model.download_dir,
            )
        return self._tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Have :meth:`get_tokenizer` return another one; the engine keeps its own."""
        self._tokenizer = tokenizer

    @property
    def model_config(self) -> Any:
        """What is known of the model."""
        return self.llm_engine.model_config

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What the model is for, in vLLM's words."""
        return self.llm_engine.get_supported_tasks()

    def get_world_size(self, include_dp: bool = True) -> int:
        """Return how many processes compute the model."""
        parallel = self.quire.config.parallel
        return parallel.num_ranks * (parallel.data_parallel_size if include_dp else 1)

    def get_metrics(self) -> list[Metric]:
        """Return the engine's counters and gauges."""
        return as_metrics(self.quire.get_metrics())

    def reset_prefix_cache(self, reset_running_requests: bool = False, *_: Any) -> bool:
        """Forget all cached prefixes, and return True."""
        return self.quire.reset_prefix_cache()

    def reset_mm_cache(self) -> None:
        """Do nothing: models here read text."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a function, or a method by its name, where the model is; see `Worker`.

        Returns
        -------
        list
            With the one answer of this process.
        """
        return collective_rpc(self.quire, method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the model, between two steps."""
        return self.collective_rpc(lambda worker: func(worker.get_model()))

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Let the engine's memory go until :meth:`wake_up`, see :meth:`quire.LLM.sleep`."""
        self.quire.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Bring it back; return whether the engine is awake."""
        self.quire.wake_up()
        return True

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Record what the engine's thread computes, by torch.profiler."""
        self._profiler.start(profile_prefix)

    def stop_profile(self) -> None:
        """Write down what was recorded, see :class:`Profiler`."""
        self._profiler.stop()

    def __repr__(self) -> str:
        return repr(self.quire)


def _adapters(lora_request: Any) -> Any:
    """Return None for a list of Nones, as callers write it for no adapter."""
    if isinstance(lora_request, (list, tuple)) and not any(lora_request):
        return None
    return lora_request
