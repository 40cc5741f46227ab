"""Constraints by outlines_core: regexes, choices, and the JSON schemas that a regex can express."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import outlines_core

from quire.errors import InvalidRequestError
from quire.structured.closed_schema import why_open
from quire.structured.regex import UntranslatableError, escape_rust, to_rust

if TYPE_CHECKING:
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec

_MOST_MEMORY = 4 * 2**30
"""Bytes that a compilation may take: an automaton may be exponential in its regex."""

_MOST_MASKS = 1024
"""States of an automaton whose masks are kept."""

_MOST_FORCED = 64

_WORKER = """
import json, sys
given = json.load(sys.stdin)
sys.path[:] = given["path"]
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
except (ImportError, ValueError):
    pass
import outlines_core.json_schema
tokens = {}
for i, token in enumerate(given["tokens"]):
    if token:
        tokens.setdefault(bytes.fromhex(token), []).append(i)
try:
    regex = given["regex"]
    if given["schema"] is not None:
        regex = outlines_core.json_schema.build_regex_from_schema(*given["schema"])
    index = outlines_core.Index(regex, outlines_core.Vocabulary(given["end_id"], tokens))
except Exception as error:
    sys.exit(f"refused: {error}")
sys.stdout.buffer.write(index.__reduce__()[1][0])
"""


class Backend:
    """See :class:`quire.structured.constraint.ConstraintBackend`.

    The library makes a regex of a schema and a whole automaton of that, whose size and time
    nothing bounds: it does so in a process of its own, which can be ended.

    Parameters
    ----------
    vocabulary : Vocabulary
    deadline : float
        Seconds after which a compilation is ended.
    """

    def __init__(self, vocabulary: Vocabulary, deadline: float) -> None:
        self._vocabulary = vocabulary
        self._deadline = deadline
        self._tokens = [token.hex() for token in vocabulary.tokens]

    def compile(self, spec: ConstraintSpec) -> Compiled:
        """Make a constraint ready."""
        given = {
            "path": sys.path,
            "memory": _MOST_MEMORY,
            "tokens": self._tokens,
            "end_id": self._vocabulary.end_id,
            **_wanted(spec),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _WORKER],
                input=json.dumps(given).encode(),
                capture_output=True,
                timeout=self._deadline,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _refusal(spec, f"it is not ready in {self._deadline:g} seconds") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            _, found, reason = said.partition("refused: ")
            raise _refusal(spec, reason if found else "it takes too much memory, or ends otherwise")
        return Compiled(outlines_core.Index.from_binary(done.stdout), self._vocabulary)


def _wanted(spec: ConstraintSpec) -> dict[str, Any]:
    """Return the regex, or the schema and the whitespace that one is made of."""
    try:
        if spec.kind == "regex":
            return {"regex": to_rust(spec.text), "schema": None}
        if spec.kind == "choice":
            items = "|".join(f"(?:{escape_rust(item)})" for item in json.loads(spec.text))
            return {"regex": items, "schema": None}
        if spec.kind not in ("json", "json_object"):
            raise _refusal(spec, "it knows regexes, choices and JSON schemas: use llguidance")
        if spec.kind == "json" and (reason := why_open(json.loads(spec.text))) is not None:
            raise _refusal(spec, f"it would not hold to {reason}")
        whitespace = "[ \\n\\r\\t]*" if spec.any_whitespace else ""
        if spec.whitespace_pattern is not None:
            whitespace = f"(?:{to_rust(spec.whitespace_pattern)})"
    except UntranslatableError as error:
        raise _refusal(spec, f"it would not hold to {error}") from None
    return {"regex": None, "schema": [spec.text, whitespace]}


def _refusal(spec: ConstraintSpec, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{spec.kind} cannot be enforced by outlines_core: {reason.strip()[:2000]}"
    )


class Compiled:
    """See :class:`quire.structured.constraint.CompiledConstraint`.

    Parameters
    ----------
    index : outlines_core.Index
    vocabulary : Vocabulary
    """

    def __init__(self, index: Any, vocabulary: Vocabulary) -> None:
        self.index = index
        self.end_id = vocabulary.end_id
        self._num_words = vocabulary.num_words
        self._masks: OrderedDict[int, npt.NDArray[np.int32]] = OrderedDict()

    def start(self) -> Walk:
        """Return a constraint at the beginning of a text."""
        return Walk(self, [self.index.get_initial_state()])

    def tokens(self, state: int) -> list[int]:
        """Return the tokens of text that may follow in a state."""
        return [id_ for id_ in self.index.get_allowed_tokens(state) or () if id_ != self.end_id]

    def mask(self, state: int) -> npt.NDArray[np.int32]:
        """Return the same as bits; made once, since texts come to a state again and again."""
        found = self._masks.get(state)
        if found is None:
            bits = np.zeros(self._num_words * 32, dtype=np.uint8)
            bits[self.tokens(state)] = 1
            found = np.packbits(bits, bitorder="little").view(np.int32)
            self._masks[state] = found
            if len(self._masks) > _MOST_MASKS:
                self._masks.popitem(last=False)
        return found


class Walk:
    """See :class:`quire.structured.constraint.Constraint`: the states of an automaton so far."""

    def __init__(self, compiled: Compiled, states: list[int]) -> None:
        self._compiled = compiled
        self._states = states

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        row[:] = self._compiled.mask(self._states[-1])

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens."""
        for token in tokens:
            state = None
            if token != self._compiled.end_id:
                state = self._compiled.index.get_next_state(self._states[-1], token)
            if state is None:
                raise InvalidRequestError(
                    f"structured_outputs do not allow token {token} behind {len(self._states) - 1}"
                )
            self._states.append(state)

    def rollback(self, n: int) -> None:
        """Take back the last tokens."""
        if n:
            del self._states[-n:]

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must follow, where there is no other."""
        forced: list[int] = []
        state = self._states[-1]
        while len(forced) < _MOST_FORCED and not self._compiled.index.is_final_state(state):
            tokens = self._compiled.tokens(state)
            if len(tokens) != 1:
                break
            forced += tokens
            state = self._compiled.index.get_next_state(state, tokens[0])
        return forced

    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        accepting: bool = self._compiled.index.is_final_state(self._states[-1])
        return accepting

    def is_finished(self) -> bool:
        """Whether the text may end here, and nothing else."""
        return self.is_accepting() and not self._compiled.tokens(self._states[-1])

    def copy(self) -> Walk:
        """Return an independent one."""
        return Walk(self._compiled, list(self._states))
