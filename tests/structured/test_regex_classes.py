"""Classes of characters are Python's, whatever Unicode the libraries know."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.structured.backends import load_constraint_backend
from quire.structured_outputs import StructuredOutputsParams

CLASSES = (r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[\d_]", r"[^\W\d]", r"[^\s\w-]", ".")
ODD = "_-a9²½ß٣৩\x1c\x1f\x85\u2028\u3007\U0001ccf7\U0001fbf2\U0001e4f6\u0345\u00aa\u2160"


@pytest.fixture(scope="module", params=["llguidance", "outlines_core"])
def accepts(request, vocabulary, tokenizer):
    """Whether a pattern, as the library has it, takes a character."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    backend = load_constraint_backend(request.param, vocabulary, 10.0)
    compiled = {each: backend.compile(StructuredOutputsParams(regex=each).spec) for each in CLASSES}

    def accepts(pattern: str, character: str) -> bool:
        matcher = compiled[pattern].start()
        try:
            matcher.accept(tokenizer.encode_fragment(character))
        except Exception:
            return False
        return matcher.is_accepting()

    return accepts


@given(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ODD))
def test_classes_hold_the_characters_that_python_says(accepts, character: str) -> None:
    for pattern in CLASSES:
        expected = re.fullmatch(pattern, character) is not None
        assert accepts(pattern, character) == expected, (pattern, hex(ord(character)))
