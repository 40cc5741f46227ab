"""OutlinesProcessor: Outlines' own logits processors, in quire's batches."""

from __future__ import annotations

import copy
import threading
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError, NotSupportedError
from quire.utils.checks import shown

if TYPE_CHECKING:
    import torch

    from quire.llm import LLM
    from quire.tokenizer.tokenizer import Tokenizer

_CONTAINERS = (list, dict, set, bytearray, deque)


class OutlinesProcessor:
    """One of Outlines' logits processors, for a request's ``logits_processors``.

    Outlines' processors follow one batch, whose sequences all begin together and are told apart by
    their place. Here sequences come and go, so that each has a copy of the processor for itself:
    each completion of ``n``, each beam, each request that the parameters are used for. A copy
    begins with ``reset()``. It is called as Outlines calls it, with a batch of one sequence and
    once per token; where a sequence goes on that was interrupted, or a beam branches off, the
    calls for its tokens are made again, with logits of 0.

    A copy shares what the original's attributes hold, except that built-in containers are copied
    where what is in them can be; a processor of one's own for which that is not right defines
    ``__copy__``.

    Parameters
    ----------
    processor : outlines.processors.OutlinesLogitsProcessor
        For torch or numpy. It is copied when a sequence begins and never called.
    vocab_size : int, optional
        How many tokens it knows; the logits of a model's others become ``-inf``. What is known
        of Outlines' three backends is the default; else it is given all the model's logits.

    Raises
    ------
    InvalidRequestError
        It is no such processor.
    NotSupportedError
        It is one for MLX.

    Examples
    --------
    >>> from outlines.backends import get_regex_logits_processor
    >>> processor = get_regex_logits_processor("llguidance", model, "[0-9]{4}")
    >>> params = SamplingParams(logits_processors=[OutlinesProcessor(processor)])
    """

    def __init__(self, processor: Any, *, vocab_size: int | None = None) -> None:
        from outlines.processors import OutlinesLogitsProcessor
        from outlines.processors.tensor_adapters import NumpyTensorAdapter, TorchTensorAdapter

        if not isinstance(processor, OutlinesLogitsProcessor):
            raise InvalidRequestError(
                "processor must be an outlines.processors.OutlinesLogitsProcessor, got "
                f"{shown(processor)}"
            )
        adapter = processor.tensor_adapter
        if not isinstance(adapter, (NumpyTensorAdapter, TorchTensorAdapter)):
            raise NotSupportedError(
                f"processor computes with {type(adapter).__name__}; quire has torch tensors: make "
                "it for 'torch' or 'numpy'"
            )
        self._processor = processor
        self._with_numpy = isinstance(adapter, NumpyTensorAdapter)
        self._vocab_size = _vocab_size(processor) if vocab_size is None else vocab_size

    def for_sequence(self) -> SequenceProcessor:
        """Return a copy for one sequence."""
        return SequenceProcessor(_fresh(self._processor), self._vocab_size, self._with_numpy)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._processor!r})"


