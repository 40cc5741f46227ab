"""From what the engine returns to what LangChain expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from quire.outputs import CompletionOutput, RequestOutput, TokenLogprobs


class FailedGeneration(Generation):
    """Stands in a result where one prompt of a batch failed, and carries the reason."""

    error: Any = None


def failure_in(generations: Sequence[Generation]) -> BaseException | None:
    """Return why a prompt failed, or None when these are its completions."""
    for generation in generations:
        if isinstance(generation, FailedGeneration):
            error: BaseException = generation.error
            return error
    return None


def to_result(outputs: Sequence[RequestOutput | BaseException], model: str) -> LLMResult:
    """Build the result of a batch.

    Parameters
    ----------
    outputs : list of RequestOutput or exception
        One per prompt.
    model : str
        The name that ``llm_output`` gives.

    Returns
    -------
    LLMResult
        One list of generations per prompt, with as many generations as the request had
        completions, or one :class:`FailedGeneration`.
    """
    generations = [to_generations(output) for output in outputs]
    return LLMResult(
        generations=generations,
        llm_output={"token_usage": token_usage(generations), "model_name": model},
    )


def split_result(result: LLMResult) -> list[LLMResult]:
    """Return one result per prompt, each with the tokens that this prompt used."""
    # LLMResult.flatten would count all tokens to the first prompt.
    return [
        LLMResult(
            generations=[generations],
            llm_output={**(result.llm_output or {}), "token_usage": token_usage([generations])},
        )
        for generations in result.generations
    ]


def to_generations(output: RequestOutput | BaseException) -> list[Generation]:
    """Return the completions of one prompt; a failure becomes one :class:`FailedGeneration`."""
    if isinstance(output, BaseException):
        return [FailedGeneration(text="", error=output)]
    return [
        Generation(
            text=completion.text,
            generation_info={
                **_logprobs_info(completion),
                **final_info(output, completion, len(completion.token_ids)),
            },
        )
        for completion in output.outputs
    ]


def token_usage(generations: Sequence[Sequence[Generation]]) -> dict[str, int]:
    """Return the tokens that were used, each prompt counted once whatever its completions."""
    prompt = completion = cached = 0
    for of_prompt in generations:
        usages = [(one.generation_info or {}).get("token_usage") for one in of_prompt]
        known = [usage for usage in usages if usage is not None]
        if known:
            prompt += known[0]["prompt_tokens"]
            cached += known[0]["cached_tokens"]
        completion += sum(usage["completion_tokens"] for usage in known)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cached_tokens": cached,
    }


class ChunkBuilder:
    """Turns the deltas of one completion into chunks that add up to its generation.

    LangChain adds chunks by concatenating strings and lists and cannot add other values, so that
    these stand in the last chunk alone.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._pending: dict[str, Any] = {}

    def add(self, output: RequestOutput) -> GenerationChunk | None:
        """Return the chunk of this delta; None when it has neither text nor an end."""
        completion = next((one for one in output.outputs if one.index == 0), None)
        if completion is None:
            return None
        self._num_tokens += len(completion.token_ids)
        self._pending = _joined(self._pending, _logprobs_info(completion))
        if completion.finished():
            info = {**self._pending, **final_info(output, completion, self._num_tokens)}
        elif completion.text:
            info = self._pending
        else:
            return None
        self._pending = {}
        return GenerationChunk(text=completion.text, generation_info=info or None)


def _joined(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    if not left or not right:
        return left or right
    first, second = left["logprobs"], right["logprobs"]
    return {"logprobs": {key: first[key] + second[key] for key in first}}


def final_info(
    output: RequestOutput, completion: CompletionOutput, num_tokens: int
) -> dict[str, Any]:
    """Return why a completion ended and the tokens that it used."""
    num_prompt_tokens = len(output.prompt_token_ids)
    info: dict[str, Any] = {
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "cached_tokens": output.num_cached_tokens,
        },
    }
    if completion.cumulative_logprob is not None:
        info["cumulative_logprob"] = completion.cumulative_logprob
    if output.prompt_logprobs is not None:
        info["prompt_logprobs"] = [
            None if position is None else _top(position) for position in output.prompt_logprobs
        ]
    return info


def _logprobs_info(completion: CompletionOutput) -> dict[str, Any]:
    """Return logprobs in the form of OpenAI's completions, with ids and ranks beside."""
    if not completion.logprobs:
        return {}
    positions = list(zip(completion.token_ids, completion.logprobs, strict=True))
    chosen = [position[token_id] for token_id, position in positions]
    return {
        "logprobs": {
            "tokens": [token_text(token_id, position) for token_id, position in positions],
            "token_ids": list(completion.token_ids),
            "token_logprobs": [one.logprob for one in chosen],
            "ranks": [one.rank for one in chosen],
            "top_logprobs": [_top(position) for position in completion.logprobs],
        }
    }


def token_text(token_id: int, position: TokenLogprobs) -> str:
    """Return the text of a token among those of its position; its id where it has none."""
    decoded = position[token_id].decoded_token
    return f"token_id:{token_id}" if decoded is None else decoded


def _top(position: TokenLogprobs) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, one in position.items():
        text = token_text(token_id, position)
        # Parts of a character all decode to the same text.
        top[f"token_id:{token_id}" if text in top else text] = one.logprob
    return top
