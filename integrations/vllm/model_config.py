"""ModelConfig: what callers of vLLM read of a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.llm import LLM


@dataclass(frozen=True)
class ModelConfig:
    """A model, as an engine has it.

    Attributes
    ----------
    model : str
        As it was named.
    tokenizer : str
    max_model_len : int or None
        Most tokens of one request; None where no engine was made of it that would say so.
    dtype : str
    seed : int
    trust_remote_code : bool
    quantization : str or None
    """

    model: str
    tokenizer: str
    max_model_len: int | None
    dtype: str
    seed: int
    trust_remote_code: bool
    quantization: str | None
    path: Path

    @classmethod
    def of(cls, llm: LLM) -> ModelConfig:
        """Describe an engine's model."""
        return cls._make(llm.config.to_kwargs(), llm.llm_engine.limits.max_model_len)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelConfig:
        """Describe the model that arguments name."""
        from quire.config import EngineConfig
        from quire.integrations.vllm.engine_args import as_quire

        arguments = dict(given)
        model = arguments.pop("model")
        config = EngineConfig.create(model, **as_quire(arguments))
        return cls._make(config.to_kwargs(), config.model.max_model_len)

    @classmethod
    def _make(cls, said: Mapping[str, Any], max_model_len: int | None) -> ModelConfig:
        from quire.models.hub import resolve

        path = resolve(
            said["model"],
            revision=said["revision"],
            download_dir=said["download_dir"],
            token=said["hf_token"],
        )
        return cls(
            model=said["model"],
            tokenizer=str(said["tokenizer"] or said["model"]),
            max_model_len=max_model_len,
            dtype=str(said["dtype"]),
            seed=said["seed"],
            trust_remote_code=said["trust_remote_code"],
            quantization=said["quantization"],
            path=path,
        )

    @cached_property
    def hf_config(self) -> Any:
        """The model's configuration as transformers reads it."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    @property
    def hf_text_config(self) -> Any:
        """The same."""
        return self.hf_config

    @property
    def is_multimodal_model(self) -> bool:
        """Return False: models here read text."""
        return False

    def get_vocab_size(self) -> int:
        """Return how many tokens the model knows."""
        return int(self.hf_config.vocab_size)

    def get_hidden_size(self) -> int:
        """Return how wide its hidden states are."""
        return int(self.hf_config.hidden_size)
