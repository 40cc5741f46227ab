"""The folders are what they promise to be, and imports go by the names users see."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = ("core_engine", "kernels", "integrations")
TOP_LEVEL = {
    *SOURCES,
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "compose.yaml",
    "constraints.txt",
    "notebooks",
    "pyproject.toml",
    "setup.py",
    "tests",
}
ENTERED = ("core_engine", "kernels", "integrations", "notebooks", "tests")


@pytest.fixture(scope="module")
def project_files(repo_root: Path) -> list[Path]:
    """Every file that git tracks or would track, relative to the repository."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=repo_root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the repository's files are known only in a git checkout, with git installed")
    return [Path(name) for name in listed.split("\0") if name and (repo_root / name).exists()]


def python_files(repo_root: Path, project_files: list[Path]) -> Iterator[tuple[Path, ast.Module]]:
    for path in project_files:
        if path.suffix == ".py":
            yield path, ast.parse((repo_root / path).read_text(encoding="utf-8"))


def test_top_level_holds_only_what_the_plan_allows(project_files: list[Path]) -> None:
    found = {path.parts[0] for path in project_files}
    assert found <= TOP_LEVEL, f"not allowed at the top level: {sorted(found - TOP_LEVEL)}"


@pytest.mark.parametrize("folder", ENTERED)
def test_every_door_has_a_sign(repo_root: Path, folder: str) -> None:
    """Each top folder has a README, and the top README links it."""
    assert (repo_root / folder / "README.md").is_file()
    assert f"({folder}/" in (repo_root / "README.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere(repo_root: Path, project_files: list[Path]) -> None:
    import re

    broken = []
    for path in project_files:
        if path.suffix == ".md":
            text = (repo_root / path).read_text(encoding="utf-8")
            text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
            for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
                if "://" not in target and not (repo_root / path.parent / target).exists():
                    broken.append(f"{path}: {target}")
    assert not broken


def test_every_source_folder_is_a_package(repo_root: Path, project_files: list[Path]) -> None:
    """find_packages sees only folders with __init__.py: one without would not ship."""
    folders = {p.parent for p in project_files if p.parts[0] in SOURCES and p.suffix == ".py"}
    missing = [str(f) for f in folders if not (repo_root / f / "__init__.py").is_file()]
    assert not missing


def test_tests_are_no_packages(project_files: list[Path]) -> None:
    """pytest imports tests by path; two files of one name would shadow each other's reports."""
    tests = [path for path in project_files if path.parts[0] == "tests"]
    assert not [path for path in tests if path.name == "__init__.py"]
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_nothing_imports_a_folder_by_its_name(repo_root: Path, project_files: list[Path]) -> None:
    """`kernels` is another project's package; ours are quire, quire.kernels, quire.integrations."""
    found = []
    for path, tree in python_files(repo_root, project_files):
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.level:
                    found.append(f"{path}:{node.lineno} relative import")
            found += [
                f"{path}:{node.lineno} imports {name}"
                for name in names
                if name.partition(".")[0] in SOURCES
            ]
    assert not found


def test_transformers_imports_beside_our_kernels_folder(repo_root: Path) -> None:
    """At the repository's root transformers finds our kernels/ for its own optional package."""
    code = (
        "import transformers\n"
        "from transformers import LlamaForCausalLM, AutoTokenizer\n"
        "import kernels\n"
        "print(sorted(n for n in vars(kernels) if not n.startswith('_')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout


def test_no_file_holds_an_index_address(repo_root: Path, project_files: list[Path]) -> None:
    """Where packages come from is the machine's affair; constraints.txt and the builds only pin."""
    for name in ("constraints.txt", "Makefile", "Dockerfile", "compose.yaml", ".ci/run"):
        text = (repo_root / name).read_text(encoding="utf-8")
        assert "://" not in text, name
        assert "index-url" not in text, name