class SequenceProcessor:
    """A processor of Outlines and the one sequence that it follows.

    Parameters
    ----------
    processor : outlines.processors.OutlinesLogitsProcessor
    vocab_size : int or None
        Tokens that it knows; None is as many as there are logits.
    with_numpy : bool
        Whether it takes numpy's arrays in place of tensors.
    """

    def __init__(self, processor: Any, vocab_size: int | None, with_numpy: bool) -> None:
        self._processor = processor
        self._vocab_size = vocab_size
        self._with_numpy = with_numpy
        self._seen: list[int] | None = None

    def __call__(
        self, prompt_token_ids: list[int], token_ids: list[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits that the processor makes of a row, ``[vocab_size]``."""
        seen, self._seen = self._seen, None  # until all calls have succeeded
        first = 0 if seen is None else len(seen) + 1
        if seen is None or first > len(token_ids) or token_ids[: len(seen)] != seen:
            first = 0
            self._processor.reset()
        for count in range(first, len(token_ids)):
            self._call(prompt_token_ids + token_ids[:count], logits.new_zeros(logits.shape))
        result = self._call(prompt_token_ids + token_ids, logits)
        self._seen = token_ids
        return result

    def _call(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        import torch

        known = len(logits) if self._vocab_size is None else self._vocab_size
        fits = known == len(logits)
        both = min(known, len(logits))
        given = logits
        if not fits:
            given = logits.new_full((known,), -torch.inf)
            given[:both] = logits[:both]
        input_ids: Any = torch.tensor([token_ids], device=logits.device)
        row: Any = given.unsqueeze(0)
        if self._with_numpy:
            input_ids, row = input_ids.cpu().numpy(), row.cpu().numpy()
        with _eagerly():
            result = self._processor(input_ids, row)
        result = torch.as_tensor(result, device=logits.device).reshape(known)
        if fits:
            return result
        whole = torch.full_like(logits, -torch.inf)
        whole[:both] = result[:both]
        return whole


def outlines_processor(
    llm: LLM | Tokenizer, output_type: Any, backend: str | None = None
) -> OutlinesProcessor:
    """Return what Outlines itself makes of an output type, for requests of an engine.

    Unlike ``structured_outputs``, for which quire compiles and enforces constraints, this is a
    program of Outlines, called between two steps. It ends a text with the tokenizer's
    end-of-sequence token: where that is none of the model's, it goes into ``stop_token_ids``.

    Parameters
    ----------
    llm : quire.LLM or its tokenizer
        What it is made for. Also taken is a model of this adapter; of an AsyncLLM, what
        ``await async_llm.get_tokenizer()`` returns.
    output_type : object
        As in ``outlines.Generator(model, output_type)``.
    backend : {"outlines_core", "llguidance", "xgrammar"}, optional
        Outlines' default, if left out: outlines_core, and llguidance for grammars.

    Returns
    -------
    OutlinesProcessor
        Making it may take seconds; it serves any number of requests.

    Raises
    ------
    InvalidRequestError
        There is no output type.
    NotSupportedError
        The engine has no tokenizer.
    """
    from outlines.generator import SteerableGenerator
    from outlines.models import Transformers

    from quire.tokenizer.tokenizer import Tokenizer

    if output_type is None:
        raise InvalidRequestError("output_type must be a type that Outlines knows, got None")
    source: Any = getattr(llm, "llm", llm)
    tokenizer = source if isinstance(source, Tokenizer) else source.get_tokenizer()
    # Of its own: Outlines sets the side of padding and a padding token.
    converted = copy.deepcopy(tokenizer.to_transformers())
    # Backends ask such a model for its tokenizer, and for nothing else.
    nobody: Any = None
    model = Transformers(nobody, converted)
    return OutlinesProcessor(SteerableGenerator(model, output_type, backend).logits_processor)


def _vocab_size(processor: Any) -> int | None:
    """Return how many tokens a processor of Outlines' backends was made for, if it minds."""
    tokenizer = getattr(processor, "llg_tokenizer", None)
    if tokenizer is None:
        tokenizer = getattr(getattr(processor, "compiled_grammar", None), "tokenizer_info", None)
    size = getattr(tokenizer, "vocab_size", None)
    return size if isinstance(size, int) else None


def _fresh(processor: Any) -> Any:
    """Return a copy of a processor that can be called without regard to it."""
    own = copy.copy(processor)
    if not hasattr(type(processor), "__copy__"):
        for name, value in vars(own).items():
            if isinstance(value, _CONTAINERS):
                setattr(own, name, _copy_of(value))
            elif isinstance(value, types.MethodType) and value.__self__ is processor:
                setattr(own, name, types.MethodType(value.__func__, own))
    own.reset()
    return own


def _copy_of(container: Any) -> Any:
    try:
        return copy.deepcopy(container)
    except Exception:  # what other libraries have made can often not be copied
        return copy.copy(container)


_EAGER_LOCK = threading.Lock()
_eager_depth = 0
_eager_stance: Any = None


@contextmanager
def _eagerly() -> Iterator[None]:
    """Have nothing compiled meanwhile: all requests would wait for that, and for half a minute.

    Outlines' backends apply their masks by functions that torch compiles when they are first
    called. The switch is the process's, so that the last thread to leave turns it back.
    """
    import torch

    global _eager_depth, _eager_stance
    with _EAGER_LOCK:
        if not _eager_depth:
            _eager_stance = torch.compiler.set_stance("force_eager")
        _eager_depth += 1
    try:
        yield
    finally:
        with _EAGER_LOCK:
            _eager_depth -= 1
            if not _eager_depth:
                _eager_stance.__exit__(None, None, None)
