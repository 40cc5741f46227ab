"""Constraints are compiled once, off the step loop, and none holds up others for ever."""

from __future__ import annotations

import threading
import time

import pytest

from quire.errors import InvalidRequestError
from quire.structured.compiler import Compilation, ConstraintCompiler
from quire.structured_outputs import StructuredOutputsParams

WAIT = 20.0


class Panic(BaseException):
    """What a Rust library raises: no Exception."""


class Library:
    """Compiles anything: to its text, to an error, or not before it is let go."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.gate = threading.Event()

    def compile(self, spec):
        if spec.text.startswith("slow"):
            assert self.gate.wait(WAIT)
        if spec.text == "panic":
            raise Panic("in Rust")
        self.compiled.append(spec.text)
        return spec.text


@pytest.fixture
def library():
    library = Library()
    yield library
    library.gate.set()


@pytest.fixture
def compiler(library):
    return ConstraintCompiler(
        lambda: None, deadline=0.05, capacity=3, load_backend=lambda *whose: library
    )


def spec(text: str):
    return StructuredOutputsParams(regex=text).spec


def settle(compiler: ConstraintCompiler, *compilations: Compilation) -> None:
    end = time.monotonic() + WAIT
    while not all(each.done for each in compilations):
        assert time.monotonic() < end
        compiler.wait(0.01)
        compiler.expire()


def test_equal_constraints_are_compiled_once_while_and_after(compiler, library) -> None:
    first = compiler.submit("x", spec("a"))
    assert compiler.submit("x", spec("a")) is first
    settle(compiler, first)
    assert compiler.submit("x", spec("a")) is first
    assert first.compiled == "a"
    assert library.compiled == ["a"]
    other = compiler.submit("y", spec("a"))
    settle(compiler, other)
    assert library.compiled == ["a", "a"]


def test_the_cache_forgets_what_was_used_least_recently(compiler, library) -> None:
    for text in ["a", "b", "c", "a", "d", "a", "b"]:
        settle(compiler, compiler.submit("x", spec(text)))
    assert library.compiled == ["a", "b", "c", "d", "b"]


def test_a_panic_fails_its_constraint_alone_and_is_tried_again(compiler) -> None:
    bad, good = compiler.submit("x", spec("panic")), compiler.submit("x", spec("a"))
    settle(compiler, bad, good)
    assert isinstance(bad.error, Panic)
    assert good.compiled == "a"
    assert compiler.submit("x", spec("panic")) is not bad


def test_one_past_its_deadline_fails_and_the_next_goes_on(compiler, library) -> None:
    slow, good = compiler.submit("x", spec("slow")), compiler.submit("x", spec("a"))
    settle(compiler, slow, good)
    assert isinstance(slow.error, InvalidRequestError)
    assert "longer to compile than structured_outputs_deadline=0.05" in str(slow.error)
    assert good.compiled == "a"
    library.gate.set()
    again = compiler.submit("x", spec("slow"))
    settle(compiler, again)
    assert again.compiled == "slow"


def test_many_past_their_deadline_are_bounded_and_none_waits_for_ever(compiler, library) -> None:
    """No more threads than four are left to themselves; the rest are told what stands before."""
    before = threading.active_count()
    slow = [compiler.submit("x", spec(f"slow{i}")) for i in range(8)]
    settle(compiler, *slow)
    assert all(each.error is not None for each in slow)
    assert "4 other constraints are still at it" in str(slow[-1].error)
    assert threading.active_count() <= before + 4
    library.gate.set()
    end = time.monotonic() + WAIT
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)
    good = compiler.submit("x", spec("a"))
    settle(compiler, good)
    assert good.compiled == "a"


def test_a_vocabulary_that_cannot_be_made_is_told_to_each(library) -> None:
    def refuse():
        raise InvalidRequestError("no tokenizer")

    compiler = ConstraintCompiler(refuse, deadline=1.0)
    for text in "ab":
        compilation = compiler.submit("llguidance", spec(text))
        settle(compiler, compilation)
        assert str(compilation.error) == "no tokenizer"


def test_a_library_that_is_missing_is_named_with_how_to_get_it(monkeypatch) -> None:
    """quire runs without it as long as nobody asks."""
    import sys

    for name in [n for n in sys.modules if n.partition(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "quire.structured.llguidance_backend", raising=False)
    compiler = ConstraintCompiler(lambda: None, deadline=1.0)
    compilation = compiler.submit("llguidance", spec("a"))
    settle(compiler, compilation)
    assert isinstance(compilation.error, InvalidRequestError)
    assert "pip install llguidance" in str(compilation.error)
