"""Usage: how many tokens a request read and wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.outputs import RequestOutput


class Usage:
    """The count of a request with any number of prompts.

    Attributes
    ----------
    completion_tokens : int
    """

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self.completion_tokens = 0

    def add(self, index: int, output: RequestOutput) -> None:
        """Count what an output has that is new.

        Parameters
        ----------
        index : int
            Of the prompt.
        output : RequestOutput
            Deltas, or the only output of its prompt.
        """
        if index not in self._prompts:
            self._prompts[index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        for completion in output.outputs:
            self.completion_tokens += len(completion.token_ids)

    def shape(self) -> dict[str, Any]:
        """Return it in OpenAI's shape."""
        prompt = sum(item[0] for item in self._prompts.values())
        cached = sum(item[1] for item in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
