"""How the tokens of a completion are chosen, and when it ends."""

from __future__ import annotations

import enum
import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal

from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import flag, integer, number, refuse, strings, token_ids
from quire.utils.keywords import refuse_unknown_keywords

_UNSET_TEMPERATURE: Final = float("1.0")
"""The default temperature, told apart from a 1.0 that somebody wrote by being this very object:
beam search takes an unset temperature to be 0 and refuses one that was asked for."""

_INT64_MIN: Final = -(2**63)
_UINT64_MAX: Final = 2**64 - 1


class RequestOutputKind(enum.IntEnum):
    """What each output of a running request holds."""

    CUMULATIVE = 0
    """Everything generated so far."""
    DELTA = 1
    """What is new since the output before."""
    FINAL_ONLY = 2
    """Nothing until the request has finished, then all of it."""


def _early_stopping(value: object) -> bool | Literal["never"]:
    if isinstance(value, str) and value == "never":
        return "never"
    if isinstance(value, bool):
        return value
    raise refuse("early_stopping", value, "True, False or 'never'")


def _changed_fields(params: SamplingParams | BeamSearchParams) -> dict[str, Any]:
    """Return the fields that differ from their defaults, by name."""
    changed = {}
    for item in fields(params):
        value = getattr(params, item.name)
        default = [] if item.name in _LIST_FIELDS else item.default
        if value != default:
            changed[item.name] = value
    return changed


_LIST_FIELDS: Final = ("stop", "stop_token_ids", "bad_words")


