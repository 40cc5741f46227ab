"""Batches in which a prompt may fail alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import LLMResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from quire.integrations.langchain.results import failure_in
from quire.utils.checks import integer


class BatchPart:
    """A part of a batch that runs at once, and which of its inputs are prompts at all."""

    def __init__(
        self, model: BaseLLM, inputs: list[LanguageModelInput], configs: list[RunnableConfig]
    ) -> None:
        self._outcomes: list[PromptValue | Exception] = []
        for given in inputs:
            try:
                self._outcomes.append(model._convert_input(given))
            except Exception as error:
                self._outcomes.append(error)
        good = [not isinstance(outcome, Exception) for outcome in self._outcomes]
        kept = [config for config, is_good in zip(configs, good, strict=True) if is_good]
        self.arguments: dict[str, Any] = {
            "prompts": [value for value in self._outcomes if not isinstance(value, Exception)],
            **{
                key: [config.get(name) for config in kept]
                for key, name in (
                    ("callbacks", "callbacks"),
                    ("tags", "tags"),
                    ("metadata", "metadata"),
                    ("run_name", "run_name"),
                )
            },
        }

    def merged(self, result: LLMResult) -> list[Any]:
        """Return one text or exception per input."""
        texts = iter(result.generations)
        outputs: list[Any] = []
        for outcome in self._outcomes:
            if isinstance(outcome, Exception):
                outputs.append(outcome)
            else:
                generations = next(texts)
                outputs.append(failure_in(generations) or generations[0].text)
        return outputs

    def all_failed(self, error: Exception) -> list[Any]:
        """Return the exception for every input that has none of its own."""
        return [o if isinstance(o, Exception) else error for o in self._outcomes]


def batch_configs(
    config: RunnableConfig | list[RunnableConfig] | None, num_inputs: int
) -> list[RunnableConfig]:
    """Return a configuration per input, with a ``max_concurrency`` of None or at least 1.

    Raises
    ------
    InvalidRequestError
        For any other, but 0, which is None: LangChain would lose prompts over it.
    """
    if not num_inputs:
        return []
    configs = get_config_list(config, num_inputs)
    width = configs[0].get("max_concurrency")
    if width is not None:
        expected = "an integer >= 1, or 0 or None for all prompts at once"
        width = integer("max_concurrency", width, expected, 0) or None
    return [{**each, "max_concurrency": width} for each in configs]


def batch_parts(
    model: BaseLLM,
    inputs: list[LanguageModelInput],
    config: RunnableConfig | list[RunnableConfig] | None,
) -> Iterator[BatchPart]:
    """Cut a batch into parts of ``max_concurrency`` inputs; without one it is one part."""
    if not inputs:
        return
    configs = batch_configs(config, len(inputs))
    width = configs[0]["max_concurrency"] or len(inputs)
    for start in range(0, len(inputs), width):
        yield BatchPart(model, inputs[start : start + width], configs[start : start + width])
