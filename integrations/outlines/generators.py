"""What the functions of the 0.x API return: a model, a structure and a sampler, to be called."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from quire.errors import InvalidRequestError, StructureIncompleteError
from quire.integrations.outlines.samplers import SamplingParameters, parameters_of
from quire.outputs import CompletionOutput, RequestOutput
from quire.prompts import as_prompts
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import refuse

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.waiting import OutputStream

_DEFAULTS: Final = SamplingParams()

THE_MODELS: Final[Any] = object()
"""In place of an adapter: that which the model has when the call begins."""


def is_llm(value: object) -> bool:
    """Return whether a value is a quire.LLM, without importing what an LLM needs."""
    module = sys.modules.get("quire.llm")
    return module is not None and isinstance(value, module.LLM)


def llm_of(model: Any) -> LLM:
    """Return the engine of a model: the quire.LLM itself, or that in its ``llm``.

    Raises
    ------
    TypeError
        The model has none.
    """
    llm: Any = model if is_llm(model) else getattr(model, "llm", None)
    if not is_llm(llm):
        raise TypeError(
            "model must be one of quire.integrations.outlines.models, or a quire.LLM, not "
            f"{type(model).__name__}; for models of others there is outlines.Generator"
        )
    return cast("LLM", llm)


def request_params(
    given: SamplingParams | None,
    drawing: SamplingParameters,
    *,
    max_tokens: int | None = None,
    stop_at: str | Sequence[str] | None = None,
    seed: int | None = None,
    constraint: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """Return the parameters of a request, as a new object.

    Parameters
    ----------
    given : SamplingParams or None
        What it sets explicitly, a default that is written out included, wins over all the rest;
        but for a ``structured_outputs=None``, which takes nothing away.
    drawing : SamplingParameters
        What the sampler stands for.
    max_tokens : int, optional
        By default the room left in the context if there is a constraint, else 16.
    stop_at : str or list of str, optional
    seed : int, optional
    constraint : StructuredOutputsParams, optional

    Raises
    ------
    InvalidRequestError
        A value out of its range, two that contradict each other, or a second constraint.
    """
    if given is None:
        given = _DEFAULTS
    elif not isinstance(given, SamplingParams):
        raise refuse("sampling_params", given, "a SamplingParams or None")
    if not given.detokenize:
        raise refuse("detokenize of sampling_params", False, "True: what is returned is text")
    wanted: dict[str, Any] = {}
    if constraint is not None:
        wanted["max_tokens"] = None
        if given.structured_outputs is not None:
            raise InvalidRequestError(
                "structured_outputs of sampling_params must be None: the generator has a "
                "structure of its own"
            )
        wanted["structured_outputs"] = constraint
    if max_tokens is not None:
        wanted["max_tokens"] = max_tokens
    if stop_at is not None:
        wanted["stop"] = stop_at
    if seed is not None:
        wanted["seed"] = seed
    if drawing.num_samples > 1:
        wanted["n"] = drawing.num_samples
    if not given.use_beam_search:  # a search draws nothing, so nothing of how to draw concerns it
        wanted |= _drawing_fields(given, drawing)
    explicit = given.explicit_fields - {"structured_outputs"}  # there, None says nothing
    return replace(given, **{k: v for k, v in wanted.items() if k not in explicit})


def _drawing_fields(given: SamplingParams, drawing: SamplingParameters) -> dict[str, Any]:
    if drawing.sampler == "beam_search" and drawing.num_samples > 1:
        num_samples = given.n if "n" in given.explicit_fields else drawing.num_samples
        return {"use_beam_search": True, "best_of": max(num_samples, drawing.num_samples)}
    if drawing.sampler in ("beam_search", "greedy"):
        return {"temperature": 0.0}
    values = {
        "top_p": drawing.top_p,
        "top_k": drawing.top_k,
        "temperature": drawing.temperature,
    }
    return {name: value for name, value in values.items() if value is not None}


class SequenceGenerator:
    """Makes completions of one structure; the functions of ``generate`` return it.

    Parameters
    ----------
    model : quire.LLM, or an object with one in ``llm``
    structured_outputs : StructuredOutputsParams or None
        What each text has to match.
    sampler : Sampler, optional
    format_sequence : callable, optional
        Makes of a text what is returned for it; by default the text. May be set later, too.

    Raises
    ------
    TypeError
        The model has no quire.LLM.
    InvalidRequestError
        The sampler is none.
    """

    def __init__(
        self,
        model: Any,
        structured_outputs: StructuredOutputsParams | None = None,
        sampler: Any = None,
        format_sequence: Callable[[str], Any] | None = None,
    ) -> None:
        llm_of(model)
        self.model = model
        self.structured_outputs = structured_outputs
        self.drawing = parameters_of(sampler)
        self.format_sequence: Callable[[str], Any] = format_sequence or str

    def __call__(
        self,
        prompts: Any,
        max_tokens: int | None = None,
        stop_at: str | Sequence[str] | None = None,
        seed: int | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = THE_MODELS,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> Any:
        """Complete prompts.

        Parameters
        ----------
        prompts : str or list of str
            Sent as they are, without a chat template. Also token ids and dicts, as for
            :meth:`quire.LLM.generate`.
        max_tokens : int, optional
            Tokens to generate at most. By default the room left in the context, and 16 for plain
            text.
        stop_at : str or list of str, optional
            Strings that end a completion; they are not part of it.
        seed : int, optional
            Makes the draws repeat.
        sampling_params : SamplingParams, optional
            What it sets wins over the arguments before and over the sampler. It is not changed.
        lora_request
            As for :meth:`quire.LLM.generate`; by default what the model's ``load_lora`` loaded.
        use_tqdm : bool or callable
            Show a progress bar.

        Returns
        -------
        object
            One result for one prompt and one sample; a list of results for several prompts, or
            for several samples; a list per prompt for several of both. A list of one prompt is
            one prompt.

        Raises
        ------
        StructureIncompleteError
            A completion ended before its structure did.
        InvalidRequestError
            A prompt or a parameter is wrong.
        RequestFailedError
            A request failed while it ran, for one because its structure cannot be enforced.
        """
        params = self._params(max_tokens, stop_at, seed, sampling_params)
        outputs = llm_of(self.model).generate(
            as_prompts(prompts), params, use_tqdm=use_tqdm, lora_request=self._adapter(lora_request)
        )
        return _nested([self._results(output) for output in outputs])

    def stream(
        self,
        prompts: Any,
        max_tokens: int | None = None,
        stop_at: str | Sequence[str] | None = None,
        seed: int | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = THE_MODELS,
    ) -> Iterator[Any]:
        """Complete prompts, and yield their texts piece by piece.

        The requests are checked and start at once. Closing or dropping the iterator before its
        end aborts them.

        Parameters
        ----------
        prompts, max_tokens, stop_at, seed, sampling_params, lora_request
            As for a call.

        Returns
        -------
        iterator
            Of texts that are not formatted, nested as the results of a call are; a completion
            that has nothing new has an empty string. The pieces, joined, are the text.

        Raises
        ------
        StructureIncompleteError
            After the last piece: a completion ended before its structure did.
        InvalidRequestError
            At once: a prompt or a parameter is wrong.
        """
        params = self._params(max_tokens, stop_at, seed, sampling_params)
        llm = llm_of(self.model)
        adapter = self._adapter(lora_request)
        streams: list[OutputStream] = []
        try:
            for prompt in as_prompts(prompts):
                streams.append(llm.stream(prompt, params, lora_request=adapter))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return self._pieces(streams, params.n)

    def _adapter(self, lora_request: Any) -> Any:
        if lora_request is THE_MODELS:
            return getattr(self.model, "lora_request", None)
        return lora_request

    def _params(
        self,
        max_tokens: int | None,
        stop_at: str | Sequence[str] | None,
        seed: int | None,
        sampling_params: SamplingParams | None,
    ) -> SamplingParams:
        return request_params(
            sampling_params,
            self.drawing,
            max_tokens=max_tokens,
            stop_at=stop_at,
            seed=seed,
            constraint=self.structured_outputs,
        )

    def _results(self, output: RequestOutput) -> list[Any]:
        self._check_whole(output)
        return [self._result(completion, output) for completion in output.outputs]

    def _result(self, completion: CompletionOutput, output: RequestOutput) -> Any:
        try:
            return self.format_sequence(completion.text)
        except ValueError as error:
            stop = completion.stop_reason
            if self.structured_outputs is None or not isinstance(stop, str):
                raise
            raise StructureIncompleteError(
                f"the text ended at the stop string {stop!r} in the middle of its structure: "
                "leave out stop_at",
                completion.text,
                output,
            ) from error

    def _check_whole(self, output: RequestOutput) -> None:
        if self.structured_outputs is None:
            return
        for completion in output.outputs:
            if completion.finish_reason == "length":
                raise StructureIncompleteError(
                    f"the text ended after {len(completion.token_ids)} tokens in the middle of "
                    "its structure: raise max_tokens, or max_model_len where it is left out",
                    completion.text,
                    output,
                )

    def _pieces(self, streams: list[OutputStream], n: int) -> Iterator[Any]:
        wholes = [_Whole(n) for _ in streams]
        running = dict(enumerate(streams))
        with contextlib.ExitStack() as closing:
            for stream in streams:
                closing.enter_context(stream)
            while running:
                pieces = [[""] * n for _ in streams]
                for i, stream in list(running.items()):
                    delta = next(stream)
                    if delta.finished:
                        del running[i]
                    wholes[i].add(delta)
                    for completion in delta.outputs:
                        pieces[i][completion.index] += completion.text
                if any(text for texts in pieces for text in texts):
                    yield _nested(pieces)
        for whole in wholes:
            self._check_whole(whole.output())


class _Whole:
    """What the deltas of one request add up to."""

    def __init__(self, n: int) -> None:
        self._last: RequestOutput | None = None
        self._texts = [""] * n
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._completions: dict[int, CompletionOutput] = {}

    def add(self, delta: RequestOutput) -> None:
        """Go on by one delta."""
        self._last = delta
        for completion in delta.outputs:
            self._completions[completion.index] = completion
            self._texts[completion.index] += completion.text
            self._token_ids[completion.index] += completion.token_ids

    def output(self) -> RequestOutput:
        """Return all of it."""
        assert self._last is not None  # a stream ends with an output, or raises
        return replace(
            self._last,
            outputs=[
                replace(completion, text=self._texts[i], token_ids=self._token_ids[i])
                for i, completion in sorted(self._completions.items())
            ],
        )


def _nested(values: list[list[Any]]) -> Any:
    """Return results without the levels, of prompts or of samples, that have one entry."""
    if len(values) == 1:
        return values[0][0] if len(values[0]) == 1 else values[0]
    return [each[0] for each in values] if len(values[0]) == 1 else values
