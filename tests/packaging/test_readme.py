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
    ["Ada", "36", "[Person("],
    ["Oslo"],
    ["Ada"],
    ["Nairobi", "Cairo"],
]


def test_there_are_six_examples() -> None:
    assert len(EXAMPLES) == len(EXPECTED) == 6


@pytest.mark.parametrize("number", range(len(EXPECTED)))
def test_example_runs_and_says_what_it_should(number: int, tmp_path: Path) -> None:
    """Each is a whole program: it ends by itself, without warnings, with the right answers."""
    if "outlines" in EXAMPLES[number]:
        pytest.importorskip("outlines", reason="the extra `outlines` is not installed")
    if "langchain" in EXAMPLES[number]:
        pytest.importorskip("langchain_core", reason="the extra `langchain` is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missing = [word for word in EXPECTED[number] if word not in done.stdout]
    assert not missing, done.stdout
