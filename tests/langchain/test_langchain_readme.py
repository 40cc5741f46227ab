"""The adapter's README says what happens."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


def test_examples_run(
    repo_root: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Every example of the README runs, one after the other, and prints what it promises."""
    text = (repo_root / "integrations" / "langchain" / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 11
    if importlib.util.find_spec("openai") is None or importlib.util.find_spec("uvicorn") is None:
        [remote] = (example for example in examples if "localhost" in example)
        examples.remove(remote)
    else:
        url = request.getfixturevalue("served").url
        examples = [example.replace("http://localhost:8000", url) for example in examples]
    scope: dict[str, object] = {}
    printed = []
    for example in examples:
        exec(compile(example, "README.md", "exec", dont_inherit=True), scope)
        printed.append(capsys.readouterr().out)
    assert "Paris" in printed[0]
    assert "Rome" in printed[1]
    assert "Madrid" in printed[1]
    assert printed[2].endswith("True\n")
    assert "InvalidRequestError" in printed[3]
    assert printed[4].startswith("stop ")
    assert "Paris" in printed[5]
    assert "degrees=" in printed[6]
    assert printed[7] == "get_weather\n"
    assert printed[8].split() == ["2", "128"]
    for answer in ("The capital", "La capitale", "THE CAPITAL"):
        assert answer in printed[9]
    assert printed[9].endswith("True\n")
    for answer in printed[10:]:
        assert answer.splitlines()[-1] in ("yes", "no")
