"""`make demo` and `make test`: what they would run, told by `make --dry-run`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

DEMO, TEST = "python -m quire.demo", "pytest -m"
CHECKS = ("ruff check", "ruff format --check", "bin/mypy", "lint-imports", TEST)


@pytest.fixture
def clone(repo_root: Path, tmp_path: Path) -> Path:
    """What the two commands look at, without an environment."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(repo_root / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    return tmp_path


def planned(clone: Path, target: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target, f"PYTHON={sys.executable}"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.replace("\\\n", " ")


@pytest.mark.parametrize(
    ("target", "extra", "runs"), [("demo", "langchain,outlines", (DEMO,)), ("test", "dev", CHECKS)]
)
def test_the_first_time_makes_an_environment_of_the_pinned_versions(
    clone: Path, target: str, extra: str, runs: tuple[str, ...]
) -> None:
    """One environment, one install, held to constraints.txt; then what the command is for."""
    plan = planned(clone, target)
    assert "-m venv .venv" in plan
    installs = [line for line in plan.splitlines() if "pip" in line and " install " in line]
    assert len(installs) == 1
    assert f'-c constraints.txt -e ".[{extra}]"' in installs[0]
    assert all(each in plan[plan.index(installs[0]) :] for each in runs)


@pytest.mark.parametrize(
    ("target", "stamp", "runs"), [("demo", ".demo", (DEMO,)), ("test", ".dev", CHECKS)]
)
def test_the_second_time_installs_nothing_until_the_pins_change(
    clone: Path, target: str, stamp: str, runs: tuple[str, ...]
) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", stamp):
        (clone / ".venv" / name).touch()
    os.utime(clone / ".venv/bin/python", (2, 2))
    plan = planned(clone, target)
    assert "install" not in plan
    assert all(each in plan for each in runs)
    later = time.time() + 10
    os.utime(clone / "constraints.txt", (later, later))
    assert " install " in planned(clone, target)


def test_ci_runs_both_suites_and_takes_no_fallback_for_a_native_kernel(repo_root: Path) -> None:
    """What .ci/run sets is set before anything runs, and a failure ends it."""
    script = (repo_root / ".ci/run").read_text(encoding="utf-8")
    assert os.access(repo_root / ".ci/run", os.X_OK)
    assert "set -euo pipefail" in script
    assert script.index("export QUIRE_REQUIRE_NATIVE=1") < script.index("\nmake test\n")
    assert script.index("\nmake test\n") < script.index("\nmake test-slow\n")
    done = subprocess.run(["bash", "-n", str(repo_root / ".ci/run")], check=False)
    assert done.returncode == 0
