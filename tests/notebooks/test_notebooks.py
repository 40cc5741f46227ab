"""Every notebook runs in a real kernel, checks itself, and has no outputs in git."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {
    "01_quickstart": 3,
    "02_structured_generation": 0,
    "03_lora_swapping": 2,
    "04_serving": 1,
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def asserts(source: str) -> int:
    return sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))


def test_there_are_these_notebooks_and_the_readme_knows_them():
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in PICTURES if f"]({name}.ipynb)" not in readme] == []


@each
def test_nothing_of_a_run_is_in_git(path):
    """No outputs, no counts, no widgets, nothing of the kernel that it ran in."""
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert cell["metadata"] == {}
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))


@each
def test_a_notebook_checks_what_it_shows(path):
    """Most cells hold asserts: one that ran, and showed something else, has failed."""
    counts = [asserts("".join(cell["source"])) for cell in cells(path, "code")]
    assert sum(counts) >= len(counts)
    assert sum(count > 0 for count in counts) >= 0.75 * len(counts), counts


@each
def test_a_notebook_is_small(path):
    """A page to read: few cells, none longer than a screen."""
    code = cells(path, "code")
    assert 5 <= len(code) <= 16
    assert max(len(cell["source"]) for cell in code) <= 45
    assert path.stat().st_size < 20_000


@pytest.mark.slow
@each
def test_a_notebook_runs(path, tmp_path):
    """In a fresh kernel, by nbmake: no error, no warning, and the pictures that there should be."""
    nb_run = pytest.importorskip("nbmake.nb_run")
    copy = shutil.copy(path, tmp_path)
    result = nb_run.NotebookRun(Path(copy), default_timeout=120).execute()
    assert result.error is None, result.error.trace
    outputs = [
        output for cell in result.nb.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    errors = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in errors if "Warning: " in text], errors
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
