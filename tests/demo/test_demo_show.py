"""The show of `python -m quire.demo`: it runs, and a wrong answer fails it."""

from __future__ import annotations

import importlib.util

import pytest

from quire.demo.__main__ import Show, main

needs_langchain = pytest.mark.skipif(
    importlib.util.find_spec("langchain_core") is None, reason="langchain-core is not installed"
)


@needs_langchain
def test_the_show_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer is right, every kind of call is shown, the exit status says so."""
    assert main() == 0
    shown = capsys.readouterr().out
    assert "every answer right" in shown
    assert "✗" not in shown
    for part in (
        "llm.invoke",
        "llm.batch",
        ".stream",
        ".chat",
        "JSON",
        "tools=",
        "lora_request=",
        "La capitale",
        "THE CAPITAL",
        "Paris",
        "Bill Clinton",
    ):
        assert part in shown


@needs_langchain
def test_a_wrong_answer_makes_the_show_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer that lacks what was expected is named, and the exit status is 1."""
    monkeypatch.setattr("quire.demo.__main__.langchain_part", lambda show, llm: None)
    monkeypatch.setattr("quire.demo.__main__.tool_part", lambda show, llm: None)
    monkeypatch.setattr("quire.demo.__main__.adapter_part", lambda show, llm: None)
    monkeypatch.setattr(
        "quire.demo.__main__.chat_part", lambda show, llm: show.line("2 + 2 =", "5", "4")
    )
    assert main() == 1
    shown = capsys.readouterr().out
    assert "✗ expected '4'" in shown
    assert "1 answers wrong" in shown


def test_without_langchain_the_show_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra is named, with the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main() == 1
    assert "quire[langchain]" in capsys.readouterr().err


def test_marks_tell_right_from_wrong() -> None:
    """An answer is right when it holds what was expected."""
    show = Show()
    assert show.mark("It is Paris.", "Paris") == "✓"
    assert show.wrong == 0
    assert "Paris" in show.mark("It is Rome.", "Paris")
    assert show.wrong == 1
