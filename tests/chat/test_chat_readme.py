"""The example in the room's README runs as it stands."""

from __future__ import annotations

import re


def test_the_readme_example_prints_a_call_that_matches(repo_root, capsys):
    text = (repo_root / "core_engine/chat/README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"name='weather', arguments='\{ ?\"city\" ?: ?\"(Rome|Oslo)\" ?\}'", printed)
