"""The package costs nothing until it is used, and says what is missing or does not fit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import quire.integrations.outlines as package


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd="/",
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def test_names_are_there_before_anything_is_imported() -> None:
    code = """
    import sys
    import quire.integrations.outlines as package
    from quire.integrations.outlines import SamplingParams
    assert set(package.__all__) <= set(dir(package))
    print([m for m in ("outlines", "torch", "llguidance", "pydantic") if m in sys.modules])
    """
    assert run(code) == "[]\n"


def test_names_lead_to_what_they_say() -> None:
    pytest.importorskip("outlines", reason="the extra `outlines` is not installed")
    from quire.integrations.outlines import AsyncVLLM, SamplingParams, from_quire, models

    assert from_quire is models.from_quire
    assert AsyncVLLM is models.AsyncVLLM
    assert SamplingParams.__module__ == "quire.sampling_params"
    with pytest.raises(AttributeError, match="has no 'model'; it has AsyncVLLM"):
        _ = package.model


def test_without_outlines_the_error_says_what_to_install() -> None:
    code = """
    import sys

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name == "outlines":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NotInstalled())
    try:
        from quire.integrations.outlines import models
    except ImportError as error:
        print(error)
    """
    printed = run(code)
    assert printed == "quire.integrations.outlines needs Outlines: pip install 'quire[outlines]'\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("del outlines.types.dsl.python_types_to_terms", "python_types_to_terms"),
        ("outlines.models.BlackBoxModel = outlines.models.SteerableModel", "knows other models"),
    ],
)
def test_another_outlines_is_told_by_its_version(change: str, said: str) -> None:
    """A release that has not what this adapter stands on fails at import, not in a call."""
    pytest.importorskip("outlines", reason="the extra `outlines` is not installed")
    code = f"""
    import importlib.metadata, outlines
    {change}
    try:
        from quire.integrations.outlines import models
    except ImportError as error:
        assert importlib.metadata.version("outlines") in str(error)
        print(error)
    """
    printed = run(code)
    assert "is written for Outlines 1.3" in printed
    assert said in printed
