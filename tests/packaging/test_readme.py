"""The README's examples run as they stand, with nothing but the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
EXPECTED = [
    ["Paris", "Tokyo"],
    ["Rome", "Lima"],
    ["Weather", "Paris", "Person(name="],
    ["Ada", "36", "[Person("],
    ["Oslo"],
    ["is Athens", "est Athènes", "IS ATHENS"],
    ["Ada"],
    ["Nairobi", "Cairo"],
    ["Stockholm", "Nairobi"],
]


def test_there_are_nine_examples() -> None:
    assert len(EXAMPLES) == len(EXPECTED) == 9


@pytest.mark.parametrize("number", range(len(EXPECTED)))
def test_example_runs_and_says_what_it_should(
    number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each is a whole program: it ends by itself, without warnings, with the right answers."""
    if "outlines" in EXAMPLES[number]:
        pytest.importorskip("outlines", reason="the extra `outlines` is not installed")
    if "langchain" in EXAMPLES[number]:
        pytest.importorskip("langchain_core", reason="the extra `langchain` is not installed")
    program = EXAMPLES[number]
    if "localhost:8000" in program:
        pytest.importorskip("openai", reason="the extra `openai` is not installed")
        pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
        program = program.replace("http://localhost:8000", request.getfixturevalue("served").url)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missing = [word for word in EXPECTED[number] if word not in done.stdout]
    assert not missing, done.stdout
