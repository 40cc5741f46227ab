"""The engine's outputs as the texts that Outlines returns."""

from __future__ import annotations

from quire.errors import InvalidRequestError, StructureIncompleteError
from quire.integrations.outlines.sampling import Call
from quire.outputs import CompletionOutput, RequestOutput
from quire.utils.checks import shown


def to_texts(output: RequestOutput, call: Call, where: str = "") -> str | list[str]:
    """Return the text of a request, or the list of its texts where ``n`` is more than 1.

    Raises
    ------
    StructureIncompleteError
        A text was cut off before it matched its structure.
    """
    for completion in output.outputs:
        if _is_cut(completion, call):
            raise _incomplete(completion, call, completion.text, output, where)
    texts = [completion.text for completion in output.outputs]
    return texts[0] if call.params.n == 1 else texts


class Pieces:
    """The texts of a stream: each output's new text, and at the end whether it is whole."""

    def __init__(self, call: Call) -> None:
        if call.params.n != 1:
            raise InvalidRequestError(f"n must be 1 in a stream, got {call.params.n}")
        self._call = call
        self._texts: list[str] = []

    def add(self, output: RequestOutput) -> str:
        """Return the new text; it may be empty."""
        [completion] = output.outputs
        self._texts.append(completion.text)
        return completion.text

    def check(self, output: RequestOutput | None) -> None:
        """Raise StructureIncompleteError if the last output says that the text was cut off."""
        if output is not None and _is_cut(output.outputs[0], self._call):
            text = "".join(self._texts)
            raise _incomplete(output.outputs[0], self._call, text, None, "")


def _is_cut(completion: CompletionOutput, call: Call) -> bool:
    return (
        call.params.structured_outputs is not None
        and not call.allow_incomplete
        and completion.finish_reason != "stop"
    )


def _incomplete(
    completion: CompletionOutput,
    call: Call,
    text: str,
    output: RequestOutput | None,
    where: str,
) -> StructureIncompleteError:
    most = call.params.max_tokens
    if completion.finish_reason != "length":
        why = "the request was aborted"
    elif most is None:
        why = "the context has no more room"
    else:
        why = f"max_tokens={most}, or the room in the context, was used up"
    return StructureIncompleteError(
        f"{where}the text was cut off before it matched its output type: {why}; it is "
        f"{shown(text)}. allow_incomplete=True returns such a text as it stands",
        text,
        output,
    )
