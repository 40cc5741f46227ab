"""Speakers: what a subcommand asks for text, an engine in this process or a server."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

    from quire.llm import LLM
    from quire.prompts import TokensPrompt
    from quire.sampling_params import SamplingParams


class Piece(NamedTuple):
    """A part of an answer.

    Attributes
    ----------
    text : str
    is_reasoning : bool
        It was said on the way to the answer, and is no part of it.
    """

    text: str
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt.

    Attributes
    ----------
    prompt : str
    index : int
        Among the prompt's completions.
    text : str
    token_ids : list of int or None
        None where a server does not tell.
    finish_reason : str or None
    """

    prompt: str
    index: int
    text: str
    token_ids: list[int] | None
    finish_reason: str | None


class Speaker(Protocol):
    """A model with the sampling parameters that were asked for."""

    @property
    def num_completions(self) -> int:
        """Completions of each prompt."""

    def answer(self, messages: list[dict[str, str]]) -> Generator[Piece, None, None]:
        """Yield the pieces of the next message as they come; closing it ends the request."""

    def stream(self, prompt: str) -> Generator[str, None, None]:
        """Yield the pieces of the only completion of a prompt."""

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Return all completions, in the order of the prompts."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, *error: object) -> None:
        """Let the model go."""


class LocalSpeaker:
    """An engine in this process.

    Parameters
    ----------
    llm : LLM
        Closed with this object.
    params : SamplingParams
    adapter : str, optional
        The name of the adapter that it answers with.
    """

    def __init__(self, llm: LLM, params: SamplingParams, adapter: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._adapter = adapter

    @property
    def num_completions(self) -> int:
        """Completions of each prompt: those that are shown."""
        return self._params.n

    def answer(self, messages: list[dict[str, str]]) -> Generator[Piece, None, None]:
        """Yield the pieces of the next message as they come.

        Raises
        ------
        InvalidRequestError
            The conversation does not fit, or the template refuses it.
        """
        token_ids = self._llm.llm_engine.processor.render_chat(
            messages, chat_template=self._llm.config.model.chat_template
        )
        prompt: TokensPrompt = {"prompt_token_ids": token_ids}
        with self._llm.stream(prompt, self._params, lora_request=self._adapter) as stream:
            for output in stream:
                yield Piece(output.outputs[0].text)

    def stream(self, prompt: str) -> Generator[str, None, None]:
        """Yield the pieces of the only completion of a prompt."""
        with self._llm.stream(prompt, self._params, lora_request=self._adapter) as stream:
            for output in stream:
                for completion in output.outputs:
                    yield completion.text

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Return all completions, in the order of the prompts."""
        outputs = self._llm.generate(
            list(prompts), self._params, use_tqdm=False, lora_request=self._adapter
        )
        return [
            Completion(prompt, each.index, each.text, list(each.token_ids), each.finish_reason)
            for prompt, output in zip(prompts, outputs, strict=True)
            for each in output.outputs
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._llm.close()
