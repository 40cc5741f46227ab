"""The adapter's README says what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_examples_run(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of the README runs, one after the other, and prints what it promises."""
    text = (repo_root / "integrations" / "langchain" / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # Those that need a server are run with one, among the tests of VLLMOpenAI.
    examples = [example for example in examples if "http://localhost" not in example]
    assert len(examples) == 5
    scope: dict[str, object] = {}
    printed = []
    for example in examples:
        exec(compile(example, "README.md", "exec"), scope)
        printed.append(capsys.readouterr().out)
    assert "Paris" in printed[0]
    assert "Rome" in printed[1]
    assert "Madrid" in printed[1]
    assert printed[2].endswith("True\n")
    assert "InvalidRequestError" in printed[3]
    assert printed[4].startswith("stop ")
