"""The embedded checkpoint, loaded once by transformers: the oracle of these tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from quire.demo import model_path
from quire.demo.samples import Question
from quire.demo.text import evaluation_sets


@pytest.fixture(scope="session")
def oracle() -> Any:
    """A callable from prompts to greedy continuations, over transformers."""
    from quire.demo.evaluate import with_transformers

    return with_transformers(model_path())


@pytest.fixture(scope="session")
def held_out() -> dict[str, list[Question]]:
    """The evaluation sets; making them takes seconds."""
    return evaluation_sets()


@pytest.fixture(scope="session")
def ask(oracle: Any) -> Any:
    """Ask one prompt."""

    def ask_one(prompt: str) -> str:
        answers: Sequence[str] = oracle([prompt])
        return answers[0]

    return ask_one
