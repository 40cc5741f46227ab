"""`import quire` is cheap and silent, and its names are there when they are used."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import quire

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "jinja2", "langchain_core", "outlines")


def run(code: str, *options: str) -> str:
    """Run code in a fresh interpreter, away from the repository; return all that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code],
        cwd="/",
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize("name", quire.__all__)
def test_every_public_name_resolves_to_what_it_says(name: str) -> None:
    value = getattr(quire, name)
    assert value is getattr(quire, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("quire.")


def test_lazy_names_type_checked_names_and_dunder_all_are_the_same() -> None:
    """Editors and type checkers see exactly the names that there are at run time."""
    source = Path(quire.__file__).read_text(encoding="utf-8")
    imported = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                imported |= {alias.name: statement.module for alias in statement.names}
    assert imported == quire._HOMES
    assert {*imported, "__version__"} == set(quire.__all__)
    assert set(quire.__all__) <= set(dir(quire))


def test_every_error_type_is_public() -> None:
    """What quire raises on purpose can be caught by a name from the front door."""
    errors = importlib.import_module("quire.errors")
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(quire.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quire' has no attribute 'LLLM'"):
        _ = quire.LLLM  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "statement",
    [
        "import quire",
        "from quire import EngineConfig, SamplingParams, BeamSearchParams, RequestOutput",
        "import quire.errors, quire.utils.log, quire.kernels, quire.integrations",
        "import quire.integrations.langchain, quire.integrations.outlines",
        "import quire.cli.app",
    ],
)
def test_what_is_light_imports_nothing_heavy(statement: str) -> None:
    """Settings, results, errors and the command's help answer without torch."""
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code) == "[]\n"


def test_the_engine_imports_without_transformers() -> None:
    """transformers costs seconds: it comes in only where a model needs it."""
    code = (
        "import sys\nimport quire.llm, quire.async_llm, quire.assembly\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(code) == "True False\n"


def test_import_prints_nothing_and_leaves_logging_and_warnings_alone() -> None:
    code = """
import json, logging, warnings
filters = list(warnings.filters)
import quire
quire.LLM, quire.AsyncLLM
logger = logging.getLogger("quire")
print(json.dumps([logger.handlers, logger.level, logging.getLogger().handlers,
                  [str(f) for f in warnings.filters if f[3:] == ("quire",)]]))
"""
    assert json.loads(run(code)) == [[], 0, [], []]
