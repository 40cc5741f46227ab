"""Constraints by xgrammar: regexes, choices, GBNF, and JSON schemas that it does not shorten."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import xgrammar

from quire.errors import InvalidRequestError
from quire.structured.closed_schema import why_open
from quire.structured.regex import UntranslatableError, to_xgrammar
from quire.structured.subschemas import subschemas
from quire.structured_outputs import is_lark

if TYPE_CHECKING:
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec


_MOST_CHARACTERS = 100_000
_MOST_PROPERTIES = 300
"""Of a constraint, and of an object in it: the library takes more than the square of their time."""


class Backend:
    """See :class:`quire.structured.constraint.ConstraintBackend`.

    Parameters
    ----------
    vocabulary : Vocabulary
    deadline : float
        Not looked at: what the library makes is bounded by what it is given.
    """

    def __init__(self, vocabulary: Vocabulary, deadline: float) -> None:
        self._vocabulary = vocabulary
        self._text_tokens = TextTokens(vocabulary)
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
        return Compiled(grammar, self._vocabulary, self._text_tokens)

    def _compile(self, spec: ConstraintSpec) -> Any:
        text = spec.text
        if len(text) > _MOST_CHARACTERS:
            raise _refusal(spec, f"it has more than {_MOST_CHARACTERS} characters: use llguidance")
        if spec.kind == "regex":
            try:
                return self._compiler.compile_regex(to_xgrammar(text))
            except UntranslatableError as error:
                raise _refusal(spec, f"it would not hold to {error}") from None
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
        for inner in subschemas(json.loads(text)):
            if len(inner.get("properties", ())) > _MOST_PROPERTIES:
                reason = f"an object has more than {_MOST_PROPERTIES} properties: use llguidance"
                raise _refusal(spec, reason)
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


class TextTokens:
    """Which tokens are text, after which others.

    The library takes the bytes of half a surrogate pair, which are no text in UTF-8, for a
    character: ``ED``, then one of ``A0`` to ``BF``. They may come as one token or as several.

    Parameters
    ----------
    vocabulary : Vocabulary
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        usual, after_lead = np.zeros((2, vocabulary.num_words * 32), dtype=np.uint8)
        for i, token in enumerate(vocabulary.tokens):
            usual[i] = bool(token) and re.search(rb"\xed[\xa0-\xbf]", token) is None
            after_lead[i] = usual[i] and not 0xA0 <= token[0] <= 0xBF
        self._usual, self._after_lead = (
            np.packbits(bits, bitorder="little").view(np.int32) for bits in (usual, after_lead)
        )
        self._leads = {i for i, token in enumerate(vocabulary.tokens) if token.endswith(b"\xed")}

    def after(self, tokens: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return the tokens that are text after others, as bits."""
        return self._after_lead if tokens and tokens[-1] in self._leads else self._usual


class Compiled:
    """See :class:`quire.structured.constraint.CompiledConstraint`."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary, text_tokens: TextTokens) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._text_tokens = text_tokens

    def start(self) -> Matcher:
        """Return a constraint at the beginning of a text."""
        matcher = xgrammar.GrammarMatcher(self._grammar)
        return Matcher(matcher, self._vocabulary, self._text_tokens, [])


class Matcher:
    """See :class:`quire.structured.constraint.Constraint`."""

    def __init__(
        self, matcher: Any, vocabulary: Vocabulary, text_tokens: TextTokens, tokens: list[int]
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._text_tokens = text_tokens
        self._tokens = tokens

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        row.fill(-1)  # it writes nothing where everything is allowed
        self._matcher.fill_next_token_bitmask(torch.from_numpy(row).unsqueeze(0))
        np.bitwise_and(row, self._text_tokens.after(self._tokens), out=row)

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens."""
        for token in tokens:
            text = int(self._text_tokens.after(self._tokens)[token // 32]) >> token % 32 & 1
            if not text or not self._matcher.accept_token(token):
                raise InvalidRequestError(f"structured_outputs do not allow token {token} here")
            self._tokens.append(token)

    def rollback(self, n: int) -> None:
        """Take back the last tokens."""
        if n:
            self._matcher.rollback(n)
            del self._tokens[-n:]

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
        tokens = list(self._tokens)
        return Matcher(self._matcher.fork(), self._vocabulary, self._text_tokens, tokens)
