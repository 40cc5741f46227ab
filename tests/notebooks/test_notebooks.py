"""Every cell of every notebook runs, inside a running event loop as in Jupyter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# What Jupyter does with a cell, without Jupyter: top-level await, in one namespace, on one loop.
RUN_CELLS = """
import ast, asyncio, inspect, json, sys

async def main():
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(json.load(sys.stdin), 1):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        cell = compile(source, f"<cell {number}>", "exec", flags=flags)
        result = eval(cell, namespace)
        if inspect.isawaitable(result):
            await result

asyncio.run(main())
"""


def test_there_are_notebooks(repo_root):
    """The next test is not empty."""
    assert list(repo_root.glob("notebooks/*.ipynb"))


@pytest.mark.slow
def test_notebook_cells_run(repo_root, tmp_path):
    """No cell of a notebook raises."""
    for path in sorted(repo_root.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        run = subprocess.run(
            [sys.executable, "-c", RUN_CELLS],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert run.returncode == 0, f"{path.name}:\n{run.stderr[-3000:]}"
