"""A regex means to every library what it means to Python, or is refused.

Single bytes are the tokens here, so that every text is tried that a grammar allows.
"""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.structured.backends import load_constraint_backend
from quire.structured_outputs import StructuredOutputsParams

_PIECES = r"""
a b Z ^ $ | ( ) (?: [ ] [^ ^ ] - [a- - * + ? {2} {,2} {,} {1,} {1,2} {0} . \d \w \s \W \S \D \x41
\u0042 \U00000043 \A \Z \b \B \< \> \1 \2 \0 \101 [\1] \n \t \v \f \a \e \h \p{L} \pL \R \X \K \z
\^ \] \- \[ \. \/ \" \' \# \& \~ \@ \\ [\^] [a\^] [a^] [\x5e] [\u005e] [\]] [^\^] && ~~ -- || / "
' # & ~ , = ! { } {a} {2 2} (?i) (?i:a) (?s:.) (?m) (?x) (?x:a\ b) (?a:\w) (?-i:a) (?#c) *? +? ??
*+ ++ ?+ {2}+ (?=a) (?!a) (?<=a) (?<!a) (?>a) (?P<g>a) (?P=g) (?(1)a) \N{DIGIT\ ONE} é € 😀 [é-ž]
[:alpha:] [[:digit:]] A 1 _ ×
"""
PIECES = _PIECES.split()
PIECES += [" ", "\n", "\r", "\\ ", "\\\n", "\\é", "\x00", "\x7f", "[\\ ]"]

REGEXES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


class Bytes:
    """A vocabulary of single bytes."""

    end_id = 256
    num_words = 9

    def __init__(self):
        self.tokens = [*(bytes([i]) for i in range(256)), b""]
        self.special_tokens = {}

    def tokenize(self, text):
        return list(text.encode())


@pytest.fixture(scope="module", params=["llguidance", "outlines_core", "xgrammar"])
def backend(request):
    pytest.importorskip(request.param)
    return load_constraint_backend(request.param, Bytes(), 10.0)


def read_by_python(pattern):
    """Return the regex as Python reads it, or None where it reads none, or will soon not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return re.compile(pattern)
        except (re.error, DeprecationWarning, OverflowError):
            return None


def texts(compiled, rng, count):
    """Return texts that the grammar takes, with rare characters as likely as others."""
    row = np.zeros(Bytes.num_words, dtype=np.int32)
    for _ in range(count):
        walker, text = compiled.start(), b""
        while len(text) < 40:
            walker.fill_mask(row)
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:256])
            if walker.is_accepting() and (not len(allowed) or rng.random() < 0.4):
                yield text.decode()
                break
            if not len(allowed):
                break  # as for a class of surrogates alone
            plain = [i for i in allowed if i < 128]
            chosen = rng.choice(plain if plain and rng.random() < 0.6 else allowed)
            walker.accept([int(chosen)])
            text += bytes([chosen])


def check(backend, pattern, seed=0, count=12):
    """Return whether the library takes it; every text of its grammar has to match."""
    compiled_by_python = read_by_python(pattern)
    if compiled_by_python is None or not pattern.strip():
        return None
    try:
        compiled = backend.compile(StructuredOutputsParams(regex=pattern).spec)
    except InvalidRequestError:
        return False
    for text in texts(compiled, random.Random(seed), count):
        assert compiled_by_python.fullmatch(text), (pattern, text)
    return True


def check_many(backend, num_examples):
    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pattern=REGEXES, seed=st.integers(0, 2**32))
    def run(pattern, seed):
        check(backend, pattern, seed)

    run()


def test_no_piece_of_a_regex_means_more_than_in_python(backend, capfd):
    """Alone, after another, between others, and within a class; and nothing is said aside."""
    rarely = "outlines" in type(backend).__module__  # each takes a process
    arounds = ("{}", "a{}", "a{}b", "[{}]", "[a{}]", "[^{}]", "(?:{})c", "a|{}")
    for i, piece in enumerate(PIECES):
        for around in arounds[i % 8 :: 8] if rarely else arounds[i % 2 :: 2]:
            check(backend, around.replace("{}", piece), count=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "pattern",
    [
        "(?x)\n",
        "(?x)a b",
        "(?x)[^ a]",
        "(?x)a\\\nb",
        "(?x)[a\n]",
        "(?x:\r)",
        "(?x)\x85",
        "(?ix) a#b",
    ],
)
def test_a_verbose_regex_means_no_more_than_in_python(backend, pattern):
    """Dialects disagree on which spaces say nothing, and where."""
    for seed in range(10):
        check(backend, pattern, seed)


def test_regexes_of_any_pieces_mean_what_they_mean_in_python(backend):
    check_many(backend, 20 if "outlines" in type(backend).__module__ else 100)


@pytest.mark.slow
def test_very_many_regexes_mean_what_they_mean_in_python(backend):
    check_many(backend, 500 if "outlines" in type(backend).__module__ else 5000)


USUAL = [
    *(r"\d{4}-\d{2}", r"[^\^]{2}", r"[a\^]", r"[]x]y", r"[^]x]", "[\n\r]", "a\nb", r"\ \#\-\&\~"),
    *(r"[\w.-]+@\w+", r"\x41\u0042", r"(a|b){,3}", r"a+?b*?", r'"[^"]*"', r"[a\-z]", r"[-a]"),
    *(r"[a-]", r"\/\.", r"[\ -/]"),
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_regexes_are_taken(backend, pattern):
    assert check(backend, pattern, count=30)


def test_a_character_of_several_tokens_is_one_that_exists(backend):
    """No half of a surrogate pair, which no text holds, comes out of single bytes."""
    for pattern in (".", "[^a]", "[^a-z]b", "[ -\U0010ffff]"):
        compiled = backend.compile(StructuredOutputsParams(regex=pattern).spec)
        walker = compiled.start()
        walker.accept([0xED])
        for step in (walker, walker.copy()):
            row = np.zeros(Bytes.num_words, dtype=np.int32)
            step.fill_mask(row)
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            assert allowed.tolist() == list(range(0x80, 0xA0))
        with pytest.raises(InvalidRequestError):
            walker.copy().accept([0xA0])
        walker.rollback(1)
        walker.accept([0xEE])
        walker.accept([0xA0, 0x80])
