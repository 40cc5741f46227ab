"""pyproject.toml, constraints.txt and the lowest allowed versions agree with each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import quire

requirements = pytest.importorskip("packaging.requirements")
tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11 and later")


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, object]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[str, str]:
    found = {}
    for line in (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "==", line
            found[pin.name] = only.version
    return found


def declared(project: dict) -> list:
    lines = [*project["dependencies"]]
    for extra in ("langchain", "outlines", "dev"):
        lines += project["optional-dependencies"][extra]
    return [r for r in map(requirements.Requirement, lines) if r.name != "quire"]


def test_every_pin_is_a_version_that_pyproject_allows(project: dict, pins: dict) -> None:
    """CI installs what the metadata promises to work, and pins all of it."""
    for requirement in declared(project):
        assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
        assert pins[requirement.name] in requirement.specifier, str(requirement)


def test_required_dependencies_have_a_lower_and_no_upper_bound(project: dict) -> None:
    for requirement in declared(project):
        assert [s.operator for s in requirement.specifier] == [">="], str(requirement)


def test_torch_is_pinned_to_the_release_with_a_cpu_build(pins: dict) -> None:
    assert pins["torch"] == "2.13.0"


def test_lower_bounds_cover_every_dependency(repo_root: Path, project: dict) -> None:
    """`make test-lower` installs each declared minimum; torch is the one exception."""
    script = repo_root / ".ci" / "lower_bounds.py"
    printed = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    ).stdout
    lines = dict(line.split("==") for line in printed.splitlines())
    extras = project["optional-dependencies"]
    of_extras = [extras[name] for name in ("langchain", "openai", "outlines", "server")]
    expected = [*project["dependencies"], *(line for lines in of_extras for line in lines)]
    for requirement in map(requirements.Requirement, expected):
        bound = next(iter(requirement.specifier)).version
        assert lines[requirement.name] == ("2.13.0" if requirement.name == "torch" else bound)
    assert len(lines) == len(expected)


def test_extras_bring_what_they_are_named_for(project: dict) -> None:
    """And nobody but a developer gets the retired community package."""
    extras = {
        name: {requirements.Requirement(line).name for line in lines}
        for name, lines in project["optional-dependencies"].items()
    }
    named = {"bench", "langchain", "outlines", "openai", "server", "gpu", "dev", "all"}
    named |= {"outlines-core", "ray", "xgrammar"}
    assert set(extras) == named
    assert extras["bench"] == {"matplotlib"}
    assert extras["langchain"] == {"langchain-core"}
    assert extras["outlines"] == {"outlines"}
    assert extras["openai"] == {"openai"}
    assert {"fastapi", "uvicorn"} <= extras["server"]
    assert "triton" in extras["gpu"]
    assert "langchain-community" in extras["dev"]
    assert not any("langchain-community" in extras[name] for name in set(extras) - {"dev"})
    (everything,) = map(requirements.Requirement, project["optional-dependencies"]["all"])
    assert everything.extras == set(extras) - {"dev", "all"}


def test_the_pythons_that_are_promised_are_those_that_are_let_in(project: dict) -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    allowed = specifiers.SpecifierSet(project["requires-python"])
    versions = {f"3.{minor}" for minor in range(7, 16) if f"3.{minor}.0" in allowed}
    assert versions == {"3.10", "3.11", "3.12", "3.13"}
    assert versions < {c.rpartition(" ")[2] for c in project["classifiers"]}


def test_the_changelog_knows_this_version(repo_root: Path) -> None:
    assert f"## {quire.__version__}" in (repo_root / "CHANGELOG.md").read_text(encoding="utf-8")
