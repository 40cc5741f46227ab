"""Constraints by xgrammar: regexes, choices, GBNF, and JSON schemas that it does not shorten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import xgrammar

from quire.errors import InvalidRequestError
from quire.structured.closed_schema import why_open
from quire.structured.regex import to_xgrammar
from quire.structured_outputs import is_lark

if TYPE_CHECKING:
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec


class Backend:
    """See :class:`quire.structured.constraint.ConstraintBackend`.

    Parameters
    ----------
    vocabulary : Vocabulary
    deadline : float
        Not looked at: what the library makes is as large as the grammar that it is given.
    """

    def __init__(self, vocabulary: Vocabulary, deadline: float) -> None:
        self._vocabulary = vocabulary
        info = xgrammar.TokenizerInfo(
            vocabulary.tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary.tokens),
            stop_token_ids=[vocabulary.end_id],
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, spec: ConstraintSpec) -> Compiled:
        """Make a constraint ready."""
        try:
            grammar = self._compile(spec)
        except RuntimeError as error:  # the library's only one
            raise _refusal(spec, str(error)) from None
        return Compiled(grammar, self._vocabulary)

    def _compile(self, spec: ConstraintSpec) -> Any:
        text = spec.text
        if spec.kind == "regex":
            pattern = to_xgrammar(text)
            if pattern is None:
                why = r"it does not read as Python does \W, \D, \S, anchors, or rare escapes"
                raise _refusal(spec, f"{why}: use llguidance")
            return self._compiler.compile_regex(pattern)
        if spec.kind == "choice":
            items = " | ".join(_ebnf_string(item) for item in json.loads(text))
            return self._compiler.compile_grammar(f"root ::= {items}\n")
        if spec.kind == "grammar" and not is_lark(text):
            return self._compiler.compile_grammar(text)
        if spec.kind not in ("json", "json_object"):
            raise _refusal(spec, "it knows regexes, choices, GBNF and JSON schemas: use llguidance")
        if spec.whitespace_pattern is not None:
            raise _refusal(spec, "whitespace_pattern must be None: use llguidance")
        if spec.kind == "json" and (reason := why_open(json.loads(text))) is not None:
            raise _refusal(spec, f"it may not hold to {reason}")
        if '"minLength"' in text or '"maxLength"' in text:
            raise _refusal(spec, "strings of bounded length may have control characters")
        if spec.any_whitespace:
            return self._compiler.compile_json_schema(text)
        return self._compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":"))


def _refusal(spec: ConstraintSpec, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{spec.kind} cannot be enforced by xgrammar: {reason.strip()[:2000]}"
    )


def _ebnf_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Compiled:
    """See :class:`quire.structured.constraint.CompiledConstraint`."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        bits = np.zeros(vocabulary.num_words * 32, dtype=np.uint8)
        bits[: len(vocabulary.tokens)] = [bool(token) for token in vocabulary.tokens]
        self._text_tokens = np.packbits(bits, bitorder="little").view(np.int32)

    def start(self) -> Matcher:
        """Return a constraint at the beginning of a text."""
        matcher = xgrammar.GrammarMatcher(self._grammar)
        return Matcher(matcher, self._vocabulary, self._text_tokens)


class Matcher:
    """See :class:`quire.structured.constraint.Constraint`."""

    def __init__(
        self, matcher: Any, vocabulary: Vocabulary, text_tokens: npt.NDArray[np.int32]
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._text_tokens = text_tokens

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        row.fill(-1)  # it writes nothing where everything is allowed
        self._matcher.fill_next_token_bitmask(torch.from_numpy(row).unsqueeze(0))
        np.bitwise_and(row, self._text_tokens, out=row)

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens."""
        for token in tokens:
            if token == self._vocabulary.end_id or not self._matcher.accept_token(token):
                raise InvalidRequestError(f"structured_outputs do not allow token {token} here")

    def rollback(self, n: int) -> None:
        """Take back the last tokens."""
        if n:
            self._matcher.rollback(n)

    def forced_tokens(self) -> list[int]:
        """Return how the tokenizer writes the text that must follow."""
        try:
            text = self._matcher.find_jump_forward_string()
        except UnicodeDecodeError:  # within a character
            return []
        return self._vocabulary.tokenize(text) if text else []

    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        accepting: bool = self._matcher.is_completed()
        return accepting

    def is_finished(self) -> bool:
        """Whether the text may end here, and nothing else."""
        if not self.is_accepting():
            return False
        row = np.empty(self._vocabulary.num_words, dtype=np.int32)
        self.fill_mask(row)
        return not row.any()

    def copy(self) -> Matcher:
        """Return an independent one."""
        return Matcher(self._matcher.fork(), self._vocabulary, self._text_tokens)
