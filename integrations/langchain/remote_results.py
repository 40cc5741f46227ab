"""From what a server answers to what LangChain expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import PrivateAttr

from quire.integrations.langchain.results import FailedGeneration


class Answer(NamedTuple):
    """What a server said to one prompt."""

    choices: list[dict[str, Any]]
    usage: dict[str, int]
    """Tokens used; where prompts went together, the first has those of all and the others none."""
    alone: bool
    """Whether the prompt went alone, so that the usage is its own."""
    fingerprint: str | None = None


class RemoteResult(LLMResult):
    """A result that knows which prompt used what."""

    _usages: list[dict[str, int]] = PrivateAttr(default_factory=list)

    def split(self) -> list[LLMResult]:
        """Return one result per prompt, whose usages add up to that of all."""
        return [
            LLMResult(
                generations=[generations],
                llm_output={**(self.llm_output or {}), "token_usage": usage},
            )
            for generations, usage in zip(self.generations, self._usages, strict=True)
        ]


def has_choices(response: Mapping[str, Any]) -> bool:
    """Return whether a response, or an event of a stream, has a list of completions."""
    choices = response.get("choices")
    return isinstance(choices, list) and all(
        isinstance(choice, Mapping)
        and isinstance(choice.get("text"), str | None)
        and isinstance(choice.get("index"), int | None)
        for choice in choices
    )


def to_answers(response: Mapping[str, Any], num_prompts: int, n: int) -> list[Answer]:
    """Cut a response into one answer per prompt.

    Raises
    ------
    ValueError
        When it has not ``n`` choices for each of them.
    """
    choices = sorted(response["choices"], key=lambda choice: choice.get("index") or 0)
    if len(choices) != num_prompts * n:
        raise ValueError(
            f"the server sent {len(choices)} completions for {num_prompts} prompts with n={n}"
        )
    usage = to_usage(response.get("usage"))
    return [
        Answer(
            choices[i * n : (i + 1) * n],
            usage if i == 0 else {},
            num_prompts == 1,
            response.get("system_fingerprint"),
        )
        for i in range(num_prompts)
    ]


def to_usage(usage: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the counts of a response's usage; ``cached_tokens`` where the server tells them."""
    if not usage or not isinstance(usage, Mapping):
        return {}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    counts = {name: usage[name] for name in names if isinstance(usage.get(name), int)}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return {**counts, "cached_tokens": cached} if isinstance(cached, int) else counts


def to_remote_result(answers: Sequence[Answer | BaseException], model: str) -> RemoteResult:
    """Build the result of a batch, in which a failure is one :class:`FailedGeneration`."""
    usages = [{} if isinstance(one, BaseException) else one.usage for one in answers]
    total: dict[str, int] = {}
    for usage in usages:
        for name, count in usage.items():
            total[name] = total.get(name, 0) + count
    output: dict[str, Any] = {"token_usage": total, "model_name": model}
    for one in answers:
        if isinstance(one, Answer) and one.fingerprint:
            output.setdefault("system_fingerprint", one.fingerprint)
    result = RemoteResult(generations=[_generations(one) for one in answers], llm_output=output)
    result._usages = usages
    return result


def _generations(answer: Answer | BaseException) -> list[Generation]:
    if isinstance(answer, BaseException):
        return [FailedGeneration(text="", error=answer)]
    own = {"token_usage": answer.usage} if answer.alone and len(answer.choices) == 1 else {}
    return [
        Generation(
            text=choice.get("text") or "",
            generation_info={
                "finish_reason": choice.get("finish_reason"),
                "logprobs": choice.get("logprobs"),
                **_other(choice),
                **(own if answer.usage else {}),
            },
        )
        for choice in answer.choices
    ]


def _other(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a server says of a completion beyond OpenAI's fields, such as a stop reason."""
    known = ("text", "index", "finish_reason", "logprobs")
    return {k: v for k, v in choice.items() if k not in known and v is not None}


class RemoteChunks:
    """Turns the events of a stream into chunks that add up to its generation.

    LangChain adds chunks by concatenating strings and lists and cannot add other values, so that
    these stand in the last chunk alone, which waits for the usage.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None
        self._usage: dict[str, int] = {}

    def add(self, event: Mapping[str, Any]) -> GenerationChunk | None:
        """Return the chunk of this event; None when there is none to show yet."""
        self._usage = to_usage(event.get("usage")) or self._usage
        choice = next((c for c in event.get("choices") or () if not c.get("index")), None)
        if choice is None:
            return None
        if choice.get("finish_reason"):
            self._last = choice
            return None
        text, logprobs = choice.get("text") or "", choice.get("logprobs")
        if not text and not logprobs:
            return None
        return GenerationChunk(
            text=text, generation_info={"logprobs": logprobs} if logprobs else None
        )

    def finish(self) -> GenerationChunk | None:
        """Return the last chunk; None when the stream broke off before the completion ended."""
        if self._last is None:
            return None
        info = {"finish_reason": self._last["finish_reason"], **_other(self._last)}
        if self._last.get("logprobs"):
            info["logprobs"] = self._last["logprobs"]
        if self._usage:
            info["token_usage"] = self._usage
        return GenerationChunk(text=self._last.get("text") or "", generation_info=info)


def to_streamed_answer(chunk: GenerationChunk) -> Answer:
    """Return the answer that a stream's chunks add up to."""
    info = dict(chunk.generation_info or {})
    usage = info.pop("token_usage", {})
    return Answer([{"text": chunk.text, **info}], usage, True)