def remember_given(cls: type[SamplingParams]) -> type[SamplingParams]:
    """Keep the names of the keywords that an object is made with, for ``explicit_fields``."""
    checked = cls.__init__
    num_fields = len(fields(cls))

    @functools.wraps(checked)
    def init(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
        # With every field there it is a copy, as of dataclasses.replace, and they say nothing.
        self.__dict__["_given"] = frozenset() if len(kwargs) == num_fields else frozenset(kwargs)
        checked(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@remember_given
@refuse_unknown_keywords
@dataclass(kw_only=True, repr=False)
class SamplingParams:
    """How the tokens of a completion are chosen, and when it ends.

    Fields are given by keyword and checked when the object is made; the engine never changes
    an object it was handed. Log-probabilities are those of the model's own distribution,
    before every penalty, mask and temperature; those of a beam search, what beams are ranked by,
    come after all but the temperature.

    Parameters
    ----------
    n : int, default 1
        Completions to return, at least 1. More than one needs ``temperature`` > 0, or beams.
    best_of : int, optional
        Completions to generate, at least ``n``, of which the ``n`` of highest cumulative
        log-probability are returned. With ``use_beam_search``, the number of beams.
    presence_penalty : float, default 0.0
        In [-2, 2]. Subtracted from the logit of every token that was generated already.
    frequency_penalty : float, default 0.0
        In [-2, 2]. Subtracted once for each time that the token was generated already.
    repetition_penalty : float, default 1.0
        Greater than 0. A token of the prompt or of the output has its logit divided by this
        where the logit is positive and multiplied by it where it is negative.
    temperature : float, default 1.0
        At least 0. What logits are divided by; 0 always takes the most likely token. Left out,
        it is 0 with ``use_beam_search``.
    top_p : float, default 1.0
        In (0, 1]. Draw from the fewest most likely tokens whose probabilities reach this sum.
    top_k : int, default 0
        Draw from this many most likely tokens; 0 or -1 is all of them.
    min_p : float, default 0.0
        In [0, 1]. Leave out tokens less likely than this fraction of the likeliest.
    seed : int, optional
        In [-2**63, 2**64 - 1]. Makes the draws repeat, whatever else the engine is doing. None
        or -1: drawn from the engine's own seed.
    stop : str or list of str, optional
        Strings that end the completion; kept as a list. Needs ``detokenize``.
    stop_token_ids : list of int, optional
        Tokens that end the completion, besides the model's own end-of-sequence tokens.
    bad_words : list of str, optional
        Strings that the completion must not contain, as far as their usual tokens go.
    include_stop_str_in_output : bool, default False
        Keep the stop string that ended the completion in its text.
    ignore_eos : bool, default False
        Go on after the model's end-of-sequence token.
    max_tokens : int or None, default 16
        Tokens to generate at most, at least 1; None is whatever room the model has left.
    min_tokens : int, default 0
        Neither an end-of-sequence token nor one of ``stop_token_ids`` is generated before this
        many tokens are. At most ``max_tokens``.
    logprobs : int, optional
        Return the log-probability of each generated token and of this many likeliest ones; -1
        is the whole vocabulary.
    prompt_logprobs : int, optional
        The same for the tokens of the prompt.
    detokenize : bool, default True
        Turn tokens into text; without it only token ids are returned.
    skip_special_tokens : bool, default True
        Leave special tokens out of the text.
    spaces_between_special_tokens : bool, default True
        Put spaces between special tokens in the text.
    logit_bias : dict of int to float, optional
        Added to the logits of these token ids; ``-inf`` forbids a token. Ids may be written as
        strings of digits, the way JSON has them.
    allowed_token_ids : list of int, optional
        The only tokens that may be generated.
    truncate_prompt_tokens : int, optional
        Keep only this many last tokens of the prompt, at least 1; -1 is as many as the model
        takes.
    logits_processors : list of callable, optional
        Each is called as ``f(token_ids, logits)`` or ``f(prompt_token_ids, token_ids, logits)``
        before a token is chosen, with the ids generated so far and float32 logits
        ``[vocab_size]``, and returns logits of that shape (the same tensor, changed, will do).
        An object that has a method ``for_sequence()`` stands for the callable that this returns:
        it is asked for one for each sequence (each of ``n`` completions, each beam), and again
        when a sequence that was interrupted goes on, so that a callable which keeps state keeps
        that of one sequence. Other callables are shared, and are to follow from their arguments.
    extra_args : dict, optional
        What the request has for the engine's own processors, see
        :class:`quire.LogitsProcessor`. Handed on as it is.
    structured_outputs : StructuredOutputsParams, optional
        What the text has to match, as a regex, a JSON schema, a choice or a grammar. Also taken
        is a dict of its fields. Of tokens that the grammar does not allow none is generated,
        whatever else is asked for, and the text ends where nothing more may follow, also before
        ``min_tokens``; ``stop`` and ``max_tokens`` may still end it half-way.
    output_kind : RequestOutputKind, default CUMULATIVE
        What each output of a running request holds.
    use_beam_search : bool, default False
        Search for the likeliest completions with ``best_of``, else ``n``, beams (at least 2)
        and return the ``n`` best. Nothing is drawn: ``temperature`` must be 0 or left out, and
        ``top_p``, ``top_k`` and ``min_p`` at their defaults.
    length_penalty : float, default 1.0
        In [-10, 10]. Beams are ranked by cumulative log-probability / length ** ``length_penalty``.
    early_stopping : bool or "never", default False
        When a beam search ends: True as soon as it has as many finished completions as beams,
        False when a better one has become unlikely, "never" when it has become impossible.

    Raises
    ------
    InvalidRequestError
        A value out of its range, or two that contradict each other.
    TypeError
        An unknown keyword; the message names the nearest valid one.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = _UNSET_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    logits_processors: list[Any] | None = None
    extra_args: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    _given: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_stopping()
        self._check_tokens()
        self._check_output()
        self._check_choice()

    def _check_numbers(self) -> None:
        self.n = integer("n", self.n, "an integer >= 1", 1)
        if self.best_of is not None:
            expected = f"an integer >= n ({self.n}) or None"
            self.best_of = integer("best_of", self.best_of, expected, self.n)
        for name in ("presence_penalty", "frequency_penalty"):
            expected = "a number in [-2, 2]"
            value = number(name, getattr(self, name), expected, lambda x: -2.0 <= x <= 2.0)
            setattr(self, name, value)
        self.repetition_penalty = number(
            "repetition_penalty",
            self.repetition_penalty,
            "a finite number > 0",
            lambda x: x > 0.0,
        )
        # A plain assignment would lose the identity by which an unset temperature is known.
        if self.temperature is not _UNSET_TEMPERATURE:
            self.temperature = number(
                "temperature", self.temperature, "a finite number >= 0", lambda x: x >= 0.0
            )
        self.top_p = number("top_p", self.top_p, "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)
        self.top_k = integer("top_k", self.top_k, "-1 or 0 (all tokens) or an integer >= 1", -1)
        self.min_p = number("min_p", self.min_p, "a number in [0, 1]", lambda x: 0.0 <= x <= 1.0)
        if self.seed is not None:
            expected = "an integer in [-2**63, 2**64 - 1] or None"
            seed = integer("seed", self.seed, expected, _INT64_MIN, _UINT64_MAX)
            self.seed = None if seed == -1 else seed

    def _check_stopping(self) -> None:
        self.stop = strings("stop", self.stop)
        self.stop_token_ids = token_ids("stop_token_ids", self.stop_token_ids)
        self.include_stop_str_in_output = flag(
            "include_stop_str_in_output", self.include_stop_str_in_output
        )
        self.ignore_eos = flag("ignore_eos", self.ignore_eos)
        if self.max_tokens is not None:
            expected = "an integer >= 1, or None for the room left"
            self.max_tokens = integer("max_tokens", self.max_tokens, expected, 1)
        most = self.max_tokens
        bound = "" if most is None else f" and <= max_tokens ({most})"
        self.min_tokens = integer("min_tokens", self.min_tokens, "an integer >= 0" + bound, 0, most)

    def _check_tokens(self) -> None:
        self.bad_words = strings("bad_words", self.bad_words)
        if self.logit_bias is not None:
            self.logit_bias = _biases(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise refuse("allowed_token_ids", [], "None or a list of at least one token id")
        if self.truncate_prompt_tokens is not None:
            expected = "an integer >= 1, -1 for what the model takes, or None"
            self.truncate_prompt_tokens = integer(
                "truncate_prompt_tokens", self.truncate_prompt_tokens, expected, -1
            )
            if self.truncate_prompt_tokens == 0:
                raise refuse("truncate_prompt_tokens", 0, expected)
        if self.logits_processors is not None:
            expected = "a list of callables, or of objects with for_sequence(), or None"
            if not isinstance(self.logits_processors, (list, tuple)):
                raise refuse("logits_processors", self.logits_processors, expected)
            for item in self.logits_processors:
                if not callable(item) and not callable(getattr(item, "for_sequence", None)):
                    raise refuse("logits_processors", self.logits_processors, expected)
            self.logits_processors = list(self.logits_processors)
        if self.extra_args is not None:
            if not isinstance(self.extra_args, Mapping) or not all(
                isinstance(k, str) for k in self.extra_args
            ):
                raise refuse("extra_args", self.extra_args, "a dict whose keys are strings or None")
            self.extra_args = dict(self.extra_args)
        constraint: Any = self.structured_outputs
        if constraint is not None and not isinstance(constraint, StructuredOutputsParams):
            if not isinstance(constraint, Mapping) or not all(
                isinstance(k, str) for k in constraint
            ):
                expected = "a StructuredOutputsParams, a dict of its fields, or None"
                raise refuse("structured_outputs", constraint, expected)
            self.structured_outputs = StructuredOutputsParams(**constraint)

    def _check_output(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                expected = "an integer >= 0, -1 for the whole vocabulary, or None"
                setattr(self, name, integer(name, value, expected, -1))
        for name in ("detokenize", "skip_special_tokens", "spaces_between_special_tokens"):
            setattr(self, name, flag(name, getattr(self, name)))
        try:
            if isinstance(self.output_kind, bool):
                raise ValueError
            self.output_kind = RequestOutputKind(self.output_kind)
        except (ValueError, TypeError, ArithmeticError):
            valid = ", ".join(f"{kind.name} ({kind.value})" for kind in RequestOutputKind)
            raise refuse("output_kind", self.output_kind, f"one of {valid}") from None
        if self.stop and not self.detokenize:
            raise refuse("stop", self.stop, "empty with detokenize=False (it looks at text)")

    def _check_choice(self) -> None:
        """Check what concerns beams, the greedy choice and sampling against each other."""
        self.use_beam_search = flag("use_beam_search", self.use_beam_search)
        self.early_stopping = _early_stopping(self.early_stopping)
        self.length_penalty = number(
            "length_penalty", self.length_penalty, "a number in [-10, 10]", lambda x: -10 <= x <= 10
        )
        if self.use_beam_search:
            self._check_beams()
        else:
            if self.early_stopping is not False:
                raise refuse("early_stopping", self.early_stopping, "False without beam search")
            if self.length_penalty != 1.0:
                raise refuse("length_penalty", self.length_penalty, "1.0 without beam search")
            if self.temperature == 0.0 and self.num_sequences > 1:
                name = "n" if self.n > 1 else "best_of"
                expected = "1 at temperature 0, where every completion would be the same"
                raise refuse(name, self.num_sequences, expected)
        if self.output_kind is RequestOutputKind.DELTA and self.num_sequences != self.n:
            expected = f"None or n ({self.n}) with output_kind DELTA"
            raise refuse("best_of", self.best_of, expected)
        if self.structured_outputs is not None and self.structured_outputs.canonical_tokens:
            self._check_canonical()

    def _check_canonical(self) -> None:
        """Refuse what needs the model's word on each token."""
        reason = "with canonical_tokens: the model is not asked for all tokens"
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                raise refuse(name, getattr(self, name), f"None {reason}")
        if self.use_beam_search:
            raise refuse("use_beam_search", True, f"False {reason}")
        if self.num_sequences != self.n:
            raise refuse("best_of", self.best_of, f"None or n ({self.n}) {reason}")

    def _check_beams(self) -> None:
        if self.beam_width < 2:
            name = "n" if self.best_of is None else "best_of"
            raise refuse(name, self.beam_width, "at least 2 with use_beam_search: it is the width")
        if self.temperature is _UNSET_TEMPERATURE:
            self.temperature = 0.0
        neutral = {"temperature": (0.0,), "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,)}
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                expected = f"{values[0]} or left out with use_beam_search, which draws nothing"
                raise refuse(name, getattr(self, name), expected)

    @property
    def explicit_fields(self) -> frozenset[str]:
        """The fields that were written out, or that differ from their defaults."""
        return frozenset(_changed_fields(self).keys() | self._given)

    @property
    def num_sequences(self) -> int:
        """Completions that are generated: ``best_of``, else ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def beam_width(self) -> int:
        """Beams of a beam search: ``best_of``, else ``n``; 1 without ``use_beam_search``."""
        return self.num_sequences if self.use_beam_search else 1

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, in one sequence."""
        return self.temperature == 0.0 and not self.use_beam_search

    def clone(self) -> SamplingParams:
        """Return an independent copy, checked anew; callables are shared."""
        copied = replace(self)
        copied.__dict__["_given"] = self._given
        return copied

    def verify(self, vocab_size: int) -> None:
        """Check what depends on the model.

        Parameters
        ----------
        vocab_size : int
            Token ids run from 0 to ``vocab_size - 1``.

        Raises
        ------
        InvalidRequestError
            A token id, or a number of log-probabilities, that the vocabulary does not have.
        """
        lists = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids,
            "logit_bias": self.logit_bias,
        }
        for name, ids in lists.items():
            if ids and max(ids) >= vocab_size:
                expected = f"in [0, {vocab_size - 1}], the model's vocabulary"
                raise refuse(f"each token id of {name}", max(ids), expected)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                expected = f"at most {vocab_size}, the size of the model's vocabulary"
                raise refuse(name, count, expected)

    def __repr__(self) -> str:
        return _show(self)

    def __reduce__(self) -> tuple[Any, ...]:
        changed = {name: getattr(self, name) for name in sorted(self.explicit_fields)}
        if self.temperature is not _UNSET_TEMPERATURE:
            changed["temperature"] = self.temperature
        return _rebuild, (type(self), changed)

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingParams:
        # A processor may close over a model or a lock: it is named here, not owned.
        return self.clone()


@refuse_unknown_keywords
@dataclass(repr=False)
class BeamSearchParams:
    """How ``LLM.beam_search`` looks for the likeliest completions.

    Parameters
    ----------
    beam_width : int
        Beams kept at each step and completions returned; at least 2.
    max_tokens : int
        Tokens to generate at most, at least 1.
    ignore_eos : bool, default False
        Go on after the model's end-of-sequence token.
    temperature : float, default 0.0
        Must be 0: nothing is drawn.
    length_penalty : float, default 1.0
        In [-10, 10]. Beams are ranked by cumulative log-probability / length ** ``length_penalty``.
    early_stopping : bool or "never", default False
        As in :class:`SamplingParams`.
    include_stop_str_in_output : bool, default False
        Keep the stop string that ended a completion in its text.
    stop : str or list of str, optional
        Strings that end a completion; kept as a list.

    Raises
    ------
    InvalidRequestError
        A value out of its range.
    TypeError
        An unknown keyword; the message names the nearest valid one.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False
    stop: str | list[str] | None = None

    def __post_init__(self) -> None:
        self.beam_width = integer("beam_width", self.beam_width, "an integer >= 2", 2)
        self.max_tokens = integer("max_tokens", self.max_tokens, "an integer >= 1", 1)
        self.ignore_eos = flag("ignore_eos", self.ignore_eos)
        self.temperature = number(
            "temperature", self.temperature, "0 in a beam search", lambda x: x == 0.0
        )
        self.length_penalty = number(
            "length_penalty", self.length_penalty, "a number in [-10, 10]", lambda x: -10 <= x <= 10
        )
        self.early_stopping = _early_stopping(self.early_stopping)
        self.include_stop_str_in_output = flag(
            "include_stop_str_in_output", self.include_stop_str_in_output
        )
        self.stop = strings("stop", self.stop)

    def to_sampling_params(self) -> SamplingParams:
        """Return the same search as the parameters of a request."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
            stop=self.stop,
        )

    def __repr__(self) -> str:
        return _show(self)


def _show(params: SamplingParams | BeamSearchParams) -> str:
    values = ", ".join(f"{name}={value!r}" for name, value in _changed_fields(params).items())
    return f"{type(params).__name__}({values})"


def _rebuild(cls: type[SamplingParams], changed: dict[str, Any]) -> SamplingParams:
    return cls(**changed)


def _biases(value: object) -> dict[int, float]:
    """Return ``logit_bias`` with int keys and float values."""
    expected = "a dict of token ids (integers >= 0) to numbers"
    if not isinstance(value, Mapping):
        raise refuse("logit_bias", value, expected)
    biases = {}
    for key, bias in value.items():
        # More digits than a token id has would be for Python to refuse, without the field's name.
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token_id = integer(
            "each token id of logit_bias", int(key) if digits else key, "an integer >= 0", 0
        )
        # The type first: comparing arrays, and some numbers, raises.
        if isinstance(bias, numbers.Real) and bias == -math.inf:
            biases[token_id] = -math.inf
        else:
            finite = "a finite number or -inf"
            biases[token_id] = number(f"logit_bias[{token_id}]", bias, finite, lambda x: True)
    return biases
