"""Constraints by llguidance: regexes, JSON schemas, grammars and tags."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import gbnf_to_lark

from quire.errors import InvalidRequestError
from quire.structured.regex import UntranslatableError, to_rust
from quire.structured_outputs import is_lark

if TYPE_CHECKING:
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec

P = ParamSpec("P")
R = TypeVar("R")

_LARGEST_EXACT = 2**53

_WORD_SLICES = (
    r"[a-z_]+",
    r"[A-Za-z0-9_]+",
    r"""[^'"\\\x00-\x1F\x7F]{1,10}""",
    r"""[^'"\\\x00-\x1F\x7F]{1,30}""",
    r"""[^'"\\\x00-\x1F\x7F]+""",
)
"""Kinds of tokens of which the library decides at once whether a grammar allows all of them.

Its own are those of JSON strings; these are for names, and for texts in single quotes."""

_DEAD_END = "NoExtensionBias"
"""The library's word for a text that can neither go on nor end."""

_MOST_GBNF_RULES = 1000
"""The library turns GBNF into Lark in Python, in a time that grows with the square of them."""


def _panics_are_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a panic of the library, which is no Exception, into one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise InvalidRequestError(
                f"structured_outputs cannot be enforced by llguidance, which panicked: {error}"
            ) from None

    return call


class _Tokens:
    """A vocabulary by the names that llguidance asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.eos_token_id = vocabulary.end_id
        self.tokens[self.eos_token_id] = b"<end of the text>"
        for id_, content in vocabulary.special_tokens.items():
            self.tokens[id_] = content.encode()
        # They are marked as such, so that no text is ever taken for them.
        self.special_token_ids = [*vocabulary.special_tokens, self.eos_token_id]
        self._tokenize = vocabulary.tokenize

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("only text is tokenized")  # llguidance asks whether bytes are, too
        return self._tokenize(text)


class Backend:
    """See :class:`quire.structured.constraint.ConstraintBackend`.

    Parameters
    ----------
    vocabulary : Vocabulary
    deadline : float
        Not looked at: the library bounds its own work.
    """

    @_panics_are_errors
    def __init__(self, vocabulary: Vocabulary, deadline: float) -> None:
        wrapper = llguidance.TokenizerWrapper(_Tokens(vocabulary))
        self._tokenizer = llguidance.LLTokenizer(
            wrapper,
            eos_token=vocabulary.end_id,
            slices=[*_WORD_SLICES, *llguidance.LLTokenizer.general_slices()],
        )
        self._special_ids = {text: id_ for id_, text in vocabulary.special_tokens.items()}

    @_panics_are_errors
    def compile(self, spec: ConstraintSpec) -> Compiled:
        """Make a constraint ready."""
        try:
            grammar = self._grammar(spec)
        except UntranslatableError as error:
            raise _refusal(spec.kind, f"it would not hold to {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(spec.kind, matcher.get_error())
        if warnings := matcher.get_grammar_warnings():
            raise _refusal(spec.kind, "; ".join(warnings))
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = _first_lines(matcher.get_error())
            raise _refusal(spec.kind, "no text matches it" if reason == _DEAD_END else reason)
        return Compiled(matcher)

    def _grammar(self, spec: ConstraintSpec) -> str:
        text = spec.text
        if spec.kind in ("json", "json_object"):
            return self._json_grammar(spec)
        if spec.kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(to_rust(text))
        if spec.kind == "choice":
            # One terminal, and not a rule of many: it becomes one automaton.
            items = " | ".join(_lark_string(item) for item in json.loads(text))
            return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {items}\n")
        if spec.kind == "structural_tag":
            return self._tag_grammar(json.loads(text))
        if not is_lark(text):
            if (num_rules := text.count("::=")) > _MOST_GBNF_RULES:
                reason = f"{num_rules} rules in GBNF, {_MOST_GBNF_RULES} at most; Lark has no bound"
                raise _refusal(spec.kind, reason)
            try:
                text = gbnf_to_lark(text)
            except Exception as error:  # of its own, and whatever a malformed text leads to
                raise _refusal(
                    spec.kind, f"read as GBNF, having no rule `start`: {error}"
                ) from error
        return llguidance.LLMatcher.grammar_from_lark(text)

    def _json_grammar(self, spec: ConstraintSpec) -> str:
        # A schema's own `x-guidance` must not make it enforce less.
        overrides: Any = {
            "lenient": False,
            "coerce_one_of": False,
            "whitespace_flexible": spec.any_whitespace,
        }
        if spec.whitespace_pattern is not None:
            overrides["whitespace_pattern"] = to_rust(spec.whitespace_pattern)
        schema = spec.text
        _refuse_rounded(spec)
        if not schema.startswith("{"):  # true or false, for which it takes no overrides
            schema = "{}" if schema == "true" else '{"not": {}}'
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides)

    def _tag_grammar(self, tag: dict[str, Any]) -> str:
        """Return tags between free text; a trigger that is a special token is taken for it."""
        lines = [r"TEXT: /(.|\n)*/"]
        names = []
        for i, item in enumerate(tag["structures"]):
            names.append(name := f"tag_{i}")
            begin = item["begin"]
            trigger = max((t for t in tag["triggers"] if begin.startswith(t)), key=len)
            rest = begin[len(trigger) :]
            parts = [_lark_string(rest)] if rest else []
            parts.append(f"%json {json.dumps(item['schema'])}")
            if item["end"]:
                parts.append(_lark_string(item["end"]))
            body = " ".join(parts)
            if trigger in self._special_ids:
                # By its id: a name need not be in angle brackets.
                lines.append(f"{name}: TEXT <[{self._special_ids[trigger]}]> {body}")
            else:
                lines.append(f"{name}_trigger[lazy]: TEXT {_lark_string(trigger)}")
                lines.append(f"{name}: {name}_trigger {body}")
        tags = f"({' | '.join(names)})"
        needed = tag.get("at_least_one", False)
        if tag.get("stop_after_first", False):
            start = f"start: {tags}" if needed else f"start: {tags} | end"
        else:
            start = f"start: {tags}{'+' if needed else '*'} end"
        grammar = "\n".join([start, "end: TEXT", *lines, ""])
        return llguidance.LLMatcher.grammar_from_lark(grammar)


class Compiled:
    """See :class:`quire.structured.constraint.CompiledConstraint`."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> Matcher:
        """Return a constraint at the beginning of a text."""
        return Matcher(self._matcher).copy()


class Matcher:
    """See :class:`quire.structured.constraint.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @_panics_are_errors
    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    @_panics_are_errors
    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens."""
        if not self._matcher.consume_tokens(list(tokens)):
            self._check()

    @_panics_are_errors
    def rollback(self, n: int) -> None:
        """Take back the last tokens."""
        if not self._matcher.rollback(n):
            self._check()

    @_panics_are_errors
    def forced_tokens(self) -> list[int]:
        """Return how the tokenizer writes the text that must follow."""
        return self._matcher.compute_ff_tokens()

    @_panics_are_errors
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @_panics_are_errors
    def is_finished(self) -> bool:
        """Whether the text may end here, and nothing else."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @_panics_are_errors
    def copy(self) -> Matcher:
        """Return an independent one."""
        return Matcher(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_lines(self._matcher.get_error())
            if reason == _DEAD_END:
                reason = "no token may follow, and the text may not end"
            raise InvalidRequestError(
                f"structured_outputs cannot be enforced further by llguidance: {reason}"
            )


def _refuse_rounded(spec: ConstraintSpec) -> None:
    """Refuse integers that the library would round: it keeps the numbers of a schema as floats."""

    def read(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > _LARGEST_EXACT:
            reason = f"an integer beyond 2**53, {digits[:50]}, which it rounds"
            raise _refusal(spec.kind, reason)
        return int(digits)

    json.loads(spec.text, parse_int=read)


def _refusal(kind: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{kind} cannot be enforced by llguidance: {_first_lines(reason)}")


def _first_lines(reason: str) -> str:
    """Return a message without the state of the parser that may follow it."""
    return reason.split("\n<state>")[0].strip()[:2000]


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
